// The control plane: one thread, one io_uring loop. Accepts connections, reads requests, answers them; watches devices' processes.
//
// What walkers must know is done on their threads by errands, and the reply waits for them. A connection has one request at a time
// and one operation in the ring at a time, so it can be freed in any completion.
#pragma once

#include "ring/control.h"
#include "ring/socket.hpp"
#include "service/guest.hpp"
#include "service/inbox.hpp"
#include "service/uring.hpp"
#include "service/walker.hpp"

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string_view>
#include <utility>
#include <vector>

namespace dirtyring::service {

class Control
{
  public:
    // socket: listening, or one connected peer.
    Control(std::vector<Walker *> walkers, ring::Fd socket);
    ~Control();

    // Until SIGTERM or SIGINT, which the caller has blocked; then the walkers must be stopped before this is destroyed.
    void run();

  private:
    struct Connection;
    struct Errand;
    // What a walker is asked to do.
    using Work = std::pair<Walker *, std::function<void()>>;
    using Then = std::function<void()>;
    using Fds = std::vector<ring::Fd>;

    // ---- the loop (control.cpp) ----
    void on_completion(std::uint64_t user_data, int result, unsigned flags);
    void accept_next();
    void on_accept(int result, unsigned flags);
    void adopt(ring::Fd socket);
    void receive(Connection &c);
    void on_received(Connection &c, int result);
    void send(Connection &c);
    void on_sent(Connection &c, int result);
    void close(Connection &c);
    [[nodiscard]] Connection *find(std::uint64_t id);

    // Runs each work on its walker, then `then` here.
    void ask(std::vector<Work> works, Then then);

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
    void guest_create(Connection &c);
    void memory_add(Connection &c);
    void ioas_alloc(Connection &c);
    void hwpt_alloc(Connection &c);
    void ring_get(Connection &c);
    void destroy(Connection &c);
    void device_attach(Connection &c);
    void device_detach(Connection &c);

    // False: it was none, and the peer has been told.
    template <class Payload> [[nodiscard]] bool read(Connection &c, Payload &out);

    // ---- ends (requests.cpp) ----
    struct Watched {
        Token guest;
        std::uint32_t device;
    };
    void watch(const Device &device, const Token &guest);
    void unwatch_if(const std::function<bool(const Watched &)> &matches);
    void on_process_gone(std::uint64_t watch);
    void release(Guest &guest, std::uint32_t device);
    void retire(std::shared_ptr<Guest> guest);

    Uring uring_{256};
    Inbox inbox_;
    std::vector<Walker *> walkers_;
    std::size_t next_home_ = 0;
    ring::Fd listener_;
    ring::Fd signals_;
    bool running_ = true;
    std::uint64_t next_id_ = 1;
    std::map<std::uint64_t, std::unique_ptr<Connection>> connections_;
    std::map<Token, std::shared_ptr<Guest>> guests_;
    std::map<std::uint64_t, Watched> watched_; // processes of devices
};

// A peer, and the message that is on its way from or to it.
struct Control::Connection {
    enum class Role { stranger, greeted, front_end, device };

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

} // namespace dirtyring::service
