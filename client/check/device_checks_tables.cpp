// What a device does in tables other than it may expect: large, read-only, wrong, changed under it, of another version.
#include "client/check/device_checks_watch.hpp"

namespace dirtyring::check {
namespace {

using iommu::AmdV1;

constexpr std::uint64_t enough = 40; // sections, after which it has done what it does with such a table

// One leaf of 64 regions, whose generations are numbered so that what was cached in one has, after a sweep, the tag of
// the region below it.
void large_leaf(Stage &s)
{
    Watch::need_sound(s);
    PlayedHwpt hwpt(s, PlayedHwpt::Leaves::one_of_1_gib);
    hwpt.start_and_attach();
    Watch watch(s, hwpt);
    watch.blame([](std::uint64_t) { return Rule("D-6"); });
    const auto until = Deadline::Clock::now() + s.deadline.patience() / 3;
    for (int sweeps = 0; sweeps < 100 && watch.look(500us) && Deadline::Clock::now() < until;) {
        if (!watch.wrote()) // one sweep, no more, between one write and the next
            continue;
        watch.sweep();
        ++sweeps;
    }
    const auto region = [](std::uint64_t page_number) { return page_number * page >> DR_REGION_LG2; };
    const Pages &written = watch.written();
    if (written.empty() || region(*written.begin()) == region(*written.rbegin()))
        throw Broken("the program wrote in one region of a 1 GiB leaf, or in none");
    s.verdicts.pass("D-6");
}

void read_only_map(Stage &s)
{
    PlayedHwpt hwpt(s);
    for (std::uint64_t p = 0; p < PlayedHwpt::pages; ++p)
        hwpt.leaf(p) &= ~AmdV1::write_bit;
    hwpt.start_and_attach();
    (void)hwpt.comes_soon([&] { return hwpt.sections() > enough; });
    if (hwpt.sections() == 0)
        throw Broken("the program made no DMA");
    s.expect(hwpt.changed().empty(), "D-11", "maps without the right to write", text_of(hwpt.changed()),
             "no page written");
}

// Nothing of it translates to anything.
void wrong_entries(Stage &s)
{
    struct Wrong {
        const char *what;
        std::function<void(PlayedHwpt &)> make;
    };
    constexpr std::uint64_t far = 1ull << 51;
    const auto all_leaves = [](PlayedHwpt &h, std::uint64_t value) {
        for (std::uint64_t p = 0; p < PlayedHwpt::pages; ++p)
            h.leaf(p) = value;
    };
    const Wrong wrongs[] = {
        {"an OA outside the guest's memory",
         [&](auto &h) {
             all_leaves(h, AmdV1::leaf(far, iommu::granule_lg2, {true, true}));
         }},
        {"an OA behind the guest's memory",
         [&](auto &h) {
             all_leaves(h, AmdV1::leaf(PlayedHwpt::oa_base + (4ull << 30), iommu::granule_lg2, {true, true}));
         }},
        {"a table where only leaves are", [&](auto &h) { all_leaves(h, AmdV1::table(1ull << 38, 0)); }},
        {"the index of no table", [](PlayedHwpt &h) { h.root() = AmdV1::table(1ull << 38, 1); }},
        {"the index behind the last table", [](PlayedHwpt &h) { h.root() = AmdV1::table(h.header().tables, 1); }},
    };
    unsigned met = 0;
    for (const Wrong &wrong : wrongs) {
        PlayedHwpt hwpt(s);
        wrong.make(hwpt);
        hwpt.start_and_attach();
        (void)hwpt.comes_soon([&] { return hwpt.sections() > enough; });
        s.need(!hwpt.subject.crashed(), "D-12", wrong.what, hwpt.subject.state(), "it goes on, or ends by itself");
        s.need(hwpt.changed().empty(), "D-12", wrong.what, text_of(hwpt.changed()), "no page written");
        met += hwpt.sections() > 0;
    }
    if (met == 0)
        s.verdicts.skip("D-12", "the program made no DMA");
}

// Pages change places under it, in pairs.
void remaps(Stage &s)
{
    Watch::need_sound(s);
    PlayedHwpt hwpt(s);
    hwpt.start_and_attach();
    if (hwpt.pins > 0)
        throw Broken("the program pins, and what is pinned is not remapped");
    std::vector<std::uint64_t> wanted(PlayedHwpt::pages);
    std::uint64_t marked = 0;
    const auto until = Deadline::Clock::now() + s.deadline.patience() / 4;
    for (std::uint64_t round = 1; marked < 200 && Deadline::Clock::now() < until && !hwpt.subject.ended(); ++round) {
        for (std::uint64_t p = 0; p < PlayedHwpt::pages; ++p) {
            const std::uint64_t oa = PlayedHwpt::oa_base + (p ^ (round & 1)) * page;
            wanted[p] = AmdV1::leaf(oa, iommu::granule_lg2, {true, true});
            word(hwpt.leaf(p)).store(wanted[p], std::memory_order_seq_cst);
        }
        hwpt.advance();
        hwpt.grace();
        hwpt.serve_for(10ms);
        for (std::uint64_t p = 0; p < PlayedHwpt::pages; ++p) {
            const std::uint64_t now = word(hwpt.leaf(p)).load(std::memory_order_seq_cst);
            s.need(AmdV1::same_translation(now, wanted[p]), "D-8", fmt::format("the leaf of page {:#x}, changed", p),
                   fmt::format("{:#x}", now), fmt::format("{:#x}, and A and D", wanted[p]));
            marked += AmdV1::dirty(now);
        }
    }
    if (marked == 0)
        throw Broken("the program marked nothing while entries changed");
    s.verdicts.pass("D-8");
}

void headers(Stage &s)
{
    struct Wrong {
        const char *what;
        void (*make)(dr_translation_header &);
    };
    const Wrong wrongs[] = {{"another magic", [](auto &h) { h.magic ^= 1ull << 40; }},
                            {"version 2", [](auto &h) { h.version = 2; }},
                            {"format 99", [](auto &h) { h.format = 99; }}};
    for (const Wrong &wrong : wrongs) {
        PlayedHwpt hwpt(s);
        wrong.make(hwpt.header());
        hwpt.start_and_attach();
        const bool used = hwpt.comes_soon([&] { return hwpt.entries_touched() || hwpt.detached; }) && !hwpt.detached;
        s.expect(!used && hwpt.changed().empty(), "D-1", fmt::format("a translation region of {}", wrong.what),
                 "the device walks it", "it is not used");
    }
}

const Situation situations[] = {
    {"a leaf of 1 GiB", large_leaf, {"D-6"}},
    {"a read-only map", read_only_map, {"D-11"}},
    {"entries that lead nowhere", wrong_entries, {"D-12"}},
    {"entries that change", remaps, {"D-8"}},
    {"translation regions that are none", headers, {"D-1"}},
};

} // namespace

std::span<const Situation> device_table_situations()
{
    return situations;
}

} // namespace dirtyring::check
