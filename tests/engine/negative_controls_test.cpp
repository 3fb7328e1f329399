// Negative controls: what a rule is good for shows when it is broken. Each enumerator of Rule has a scenario that
// loses nothing and hangs nowhere as the engine is, and does one or the other once the rule is broken. Both halves run
// the same code.
//
// The scenarios are scheduled by hand, in one thread: a walker is what is stepped, a device is an object. Where only
// hardware can show the loss: races_test.
#include "tests/engine/hook.hpp"
#include "tests/engine/scenario.hpp"

#include <array>
#include <cstdlib>
#include <sched.h>
#include <string>
#include <thread>

namespace dirtyring::test {
namespace {

// ---- device --------------------------------------------------------------------------------------------------------

// The walker cleans and advances while the device is between its walk and its IOTLB.
Outcome swept_before_tag()
{
    Rig rig;
    prepare(rig);
    const Hook hook(Point::device_before_tag, [&] { rig.settle(); });
    rig.write(0, page0, page_size);
    rig.settle();
    rig.drain();
    rig.write(0, page0, page_size); // by the IOTLB
    return judge(rig);
}

// The region is advanced; the large entry must go with it.
Outcome large_leaf_twice()
{
    Rig rig;
    prepare(rig);
    rig.write(0, large, page_size);
    if (const Outcome first = judge(rig); first.bad())
        return first;
    rig.write(0, large, page_size);
    return judge(rig);
}

// The walker looks between D and the summary.
Outcome swept_before_summary()
{
    Rig rig;
    prepare(rig);
    const Hook hook(
        Point::device_between_dirty_and_summary,
        [&] {
            rig.settle();
            rig.drain();
        },
        Hook::Times::always); // broken, it is there for the tables above too
    rig.write(0, page0, page_size);
    return judge(rig);
}

// A leaf of 1 GiB in the second of two slices that share a top table.
Outcome gigabyte_in_second_slice()
{
    Rig rig({.aperture_lg2 = 31, .shards = 2, .memory = 2 * GiB});
    EXPECT_EQ(rig.map(GiB, GiB, GiB), 0);
    EXPECT_EQ(rig.enable(), 0);
    rig.write(0, GiB + 5 * page_size, page_size);
    return judge(rig);
}

// The walker sleeps, a device writes.
Outcome written_while_asleep()
{
    Rig rig;
    prepare(rig);
    SleepyWalker walker(rig);
    bool slept = walker.run();
    rig.write(0, page0, page_size);
    slept &= walker.run_until_idle();
    rig.drain();
    return {0, !slept || rig.lost() != 0};
}

// ---- walker --------------------------------------------------------------------------------------------------------

// The walker sweeps and the VMM copies while the device has its translation and has not written yet.
Outcome swept_before_data()
{
    Rig rig;
    prepare(rig);
    const Hook hook(Point::device_before_tag, [&] {
        rig.settle();
        rig.drain();
    });
    rig.write(0, page0, page_size);
    rig.settle();
    rig.drain();
    return judge(rig);
}

// A second thread of the device finds D set by the first, which is not at the summary yet; its DMA is complete, so a
// sync must report it.
Outcome synced_before_summary()
{
    Rig rig;
    prepare(rig);
    Outcome at_sync;
    const Hook hook(Point::device_between_dirty_and_summary, [&] {
        rig.write(1, page0, page_size);
        const Op &op = rig.submit(0, OpKind::sync);
        rig.settle();
        rig.drain();
        if (op.over())
            at_sync.lost = rig.lost();
    });
    rig.write(0, page0, page_size);
    const Outcome after = judge(rig);
    return {at_sync.lost + after.lost, after.hung};
}

// An unmap while the device has its translation and has not written yet.
Outcome unmapped_before_data()
{
    Rig rig;
    prepare(rig);
    const Op *op = nullptr;
    const Hook hook(Point::device_before_tag, [&] {
        op = &rig.submit_unmap(0, 4 * MiB);
        rig.settle();
        rig.drain();
    });
    rig.write(0, page0, page_size);
    const bool hung = !rig.run(*op);
    const Outcome after = judge(rig);
    return {after.lost, after.hung || hung};
}

// The VMM reads its ring only after the reply.
Outcome unmapped_with_full_ring()
{
    Rig rig({.leaf_lg2_max = 12, .capacity = 8});
    prepare(rig);
    for (std::uint64_t i = 0; i < 16; ++i)
        rig.write(0, 2 * i * page_size, page_size);
    rig.settle();
    std::uint64_t from = 0;
    for (unsigned tries = 0; tries < 100; ++tries) {
        const Op &op = rig.submit_unmap(from, 4 * MiB - from);
        if (!rig.run(op, false))
            return {0, true};
        from = op.reached;
        rig.drain();
        if (op.result == 0)
            return judge(rig);
        EXPECT_EQ(op.result, -EAGAIN);
    }
    return {0, true};
}

// The IOTLB holds an entry from the time when nobody tracked.
Outcome cached_before_enable()
{
    Rig rig;
    EXPECT_EQ(rig.map(0, 4 * MiB, 0), 0);
    rig.write(0, page0, page_size);
    EXPECT_EQ(rig.enable(), 0);
    rig.write(0, page0, page_size);
    return judge(rig);
}

// A device dies between D and the summary; before that another one finds D set and completes.
Outcome died_before_summary()
{
    struct Death {
    };
    Rig rig;
    prepare(rig);
    const Hook hook(Point::device_between_dirty_and_summary, [&] {
        rig.write(1, page0, page_size);
        throw Death{};
    });
    try {
        rig.write(0, page0, page_size);
    } catch (const Death &) {
        rig.bury(0);
    }
    return judge(rig);
}

// The same while ENABLE cleans, where devices mark all the time: the cleaning has passed the page.
Outcome died_while_enable_cleans()
{
    struct Death {
    };
    Rig rig({.always_on = true, .leaf_lg2_max = 12, .memory = 256 * MiB});
    EXPECT_EQ(rig.map(0, 128 * MiB, 0), 0);
    const Op &enable = rig.submit(0, OpKind::enable);
    rig.step();
    EXPECT_FALSE(enable.over());
    {
        const Hook hook(Point::device_between_dirty_and_summary, [] { throw Death{}; });
        EXPECT_THROW(rig.write(0, page0, page_size), Death);
    }
    rig.bury(0);
    EXPECT_TRUE(rig.run(enable));
    rig.copy_all();
    rig.write(1, page0, page_size);
    return judge(rig);
}

// An unmap of two slices in IOVA space. Its first part is done before dirt is reported, an ENABLE and a write come,
// then its second part; the VMM maps something else there before it reads the run.
Outcome enabled_between_two_parts()
{
    Rig rig({.shards = 2, .leaf_lg2_max = 12, .space = DR_SPACE_IOVA});
    const std::uint64_t border = 1ull << rig.geometry.slice_lg2;
    EXPECT_EQ(rig.map(border - page_size, 2 * page_size, 0), 0);
    const Op &first = rig.submit_unmap(border - page_size, page_size);
    EXPECT_TRUE(rig.run(first));
    EXPECT_EQ(first.told_epoch(), 0u);
    rig.note_unmapped(first);
    EXPECT_EQ(rig.enable(), 0);
    rig.write(0, border, page_size);

    Op &second = rig.submit_unmap(border, page_size);
    second.note = first.note;
    EXPECT_TRUE(rig.run(second, false));
    rig.note_unmapped(second);
    if (second.result == -EAGAIN) {
        const Op &rest = rig.submit_unmap(border, page_size);
        EXPECT_TRUE(rig.run(rest, false));
        EXPECT_EQ(rest.result, 0);
        rig.note_unmapped(rest);
    }
    const Op &map = rig.submit_map(border, page_size, 7 * page_size);
    EXPECT_TRUE(rig.run(map, false));
    rig.note_mapped(map);
    return judge(rig);
}

// A device is stopped in the middle of its DMA; the VMM would like to be rid of it before its last sync. Who detaches
// (the control plane, here the test) must not.
Outcome stopped_device_detached()
{
    Rig rig;
    prepare(rig);
    const Hook hook(Point::device_before_tag, [&] {
        if (broken(Rule::detach_stopped))
            rig.detach(0);
        rig.submit(0, OpKind::sync);
        rig.settle();
        rig.drain();
    });
    rig.write(0, page0, page_size);
    return judge(rig);
}

// More is dirty than the ring holds; the walker sleeps until the VMM kicks.
Outcome slept_before_full_ring()
{
    Rig rig({.leaf_lg2_max = 12, .capacity = 8});
    prepare(rig);
    for (std::uint64_t i = 0; i < 16; ++i)
        rig.write(0, 2 * i * page_size, page_size);
    SleepyWalker walker(rig);
    bool slept = walker.run();
    while (rig.drain() > 0)
        slept &= walker.run_until_idle();
    return {0, !slept || rig.lost() != 0};
}

// A device writes after the walker's last look and before it raises `asleep`.
Outcome written_while_falling_asleep()
{
    Rig rig;
    prepare(rig);
    SleepyWalker walker(rig);
    bool slept = walker.run_with([&] { rig.write(0, page0, page_size); });
    slept &= walker.run_until_idle();
    rig.drain();
    return {0, !slept || rig.lost() != 0};
}

// The VMM sleeps until it is called.
Outcome consumer_asleep()
{
    Rig rig;
    prepare(rig);
    rig.drain();
    EXPECT_TRUE(rig.consumer().arm());
    rig.write(0, page0, page_size);
    rig.settle();
    if (rig.state().calls == 0)
        return {0, true};
    rig.drain();
    return judge(rig);
}

// ---- leave_relaxed --------------------------------------------------------------------------------------------------

// Reads, watched by TSan, what the device wrote; the device's leave is all that orders the two. For a process of its
// own.
[[noreturn]] void read_behind_leave()
{
    auto &rig = *new Rig; // the device's thread outlives this function
    prepare(rig);
    static std::array<std::uint64_t, 512> data{};
    std::thread([&rig] {
        rig.device().enter();
        rig.device().write(0, data.data(), page_size);
        static_cast<void>(rig.device().leave());
        ::pause();
    }).detach();
    while (peek_word(reinterpret_cast<const std::byte *>(&rig.cell(0)->count)) != 2)
        sched_yield();
    while (rig.consumer().peek().empty())
        rig.step();
    std::uint64_t sum = 0;
    for (std::uint64_t i = 0; i < page_size; i += 8)
        sum += *reinterpret_cast<const std::uint64_t *>(rig.source.data() + i);
    std::exit(sum == 0 ? 0 : 1);
}

// ---- the table ------------------------------------------------------------------------------------------------------

struct Control {
    friend void PrintTo(const Control &c, std::ostream *out) { *out << c.name; }

