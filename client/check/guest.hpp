// A guest of the kit's own: a front-end with its command ring, and the consumer of its dirty rings. What comes through
// the rings is held to their rules.
#pragma once

#include "client/check/peer.hpp"
#include "ring/layout.h"

#include <atomic>
#include <functional>
#include <optional>
#include <set>

namespace dirtyring::check {

using Pages = std::set<std::uint64_t>;      // page numbers
using Entries = std::vector<std::uint64_t>; // of a dirty ring

constexpr std::uint32_t read_write = DR_MAP_READ | DR_MAP_WRITE;

template <class T> std::atomic_ref<T> word(T &w)
{
    return std::atomic_ref<T>(w);
}

// Maps a region that must have `size` bytes.
Mapping map_region(Context &context, const Fd &fd, std::size_t size, int protection, const std::string &what);
Fd memory_file(std::uint64_t size);
// An eventfd that was signalled, and nobody has read it since.
bool is_signalled(const Fd &event);
// The same, and its counter is zero again.
bool take_signal(const Fd &event);

Pages pages_of(const Entries &entries);
bool covers(const Pages &reported, const Pages &written);
std::string text_of(const Pages &pages);

// Addresses that a ring may name.
struct Span {
    std::uint64_t start;
    std::uint64_t end;
};

class Ring
{
  public:
    Ring(Context &context, std::vector<Fd> fds, const dr_hwpt_alloc &hwpt, std::uint32_t shard, Span memory);

    // New entries, which stay until released. Each is held to the rules.
    Entries peek();
    // All that was peeked. Kicks if asked to.
    void release();
    // New entries; all that was peeked is released.
    Entries take();
    // Waits until there are new entries; the check ends by `rule` if none come.
    Entries wait_for_entries(Rule rule, const std::string &what);
    // Asks for a call at the next entry. True: there is none yet.
    bool arm();

    // ---- as a hostile consumer would ----
    void set_tail(std::uint64_t tail) const { word(consumer().tail).store(tail, std::memory_order_seq_cst); }
    void kick() const;

    [[nodiscard]] dr_ring_producer &producer() const { return *producer_map.as<dr_ring_producer>(); }
    [[nodiscard]] dr_ring_consumer &consumer() const { return *consumer_map.as<dr_ring_consumer>(); }
    [[nodiscard]] std::uint64_t head() const { return word(producer().head).load(std::memory_order_seq_cst); }
    [[nodiscard]] std::uint64_t tail() const { return tail_; }
    [[nodiscard]] std::uint64_t entry(std::uint64_t index) const
    {
        return reinterpret_cast<const std::uint64_t *>(&producer() + 1)[index & (capacity_ - 1)];
    }

    Fd producer_fd;
    Fd consumer_fd;
    Fd call;
    Fd kick_event;
    Mapping producer_map;
    Mapping consumer_map;

  private:
    void check_header(const dr_hwpt_alloc &hwpt, std::uint32_t shard);
    void check_entry(std::uint64_t index, std::uint64_t entry);

    Context &context_;
    std::string where_;
    std::uint64_t capacity_;
    Span allowed_; // by a run
    std::uint64_t tail_ = 0;
    std::uint64_t peeked_ = 0;
    bool ended_ = false;
};

class Guest : public Peer
{
  public:
    explicit Guest(Context &context, std::uint32_t command_entries = 64);

    void add_memory(std::uint64_t oa, std::uint64_t length, const Fd &fd);
    static dr_hwpt_alloc hwpt_request(std::uint32_t ioas);
    Ring ring(std::uint32_t hwpt, const dr_hwpt_alloc &request, std::uint32_t shard, Span memory);

    // ---- the command ring ----
    void submit(const dr_command &command);
    void kick() const;
    // The next completion, if there is one.
    std::optional<dr_completion> completed();
    dr_completion next_completion(const std::string &what, Rule rule = "M-2");
    // Submits and waits; `rule` wants a completion. It carries its user_data, or M-2 is broken.
    dr_completion run(const dr_command &command, const std::string &what, Rule rule = "M-2");
    // Its result must be `result` by `rule`.
    void expect(Rule rule, const dr_command &command, int result, const std::string &what);
    [[nodiscard]] std::uint64_t taken() const
    {
        return word(submission_consumer().tail).load(std::memory_order_seq_cst);
    }

    [[nodiscard]] dr_ring_consumer &completion_consumer() const { return *front_end_map.as<dr_ring_consumer>(0); }
    [[nodiscard]] dr_ring_producer &submission_region() const { return *front_end_map.as<dr_ring_producer>(DR_PAGE); }
    [[nodiscard]] dr_ring_consumer &submission_consumer() const { return *service_map.as<dr_ring_consumer>(0); }
    [[nodiscard]] dr_ring_producer &completion_region() const { return *service_map.as<dr_ring_producer>(DR_PAGE); }

    dr_guest_create created;
    dr_guest info{};
    Fd front_end_fd;
    Fd service_fd;
    Fd kick_event;
    Fd call_event;
    Mapping front_end_map;
    Mapping service_map;

  private:
    void check_header(const dr_ring_header &header, dr_ring_kind kind, std::uint32_t entry_size);

    std::uint64_t capacity_;
    std::uint64_t submitted_ = 0;
    std::uint64_t reaped_ = 0;
};

dr_command command(dr_opcode opcode, std::uint32_t object);
dr_command map_command(std::uint32_t ioas, std::uint64_t iova, std::uint64_t length, std::uint64_t oa,
                       std::uint32_t flags = read_write);
dr_command unmap_command(std::uint32_t ioas, std::uint64_t iova, std::uint64_t length, std::uint32_t flags = 0);
dr_command sync_command(std::uint32_t hwpt, std::uint64_t cookie);

// A guest with memory, an ioas, an hwpt and its rings, of which [0, pages) is mapped and tracked.
class TrackedGuest : public Guest
{
  public:
    using Change = std::function<void(dr_hwpt_alloc &)>;

    explicit TrackedGuest(Context &context, const Change &change = {}, std::uint32_t command_entries = 64);

    [[nodiscard]] dr_device_attach attach_request() const;
    // Runs of a sync, taken until its markers have come.
    Pages sync(const std::string &what);
    // Reads to the marker of a sync that was submitted; M-25 is broken if another comes, or none.
    Pages read_to_marker(std::uint64_t cookie, const std::string &what);
    dr_completion map(std::uint64_t first, std::uint64_t count, std::uint64_t oa_page);
    std::uint64_t next_cookie() { return ++cookie_; }
    void enable(bool on);

    static constexpr std::uint64_t pages = 1024; // two leaves of 2 MiB
    Fd memory = memory_file(pages * page);
    std::uint32_t ioas = 0;
    std::uint32_t hwpt = 0;
    dr_hwpt_alloc request{};
    std::vector<Ring> rings;

  private:
    std::uint64_t cookie_ = 100;
};

} // namespace dirtyring::check
