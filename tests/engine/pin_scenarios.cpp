// Scenarios of the negative controls: DMA in flight without a section.
#include "tests/engine/hook.hpp"
#include "tests/engine/scenario.hpp"

namespace dirtyring::test {

// One device has a read from its disk in flight; what another writes is published meanwhile.
Outcome published_while_pinned()
{
    Rig rig({.leaf_lg2_max = 12});
    prepare(rig);
    const Pin pin = rig.pin(0, page0, page_size);
    rig.write(1, large, page_size);
    rig.settle();
    const bool hung = rig.drain() == 0;
    rig.land(pin);
    rig.unpin(0, pin);
    const Outcome after = judge(rig);
    return {after.lost, after.hung || hung};
}

// An unmap closes the range, finds no pin, and has taken out the first leaves, just before the slot is taken.
Outcome closed_while_pinning()
{
    constexpr std::uint64_t length = 32 * MiB;
    Rig rig({.leaf_lg2_max = 12});
    EXPECT_EQ(rig.map(0, length, 0), 0);
    EXPECT_EQ(rig.enable(), 0);
    const Op *unmap = nullptr;
    const Hook hook(Point::device_before_pin, [&] {
        unmap = &rig.submit_unmap(0, length);
        rig.step();
    });
    const Pin pin = rig.pin(0, length - page_size, page_size);
    rig.settle();
    if (pin.error == 0) {
        rig.land(pin);
        rig.unpin(0, pin);
    }
    const bool hung = !rig.run(*unmap);
    const Outcome after = judge(rig);
    return {after.lost, after.hung || hung};
}

// The walker sweeps and the VMM copies before the data lands.
Outcome swept_while_pinned()
{
    Rig rig;
    prepare(rig);
    const Pin pin = rig.pin(0, page0, page_size);
    rig.settle();
    rig.drain();
    rig.land(pin);
    rig.unpin(0, pin);
    return judge(rig);
}

// An unmap waits for a pin and the walker sleeps. The pin is for reading, so no Dirty bit wakes it.
Outcome unpinned_while_asleep()
{
    Rig rig;
    prepare(rig);
    const Pin pin = rig.pin(0, page0, page_size, false);
    const Op &unmap = rig.submit_unmap(0, 4 * MiB);
    SleepyWalker walker(rig);
    bool slept = walker.run();
    rig.unpin(0, pin);
    slept &= walker.run_until_idle();
    return {0, !slept || !unmap.over()};
}

// The VMM takes the map away while the data is in flight.
Outcome unmapped_while_pinned()
{
    Rig rig;
    prepare(rig);
    const Pin pin = rig.pin(0, page0, page_size);
    const Op &unmap = rig.submit_unmap(0, 4 * MiB);
    rig.settle();
    rig.land(pin);
    rig.unpin(0, pin);
    const bool hung = !rig.run(unmap);
    const Outcome after = judge(rig);
    return {after.lost, after.hung || hung};
}

// The VMM stops the guest and syncs while the data is in flight: after the sync nothing lands any more.
Outcome synced_while_pinned()
{
    Rig rig;
    prepare(rig);
    const Pin pin = rig.pin(0, page0, page_size);
    const Op &sync = rig.submit(0, OpKind::sync);
    rig.settle();
    rig.drain();
    rig.land(pin);
    Outcome at_sync;
    if (sync.over())
        at_sync.lost = rig.lost();
    rig.unpin(0, pin);
    const Outcome after = judge(rig);
    return {at_sync.lost + after.lost, after.hung};
}

// The data lands and the pin goes while another device has set D of the page and is not at the summary yet.
Outcome unpinned_before_summary()
{
    Rig rig;
    prepare(rig);
    const Pin pin = rig.pin(0, page0, page_size);
    const Op &sync = rig.submit(0, OpKind::sync);
    rig.settle();
    Outcome at_sync;
    const Hook hook(Point::device_between_dirty_and_summary, [&] {
        rig.land(pin);
        rig.unpin(0, pin);
        rig.settle();
        rig.drain();
        if (sync.over())
            at_sync.lost = rig.lost();
    });
    rig.write(1, page0, page_size);
    const Outcome after = judge(rig);
    return {at_sync.lost + after.lost, after.hung};
}

// The data has landed and the device dies before it says so.
Outcome died_with_pin()
{
    Rig rig;
    prepare(rig);
    const Pin pin = rig.pin(0, page0, page_size);
    rig.land(pin);
    rig.bury(0);
    return judge(rig);
}

} // namespace dirtyring::test
