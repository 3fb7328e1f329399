#include "client/check/device_checks_watch.hpp"

#include <algorithm>

namespace dirtyring::check {

bool Watch::look(std::chrono::microseconds after)
{
    hwpt_.burst(after);
    const bool goes_on = !hwpt_.subject.ended();
    const Pages changed = hwpt_.changed();
    check_sections(changed);
    check_slots();
    check_marks(changed);
    check_summary(changed);
    hwpt_.remember(changed);
    written_.insert(changed.begin(), changed.end());
    wrote_ = !changed.empty();
    quiet_between_ = quiet_between_ || (!changed.empty() && !hwpt_.inside());
    return goes_on;
}

Rule Watch::blame_for(std::uint64_t page_number) const
{
    if (blame_)
        return blame_(page_number);
    if (hwpt_.has_pinned())
        return "D-18";
    return written_.contains(page_number) ? Rule("D-4") : Rule("D-9");
}

// Whoever marks before it writes, or before it gives a slot back, has marked what has changed.
void Watch::check_marks(const Pages &changed)
{
    if (!iommu::AmdV1::tracks(hwpt_.control().context))
        return;
    for (const std::uint64_t p : changed) {
        if (!hwpt_.dirty(p) && hwpt_.pinned(p))
            continue;
        stage_.need(hwpt_.dirty(p), blame_for(p), fmt::format("page {:#x}", p), "it was written while D is clear",
                    "D set in its leaf");
        if (written_.contains(p))
            rewritten_.insert(p);
    }
}

// Between two looks no section and no pin, and yet something was written.
void Watch::check_sections(const Pages &changed)
{
    std::vector<std::uint64_t> counts;
    for (dr_cell &cell : hwpt_.cells())
        counts.push_back(word(cell.count).load(std::memory_order_seq_cst));
    const bool none = !hwpt_.inside() && counts == counts_;
    const bool never = std::all_of(counts.begin(), counts.end(), [](std::uint64_t n) { return n == 0; });
    for (const std::uint64_t p : changed) {
        if (!(none || never) || hwpt_.pinned(p))
            continue;
        const Rule rule = never ? Rule("D-2") : hwpt_.has_pinned() ? Rule("D-19") : Rule("D-13");
        stage_.need(false, rule, fmt::format("page {:#x}", p),
                    never ? "it was written and no cell was ever odd" : "it was written outside of sections and pins",
                    "DMA inside a section, or under a pin");
    }
    for (std::size_t i = 0; i < counts_.size(); ++i)
        stage_.need(counts[i] >= counts_[i], "D-2", fmt::format("the cell of thread {}", i),
                    fmt::format("{} after {}", counts[i], counts_[i]), "a count that only its thread counts up");
    counts_ = counts;
}

void Watch::check_summary(const Pages &changed)
{
    if (!iommu::AmdV1::tracks(hwpt_.control().context) || hwpt_.inside())
        return;
    for (const std::uint64_t p : changed) {
        if (!hwpt_.dirty(p))
            continue;
        const std::string where = fmt::format("page {:#x}, whose leaf has D", p);
        stage_.need(hwpt_.line_bit(p), "D-10", where, "its line bit is 0 outside of sections", "1");
        stage_.need(hwpt_.table_bit(p), "D-10", where, "its table bit is 0 outside of sections", "1");
    }
}

void Watch::check_slots()
{
    const std::span<dr_pin> slots = hwpt_.slots();
    for (std::size_t thread = 0; thread < hwpt_.threads && hwpt_.pins > 0; ++thread) {
        std::uint64_t odd = 0;
        for (const dr_pin &pin : slots.subspan(thread * hwpt_.pins, hwpt_.pins)) {
            if ((pin.count & 1) == 0)
                continue;
            ++odd;
            stage_.need(pin.start <= pin.last && pin.last >> hwpt_.header().aperture_lg2 == 0 && pin.write <= 1, "D-16",
                        fmt::format("a slot of thread {} that is held", thread),
                        fmt::format("range {:#x} to {:#x}, write {}", pin.start, pin.last, pin.write),
                        "a range of the IOVA space, and 0 or 1");
        }
        const std::uint64_t pinned = hwpt_.cells()[thread].pinned;
        stage_.need(pinned >= odd, "D-16", fmt::format("`pinned` of thread {}", thread),
                    fmt::format("{} with {} slots held", pinned, odd), fmt::format("{} or more", odd));
        held_ = held_ || odd > 0;
    }
}

void Watch::need_sound(const Stage &stage)
{
    for (const Rule rule : {Rule("D-2"), Rule("D-4"), Rule("D-9"), Rule("D-13"), Rule("D-18")}) {
        if (stage.verdicts.outcome(rule) == Outcome::fail)
            throw Broken(fmt::format("what breaks {} would break this as well", rule.requirement().number));
    }
}

} // namespace dirtyring::check
