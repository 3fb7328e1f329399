#include "service/guest.hpp"

#include "iommu/format_amdv1.hpp"
#include "iommu/slice.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/random.h>

namespace dirtyring::service {

namespace {

tl::unexpected<Refusal> refuse(int error, std::string sentence)
{
    return tl::unexpected<Refusal>({error, std::move(sentence)});
}

Result<ring::Region> make_region(const char *name, std::uint64_t size, ring::Pages pages)
{
    ring::Region region;
    if (const int error = region.make(name, size, pages); error != 0)
        return refuse(-error, fmt::format("no memory for {} ({} bytes): {}", name, size, std::strerror(-error)));
    return region;
}

Result<Token> make_token()
{
    Token token;
    if (::getrandom(token.data(), token.size(), 0) != static_cast<ssize_t>(token.size()))
        return refuse(errno, "no random bytes for a token");
    return token;
}

// A generation is touched where something is mapped only; beyond this many bytes they come into being then.
static_assert(iommu::shards_max == DR_SHARDS_MAX);

constexpr std::uint64_t translation_present_max = 16ull << 20;

Result<void> check(const dr_hwpt_alloc &r)
{
    if (r.format != DR_FORMAT_AMDV1)
        return refuse(EOPNOTSUPP, fmt::format("format {} is not known here, AMD v1 ({}) is", r.format,
                                              static_cast<unsigned>(DR_FORMAT_AMDV1)));
    if ((r.flags & ~DR_HWPT_DIRTY_TRACKING) != 0)
        return refuse(EINVAL,
                      fmt::format("flags {:#x} of the hwpt: only {:#x} is known", r.flags, DR_HWPT_DIRTY_TRACKING));
    if (r.aperture_lg2 < iommu::aperture_lg2_min || r.aperture_lg2 > iommu::aperture_lg2_max)
        return refuse(EINVAL, fmt::format("aperture_lg2 is {}, expected {} to {}", r.aperture_lg2,
                                          iommu::aperture_lg2_min, iommu::aperture_lg2_max));
    const std::uint64_t shards_max =
        std::min<std::uint64_t>(DR_SHARDS_MAX, 1ull << (r.aperture_lg2 - iommu::largest_leaf_lg2));
    if (!std::has_single_bit(r.shards) || r.shards > shards_max)
        return refuse(EINVAL,
                      fmt::format("shards is {}, expected a power of two up to {} (each slice holds 1 GiB or more)",
                                  r.shards, shards_max));
    if (r.leaf_lg2_max != 12 && r.leaf_lg2_max != 21 && r.leaf_lg2_max != 30)
        return refuse(EINVAL, fmt::format("leaf_lg2_max is {}, expected 12, 21 or 30", r.leaf_lg2_max));
    if (r.space != DR_SPACE_IOVA && r.space != DR_SPACE_OA)
        return refuse(EINVAL, fmt::format("space is {}, expected 0 (iova) or 1 (oa)", r.space));
    if (!std::has_single_bit(r.ring_entries) || r.ring_entries < DR_CAPACITY_MIN || r.ring_entries > DR_CAPACITY_MAX)
        return refuse(EINVAL, fmt::format("ring_entries is {}, expected a power of two from {} to {}", r.ring_entries,
                                          DR_CAPACITY_MIN, DR_CAPACITY_MAX));
    return {};
}

} // namespace

Result<ring::Fd> make_eventfd()
{
    ring::Fd fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    if (!fd)
        return refuse(errno, fmt::format("no eventfd: {}", std::strerror(errno)));
    return fd;
}

Result<std::unique_ptr<Hwpt>> Hwpt::make(const dr_hwpt_alloc &request, const std::vector<Walker *> &owners)
{
    if (auto ok = check(request); !ok)
        return tl::unexpected(ok.error());
    const dr_translation_header h = iommu::make_geometry(request.format, request.aperture_lg2, request.shards);
    auto hwpt = std::make_unique<Hwpt>();
    hwpt->ioas = request.ioas;
    hwpt->tracks = (request.flags & DR_HWPT_DIRTY_TRACKING) != 0;
    hwpt->geometry = h;

    auto tables = make_region("dirtyring-tables", h.tables_size, ring::Pages::sparse);
    auto translation = make_region("dirtyring-translation", h.translation_size, ring::Pages::sparse);
    if (!tables || !translation)
        return tl::unexpected(!tables ? tables.error() : translation.error());
    hwpt->tables = std::move(*tables);
    hwpt->translation = std::move(*translation);
    const std::uint64_t tops = h.top_tables << iommu::table_size_lg2;
    if (hwpt->tables.make_present(h.table_pages, tops) != 0 ||
        hwpt->translation.make_present(0, std::min(h.translation_size, translation_present_max)) != 0)
        return refuse(ENOMEM, "no memory for the top tables and generations");

    const iommu::Tables view(hwpt->tables.map.data(), h);
    iommu::make_top_tables<iommu::AmdV1>(h, view);
    auto *controls = hwpt->translation.map.as<dr_shard_control>(h.shard_controls);
    auto *generations = hwpt->translation.map.as<std::uint64_t>(h.generations);
    for (std::uint32_t i = 0; i < request.shards; ++i)
        controls[i].first_table = iommu::first_table(h, i);

    for (std::uint32_t i = 0; i < request.shards; ++i) {
        ShardHome &home = hwpt->shards.emplace_back();
        home.owner = owners[i % owners.size()];
        auto doorbell = make_eventfd();
        auto call = make_eventfd();
        if (!doorbell || !call)
            return tl::unexpected(!doorbell ? doorbell.error() : call.error());
        home.doorbell = std::move(*doorbell);
        home.call = std::move(*call);
        if (hwpt->tracks) {
            auto producer = make_region("dirtyring-producer",
                                        ring::producer_region_size(request.ring_entries, sizeof(std::uint64_t)),
                                        ring::Pages::present);
            auto consumer = make_region("dirtyring-consumer", sizeof(dr_ring_consumer), ring::Pages::present);
            if (!producer || !consumer)
                return tl::unexpected(!producer ? producer.error() : consumer.error());
            home.producer = std::move(*producer);
            home.consumer = std::move(*consumer);
            dr_ring_header header{};
            header.kind = DR_RING_DIRTY;
            header.capacity = request.ring_entries;
            header.entry_size = sizeof(std::uint64_t);
            header.space = request.space;
            header.start = std::uint64_t{i} << h.slice_lg2;
            header.last = header.start + ((1ull << h.slice_lg2) - 1);
            ring::make_producer_region(home.producer.map.as<dr_ring_producer>(), header);
        }
        ShardConfig config;
        config.tables = view;
        config.geometry = h;
        config.index = i;
        config.control = &controls[i];
        config.generations = generations;
        config.leaf_lg2_max = request.leaf_lg2_max;
        config.producer = hwpt->tracks ? home.producer.map.as<dr_ring_producer>() : nullptr;
        config.consumer = hwpt->tracks ? home.consumer.map.as<dr_ring_consumer>() : nullptr;
        config.min_interval_ns = std::uint64_t{request.min_interval_us} * 1000;
        config.make_present = [&region = hwpt->tables](std::uint64_t offset, std::uint64_t length) {
            return region.make_present(offset, length);
        };
        config.call = [owner = home.owner, fd = home.call.get()] { owner->call(fd); };
        home.shard = make_shard(request.format, std::move(config));
    }
    auto *header = hwpt->translation.map.as<dr_translation_header>();
    *header = h;
    header->version = 0;
    // Last, as R6 of the rings: who maps the region before the attach reply has brought it here sees no half header.
    std::atomic_ref(header->version).store(h.version, std::memory_order_release);
    return hwpt;
}

Result<std::unique_ptr<Guest>> Guest::make(std::uint32_t command_entries, Walker &home)
{
    if (!std::has_single_bit(command_entries) || command_entries < DR_COMMAND_CAPACITY_MIN ||
        command_entries > DR_COMMAND_CAPACITY_MAX)
        return refuse(EINVAL, fmt::format("command_entries is {}, expected a power of two from {} to {}",
                                          command_entries, DR_COMMAND_CAPACITY_MIN, DR_COMMAND_CAPACITY_MAX));
    const auto size = [&](std::uint64_t entry_size) {
        return DR_COMMAND_PRODUCER_OFFSET + ring::producer_region_size(command_entries, entry_size);
    };
    auto front_end = make_region("dirtyring-front-end", size(sizeof(dr_command)), ring::Pages::present);
    auto service = make_region("dirtyring-service", size(sizeof(dr_completion)), ring::Pages::present);
    auto kick = make_eventfd();
    auto call = make_eventfd();
    auto token = make_token();
    auto secret = make_token();
    for (const Refusal *r : {!front_end ? &front_end.error() : nullptr, !service ? &service.error() : nullptr,
                             !kick ? &kick.error() : nullptr, !call ? &call.error() : nullptr,
                             !token ? &token.error() : nullptr, !secret ? &secret.error() : nullptr}) {
        if (r != nullptr)
            return tl::unexpected(*r);
    }
    auto guest = std::make_unique<Guest>();
    guest->token = *token;
    guest->secret = *secret;
    guest->home = &home;
    guest->front_end = std::move(*front_end);
    guest->service = std::move(*service);
    guest->kick = std::move(*kick);
    guest->call = std::move(*call);
    guest->command_entries = command_entries;

    dr_ring_header header{};
    header.capacity = command_entries;
    header.kind = DR_RING_SUBMISSION;
    header.entry_size = sizeof(dr_command);
    auto *submissions = guest->front_end.map.as<dr_ring_producer>(DR_COMMAND_PRODUCER_OFFSET);
    ring::make_producer_region(submissions, header);
    header.kind = DR_RING_COMPLETION;
    header.entry_size = sizeof(dr_completion);
    auto *completions = guest->service.map.as<dr_ring_producer>(DR_COMMAND_PRODUCER_OFFSET);
    ring::make_producer_region(completions, header);

    Commands::Config config;
    config.home = &home;
    config.capacity = command_entries;
    config.submissions = guest->service.map.as<dr_ring_consumer>(DR_COMMAND_CONSUMER_OFFSET);
    config.submissions_peer = submissions;
    config.completions = completions;
    config.completions_peer = guest->front_end.map.as<dr_ring_consumer>(DR_COMMAND_CONSUMER_OFFSET);
    config.call = [&home, fd = guest->call.get()] { home.call(fd); };
    guest->commands = std::make_unique<Commands>(std::move(config));
    return guest;
}

Result<void> Guest::add_memory(const dr_memory_region &r, ring::FdList &fds)
{
    const auto aligned = [](std::uint64_t v) { return v % DR_PAGE == 0; };
    if (r.reserved != 0 || r.length == 0 || !aligned(r.oa) || !aligned(r.length) || !aligned(r.offset) ||
        r.oa + r.length < r.oa || r.oa + r.length > 1ull << DR_OA_LG2 || r.offset + r.length < r.offset)
        return refuse(EINVAL,
                      fmt::format("memory region oa {:#x} length {:#x} offset {:#x}: expected multiples of 4096, "
                                  "not empty, below 2^52, without wrapping",
                                  r.oa, r.length, r.offset));
    if (!devices.empty())
        return refuse(EBUSY, "memory is added before the first device attaches");
    if (memory.size() == DR_GUEST_REGIONS_MAX)
        return refuse(ENOSPC, fmt::format("a guest has at most {} memory regions", DR_GUEST_REGIONS_MAX));
    for (const MemoryRegion &m : memory) {
        if (r.oa < m.oa + m.length && m.oa < r.oa + r.length)
            return refuse(EEXIST,
                          fmt::format("memory region oa {:#x} length {:#x} overlaps the one at {:#x} length {:#x}",
                                      r.oa, r.length, m.oa, m.length));
    }
    // Answered by memory file systems only; a descriptor of a FUSE file could make us wait for its server.
    if (::fcntl(fds.get(0), F_GET_SEALS) < 0)
        return refuse(EBADF, "guest memory must be a memfd, or a file on tmpfs or hugetlbfs");
    memory.push_back({r.oa, r.length, r.offset, fds.take(0)});
    return {};
}

} // namespace dirtyring::service
