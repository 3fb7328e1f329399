// What the VMM makes of completions and of what rings say.
#include "tests/search/vmm.hpp"

#include <fmt/format.h>

#include <algorithm>

namespace dirtyring::search {

namespace {

Event end_of(const dr_command &c, int result)
{
    if (result == -ECANCELED)
        return Event::cancelled;
    switch (c.opcode) {
    case DR_OP_MAP:
        return result == 0 ? Event::map_done : Event::map_refused;
    case DR_OP_UNMAP:
        return result == 0 ? Event::unmap_done : result == -EAGAIN ? Event::unmap_again : Event::unmap_refused;
    case DR_OP_SPLIT:
        return result == 0 ? Event::split_done : Event::resize_refused;
    case DR_OP_COLLAPSE:
        return result == 0 ? Event::collapse_done : Event::resize_refused;
    case DR_OP_ENABLE:
        return result == 0 ? Event::enable_done : Event::enable_refused;
    case DR_OP_DISABLE:
        return result == 0 ? Event::disable_done : Event::disable_refused;
    default:
        return result == 0 ? Event::sync_done : Event::sync_refused;
    }
}

} // namespace

// The hwpt has come or gone meanwhile: it may have met either.
bool Vmm::loose(const Flight &f) const
{
    return f.era != era_ || !world_.hwpt || world_.hwpt->destroying;
}

void Vmm::look_at_rings()
{
    if (!world_.hwpt)
        return;
    for (const auto &ring : world_.hwpt->rings) {
        ring->look();
        if (ring->broke_quiet)
            world_.wrong("run after DISABLE", "a run is published though nobody tracks");
        if (ring->ends > 0 && !world_.hwpt->destroying)
            world_.wrong("end", "an end marker in the ring of an hwpt that is there");
    }
}

void Vmm::judge(const dr_completion &c)
{
    const auto found = flights_.find(c.user_data);
    if (found == flights_.end())
        return world_.wrong("completed twice",
                            fmt::format("command {} is completed, and is not in flight", c.user_data));
    look_at_rings();
    Flight f = std::move(found->second);
    for (auto before = flights_.begin(); before != found; ++before) {
        if (meet(before->second, f) && !loose(f))
            world_.wrong("order", fmt::format("command {} has overtaken {}", c.user_data, before->first));
    }
    const bool range = f.c.opcode == DR_OP_MAP || f.c.opcode == DR_OP_UNMAP;
    world_.say([&] {
        return fmt::format("{} completes with {}, done {:#x}, epoch {}", c.user_data, c.result, c.done, c.epoch);
    });
    world_.met(end_of(f.c, c.result), range ? std::optional(f.c.iova) : std::nullopt);
    flights_.erase(found);
    if (f.expected != 0) {
        if (c.result != f.expected && !loose(f))
            world_.wrong("result", fmt::format("a wrong command completes with {}, expected {}", c.result, f.expected));
        return;
    }
    if (c.result == -EIO)
        return world_.wrong("result", fmt::format("command {} completes with EIO", c.user_data));
    if (loose(f)) {
        if (f.c.opcode == DR_OP_DISABLE && c.result == 0)
            enabled_ = false;
        // What it has discarded before a DESTROY cancelled it, and markers of syncs may still be read.
        if (f.c.opcode == DR_OP_UNMAP && (f.c.flags & DR_UNMAP_DISCARD) != 0 && world_.hwpt && world_.hwpt->destroying)
            maps_.for_each([&](const iommu::Extent &e) {
                if (e.start < f.end && f.c.iova < e.end)
                    oracle_.forgive(e.oa, e.end - e.start);
            });
        return;
    }
    switch (f.c.opcode) {
    case DR_OP_MAP:
        return judge_map(f, c);
    case DR_OP_UNMAP:
        return judge_unmap(f, c);
    case DR_OP_SYNC:
        return judge_sync(f, c);
    case DR_OP_ENABLE:
    case DR_OP_DISABLE:
        return judge_tracking(f, c);
    default:
        if (c.result != 0 && !(c.result == -ENOMEM && world_.attributes.short_of_memory))
            world_.wrong("result", fmt::format("a resize completes with {}", c.result));
    }
}

void Vmm::judge_map(const Flight &f, const dr_completion &c)
{
    const iommu::Rights rights{(f.c.flags & DR_MAP_READ) != 0, (f.c.flags & DR_MAP_WRITE) != 0};
    const bool there = maps_.first_in(f.c.iova, f.end).has_value();
    const bool so = (f.c.flags & DR_MAP_IDEMPOTENT) != 0 && maps_.maps_to(f.c.iova, f.end, f.c.oa, rights);
    const int expected = there && !so ? -EEXIST : 0;
    const bool short_of_memory = !there && c.result == -ENOMEM && world_.attributes.short_of_memory;
    if (c.result != expected && !short_of_memory)
        world_.wrong("result", fmt::format("a MAP completes with {}, expected {}", c.result, expected));
    if (c.result == 0 && !there) {
        maps_.insert({f.c.iova, f.end, f.c.oa, rights, static_cast<std::uint32_t>(++world_.time)});
        return;
    }
    for (const auto &[from, upto] : f.gaps) {
        if (c.result != 0)
            world_.hwpt->retained.unmapped(from, upto - from, 0);
        gone_.push_back({{from, upto, f.c.oa + (from - f.c.iova), rights}, ++world_.time});
    }
}

void Vmm::judge_unmap(const Flight &f, const dr_completion &c)
{
    const bool empty = !maps_.first_in(f.c.iova, f.end);
    const bool empty_ok = (f.c.flags & DR_UNMAP_EMPTY_OK) != 0;
    if (maps_.spans(f.c.iova) || maps_.spans(f.end) || (empty && !empty_ok)) {
        if (c.result != -ENOENT)
            world_.wrong("result", fmt::format("an UNMAP of nothing, or of half a map, completes with {}", c.result));
        // It was not asked for, after all.
        std::vector<iommu::Extent> stay;
        for (auto e = maps_.first_in(f.c.iova, f.end); e; e = maps_.first_in(e->end, f.end))
            stay.push_back(*e);
        for (iommu::Extent e : stay) {
            maps_.erase(e.start, e.end);
            e.tag = static_cast<std::uint32_t>(++world_.time);
            maps_.insert(e);
        }
        return;
    }
    const std::uint64_t length = f.end - f.c.iova;
    if (c.result == 0 ? c.done != length && c.done != f.c.length : empty || c.result != -EAGAIN || c.done >= length)
        return world_.wrong("result", fmt::format("an UNMAP of {:#x} bytes completes with {} and done {:#x}", length,
                                                  c.result, c.done));
    const std::uint64_t upto = f.c.iova + std::min(c.done, length);
    judge_pins(f, upto);
    judge_epoch(f, c);
    for (auto e = maps_.first_in(f.c.iova, upto); e; e = maps_.first_in(f.c.iova, upto)) {
        const std::uint64_t from = std::max(e->start, f.c.iova);
        const std::uint64_t to = std::min(e->end, upto);
        const std::uint64_t oa = e->oa + (from - e->start);
        if ((f.c.flags & DR_UNMAP_DISCARD) != 0)
            oracle_.forgive(oa, to - from);
        gone_.push_back({{from, to, oa, e->rights}, ++world_.time});
        maps_.erase(from, to);
    }
    while (gone_.size() > 64)
        gone_.pop_front();
    world_.hwpt->retained.unmapped(f.c.iova, upto - f.c.iova, c.epoch);
    if (c.result == -EAGAIN) { // what is left was not asked for
        std::vector<iommu::Extent> stay;
        for (auto e = maps_.first_in(upto, f.end); e; e = maps_.first_in(e->end, f.end))
            stay.push_back(*e);
        for (iommu::Extent e : stay) {
            maps_.erase(e.start, e.end);
            e.tag = static_cast<std::uint32_t>(++world_.time);
            maps_.insert(e);
        }
        if (world_.choices.next(2) != 0)
            submit_rest(f, c.done);
    }
}

// Nobody holds a pin on it, but of a map that came behind this UNMAP.
void Vmm::judge_pins(const Flight &f, std::uint64_t upto)
{
    for (const HeldPin &pin : held_pins()) {
        const bool old = pin.time < f.time || std::none_of(flights_.begin(), flights_.end(), [&](const auto &later) {
                             const Flight &m = later.second;
                             return m.c.opcode == DR_OP_MAP && m.c.iova < pin.end && pin.start < m.end;
                         });
        if (old && pin.start < upto && f.c.iova < pin.end && maps_.first_in(pin.start, pin.end))
            world_.wrong("unmapped under a pin", fmt::format("{:#x} is pinned, and its UNMAP completes", pin.start));
    }
}

// M-18, M-20; before the VMM forgets what was mapped.
void Vmm::judge_epoch(const Flight &f, const dr_completion &c)
{
    if (world_.attributes.space == DR_SPACE_OA) {
        for (const auto &ring : world_.hwpt->rings) {
            if (!ring->epochs.empty())
                world_.wrong("epoch", "a marker of an epoch in an OA ring");
        }
        if (c.epoch != 0)
            world_.wrong("epoch", "an UNMAP has an epoch where the space is OA");
        return;
    }
    const std::uint64_t upto = f.c.iova + std::min(c.done, f.end - f.c.iova);
    const bool took = maps_.first_in(f.c.iova, upto).has_value();
    if (c.epoch == 0) {
        if (took && f.tracked && tracking_on() && f.disables == disables_)
            world_.wrong("epoch", "an UNMAP of a tracked range has no epoch");
        return;
    }
    if (!epochs_.insert(c.epoch).second)
        world_.wrong("epoch", fmt::format("epoch {} is used twice", c.epoch));
    if ((f.c.flags & (DR_UNMAP_DEFERRED | DR_UNMAP_DISCARD)) != 0)
        return; // published later
    const std::uint64_t slice = 1ull << world_.attributes.slice_lg2;
    for (unsigned i = 0; i < world_.hwpt->rings.size(); ++i) {
        const std::uint64_t from = std::max(f.c.iova, i * slice);
        const std::uint64_t to = std::min(upto, (i + 1) * slice);
        if (from >= to || !maps_.first_in(from, to))
            continue;
        const auto &seen = world_.hwpt->rings[i]->epochs;
        const auto marker = seen.find(c.epoch);
        if (marker == seen.end())
            world_.wrong("epoch", fmt::format("ring {} has no marker of epoch {}", i, c.epoch));
        else if (marker->second > 1 && f.lives == world_.lives)
            world_.wrong("epoch", fmt::format("ring {} has two markers of epoch {}", i, c.epoch));
    }
}

void Vmm::judge_tracking(const Flight &f, const dr_completion &c)
{
    const bool enable = f.c.opcode == DR_OP_ENABLE;
    const int expected = enabled_ == enable ? -EALREADY : 0;
    const bool may_be_in_the_way = enable && expected == 0 && c.result == -ENODEV && world_.attributes.optional;
    if (may_be_in_the_way)
        return;
    if (c.result != expected)
        return world_.wrong("result", fmt::format("{} completes with {}, expected {}", enable ? "ENABLE" : "DISABLE",
                                                  c.result, expected));
    if (c.result != 0)
        return;
    enabled_ = enable;
    if (enable) {
        for (const auto &ring : world_.hwpt->rings)
            ring->fresh_from = ring->mine()->head;
        return world_.copy_all(); // E-6
    }
    const bool again =
        std::any_of(flights_.begin(), flights_.end(), [](const auto &o) { return o.second.c.opcode == DR_OP_ENABLE; });
    for (const auto &ring : world_.hwpt->rings)
        ring->quiet_from = again ? UINT64_MAX : ring->mine()->head;
}

void Vmm::judge_sync(Flight &f, const dr_completion &c)
{
    if (c.result != 0)
        return world_.wrong("result", fmt::format("a SYNC completes with {}", c.result));
    for (unsigned i = 0; i < world_.hwpt->rings.size(); ++i) {
        const auto &seen = world_.hwpt->rings[i]->syncs;
        const auto marker = seen.find(f.c.cookie);
        if (marker == seen.end())
            world_.wrong("sync marker", fmt::format("ring {} has no marker of SYNC {}", i, f.c.cookie));
        else if (marker->second > 1 && f.lives == world_.lives)
            world_.wrong("sync marker", fmt::format("ring {} has two markers of SYNC {}", i, f.c.cookie));
    }
    for (const HeldPin &pin : held_pins()) { // S-13
        if (pin.write && pin.time < f.time && maps_.first_in(pin.start, pin.end))
            world_.wrong("synced under a pin",
                         fmt::format("{:#x} is pinned for writing, and SYNC {} completes", pin.start, f.c.cookie));
    }
    waiting_.push_back({f.c.cookie, f.tracked, f.disables, std::move(f.before)});
}

template <class Visit> void Vmm::for_each_discarded(Visit visit) const
{
    for (const auto &flight : flights_) {
        const Flight &f = flight.second;
        if (f.c.opcode != DR_OP_UNMAP || (f.c.flags & DR_UNMAP_DISCARD) == 0)
            continue;
        const auto part = [&](std::uint64_t start, std::uint64_t end, std::uint64_t oa) {
            const std::uint64_t from = std::max(start, f.c.iova);
            const std::uint64_t to = std::min(end, f.end);
            if (from < to)
                visit((oa + (from - start)) / page_size, (oa + (to - start)) / page_size);
        };
        maps_.for_each([&](const iommu::Extent &e) { part(e.start, e.end, e.oa); });
        for (const auto &[other, m] : flights_) {
            if (m.c.opcode == DR_OP_MAP)
                part(m.c.iova, m.end, m.c.oa);
        }
    }
}

void Vmm::judge_markers()
{
    std::erase_if(waiting_, [&](const Waiting &w) {
        if (!world_.hwpt)
            return true;
        for (const auto &ring : world_.hwpt->rings) {
            if (!ring->read.contains(w.cookie))
                return false;
        }
        // Unmaps behind a DISABLE have no marker, so that runs of IOVA rings that are read later mean nothing.
        if (!w.judged || (w.disables != disables_ && world_.attributes.space == DR_SPACE_IOVA))
            return true;
        const auto exempt = [&](std::uint64_t page) {
            bool found = false;
            for_each_discarded([&](std::uint64_t from, std::uint64_t upto) { found |= from <= page && page < upto; });
            return found;
        };
        if (const auto lost = oracle_.missing(w.before, exempt))
            world_.wrong("lost", fmt::format("SYNC {}: the copy of OA page {:#x} lacks write {} of device {}", w.cookie,
                                             lost->page, lost->stamp, lost->device));
        return true;
    });
}

void Vmm::take(HwptWorld &hwpt, unsigned which, std::uint64_t entry, std::uint64_t index)
{
    DirtyRing &ring = *hwpt.rings[which];
    if (dr_is_marker(entry)) {
        switch (dr_marker_kind(entry)) {
        case DR_MARKER_SYNC:
            ring.read.insert(dr_marker_payload(entry));
            break;
        case DR_MARKER_EPOCH:
            hwpt.retained.passed(which, dr_marker_payload(entry));
            break;
        case DR_MARKER_END:
            ring.ended = true;
            break;
        default:
            world_.wrong("stray", "a marker of a kind that nobody asked for");
        }
        return;
    }
    const std::uint64_t start = dr_run_address(entry);
    const std::uint64_t length = dr_run_length(entry);
    if (world_.attributes.space == DR_SPACE_OA) {
        if (!world_.copy(start, length))
            world_.wrong("stray", fmt::format("a run names {:#x} +{:#x}, which is no memory", start, length));
        return;
    }
    const auto &header = ring.mine()->header;
    if (start < header.start || start + length - 1 > header.last)
        world_.wrong("stray", "a run reaches out of its slice");
    bool memory = true;
    const bool mapped = hwpt.retained.translate(
        which, start, length, [&](std::uint64_t oa, std::uint64_t n) { memory = memory && world_.copy(oa, n); });
    if (!mapped && hwpt.lives == 1 && index >= ring.fresh_from && tracking_on() && &hwpt == world_.hwpt.get())
        world_.wrong("stray", fmt::format("a run names {:#x} +{:#x}, where nothing was mapped", start, length));
    if (!memory)
        world_.wrong("stray", "a run leads out of the guest's memory");
}

bool Vmm::is_mapped_since(std::uint64_t iova, bool write, std::uint64_t time) const
{
    const auto e = maps_.first_in(iova, iova + 1);
    if (!e || e->tag > time || !(write ? e->rights.write : e->rights.read))
        return false;
    return std::none_of(flights_.begin(), flights_.end(), [&](const auto &f) {
        return f.second.c.opcode == DR_OP_UNMAP && f.second.c.iova <= iova && iova < f.second.end;
    });
}

bool Vmm::may_reach(std::uint64_t iova, std::uint64_t oa, bool write, std::uint64_t time) const
{
    const auto good = [&](std::uint64_t start, std::uint64_t end, std::uint64_t to, bool right) {
        return start <= iova && iova < end && to + (iova - start) == oa && (right || !write);
    };
    if (const auto e = maps_.first_in(iova, iova + 1); e && good(e->start, e->end, e->oa, e->rights.write))
        return true;
    for (const auto &[user_data, f] : flights_) {
        if (f.c.opcode == DR_OP_MAP && good(f.c.iova, f.end, f.c.oa, (f.c.flags & DR_MAP_WRITE) != 0))
            return true;
    }
    return std::any_of(gone_.begin(), gone_.end(), [&](const Gone &g) {
        return g.time > time && good(g.extent.start, g.extent.end, g.extent.oa, g.extent.rights.write);
    });
}

void Vmm::hwpt_gone()
{
    ++era_;
    maps_ = {};
    gone_.clear();
    waiting_.clear();
    enabled_ = false;
    ++disables_;
}

void Vmm::hwpt_made()
{
    ++era_;
    epochs_.clear();
}

} // namespace dirtyring::search