    Rule rule;
    const char *name;
    Scenario scenario;
};

Control control(Rule rule)
{
    switch (rule) { // no default: a rule that is added needs a scenario
    case Rule::none:
        break;
    case Rule::tag_after_walk:
        return {rule, "tag_after_walk", swept_before_tag};
    case Rule::iotlb_across_regions:
        return {rule, "iotlb_across_regions", large_leaf_twice};
    case Rule::section_without_order:
    case Rule::advance_plain:
    case Rule::sample_before_advance:
        return {rule, "races_test", nullptr};
    case Rule::leave_relaxed:
        return {rule, "leave_relaxed", nullptr};
    case Rule::summary_without_order:
        return {rule, "summary_without_order", swept_before_summary};
    case Rule::summary_shared:
        return {rule, "summary_shared", gigabyte_in_second_slice};
    case Rule::no_doorbell:
        return {rule, "no_doorbell", written_while_asleep};
    case Rule::section_over_io:
        return {rule, "section_over_io", published_while_pinned};
    case Rule::pin_after_look:
        return {rule, "pin_after_look", closed_while_pinning};
    case Rule::mark_before_data:
        return {rule, "mark_before_data", swept_while_pinned};
    case Rule::no_pin_bell:
        return {rule, "no_pin_bell", unpinned_while_asleep};
    case Rule::unmap_ignores_pins:
        return {rule, "unmap_ignores_pins", unmapped_while_pinned};
    case Rule::sync_ignores_pins:
        return {rule, "sync_ignores_pins", synced_while_pinned};
    case Rule::no_grace_after_pins:
        return {rule, "no_grace_after_pins", unpinned_before_summary};
    case Rule::death_ignores_pins:
        return {rule, "death_ignores_pins", died_with_pin};
    case Rule::no_grace:
        return {rule, "no_grace", swept_before_data};
    case Rule::publish_before_advance:
        return {rule, "publish_before_advance", swept_before_data};
    case Rule::no_leading_grace:
        return {rule, "no_leading_grace", synced_before_summary};
    case Rule::unmap_without_grace:
        return {rule, "unmap_without_grace", unmapped_before_data};
    case Rule::unmap_waits_for_room:
        return {rule, "unmap_waits_for_room", unmapped_with_full_ring};
    case Rule::enable_without_advance:
        return {rule, "enable_without_advance", cached_before_enable};
    case Rule::no_full_scan_on_death:
        return {rule, "no_full_scan_on_death", died_before_summary};
    case Rule::cleaned_for_good:
        return {rule, "cleaned_for_good", died_while_enable_cleans};
    case Rule::unmap_passes_enable:
        return {rule, "unmap_passes_enable", enabled_between_two_parts};
    case Rule::detach_stopped:
        return {rule, "detach_stopped", stopped_device_detached};
    case Rule::no_want_kick:
        return {rule, "no_want_kick", slept_before_full_ring};
    case Rule::no_second_look:
        return {rule, "no_second_look", written_while_falling_asleep};
    case Rule::arm_without_look:
        return {rule, "arm_without_look", consumer_asleep};
    case Rule::clear_before_stage:
    case Rule::restart_without_advance:
    case Rule::restart_without_scan:
    case Rule::resumed_map_not_scanned:
    case Rule::cut_not_noted:
        return {rule, "by a death: schedule_test", nullptr};
    case Rule::split_drops_dirty:
    case Rule::naive_replicated_split:
    case Rule::replica_reported_alone:
    case Rule::resized_not_summarized:
    case Rule::resized_behind_pass:
    case Rule::break_taken_for_fault:
    case Rule::collapse_cuts_leaf:
    case Rule::naive_collapse:
    case Rule::collapse_goes_on:
        return {rule, "resize_test", nullptr};
    case Rule::death_skips_begun:
    case Rule::take_before_stage:
    case Rule::restart_opens_early:
    case Rule::closes_for_devices_only:
    case Rule::restart_without_call:
    case Rule::sync_marks_again:
    case Rule::present_forgotten:
    case Rule::relinked_at_once:
    case Rule::collapse_forgotten:
    case Rule::sync_takes_last_slot:
    case Rule::leaf_left_in_part:
    case Rule::taken_out_stays_mapped:
    case Rule::split_raises_limit:
    case Rule::due_marker_forgotten:
    case Rule::begun_stays:
    case Rule::failed_map_not_scanned:
    case Rule::failed_map_is_whole:
    case Rule::hole_not_counted:
        return {rule, "restart_test", nullptr};
    case Rule::commands_not_recorded:
        return {rule, "command_journal_test", nullptr};
    case Rule::nap_ignores_bell:
        return {rule, "walker_test", nullptr};
    case Rule::no_lock:
        return {rule, "service_restart_test", nullptr};
    case Rule::destroy_not_ended:
    case Rule::takeover_wakes_nobody:
        return {rule, "service_survival_test", nullptr};
    case Rule::epoch_at_submission:
        return {rule, "service_overtaken_test", nullptr};
    }
    return {Rule::none, "none", nullptr};
}

std::vector<Control> controls()
{
    std::vector<Control> all;
    for (int i = 1; control(static_cast<Rule>(i)).rule != Rule::none; ++i) {
        if (const Control c = control(static_cast<Rule>(i)); c.scenario != nullptr)
            all.push_back(c);
    }
    return all;
}

class NegativeControl : public testing::TestWithParam<Control>
{
};

TEST_P(NegativeControl, GreenAsItIs)
{
    const Outcome o = GetParam().scenario();
    EXPECT_EQ(o.lost, 0u);
    EXPECT_FALSE(o.hung);
}

TEST_P(NegativeControl, RedWhenBroken)
{
    const Breaking breaking(GetParam().rule);
    EXPECT_TRUE(GetParam().scenario().bad()) << "neither a page lost nor a hang";
}

INSTANTIATE_TEST_SUITE_P(Rules, NegativeControl, testing::ValuesIn(controls()),
                         [](const auto &info) { return std::string(info.param.name); });

class LeaveRelaxed : public testing::Test
{
  protected:
    void SetUp() override
    {
        if (!under_tsan)
            GTEST_SKIP() << "every store releases on x86: shown in the TSan build";
        GTEST_FLAG_SET(death_test_style, "threadsafe");
    }
};
using LeaveRelaxedDeathTest = LeaveRelaxed;

TEST_F(LeaveRelaxedDeathTest, GreenAsItIs)
{
    EXPECT_EXIT(read_behind_leave(), testing::ExitedWithCode(0), "");
}

TEST_F(LeaveRelaxedDeathTest, RedWhenBroken)
{
    const Breaking breaking(Rule::leave_relaxed);
    EXPECT_EXIT(read_behind_leave(), testing::ExitedWithCode(66), "data race");
}

} // namespace
} // namespace dirtyring::test
