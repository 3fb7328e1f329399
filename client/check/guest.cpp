#include "client/check/guest.hpp"

#include "ring/producer.hpp"

#include <algorithm>
#include <sys/eventfd.h>
#include <sys/mman.h>

namespace dirtyring::check {

// ---- the command ring -----------------------------------------------------------------------------------------------

Guest::Guest(Context &context, std::uint32_t command_entries)
    : Peer(context), created(new_guest(command_entries)), capacity_(command_entries)
{
    hello();
    std::vector<Fd> fds;
    info = get<dr_guest>(DR_GUEST_CREATE, created, {}, &fds, 4);
    front_end_fd = std::move(fds[0]);
    service_fd = std::move(fds[1]);
    kick_event = std::move(fds[2]);
    call_event = std::move(fds[3]);
    const auto size = [&](std::uint64_t entry) { return DR_PAGE + ring::producer_region_size(command_entries, entry); };
    front_end_map =
        map_region(context, front_end_fd, size(sizeof(dr_command)), PROT_READ | PROT_WRITE, "the front-end's memfd");
    service_map = map_region(context, service_fd, size(sizeof(dr_completion)), PROT_READ, "the service's memfd");
    check_header(submission_region().header, DR_RING_SUBMISSION, sizeof(dr_command));
    check_header(completion_region().header, DR_RING_COMPLETION, sizeof(dr_completion));
    word(completion_consumer().armed).store(DR_DISARMED, std::memory_order_seq_cst);
}

void Guest::check_header(const dr_ring_header &h, dr_ring_kind kind, std::uint32_t entry_size)
{
    context_.need(h.magic == DR_RING_MAGIC && h.version == DR_RING_VERSION, "S-4", "a command ring",
                  fmt::format("magic {:#x}, version {}", h.magic, h.version),
                  fmt::format("magic {:#x}, version {}", DR_RING_MAGIC, DR_RING_VERSION));
    const auto wanted = static_cast<std::uint32_t>(kind);
    context_.need(h.kind == wanted && h.entry_size == entry_size && h.capacity == capacity_, "M-1", "a command ring",
                  fmt::format("kind {}, {} entries of {} bytes", h.kind, h.capacity, h.entry_size),
                  fmt::format("kind {}, {} entries of {} bytes", wanted, capacity_, entry_size));
}

void Guest::submit(const dr_command &command)
{
    dr_ring_producer &mine = submission_region();
    reinterpret_cast<dr_command *>(&mine + 1)[submitted_ & (capacity_ - 1)] = command;
    const std::uint64_t before = submitted_++;
    word(mine.head).store(submitted_, std::memory_order_seq_cst);                                  // R3, R4
    const std::uint64_t armed = word(submission_consumer().armed).load(std::memory_order_seq_cst); // R4
    if (armed - before - 1 < submitted_ - before)
        kick();
}

void Guest::kick() const
{
    ::eventfd_write(kick_event.get(), 1);
}

std::optional<dr_completion> Guest::completed()
{
    const std::uint64_t head = word(completion_region().head).load(std::memory_order_acquire); // R3
    context_.need(head >= reaped_ && head - reaped_ <= capacity_, "M-2", "the ring of completions",
                  fmt::format("head {} with tail {}", head, reaped_), fmt::format("at most {} more", capacity_));
    if (head == reaped_)
        return std::nullopt;
    const dr_completion copy =
        reinterpret_cast<const dr_completion *>(&completion_region() + 1)[reaped_ & (capacity_ - 1)];
    word(completion_consumer().tail).store(++reaped_, std::memory_order_seq_cst); // R1, R5
    if (word(completion_region().want_kick).load(std::memory_order_seq_cst) != 0) // R5
        kick();
    return copy;
}

dr_completion Guest::next_completion(const std::string &what, Rule rule)
{
    std::optional<dr_completion> completion;
    const bool came = context_.comes_true([&] { return (completion = completed()).has_value(); });
    context_.need(came, rule, what, context_.nothing(), "a completion");
    return *completion;
}

dr_completion Guest::run(const dr_command &command, const std::string &what, Rule rule)
{
    submit(command);
    const dr_completion completion = next_completion(what, rule);
    context_.need(completion.user_data == command.user_data, "M-2", what,
                  fmt::format("user_data {}", completion.user_data), fmt::format("{}", command.user_data));
    return completion;
}

void Guest::expect(Rule rule, const dr_command &command, int result, const std::string &what)
{
    const auto text = [](int r) { return r == 0 ? std::string("0") : fmt::format("-{}", error_name(-r)); };
    const int got = run(command, what).result;
    context_.expect(got == result, rule, what, fmt::format("completed with {}", text(got)), text(result));
}

// ---- commands -------------------------------------------------------------------------------------------------------

dr_command command(dr_opcode opcode, std::uint32_t object)
{
    static std::uint64_t serial = 0;
    dr_command c{};
    c.user_data = ++serial;
    c.opcode = opcode;
    c.object = object;
    return c;
}

dr_command map_command(std::uint32_t ioas, std::uint64_t iova, std::uint64_t length, std::uint64_t oa,
                       std::uint32_t flags)
{
    dr_command c = command(DR_OP_MAP, ioas);
    c.iova = iova;
    c.length = length;
    c.oa = oa;
    c.flags = flags;
    return c;
}

dr_command unmap_command(std::uint32_t ioas, std::uint64_t iova, std::uint64_t length, std::uint32_t flags)
{
    dr_command c = command(DR_OP_UNMAP, ioas);
    c.iova = iova;
    c.length = length;
    c.flags = flags;
    return c;
}

dr_command sync_command(std::uint32_t hwpt, std::uint64_t cookie)
{
    dr_command c = command(DR_OP_SYNC, hwpt);
    c.cookie = cookie;
    return c;
}

// ---- objects --------------------------------------------------------------------------------------------------------

void Guest::add_memory(std::uint64_t oa, std::uint64_t length, const Fd &fd)
{
    get<dr_empty>(DR_MEMORY_ADD, dr_memory_region{0, 0, oa, length, 0}, {fd.get()});
}

dr_hwpt_alloc Guest::hwpt_request(std::uint32_t ioas)
{
    dr_hwpt_alloc request{};
    request.ioas = ioas;
    request.format = DR_FORMAT_AMDV1;
    request.flags = DR_HWPT_DIRTY_TRACKING;
    request.aperture_lg2 = 32;
    request.shards = 1;
    request.leaf_lg2_max = 12;
    request.space = DR_SPACE_IOVA;
    request.ring_entries = 64;
    return request;
}

Ring Guest::ring(std::uint32_t hwpt, const dr_hwpt_alloc &request, std::uint32_t shard, Span memory)
{
    std::vector<Fd> fds;
    get<dr_ring>(DR_RING_GET, dr_ring_get{0, hwpt, shard}, {}, &fds, 4);
    return {context_, std::move(fds), request, shard, memory};
}

TrackedGuest::TrackedGuest(Context &context, const Change &change, std::uint32_t command_entries)
    : Guest(context, command_entries)
{
    add_memory(0, pages * page, memory);
    ioas = get<dr_object>(DR_IOAS_ALLOC, dr_empty{}).id;
    request = hwpt_request(ioas);
    if (change)
        change(request);
    hwpt = get<dr_hwpt>(DR_HWPT_ALLOC, request).id;
    expect("M-6", map_command(ioas, 0, pages * page, 0), 0, "MAP of the guest's memory");
    if ((request.flags & (DR_HWPT_DIRTY_TRACKING | DR_HWPT_DIRTY_OPTIONAL)) == 0)
        return;
    for (std::uint32_t shard = 0; shard < request.shards; ++shard)
        rings.push_back(ring(hwpt, request, shard, {0, pages * page}));
    enable(true);
}

void TrackedGuest::enable(bool on)
{
    expect("M-8", command(on ? DR_OP_ENABLE : DR_OP_DISABLE, hwpt), 0, on ? "ENABLE" : "DISABLE");
}

dr_device_attach TrackedGuest::attach_request() const
{
    return new_device(hwpt, info.token);
}

Pages TrackedGuest::read_to_marker(std::uint64_t cookie, const std::string &what)
{
    const std::uint64_t marker = dr_marker(DR_MARKER_SYNC, cookie);
    Pages pages;
    for (Ring &ring : rings) {
        Entries entries;
        const auto end = [&] { return std::find(entries.begin(), entries.end(), marker); };
        const bool came = context_.comes_true([&] {
            const Entries more = ring.take();
            entries.insert(entries.end(), more.begin(), more.end());
            return end() != entries.end();
        });
        context_.need(came, "M-25", what, fmt::format("no marker with cookie {}: {}", cookie, context_.nothing()),
                      "one");
        pages.merge(pages_of({entries.begin(), end()}));
        context_.expect(std::count(entries.begin(), entries.end(), marker) == 1, "M-25", what,
                        fmt::format("more than one marker with cookie {}", cookie), "one");
    }
    return pages;
}

Pages TrackedGuest::sync(const std::string &what)
{
    const dr_command sync = sync_command(hwpt, next_cookie());
    submit(sync);
    Pages pages = read_to_marker(sync.cookie, what);
    const dr_completion completion = next_completion(what);
    context_.need(completion.user_data == sync.user_data, "M-2", what,
                  fmt::format("user_data {}", completion.user_data), fmt::format("{}", sync.user_data));
    context_.expect(completion.result == 0, "M-8", what,
                    fmt::format("SYNC completed with -{}", error_name(-completion.result)), "0");
    return pages;
}

dr_completion TrackedGuest::map(std::uint64_t first, std::uint64_t count, std::uint64_t oa_page)
{
    const std::string what = fmt::format("MAP of pages {:#x} +{:#x} to page {:#x}", first, count, oa_page);
    const dr_completion completion = run(map_command(ioas, first * page, count * page, oa_page * page), what);
    context_.expect(completion.result == 0, "M-6", what,
                    fmt::format("completed with -{}", error_name(-completion.result)), "0");
    return completion;
}

} // namespace dirtyring::check
