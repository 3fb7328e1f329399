// The control plane: one thread, one io_uring loop. Accepts connections, reads requests, answers them; watches devices'
// processes.
//
// What walkers must know is done on their threads by errands, and the reply waits for them. A connection has one
// request at a time and one operation in the ring at a time, so it can be freed in any completion.
//
// What must outlive this process is in guests' records and in the store: see guest.hpp.
#pragma once

#include "ring/control.h"
#include "ring/socket.hpp"
#include "service/guests/guest.hpp"
#include "service/guests/peer_fds.hpp"
#include "service/keeper/fd_store.hpp"
#include "service/walkers/inbox.hpp"
#include "service/walkers/uring.hpp"
#include "service/walkers/walker.hpp"

#include <compare>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <tl/expected.hpp>
#include <utility>
#include <vector>

namespace dirtyring::service {

// The upper byte of user_data says what completed, the rest for whom.
enum Kind : std::uint64_t {
    ignored = 0,
    acceptable = 1,
    pause_over = 2,
    signalled = 3,
    task = 4,
    received = 5,
    sent = 6,
    gone = 7,
    linger_over = 8,
};

constexpr std::uint64_t tag(Kind kind, std::uint64_t id = 0)
{
    return std::uint64_t{kind} << 56 | id;
}

class Control
{
  public:
    // socket: listening, or one connected peer.
    Control(std::vector<Walker *> walkers, ring::Fd socket, FdStore &store);
    ~Control();

    // First: takes up the guests that a service before this one has left in the store. The error is a sentence: another
    // one has them.
    tl::expected<void, std::string> restore();

    // Until SIGTERM or SIGINT, which the caller has blocked; then the walkers must be stopped before this is destroyed.
    // Calls ready() once peers are served.
    void run(const std::function<void()> &ready);

  private:
    // A peer, and the message that is on its way from or to it.
    struct Connection {
        enum class Role { stranger, greeted, front_end, device, dismissed };

        std::uint64_t id;
        ring::Fd socket;
        Role role = Role::stranger;
        std::uint64_t features = 0;
        std::shared_ptr<Guest> guest; // of a front-end
        Token device_guest{};         // of a device
        std::uint32_t device = 0;

        dr_message_header header{};
        std::vector<std::byte> payload;
        std::size_t got = 0; // bytes of header and payload
        bool fds_fit = true;
        ring::FdList fds;

        std::vector<std::byte> out;
        std::size_t sent = 0;
        ring::FdList out_fds;

        iovec vector{};
        msghdr message{};
    };

    struct Errand;
    struct Word;
    // What a walker is asked to do.
    using Work = std::pair<Walker *, std::function<void()>>;
    using Then = std::function<void()>;
    using Fds = std::vector<ring::Fd>;

    // ---- the loop (control.cpp) ----
    void on_completion(std::uint64_t user_data, int result, unsigned flags);
    void on_signalled();
    void accept_next();
    void on_acceptable();
    void adopt(ring::Fd socket);
    void receive(Connection &c);
    void on_received(Connection &c, int result);
    void send(Connection &c);
    void on_sent(Connection &c, int result);
    void close(Connection &c);
    [[nodiscard]] Connection *find(std::uint64_t id);

    // Runs each work on its walker, then `then` here.
    void ask(std::vector<Work> works, Then then);
    // The same for a change of the guest that a front-end has asked for: whoever takes the guest over finds it done.
    void change(const std::shared_ptr<Guest> &guest, std::vector<Work> works, Then then);
    // From any thread: runs it here.
    void tell(Then what);

    // Closing some files waits for others: peers' descriptors are closed by the kernel's workers.
    void discard(ring::FdList &fds);

    // ---- replies ----
    void reply(std::uint64_t id, const void *payload, std::size_t size, Fds fds = {});
    template <class Payload> void reply(std::uint64_t id, Payload payload, Fds fds = {})
    {
        payload.size = sizeof payload;
        reply(id, &payload, sizeof payload, std::move(fds));
    }
    void refuse(std::uint64_t id, const Refusal &refusal);
    template <class T> bool refused(std::uint64_t id, const Result<T> &result)
    {
        if (!result)
            refuse(id, result.error());
        return !result;
    }

    // ---- requests (requests.cpp) ----
    void handle(Connection &c);
    void hello(Connection &c);
    void memory_add(Connection &c);
    void ioas_alloc(Connection &c);
    void hwpt_alloc(Connection &c);
    void ring_get(Connection &c);
    void destroy(Connection &c);
    void device_info(Connection &c);
    void hwpt_status(Connection &c);
    void destroy_hwpt(const std::shared_ptr<Guest> &guest, std::uint32_t hwpt, Then then);
    HwptPlan plan(const Guest &guest, std::uint32_t id, const dr_hwpt_alloc &request);

