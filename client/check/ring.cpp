// The consumer of a dirty ring.
#include "client/check/guest.hpp"

#include "ring/producer.hpp"

#include <algorithm>
#include <bit>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>

namespace dirtyring::check {

Mapping map_region(Context &context, const Fd &fd, std::size_t size, int protection, const std::string &what)
{
    struct stat status {
    };
    const bool there = ::fstat(fd.get(), &status) == 0;
    context.need(there && static_cast<std::size_t>(status.st_size) >= size, "S-4", what,
                 fmt::format("a file of {} bytes", status.st_size), fmt::format("{} or more", size));
    Mapping map;
    const int error = map.map(fd.get(), static_cast<std::size_t>(status.st_size), protection);
    context.need(error == 0, "S-2", what, fmt::format("it cannot be mapped: {}", std::strerror(-error)),
                 (protection & PROT_WRITE) != 0 ? "a descriptor for reading and writing" : "one for reading");
    return map;
}

Fd memory_file(std::uint64_t size)
{
    Fd fd(::memfd_create("guest-memory", MFD_CLOEXEC));
    if (!fd || ::ftruncate(fd.get(), static_cast<off_t>(size)) != 0)
        throw std::runtime_error(fmt::format("no memory of {} bytes: {}", size, std::strerror(errno)));
    return fd;
}

bool is_signalled(const Fd &event)
{
    pollfd readable{event.get(), POLLIN, 0};
    return ::poll(&readable, 1, 0) == 1;
}

bool take_signal(const Fd &event)
{
    std::uint64_t count = 0;
    return is_signalled(event) && ::read(event.get(), &count, sizeof count) == sizeof count;
}

Pages pages_of(const Entries &entries)
{
    Pages pages;
    for (const std::uint64_t entry : entries) {
        for (std::uint64_t at = 0; !dr_is_marker(entry) && at < dr_run_length(entry); at += page)
            pages.insert((dr_run_address(entry) + at) / page);
    }
    return pages;
}

bool covers(const Pages &reported, const Pages &written)
{
    return std::includes(reported.begin(), reported.end(), written.begin(), written.end());
}

std::string text_of(const Pages &pages)
{
    constexpr std::size_t shown = 16;
    std::string text = pages.empty() ? "no page" : "pages";
    std::size_t n = 0;
    for (const std::uint64_t p : pages) {
        if (n++ == shown) {
            text += fmt::format(" … ({} in all)", pages.size());
            break;
        }
        text += fmt::format(" {:#x}", p);
    }
    return text;
}

Ring::Ring(Context &context, std::vector<Fd> fds, const dr_hwpt_alloc &hwpt, std::uint32_t shard, Span memory)
    : producer_fd(std::move(fds[0])), consumer_fd(std::move(fds[1])), call(std::move(fds[2])),
      kick_event(std::move(fds[3])), context_(context), where_(fmt::format("ring {}", shard)),
      capacity_(hwpt.ring_entries), allowed_(memory)
{
    producer_map = map_region(context, producer_fd, ring::producer_region_size(capacity_, sizeof(std::uint64_t)),
                              PROT_READ, fmt::format("{}, producer region", where_));
    consumer_map = map_region(context, consumer_fd, sizeof(dr_ring_consumer), PROT_READ | PROT_WRITE,
                              fmt::format("{}, consumer region", where_));
    check_header(hwpt, shard);
    const dr_ring_header &h = producer().header;
    if (hwpt.space == DR_SPACE_IOVA)
        allowed_ = {h.start, h.last + 1};
    tail_ = peeked_ = word(consumer().tail).load(std::memory_order_relaxed);
    word(consumer().armed).store(DR_DISARMED, std::memory_order_seq_cst);
}

void Ring::check_header(const dr_hwpt_alloc &hwpt, std::uint32_t shard)
{
    const std::uint32_t version = word(producer().header.version).load(std::memory_order_acquire); // R6
    const dr_ring_header h = producer().header;
    context_.need(h.magic == DR_RING_MAGIC && version == DR_RING_VERSION, "S-4", where_,
                  fmt::format("magic {:#x}, version {}", h.magic, version),
                  fmt::format("magic {:#x}, version {}", DR_RING_MAGIC, DR_RING_VERSION));
    const std::uint64_t slice = (1ull << hwpt.aperture_lg2) / hwpt.shards;
    context_.need(h.kind == DR_RING_DIRTY && h.entry_size == sizeof(std::uint64_t) && h.capacity == capacity_ &&
                      h.space == hwpt.space && h.start == shard * slice && h.last == h.start + (slice - 1),
                  "Q-1", where_,
                  fmt::format("kind {}, entries of {} bytes, capacity {}, space {}, [{:#x}, {:#x}]", h.kind,
                              h.entry_size, h.capacity, h.space, h.start, h.last),
                  fmt::format("kind 1, entries of 8 bytes, capacity {}, space {}, [{:#x}, {:#x}]", capacity_,
                              hwpt.space, shard * slice, (shard + 1) * slice - 1));
}

Entries Ring::peek()
{
    const std::uint64_t head = word(producer().head).load(std::memory_order_acquire); // R3
    const std::uint64_t staged = word(producer().staged).load(std::memory_order_acquire);
    context_.need(head >= peeked_ && head <= staged && staged - tail_ <= capacity_, "Q-2", where_,
                  fmt::format("tail {}, head {}, staged {}", tail_, head, staged),
                  fmt::format("tail ≤ {} ≤ head ≤ staged ≤ tail + {}", peeked_, capacity_));
    Entries entries;
    for (; peeked_ != head; ++peeked_) {
        entries.push_back(entry(peeked_));
        check_entry(peeked_, entries.back());
    }
    return entries;
}

void Ring::check_entry(std::uint64_t index, std::uint64_t entry)
{
    const std::string where = fmt::format("{}, entry {} ({:#018x})", where_, index, entry);
    context_.expect(!ended_, "Q-17", where, "it lies behind an end marker", "nothing there");
    if (dr_is_marker(entry)) {
        ended_ = ended_ || dr_marker_kind(entry) == DR_MARKER_END;
        return;
    }
    const std::uint64_t start = dr_run_address(entry);
    const std::uint64_t end = start + dr_run_length(entry);
    context_.expect(start >= allowed_.start && end <= allowed_.end && start < end, "Q-5", where,
                    fmt::format("[{:#x}, {:#x})", start, end),
                    fmt::format("within [{:#x}, {:#x})", allowed_.start, allowed_.end));
    const bool large = (entry >> 11 & 1) != 0;
    if (large)
        context_.expect(start % (page << DR_LARGE_UNIT_LG2) == 0, "Q-6", where,
                        fmt::format("it begins at {:#x}", start), "a multiple of 2 MiB");
    context_.expect(index + 1 - tail_ <= capacity_ - DR_MARKER_SLOTS, "Q-4", where,
                    fmt::format("{} slots from tail {}", index + 1 - tail_, tail_),
                    fmt::format("runs in {} slots at most", capacity_ - DR_MARKER_SLOTS));
}

void Ring::release()
{
    tail_ = peeked_;
    word(consumer().tail).store(tail_, std::memory_order_seq_cst);       // R1, R5
    if (word(producer().want_kick).load(std::memory_order_seq_cst) != 0) // R5
        kick();
}

Entries Ring::take()
{
    Entries entries = peek();
    if (peeked_ != tail_)
        release();
    return entries;
}

Entries Ring::wait_for_entries(Rule rule, const std::string &what)
{
    Entries entries;
    const bool came = context_.comes_true([&] { return !(entries = peek()).empty(); });
    context_.need(came, rule, fmt::format("{}, {}", where_, what), context_.nothing(), "new entries");
    return entries;
}

bool Ring::arm()
{
    (void)take_signal(call);
    word(consumer().armed).store(peeked_ + 1, std::memory_order_seq_cst); // R4
    return head() == peeked_;
}

void Ring::kick() const
{
    ::eventfd_write(kick_event.get(), 1);
}

} // namespace dirtyring::check
