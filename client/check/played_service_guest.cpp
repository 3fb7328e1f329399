#include "client/check/played_service_guest.hpp"

#include "iommu/geometry.hpp"

#include <algorithm>
#include <bit>

namespace dirtyring::check {
namespace {

void make_header(dr_ring_producer *region, dr_ring_kind kind, std::uint64_t capacity, std::size_t entry_size)
{
    dr_ring_header header{};
    header.kind = kind;
    header.capacity = capacity;
    header.entry_size = static_cast<std::uint32_t>(entry_size);
    ring::make_producer_region(region, header);
}

} // namespace

// ---- a ring ---------------------------------------------------------------------------------------------------------

PlayedRing::PlayedRing(const dr_hwpt_alloc &hwpt, std::uint32_t shard, const Distort &distort)
{
    const std::uint64_t size = 1ull << (hwpt.aperture_lg2 - static_cast<unsigned>(std::countr_zero(hwpt.shards)));
    slice = {shard * size, (shard + 1) * size};
    must(producer_.make("producer", ring::producer_region_size(hwpt.ring_entries, sizeof(std::uint64_t)),
                        ring::Pages::present),
         "a ring");
    must(consumer_.make("consumer", sizeof(dr_ring_consumer), ring::Pages::present), "a ring");
    auto *region = producer_.map.as<dr_ring_producer>();
    make_header(region, DR_RING_DIRTY, hwpt.ring_entries, sizeof(std::uint64_t));
    region->header.space = hwpt.space;
    region->header.start = slice.start;
    region->header.last = slice.end - 1;
    out_.emplace(region, &mine());
    if (distort)
        distort(region->header);
}

bool PlayedRing::publish(const Entries &entries)
{
    for (std::size_t i = 0; i < entries.size(); ++i)
        out_->put(i, entries[i]);
    out_->stage(entries.size());
    called_ = out_->publish();
    if (called_)
        signal(call);
    return called_;
}

void PlayedRing::bait(std::uint64_t entry)
{
    for (std::uint64_t i = room(); i-- > 0;)
        out_->put(i, entry);
}

void PlayedRing::set_head(std::uint64_t head) const
{
    word(producer_.map.as<dr_ring_producer>()->head).store(head, std::memory_order_seq_cst);
}

void PlayedRing::disarm() const
{
    word(mine().armed).store(DR_DISARMED, std::memory_order_seq_cst); // before the call; the next arm() is behind it
}

std::vector<Fd> PlayedRing::descriptors() const
{
    std::vector<Fd> fds;
    fds.push_back(read_only(producer_));
    fds.push_back(copy_of(consumer_.fd));
    fds.push_back(copy_of(call));
    fds.push_back(copy_of(kick));
    return fds;
}

// ---- requests -------------------------------------------------------------------------------------------------------

PlayedGuest::PlayedGuest(Stage &stage) : PlayedService(stage) {}

PlayedGuest::Hwpt *PlayedGuest::find_hwpt(std::uint32_t id)
{
    const auto found = std::find_if(hwpts_.begin(), hwpts_.end(), [&](const Hwpt &h) { return h.id == id; });
    return found == hwpts_.end() ? nullptr : &*found;
}

Answer PlayedGuest::answer(Request &request)
{
    if (request.number == DR_GUEST_CREATE)
        return create_guest(request.as<dr_guest_create>());
    if (request.number == DR_DEVICE_ATTACH)
        throw Refuse{EACCES, "the kit plays this service without devices"};
    if (kind != Kind::front_end || request.number == DR_DEVICE_DETACH)
        throw Refuse{EPROTO, "this request is for connections of another kind"};
    switch (request.number) {
    case DR_MEMORY_ADD:
        memory_.push_back({request.as<dr_memory_region>(), std::move(request.fds[0])});
        return answer_of(dr_empty{});
    case DR_IOAS_ALLOC:
        ioases_.push_back(next_id_);
        return answer_of(dr_object{0, next_id_++});
    case DR_HWPT_ALLOC:
        return alloc_hwpt(request.as<dr_hwpt_alloc>());
    case DR_RING_GET:
        return get_ring(request.as<dr_ring_get>());
    case DR_GUEST_DESTROY:
        return answer_of(dr_empty{}); // and the program is about to go
    default:
        return destroy(request.as<dr_object>().id);
    }
}

Answer PlayedGuest::create_guest(const dr_guest_create &request)
{
    if (kind != Kind::greeted)
        throw Refuse{EBUSY, "this connection has a guest"};
    if (std::all_of(std::begin(request.secret), std::end(request.secret), [](auto byte) { return byte == 0; }))
        throw Refuse{EINVAL, "a secret of zeroes"};
    if (request.flags != 0)
        throw Refuse{ENOENT, "the kit plays a service without a guest"};
    if (submissions_)
        throw Refuse{ENOSPC, "the kit plays one guest"};
    const std::uint64_t entries = request.command_entries;
    if (!std::has_single_bit(entries) || entries < DR_COMMAND_CAPACITY_MIN || entries > DR_COMMAND_CAPACITY_MAX)
        throw Refuse{EINVAL, "expected a power of two from 2 to 4096 as command_entries"};
    const auto size = [&](std::size_t entry) { return DR_PAGE + ring::producer_region_size(entries, entry); };
    must(front_end_.make("front-end", size(sizeof(dr_command)), ring::Pages::present), "a command ring");
    must(service_.make("service", size(sizeof(dr_completion)), ring::Pages::present), "a command ring");
    auto *submissions = front_end_.map.as<dr_ring_producer>(DR_COMMAND_PRODUCER_OFFSET);
    auto *completions = service_.map.as<dr_ring_producer>(DR_COMMAND_PRODUCER_OFFSET);
    make_header(submissions, DR_RING_SUBMISSION, entries, sizeof(dr_command));
    make_header(completions, DR_RING_COMPLETION, entries, sizeof(dr_completion));
    submissions_.emplace(service_.map.as<dr_ring_consumer>(), submissions, entries);
    completions_.emplace(completions, front_end_.map.as<dr_ring_consumer>());
    armed_ = submissions_->arm();

    kind = Kind::front_end;
    guest_.command_entries = request.command_entries;
    std::memset(guest_.token, 0x5a, sizeof guest_.token);
    std::vector<Fd> fds;
    fds.push_back(copy_of(front_end_.fd));
    fds.push_back(read_only(service_));
    fds.push_back(copy_of(kick_));
    fds.push_back(copy_of(call_));
    return answer_of(guest_, std::move(fds));
}

Answer PlayedGuest::alloc_hwpt(const dr_hwpt_alloc &request)
{
    if (std::find(ioases_.begin(), ioases_.end(), request.ioas) == ioases_.end())
        throw Refuse{ENOENT, "no such ioas"};
    if (request.aperture_lg2 < 21 || request.aperture_lg2 > 48 || !std::has_single_bit(request.shards) ||
        request.shards > iommu::shards_most(request.aperture_lg2) || !std::has_single_bit(request.ring_entries) ||
        request.ring_entries < DR_CAPACITY_MIN || request.ring_entries > DR_CAPACITY_MAX || request.space > DR_SPACE_OA)
        throw Refuse{EINVAL, "a field of dr_hwpt_alloc is out of its range"};
    Hwpt &made = hwpts_.emplace_back();
    made.id = next_id_++;
    made.request = request;
    for (std::uint32_t shard = 0; shard < request.shards; ++shard)
        made.rings.emplace_back(request, shard, distort).publish(first_entries);
    hwpt_ = request;
    rings_ = &made.rings;
    const auto slice_lg2 = request.aperture_lg2 - static_cast<std::uint32_t>(std::countr_zero(request.shards));
    return answer_of(dr_hwpt{0, made.id, request.shards, slice_lg2});
}

Answer PlayedGuest::get_ring(const dr_ring_get &request)
{
    Hwpt *hwpt = find_hwpt(request.hwpt);
    if (hwpt == nullptr || request.shard >= hwpt->rings.size())
        throw Refuse{ENOENT, "no such hwpt or shard"};
    PlayedRing &ring = hwpt->rings[request.shard];
    ring.opened = true;
    got_rings = true;
    return answer_of(dr_ring{0, hwpt->request.shards}, ring.descriptors());
}

Answer PlayedGuest::destroy(std::uint32_t id)
{
    if (Hwpt *hwpt = find_hwpt(id)) {
        for (PlayedRing &ring : hwpt->rings) {
            if (ring.room() > 0)
                ring.publish({dr_marker(DR_MARKER_END, 0)});
        }
        hwpt->tracked = false;
    } else if (std::erase(ioases_, id) == 0) {
        throw Refuse{ENOENT, "no such object"};
    }
    return answer_of(dr_empty{});
}

// ---- what the program has set up ------------------------------------------------------------------------------------

void PlayedGuest::start_and_wait()
{
    start();
    const bool there = comes([&] {
        return std::any_of(hwpts_.begin(), hwpts_.end(), [](const Hwpt &h) {
            return h.tracked && std::all_of(h.rings.begin(), h.rings.end(), [](auto &r) { return r.opened; });
        });
    });
    if (!there)
        throw Broken(
            fmt::format("the program got no rings of a tracked hwpt; {}; {}", last_request(), subject.state()));
    choose();
}

// The ring with the most to say.
void PlayedGuest::choose()
{
    std::uint64_t most = 0;
    for (std::size_t i = 0; i < rings_->size(); ++i) {
        std::vector<PageRange> pages;
        std::uint64_t count = 0;
        for (const dr_command &m : maps_) {
            const Span &slice = (*rings_)[i].slice;
            const std::uint64_t start = std::max(m.iova, slice.start);
            const std::uint64_t end = std::min(m.iova + m.length, slice.end);
            if (m.object != hwpt_.ioas || start >= end)
                continue;
            const std::uint64_t named = hwpt_.space == DR_SPACE_OA ? m.oa + (start - m.iova) : start;
            pages.push_back({named / page, (end - start) / page});
            count += pages.back().count;
        }
        if (count > most) {
            most = count;
            fed_ = i;
            pages_ = std::move(pages);
        }
    }
    if (most == 0)
        throw Broken("the program mapped nothing in an hwpt that it tracks");
}

Entries PlayedGuest::runs(std::uint64_t n)
{
    Entries entries;
    while (entries.size() < n) {
        const PageRange &range = pages_[fed_pages_ % pages_.size()];
        entries.push_back(dr_run(range.first + fed_pages_ / pages_.size() % range.count, false, 1));
        ++fed_pages_;
    }
    return entries;
}

std::vector<PlayedGuest::Piece> PlayedGuest::memory()
{
    std::vector<Piece> all;
    for (const dr_command &m : maps_) {
        const Span slice = fed().slice;
        const std::uint64_t start = std::max(m.iova, slice.start);
        const std::uint64_t end = std::min(m.iova + m.length, slice.end);
        if (m.object != hwpt_.ioas || start >= end)
            continue;
        for (Piece &piece : pieces(m.oa + (start - m.iova), end - start))
            all.push_back(std::move(piece));
    }
    return all;
}

std::vector<PlayedGuest::Piece> PlayedGuest::pieces(std::uint64_t oa, std::uint64_t length)
{
    std::vector<Piece> all;
    for (const Memory &given : memory_) {
        const dr_memory_region &r = given.region;
        const std::uint64_t from = std::max(oa, r.oa);
        const std::uint64_t upto = std::min(oa + length, r.oa + r.length);
        Fd own(::open(fmt::format("/proc/self/fd/{}", given.fd.get()).c_str(), O_RDWR | O_CLOEXEC));
        if (own && from < upto)
            all.push_back({std::move(own), {r.offset + from - r.oa, r.offset + upto - r.oa}});
    }
    return all;
}

bool PlayedGuest::fed_until(const std::function<bool()> &condition)
{
    PlayedRing &ring = fed();
    const auto until = Deadline::Clock::now() + context_.deadline.patience() / 2;
    while (!condition() && Deadline::Clock::now() < until) {
        feed(ring, runs(std::min<std::uint64_t>(1024, ring.room() - DR_MARKER_SLOTS)));
        need_released(ring, "runs");
    }
    return condition();
}

void PlayedGuest::feed(PlayedRing &ring, const Entries &entries)
{
    if (sleeps_)
        sleeps_ = comes_soon([&] { return ring.waits(); });
    ring.publish(entries);
}

void PlayedGuest::need_released(PlayedRing &ring, const std::string &what, Rule rule)
{
    const bool all = comes([&] { return ring.released(); });
    const std::uint64_t ahead = ring.armed() - ring.head();
    if (!all)
        need_running();
    if (!all && ahead > 1 && ahead <= hwpt_.ring_entries)
        throw Broken(fmt::format("the program sleeps until {} more entries have come", ahead));
    const std::string seen =
        fmt::format("tail {}, armed {} with head {}: {}", ring.tail(), ring.armed(), ring.head(), context_.nothing());
    if (!all && ring.missed())
        context_.need(false, "C-6", what, seen, "a look at head after it has armed");
    context_.need(all, rule, what, seen, "all of [tail, head) read and released");
}

} // namespace dirtyring::check
