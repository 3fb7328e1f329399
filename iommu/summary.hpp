// The two-level summary over dirty lines (edge S4 of iommu/layout.h): devices mark, the owner takes.
#pragma once

#include "iommu/geometry.hpp"

#include <atomic>
#include <cstdint>

namespace dirtyring::iommu {

// Sets `bit` unless it is set. True: this call turned it from 0 to 1. seq_cst also where it is found set: the owner
// that took it earlier in the total order reads the leaf later in it, so it sees the D that came before this load.
inline bool test_and_set(std::uint64_t &word, std::uint64_t bit)
{
    std::atomic_ref w(word);
    if ((w.load(std::memory_order_seq_cst) & bit) != 0)
        return false;
    return (w.fetch_or(bit, std::memory_order_seq_cst) & bit) == 0;
}

// After D was set in entry `index` of the table whose line word is `word`. True: the table bit was turned, so a
// sleeping walker is owed a ring.
inline bool mark_line(const Tables &tables, std::uint64_t word, unsigned index)
{
    test_and_set(tables.line_word(word), 1ull << (index / line_entries));
    return test_and_set(tables.table_bits(word / 64), 1ull << (word % 64));
}

// Takes all bits of a word. The load first keeps the line shared while nothing is set, which is nearly always.
inline std::uint64_t take_bits(std::uint64_t &word)
{
    std::atomic_ref w(word);
    if (w.load(std::memory_order_seq_cst) == 0)
        return 0;
    return w.exchange(0, std::memory_order_seq_cst);
}

} // namespace dirtyring::iommu
