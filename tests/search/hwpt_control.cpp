#include "tests/search/hwpt_control.hpp"

#include "service/guests/end_ring.hpp"

#include <fmt/format.h>

namespace dirtyring::search {

namespace {

// The end markers that a dead worker has not put, and a call for everybody.
void end_rings(HwptWorld &hwpt)
{
    for (const auto &ring : hwpt.rings) {
        service::DirtyRing left(ring->mine(), ring->peer());
        service::end_ring(left);
        ring->called = true;
    }
}

} // namespace

void HwptControl::destroy()
{
    if (!world_.hwpt || !service_.alive())
        return;
    HwptWorld &hwpt = *world_.hwpt;
    if (!hwpt.destroying) {
        // A worker serves nobody before its guests' command rings go on.
        if (!world_.attributes.destroys || !devices_.none_has_a_slot() || !service_.life().home_begun ||
            world_.choices.next(4) != 3)
            return;
        world_.say([&] { return fmt::format("hwpt {} is to be destroyed", hwpt.id); });
        hwpt.destroying = true;
        vmm_.hwpt_goes();
        return world_.met(Event::destroy_recorded);
    }
    if (!unrouted_) {
        if (service_.on(0, [&] { service_.life().commands->remove_hwpt(hwpt.id); }) && service_.alive()) {
            unrouted_ = true;
            world_.met(Event::destroy_unrouted);
        }
        return;
    }
    if (cancelled_.size() < world_.attributes.shards) {
        const auto shard = static_cast<unsigned>(cancelled_.size());
        const unsigned owner = Life::owner(shard);
        hwpt.rings[shard]->full_at_end |= hwpt.rings[shard]->room() == 0;
        const bool done = service_.on(owner, [&] {
            service_.life().inboxes[owner].drain(); // parts that were sent before
            hwpt.rings[shard]->full_at_end |= hwpt.rings[shard]->room() == 0;
            service_.life().shards[shard]->cancel();
        });
        if (done && service_.alive()) {
            world_.say([&] { return fmt::format("shard {} is cancelled", shard); });
            cancelled_.insert(shard);
            world_.met(Event::destroy_cancelled);
        }
        return;
    }
    if (!service_.is_free(0) || !service_.is_free(1))
        return;
    service_.on_both([&] { service_.life().inboxes[0].drain(); });
    if (!service_.alive())
        return;
    service_.life().forget_hwpt();
    gone();
}

void HwptControl::gone()
{
    HwptWorld &hwpt = *world_.hwpt;
    world_.met(Event::destroy_done);
    world_.say([&] { return fmt::format("hwpt {} is gone", hwpt.id); });
    for (unsigned i = 0; i < hwpt.rings.size(); ++i) {
        DirtyRing &ring = *hwpt.rings[i];
        ring.look();
        if ((ring.ends == 0 && !ring.full_at_end) || ring.ends > 1 || ring.behind_end)
            world_.wrong("end", fmt::format("ring {} of hwpt {}, which is destroyed, has {} end markers", i, hwpt.id,
                                            ring.ends));
    }
    world_.gone.push_back(std::move(world_.hwpt));
    world_.hwpt.reset();
    vmm_.hwpt_gone();
    unrouted_ = false;
    cancelled_.clear();
}

void HwptControl::make()
{
    if (world_.hwpt || !vmm_.quiet() || !service_.is_free(0) || !service_.is_free(1) || !service_.life().home_begun)
        return;
    world_.make_hwpt();
    world_.say([&] { return fmt::format("hwpt {} is made", world_.hwpt->id); });
    vmm_.hwpt_made();
    if (world_.choices.one_in(4))
        vmm_.submit_any(); // it lies in the ring before the walkers know the hwpt
    service_.on_both([&] { service_.life().add_hwpt(false); });
    world_.met(Event::hwpt_made);
}

void HwptControl::make_large()
{
    if (!world_.hwpt || world_.hwpt->large_wished.empty() || !service_.alive())
        return;
    const unsigned shard = world_.hwpt->large_wished.front().first;
    const std::uint64_t offset = world_.hwpt->large_wished.front().second;
    if (!service_.is_free(Life::owner(shard)) || world_.hwpt->destroying)
        return;
    world_.hwpt->large_wished.pop_front();
    world_.say([&] { return fmt::format("shard {} is told of a large page at {:#x}", shard, offset); });
    world_.met(Event::made_large);
    service_.on(Life::owner(shard), [&] { service_.life().shards[shard]->made_large(offset); });
}

// What was recorded goes on; what was not has never been.
void HwptControl::service_died()
{
    unrouted_ = false;
    cancelled_.clear();
    if (!world_.hwpt)
        return;
    world_.hwpt->large_wished.clear();
    if (!world_.hwpt->destroying)
        return;
    for (const auto &ring : world_.hwpt->rings)
        ring->full_at_end |= ring->room() == 0;
    if (!broken(Rule::destroy_not_ended))
        end_rings(*world_.hwpt);
    gone();
}

} // namespace dirtyring::search
