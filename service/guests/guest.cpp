#include "service/guests/guest.hpp"

#include "iommu/rules.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <sys/random.h>

namespace dirtyring::service {

namespace {

constexpr std::uint32_t stall_ms_default = 1000;

Result<Token> make_token()
{
    Token token;
    if (::getrandom(token.data(), token.size(), 0) != static_cast<ssize_t>(token.size()))
        return refusal(errno, "no random bytes for a token");
    return token;
}

// systemd keeps but one of the descriptors that share an open file description, and a VMM may well send one memfd for
// two regions: so the file is opened once more, as it was. Its owner may not permit that; then what the VMM sent has to
// do.
ring::Fd reopened(int fd)
{
    const int mode = ::fcntl(fd, F_GETFL) & O_ACCMODE;
    ring::Fd again(::open(fmt::format("/proc/self/fd/{}", fd).c_str(), mode | O_CLOEXEC));
    return again ? std::move(again) : ring::Fd(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
}

} // namespace

std::optional<int> lock(int memfd)
{
    struct flock whole {
    };
    whole.l_whence = SEEK_SET;
    do {
        whole.l_type = F_WRLCK;
        if (broken(Rule::no_lock) || ::fcntl(memfd, F_SETLK, &whole) == 0)
            return std::nullopt;
        ::fcntl(memfd, F_GETLK, &whole);
    } while (whole.l_type == F_UNLCK); // it has just gone
    return whole.l_pid;
}

Result<std::shared_ptr<Device>> Device::make(std::uint32_t guest, DeviceSlot &slot, ring::Fd pidfd, Holdings &holdings)
{
    auto device = std::make_shared<Device>();
    device->slot = &slot;
    device->pidfd = std::move(pidfd);
    const std::size_t cells_size = slot.threads * sizeof(dr_cell);
    const std::size_t pins = std::size_t{slot.threads} * slot.pins;
    auto cells = holdings.region(kept_name('D', guest, slot.id), "dirtyring-cells", cells_size + pins * sizeof(dr_pin),
                                 ring::Pages::present);
    if (!cells)
        return tl::unexpected(cells.error());
    device->cells = std::move(*cells);
    device->threads = {{device->cells.map.as<dr_cell>(), slot.threads},
                       {device->cells.map.as<dr_pin>(cells_size), pins}};
    return device;
}

Result<std::unique_ptr<Guest>> Guest::make(std::uint32_t number, const dr_guest_create &request, std::uint32_t sequence,
                                           Walker &home, Holdings &holdings)
{
    if (!std::has_single_bit(request.command_entries) || request.command_entries < DR_COMMAND_CAPACITY_MIN ||
        request.command_entries > DR_COMMAND_CAPACITY_MAX)
        return refusal(EINVAL, fmt::format("command_entries is {}, expected a power of two from {} to {}",
                                           request.command_entries, DR_COMMAND_CAPACITY_MIN, DR_COMMAND_CAPACITY_MAX));
    const auto token = make_token();
    if (!token)
        return tl::unexpected(token.error());
    auto memfd = holdings.region(kept_name('P', number), "dirtyring-private",
                                 GuestRecord::size(request.command_entries), ring::Pages::present);
    if (!memfd)
        return tl::unexpected(memfd.error());
    auto guest = std::make_unique<Guest>();
    guest->home = &home;
    guest->memfd = std::move(*memfd);
    guest->record = guest->memfd.map.as<GuestRecord>();
    GuestRecord &r = *guest->record;
    r.magic = GuestRecord::magic_expected;
    r.number = number;
    r.command_entries = request.command_entries;
    r.linger_ms = request.linger_ms;
    r.stall_ms = request.stall_ms;
    r.next_id = 1;
    r.sequence = sequence;
    std::copy(token->begin(), token->end(), r.token);
    std::copy(std::begin(request.secret), std::end(request.secret), r.secret);
    if (auto ok = guest->assemble(holdings); !ok)
        return tl::unexpected(ok.error());
    return guest;
}

Result<std::unique_ptr<Guest>> Guest::restore(ring::Region memfd, Walker &home, Holdings &holdings)
{
    auto guest = std::make_unique<Guest>();
    guest->home = &home;
    guest->memfd = std::move(memfd);
    guest->record = guest->memfd.map.as<GuestRecord>();
    const GuestRecord &r = *guest->record;
    if (auto ok = guest->assemble(holdings); !ok)
        return tl::unexpected(ok.error());
    std::atomic_ref(guest->status().since).store(0, std::memory_order_release); // the shards will tell again
    for (std::uint32_t i = 0; i < r.memory.size() && r.memory[i].state == slot_taken; ++i) {
        auto fd = holdings.take(kept_name('M', r.number, i));
        if (!fd)
            return tl::unexpected(fd.error());
        guest->memory.push_back({r.memory[i].oa, r.memory[i].length, r.memory[i].offset, std::move(*fd)});
    }
    return guest;
}

std::uint64_t Guest::stall_ns() const
{
    return std::uint64_t{record->stall_ms == 0 ? stall_ms_default : record->stall_ms} * 1'000'000;
}

Names Guest::all_names() const
{
    Names all = names;
    for (const auto &[id, hwpt] : hwpts)
        all.insert(all.end(), hwpt->names.begin(), hwpt->names.end());
    for (const auto &[id, device] : devices)
        all.insert(all.end(), device->names.begin(), device->names.end());
    return all;
}

// The command ring and its descriptors.
Result<void> Guest::assemble(Holdings &holdings)
{
    const std::uint32_t entries = record->command_entries;
    const auto size = [&](std::uint64_t entry_size) {
        return DR_COMMAND_PRODUCER_OFFSET + ring::producer_region_size(entries, entry_size);
    };
    const auto name = [&](char kind) { return kept_name(kind, number()); };
    auto front_end_made =
        holdings.region(name('F'), "dirtyring-front-end", size(sizeof(dr_command)), ring::Pages::present);
    if (!front_end_made)
        return tl::unexpected(front_end_made.error());
    auto service_made =
        holdings.region(name('S'), "dirtyring-service", size(sizeof(dr_completion)), ring::Pages::present);
    if (!service_made)
        return tl::unexpected(service_made.error());
    auto kick_made = holdings.eventfd(name('K'));
    if (!kick_made)
        return tl::unexpected(kick_made.error());
    auto call_made = holdings.eventfd(name('C'));
    if (!call_made)
        return tl::unexpected(call_made.error());
    front_end = std::move(*front_end_made);
    service = std::move(*service_made);
    kick = std::move(*kick_made);
    call = std::move(*call_made);

    auto *submissions = front_end.map.as<dr_ring_producer>(DR_COMMAND_PRODUCER_OFFSET);
    auto *completions = service.map.as<dr_ring_producer>(DR_COMMAND_PRODUCER_OFFSET);
    if (!holdings.restored()) {
        dr_ring_header header{};
        header.capacity = entries;
        header.kind = DR_RING_SUBMISSION;
        header.entry_size = sizeof(dr_command);
        ring::make_producer_region(submissions, header);
        header.kind = DR_RING_COMPLETION;
        header.entry_size = sizeof(dr_completion);
        ring::make_producer_region(completions, header);
    }
    Commands::Config config;
    config.home = &home->inbox();
    config.capacity = entries;
    config.submissions = service.map.as<dr_ring_consumer>(DR_COMMAND_CONSUMER_OFFSET);
    config.submissions_peer = submissions;
    config.completions = completions;
    config.completions_peer = front_end.map.as<dr_ring_consumer>(DR_COMMAND_CONSUMER_OFFSET);
    config.call = [home = home, fd = call.get()] { home->call(fd); };
    config.journal = {memfd.map.as<CommandRecord>(GuestRecord::journal_offset()), entries};
    config.restarted = holdings.restored();
    commands = std::make_unique<Commands>(std::move(config));
    return {};
}

Result<void> Guest::add_memory(const dr_memory_region &r, std::uint32_t sequence, int fd, Holdings &holdings)
{
    const auto aligned = [](std::uint64_t v) { return v % DR_PAGE == 0; };
    if (r.reserved != 0 || r.length == 0 || !aligned(r.oa) || !aligned(r.length) || !aligned(r.offset) ||
        r.oa + r.length < r.oa || r.oa + r.length > 1ull << DR_OA_LG2 || r.offset + r.length < r.offset)
        return refusal(EINVAL,
                       fmt::format("memory region oa {:#x} length {:#x} offset {:#x}: expected multiples of 4096, "
                                   "not empty, below 2^52, without wrapping",
                                   r.oa, r.length, r.offset));
    if (!devices.empty())
        return refusal(EBUSY, "memory is added before the first device attaches");
    if (memory.size() == DR_GUEST_REGIONS_MAX)
        return refusal(ENOSPC, fmt::format("a guest has at most {} memory regions", DR_GUEST_REGIONS_MAX));
    for (const MemoryRegion &m : memory) {
        if (r.oa < m.oa + m.length && m.oa < r.oa + r.length)
            return refusal(EEXIST,
                           fmt::format("memory region oa {:#x} length {:#x} overlaps the one at {:#x} length {:#x}",
                                       r.oa, r.length, m.oa, m.length));
    }
    // Answered by memory file systems only; a descriptor of a FUSE file could make us wait for its server.
    if (::fcntl(fd, F_GET_SEALS) < 0)
        return refusal(EBADF, "guest memory must be a memfd, or a file on tmpfs or hugetlbfs");
    ring::Fd own = reopened(fd);
    if (!own)
        return refusal(errno, fmt::format("out of descriptors: {}", std::strerror(errno)));
    const auto slot = static_cast<std::uint32_t>(memory.size());
    if (auto ok = holdings.put(kept_name('M', number(), slot), own.get()); !ok)
        return ok;
    point(Point::object_stored);
    memory.push_back({r.oa, r.length, r.offset, std::move(own)});
    record->change(sequence);
    take_slot(record->memory[slot], {0, sequence, 0, r.oa, r.length, r.offset});
    point(Point::object_recorded);
    return {};
}

} // namespace dirtyring::service