    // False: it was none, and the peer has been told.
    template <class Payload> [[nodiscard]] bool read(Connection &c, Payload &out)
    {
        const int error = ring::read_payload(c.payload.data(), c.payload.size(), out);
        if (error != 0)
            refuse_size(c, -error, sizeof out);
        return error == 0;
    }
    void refuse_size(const Connection &c, int error, std::size_t expected);

    // ---- front-ends (front_ends.cpp) ----
    void guest_create(Connection &c);
    void guest_destroy(Connection &c);
    void create_or_take(Connection &c, const dr_guest_create &request);
    void create(Connection &c, const dr_guest_create &request);
    void take_over(Connection &c, const std::shared_ptr<Guest> &guest, const dr_guest_create &request);
    void give_to(Connection &c, std::shared_ptr<Guest> guest, Fds fds, std::vector<Work> works);
    [[nodiscard]] static std::vector<Work> look_again_at(const Guest &guest);
    // The peer speaks for nobody any more.
    void dismiss(Connection &c);
    // The front-end has closed its connection.
    void leave(const std::shared_ptr<Guest> &guest);
    // Waits for another front-end, if it is to.
    void linger(const std::shared_ptr<Guest> &guest);
    void stop_lingering(Guest &guest);
    void on_linger_over(std::uint64_t timer);
    // Frees all that the guest has, when no walker uses it any more.
    void retire(std::shared_ptr<Guest> guest, Then then = {});

    // ---- devices (devices.cpp) ----
    void device_attach(Connection &c);
    void admit_or_attach(Connection &c, const dr_device_attach &request, std::uint32_t admitted);
    void admit(Connection &c, const std::shared_ptr<Guest> &guest, const dr_device_attach &request,
               std::uint32_t device);
    void withdraw(const std::shared_ptr<Guest> &guest, std::uint32_t hwpt, std::uint32_t device, Then then);
    void attach_again(Connection &c, const std::shared_ptr<Guest> &guest, const Device &device,
                      const dr_device_attach &request, const Process &process);
    void attach(Connection &c, const std::shared_ptr<Guest> &guest, const DeviceSlot &filled, Process process);
    void device_detach(Connection &c);
    void on_device_gone(const std::shared_ptr<Guest> &guest, const std::shared_ptr<Device> &device);
    void on_reported(const Token &token, std::uint32_t device);
    void release(const std::shared_ptr<Guest> &guest, std::uint32_t device, Then then);

    // ---- pages of 2 MiB for tables (large_pages.cpp) ----
    struct LargePage {
        Token guest;
        std::uint32_t hwpt;
        unsigned shard;       // whose tables
        std::uint64_t offset; // in the hwpt's
        unsigned tries = 0;
        auto operator<=>(const LargePage &) const = default;
    };
    void make_large_page();

    // ---- who holds a guest up (stalls.cpp) ----
    void on_stalled(const Token &token, std::uint32_t hwpt, unsigned shard, const dr_cell *cell);
    // Nobody waits any more where this is true.
    void end_stalls(Guest &guest, const std::function<bool(const Stall &)> &where);
    void show_stalls(Guest &guest);

    // ---- processes (devices.cpp) ----
    struct Watched {
        Token guest;
        std::uint32_t device; // 0: the front-end
        int pidfd;            // the guest's, as long as it is watched
    };
    void watch(const ring::Fd &pidfd, const Token &guest, std::uint32_t device);
    void poll_process(std::uint64_t watch);
    void unwatch_if(const std::function<bool(const Watched &)> &matches);
    void on_process_gone(std::uint64_t watch);

    // ---- after a restart (restore.cpp) ----
    Result<void> take_up(std::uint32_t number);
    Result<void> take_up_hwpts(Guest &guest);
    Result<void> take_up_devices(Guest &guest);
    void put_to_work(const std::shared_ptr<Guest> &guest, Then then);

    Uring uring_{256};
    Inbox inbox_;
    std::vector<Walker *> walkers_;
    FdStore &store_;
    std::uint32_t next_guest_ = 1; // its number
    std::size_t taken_up_ = 0;     // guests that are not at work yet
    ring::Fd socket_;              // until peers are served
    ring::Fd listener_;
    ring::Fd signals_;
    bool running_ = true;
    std::uint64_t next_id_ = 1;
    std::map<std::uint64_t, std::unique_ptr<Connection>> connections_;
    std::map<Token, std::shared_ptr<Guest>> guests_;
    std::map<std::uint64_t, Watched> watched_; // processes
    struct Timer {
        Token guest;
        __kernel_timespec time;
    };
    std::map<std::uint64_t, Timer> timers_; // of guests that linger
    std::set<LargePage> to_make_large_;     // one a round
};

} // namespace dirtyring::service
