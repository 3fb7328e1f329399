// The owner of a shard dies, and another takes up what it has left: one scenario, and a death at every place that has a
// name.
#include "tests/engine/death_at.hpp"
#include "tests/engine/hook.hpp"
#include "tests/engine/rig.hpp"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <array>
#include <cerrno>
#include <set>
#include <string>
#include <string_view>

namespace dirtyring::test {
namespace {

constexpr std::uint64_t P = page_size;

constexpr std::array names_of_points = {
#define X(name) std::string_view(#name),
    DIRTYRING_POINTS(X)
#undef X
};

// Leaves of all sizes, small steps: the ring is short, so an unmap is cut; devices write all the time, and one has a
// pin.
bool scenario(Rig &rig, DeathAt &death)
{
    const auto write = [&] {
        for (const std::uint64_t iova : {GiB - 3 * P, GiB + 5 * MiB, 8 * GiB + 7 * P, 8 * GiB + 21 * P})
            rig.write(0, iova, P);
    };
    const auto map = [&](std::uint64_t iova, std::uint64_t length, std::uint64_t oa) {
        const Op &op = rig.submit_map(iova, length, oa);
        if (!death.run(rig, op) || op.result != 0)
            return false;
        rig.note_mapped(op);
        return true;
    };
    const auto unmap = [&](std::uint64_t iova, std::uint64_t length) {
        for (std::uint64_t at = iova; at < iova + length;) {
            const Op &op = rig.submit_unmap(at, iova + length - at);
            if (!death.run(rig, op) || (op.result != 0 && op.result != -EAGAIN))
                return false;
            rig.note_unmapped(op);
            at = op.reached;
            rig.drain();
        }
        return true;
    };
    if (!map(GiB - 2 * MiB, 2 * MiB, 0) || !map(GiB, 4 * MiB, 2 * MiB) || !map(GiB + 4 * MiB, 10 * MiB, 6 * MiB) ||
        !map(8 * GiB, MiB, 20 * MiB) || !death.run(rig, rig.submit(0, OpKind::enable)))
        return false;
    rig.copy_all();
    write();
    const Pin pin = rig.pin(1, 8 * GiB, P);
    rig.land(pin);
    ++rig.cookie;
    const Op &sync = rig.submit(0, OpKind::sync);
    for (unsigned i = 0; i < 50; ++i) {
        death.step(rig);
        write();
        rig.drain(0, 2);
    }
    rig.unpin(1, pin);
    if (!death.run(rig, sync))
        return false;
    const auto resize = [&](OpKind kind, std::uint64_t iova, std::uint64_t length, unsigned lg2) {
        const Op &op = rig.submit_resize(kind, iova, length, lg2);
        for (unsigned i = 0; i < 100'000 && !op.over(); ++i) {
            death.step(rig);
            write();
            rig.drain(0, 2);
        }
        return op.over() && op.result == 0;
    };
    if (!resize(OpKind::split, GiB, 14 * MiB, 12) || !resize(OpKind::collapse, GiB, 14 * MiB, 30) ||
        !resize(OpKind::split, GiB + 5 * MiB, 2 * MiB, 16) || !resize(OpKind::split, 8 * GiB, MiB, 13))
        return false;
    for (std::uint64_t at = 0; at < MiB; at += 3 * P)
        rig.write(1, 8 * GiB + at, 8);
    if (!unmap(8 * GiB, MiB) || !map(8 * GiB, 4 * MiB, 40 * MiB))
        return false;
    write();
    if (!unmap(GiB, 4 * MiB) || !map(GiB + 2 * MiB, MiB, 32 * MiB))
        return false;
    write();
    const auto held = rig.pin(1, 8 * GiB + 3 * P, P);
    rig.land(held);
    rig.bury(1);
    write();
    const Op &last = rig.submit(0, OpKind::sync);
    return death.run(rig, last);
}

struct Kind {
    const char *name;
    dr_space space;
    unsigned format = iommu::AmdV1::id;
    bool always_on = false;
    bool all_sizes = false;
    iommu::Break how = iommu::Break::none;
    dr_split split = DR_SPLIT_NONE;

    friend void PrintTo(const Kind &k, std::ostream *out) { *out << k.name; }
};

class Dies : public testing::TestWithParam<Kind>
{
};

TEST_P(Dies, AtEveryPlaceAndNothingIsLost)
{
    // Those of what is above the shard, and of a sleep: others' tests. Those of devices come first, and are none of
    // ours.
    const std::set<std::string_view> elsewhere = {"device_before_tag", "device_between_dirty_and_summary",
                                                  "device_before_pin", "walker_before_sleep",
                                                  "command_recorded",  "command_taken",
                                                  "command_begun",     "command_done",
                                                  "command_completed", "object_stored",
                                                  "object_recorded",   "object_forgotten",
                                                  "destroy_noted",     "ring_ended",
                                                  "restart_begun",     "restart_locked",
                                                  "restart_rebuilt",   "restart_advanced",
                                                  "restart_published"};
    for (auto p = static_cast<unsigned>(Point::walker_before_advance); p < names_of_points.size(); ++p) {
        for (const unsigned n : {1u, 2u, 3u, 7u, 20u}) {
            Rig rig({.format = GetParam().format,
                     .always_on = GetParam().always_on,
                     .all_sizes = GetParam().all_sizes,
                     .split = GetParam().split,
                     .how = GetParam().how,
                     .space = GetParam().space,
                     .capacity = 16,
                     .memory = 64 * MiB});
            DeathAt death(static_cast<Point>(p), n);
            ASSERT_TRUE(scenario(rig, death)) << names_of_points[p] << ' ' << n << ": " << rig.describe();
            at_point = nullptr;
            ASSERT_EQ(rig.sync(), 0) << names_of_points[p] << ' ' << n;
            EXPECT_EQ(rig.lost(), 0u) << names_of_points[p] << ' ' << n;
            EXPECT_EQ(rig.stray, 0u) << names_of_points[p] << ' ' << n;
            const bool reached = !elsewhere.contains(names_of_points[p]) &&
                                 (GetParam().space == DR_SPACE_IOVA || names_of_points[p] != "unmap_marked") &&
                                 ((GetParam().all_sizes && GetParam().split == DR_SPLIT_NONE) ||
                                  !names_of_points[p].ends_with("replica_taken")) &&
                                 (GetParam().all_sizes || !names_of_points[p].starts_with("split_replica")) &&
                                 (GetParam().split == DR_SPLIT_NONE || names_of_points[p] != "unmap_unlinked");
            if (n == 1 && reached) {
                EXPECT_TRUE(death.came()) << names_of_points[p];
            }
            for (const std::uint64_t iova :
                 {GiB - 2 * MiB, GiB + 2 * MiB, GiB + 5 * MiB, 8 * GiB, 8 * GiB + 4 * MiB - P})
                EXPECT_EQ(rig.read(0, iova, 8).reason, iommu::FaultReason::none)
                    << names_of_points[p] << ' ' << n << ' ' << std::hex << iova;
            for (const std::uint64_t iova : {GiB, GiB + 3 * MiB, 8 * GiB + 4 * MiB})
                EXPECT_EQ(rig.read(0, iova, 8).reason, iommu::FaultReason::not_present)
                    << names_of_points[p] << ' ' << n << ' ' << std::hex << iova;
        }
    }
}

INSTANTIATE_TEST_SUITE_P(
    Kinds, Dies,
    testing::Values(Kind{"Iova", DR_SPACE_IOVA}, Kind{"Oa", DR_SPACE_OA},
                    Kind{"IovaAlwaysOn", DR_SPACE_IOVA, iommu::AmdV1::id, true},
                    Kind{"OaEager", DR_SPACE_OA, iommu::AmdV1::id, false, true, iommu::Break::none, DR_SPLIT_EAGER},
                    Kind{"OaAllSizes", DR_SPACE_OA, iommu::AmdV1::id, false, true},
                    Kind{"IovaVtdSs", DR_SPACE_IOVA, iommu::VtdSs::id},
                    Kind{"IovaSmmuV3S2", DR_SPACE_IOVA, iommu::SmmuV3S2::id, false, false, iommu::Break::not_cached},
                    Kind{"IovaSmmuV3S1", DR_SPACE_IOVA, iommu::SmmuV3S1::id, false, false, iommu::Break::stall}),
    [](const auto &info) { return std::string(info.param.name); });

// It dies while it begins again, as often as it likes.
TEST(Restart, MayDieItself)
{
    for (const Point where :
         {Point::restart_advanced, Point::sweep_before_publish, Point::sweep_published, Point::restart_published}) {
        Rig rig({.leaf_lg2_max = 12, .capacity = 16});
        ASSERT_EQ(rig.map(0, MiB, 0), 0);
        ASSERT_EQ(rig.enable(), 0);
        for (std::uint64_t at = 0; at < MiB; at += 2 * P)
            rig.write(0, at, P);
        rig.step();
        for (unsigned n = 0; n < 5; ++n) {
            DeathAt death(where, 1);
            rig.restart();
            try {
                rig.settle();
            } catch (const Death &) {
            }
        }
        rig.restart();
        ASSERT_EQ(rig.sync(), 0);
        EXPECT_EQ(rig.lost(), 0u);
    }
}

// A consumer that sleeps armed, and the owner dies between publishing and calling.
TEST(Restart, CallsTheConsumerWhateverItAskedFor)
{
    const auto calls_after_restart = [] {
        Rig rig({.leaf_lg2_max = 12});
        static_cast<void>(rig.map(0, MiB, 0));
        static_cast<void>(rig.enable());
        rig.restart();
        const std::uint64_t before = rig.state().calls;
        rig.settle();
        return rig.state().calls - before;
    };
    EXPECT_EQ(calls_after_restart(), 1u);
    const Breaking breaking(Rule::restart_without_call);
    EXPECT_EQ(calls_after_restart(), 0u);
}

// The VMM has read the marker, so it knows that the sync is done, and does not read on until the service knows it too.
TEST(Restart, ASyncWhoseMarkerIsThereNeedsNoRoom)
{
    const auto done_without_room = [] {
        Rig rig({.leaf_lg2_max = 12, .capacity = 16});
        static_cast<void>(rig.map(0, MiB, 0));
        static_cast<void>(rig.enable());
        const Op &sync = rig.submit(0, OpKind::sync);
        DeathAt death(Point::sync_marked, 1);
        while (!death.came())
            death.step(rig);
        for (std::uint64_t at = 0; at < MiB; at += 2 * P)
            rig.write(0, at, 8);
        rig.settle();
        return sync.over();
    };
    EXPECT_TRUE(done_without_room());
    const Breaking breaking(Rule::sync_marks_again);
    EXPECT_FALSE(done_without_room());
}

// The service dies in the middle of a map, then a device with a pin in it; the map goes on.
TEST(Restart, ReportsWhatADeadDeviceHadPinnedInAnInterruptedMap)
{
    const auto lost = [] {
        Rig rig({.leaf_lg2_max = 12});
        static_cast<void>(rig.enable());
        const Op &map = rig.submit_map(0, MiB, 0);
        DeathAt death(Point::map_leaf_stored, 100);
        while (!death.came())
            death.step(rig);
        const Pin pin = rig.pin(1, 7 * P, P);
        EXPECT_EQ(pin.error, 0);
        rig.land(pin);
        rig.bury(1);
        EXPECT_TRUE(rig.run(map));
        rig.note_mapped(map);
        EXPECT_EQ(rig.sync(), 0);
        return rig.lost();
    };
    EXPECT_EQ(lost(), 0u);
    const Breaking breaking(Rule::death_skips_begun);
    EXPECT_GT(lost(), 0u);
}

TEST(Restart, ReportsWhatAnUnmapHadTakenOut)
{
    const auto lost = [] {
        Rig rig({.leaf_lg2_max = 12});
        EXPECT_EQ(rig.map(0, MiB, 0), 0);
        EXPECT_EQ(rig.enable(), 0);
        rig.write(0, 7 * P, P);
        const Op &unmap = rig.submit_unmap(0, MiB);
        DeathAt death(Point::unmap_taken_out, 1);
        EXPECT_TRUE(death.run(rig, unmap));
        EXPECT_TRUE(death.came());
        rig.note_unmapped(unmap);
        EXPECT_EQ(rig.sync(), 0);
        return rig.lost();
    };
    EXPECT_EQ(lost(), 0u);
    const Breaking breaking(Rule::take_before_stage);
    EXPECT_GT(lost(), 0u);
}

// The service dies when an unmap has taken leaves out and not advanced; a device still has a translation that went
// through one of them.
TEST(Restart, LetsNobodyPinWhatIsTakenOut)
{
    const auto lost = [] {
        Rig rig({.leaf_lg2_max = 12});
        EXPECT_EQ(rig.map(0, MiB, 0), 0);
        EXPECT_EQ(rig.map(GiB, P, MiB), 0);
        EXPECT_EQ(rig.enable(), 0);
        rig.write(0, 7 * P, P);
        const Pin elsewhere = rig.pin(1, GiB, P); // else no range need be closed
        EXPECT_EQ(elsewhere.error, 0);
        const Op &unmap = rig.submit_unmap(0, MiB);
        DeathAt death(Point::unmap_taken_out, 1);
        while (!death.came())
            death.step(rig);
        const Pin pin = rig.pin(0, 7 * P, P);
        if (pin.error == 0) {
            for (unsigned i = 0; i < 100; ++i) { // what was taken out is published
                rig.step();
                rig.drain();
            }
            rig.land(pin);
            rig.unpin(0, pin);
        }
        rig.unpin(1, elsewhere);
        EXPECT_TRUE(rig.run(unmap));
        rig.note_unmapped(unmap);
        EXPECT_EQ(rig.sync(), 0);
        return rig.lost();
    };
    EXPECT_EQ(lost(), 0u);
    const Breaking breaking(Rule::restart_opens_early);
    EXPECT_GT(lost(), 0u);
}

// The same when all devices are leaving: no shard waits for them any more, but they were not forgotten yet.
TEST(Restart, LetsNobodyPinWhatIsTakenOutThoughAllHadLeft)
{
    const auto pins = [] {
        Rig rig({.leaf_lg2_max = 12, .devices = 1});
        EXPECT_EQ(rig.map(0, MiB, 0), 0);
        EXPECT_EQ(rig.enable(), 0);
        rig.write(0, 7 * P, P);
        rig.detach_in_vain(0);
        const Op &unmap = rig.submit_unmap(0, MiB);
        DeathAt death(Point::unmap_taken_out, 1);
        while (!death.came())
            death.step(rig);
        const Pin pin = rig.pin(0, 7 * P, P);
        if (pin.error == 0)
            rig.unpin(0, pin);
        EXPECT_TRUE(rig.run(unmap));
        return pin.error == 0;
    };
    EXPECT_FALSE(pins());
    const Breaking breaking(Rule::closes_for_devices_only);
    EXPECT_TRUE(pins());
}

// A of table entries is the devices'.
TEST(Restart, KeepsAOfTables)
{
    Rig rig({.format = iommu::VtdSs::id, .leaf_lg2_max = 12});
    ASSERT_EQ(rig.map(0, MiB, 0), 0);
    ASSERT_EQ(rig.enable(), 0);
    rig.read(0, 0, 8);
    const std::uint64_t before = *rig.entry(0, 1);
    ASSERT_EQ(before, iommu::VtdSs::accessed_table(before));
    rig.restart();
    EXPECT_EQ(*rig.entry(0, 1), before);
}

TEST(Restart, KeepsASleepingDeviceWaitingForNobody)
{
    Rig rig({.leaf_lg2_max = 12});
    ASSERT_EQ(rig.map(0, MiB, 0), 0);
    ASSERT_EQ(rig.enable(), 0);
    SleepyWalker walker(rig);
    ASSERT_TRUE(walker.run()); // asleep, and there it dies
    rig.restart();
    rig.write(0, 0, P); // rings, or finds it awake
    SleepyWalker successor(rig);
    ASSERT_TRUE(successor.run());
    rig.drain();
    EXPECT_EQ(rig.lost(), 0u);
}

// ---- a device that does not go on -----------------------------------------------------------------------------------

TEST(Stall, IsToldOnceAndTakenBack)
{
    Rig rig({.leaf_lg2_max = 12, .stall_ns = 1'000'000});
    ASSERT_EQ(rig.map(0, MiB, 0), 0);
    ASSERT_EQ(rig.enable(), 0);
    rig.device(1).enter();
    rig.write(0, 0, P);
    rig.settle();
    EXPECT_TRUE(rig.state().stalled.empty()) << "not yet";
    rig.now += 2'000'000;
    rig.settle();
    rig.now += 2'000'000;
    rig.settle();
    EXPECT_EQ(rig.state().stalled, std::vector<const dr_cell *>{rig.cell(1)});
    static_cast<void>(rig.device(1).leave());
    rig.settle();
    EXPECT_EQ(rig.state().stalled, (std::vector<const dr_cell *>{rig.cell(1), nullptr}));
    rig.drain();
    EXPECT_EQ(rig.lost(), 0u);
}

TEST(Stall, EndsWithTheDevice)
{
    Rig rig({.leaf_lg2_max = 12, .stall_ns = 1'000'000});
    ASSERT_EQ(rig.map(0, MiB, 0), 0);
    ASSERT_EQ(rig.enable(), 0);
    rig.device(1).enter();
    rig.write_inside(1, 0, P);
    rig.write(0, P, P);
    rig.settle();
    rig.now += 2'000'000;
    rig.settle();
    ASSERT_EQ(rig.state().stalled.size(), 1u);
    rig.bury(1);
    rig.settle();
    EXPECT_EQ(rig.state().stalled.size(), 2u);
    EXPECT_TRUE(rig.state().dying.empty());
    rig.drain();
    EXPECT_EQ(rig.lost(), 0u);
}

} // namespace
} // namespace dirtyring::test
