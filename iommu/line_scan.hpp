// Lines of a table at once: in which entries match a pattern, and D taken out of those that have it. By the widest
// instructions that the processor has.
//
// Lines are listed first, many of them, then acted on: a branch for each line is bound by mispredictions.
#pragma once

#include "iommu/format.hpp"

#include <array>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>

// TSan takes no vector for atomic; a model of memory orderings knows none.
#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__) && !defined(DIRTYRING_NO_VECTORS)
#define DIRTYRING_VECTORS 1
#include <immintrin.h>
#endif

namespace dirtyring::iommu {

// Some entries of a line.
struct LineEntries {
    std::uint64_t *entries; // the line's
    std::uint64_t iova;     // of entries[0]
    std::uint32_t mask;     // bit i: entries[i]
    std::uint16_t line;     // of its table
    std::uint16_t table;    // as the caller counts them
};

// A table whose leaves are looked at.
struct OpenTable {
    std::uint64_t *entries;
    std::uint64_t iova; // of entries[0]
    unsigned level;

    [[nodiscard]] std::uint64_t iova_of(unsigned entry) const
    {
        return iova + (std::uint64_t{entry} << entry_lg2(level));
    }
    [[nodiscard]] LineEntries line(unsigned i, unsigned mask, unsigned which) const
    {
        return {entries + std::size_t{i} * line_entries, iova_of(i * line_entries), mask, static_cast<std::uint16_t>(i),
                static_cast<std::uint16_t>(which)};
    }
};

inline constexpr std::size_t table_lines = table_entries / line_entries;
// Looked at together: so many tables, or as few as have so many lines. Enough for memory to be busy, not so many that
// the core waits until it can ask for more.
inline constexpr std::size_t tables_at_once = 16;
inline constexpr std::size_t lines_wanted = 16;
inline constexpr std::size_t lines_at_once = tables_at_once * table_lines;

// Asks for the line to write to it: for reading alone it would still be another core's when it is written. gcc makes a
// read of __builtin_prefetch, and may drop a function of nothing but that. Older processors do nothing.
inline void prefetch_to_write(const std::uint64_t *at)
{
#ifdef __x86_64__
    asm volatile("prefetchw %0" : : "m"(*at));
#else
    __builtin_prefetch(at, 1);
#endif
}

// Lines to be looked at next: asked for one by one, while those at hand keep the core busy. All at once they would keep
// it waiting.
class LinesAhead
{
  public:
    void clear() { next_ = used_ = 0; }
    void add(const std::uint64_t *line) { lines_[used_++] = line; }
    [[nodiscard]] std::size_t size() const { return used_; }

    void ask()
    {
        if (next_ < used_)
            prefetch_to_write(lines_[next_++]);
    }
    void ask_rest()
    {
        while (next_ < used_)
            ask();
    }

  private:
    std::array<const std::uint64_t *, lines_wanted - 1 + table_lines> lines_;
    std::size_t used_ = 0;
    std::size_t next_ = 0;
};

namespace scan {

#if DIRTYRING_VECTORS

inline const bool has_avx512 = __builtin_cpu_supports("avx512f") != 0;
inline const bool has_avx2 = __builtin_cpu_supports("avx2") != 0;

// An aligned vector is loaded and stored entry by entry or as a whole, no entry torn, and ordered as any load and store
// is; entries that a masked store leaves out are not written.

__attribute__((target("avx512f"), always_inline)) inline unsigned line_avx512(const std::uint64_t *line, Pattern p)
{
    const __m512i mask = _mm512_set1_epi64(static_cast<long long>(p.mask));
    const __m512i value = _mm512_set1_epi64(static_cast<long long>(p.value));
    return _mm512_cmpeq_epi64_mask(_mm512_and_si512(_mm512_load_si512(line), mask), value);
}

// Does any entry of the table match? Asks for no line ahead: the processor sees that they are read in a row.
__attribute__((target("avx512f"))) inline bool any_avx512(const OpenTable &table, Pattern p)
{
    unsigned any = 0;
#pragma GCC unroll 8
    for (unsigned i = 0; i < table_entries; i += line_entries)
        any |= line_avx512(table.entries + i, p);
    return any != 0;
}

__attribute__((target("avx512f"))) inline std::size_t find_avx512(const OpenTable &table, std::uint64_t lines,
                                                                  Pattern p, unsigned which, LineEntries *out)
{
    std::size_t n = 0;
    for (; lines != 0; lines &= lines - 1) {
        const auto i = static_cast<unsigned>(std::countr_zero(lines));
        out[n] = table.line(i, line_avx512(table.entries + i * line_entries, p), which);
        n += out[n].mask != 0 ? 1 : 0;
    }
    return n;
}

__attribute__((target("avx2"), always_inline)) inline unsigned half_line_avx2(const std::uint64_t *half, Pattern p)
{
    const __m256i mask = _mm256_set1_epi64x(static_cast<long long>(p.mask));
    const __m256i value = _mm256_set1_epi64x(static_cast<long long>(p.value));
    const __m256i seen = _mm256_load_si256(reinterpret_cast<const __m256i *>(half));
    const __m256i equal = _mm256_cmpeq_epi64(_mm256_and_si256(seen, mask), value);
    return static_cast<unsigned>(_mm256_movemask_pd(_mm256_castsi256_pd(equal)));
}

__attribute__((target("avx2"))) inline std::size_t find_avx2(const OpenTable &table, std::uint64_t lines, Pattern p,
                                                             unsigned which, LineEntries *out)
{
    std::size_t n = 0;
    for (; lines != 0; lines &= lines - 1) {
        const auto i = static_cast<unsigned>(std::countr_zero(lines));
        const std::uint64_t *line = table.entries + i * line_entries;
        const unsigned low = half_line_avx2(line, p);
        out[n] = table.line(i, low | half_line_avx2(line + line_entries / 2, p) << (line_entries / 2), which);
        n += out[n].mask != 0 ? 1 : 0;
    }
    return n;
}

// Flips bits of those entries that match; takes them out of the masks. True: others are left.
__attribute__((target("avx512f"))) inline bool flip_avx512(std::span<LineEntries> lines, Pattern p, std::uint64_t flip)
{
    const __m512i mask = _mm512_set1_epi64(static_cast<long long>(p.mask));
    const __m512i value = _mm512_set1_epi64(static_cast<long long>(p.value));
    const __m512i flips = _mm512_set1_epi64(static_cast<long long>(flip));
    unsigned left = 0;
    for (LineEntries &l : lines) {
        const __m512i v = _mm512_load_si512(l.entries);
        const __mmask8 matching =
            _mm512_mask_cmpeq_epi64_mask(static_cast<__mmask8>(l.mask), _mm512_and_si512(v, mask), value);
        _mm512_mask_store_epi64(l.entries, matching, _mm512_xor_si512(v, flips));
        l.mask &= ~static_cast<unsigned>(matching);
        left |= l.mask;
    }
    return left != 0;
}

#endif

inline std::size_t find(const OpenTable &table, std::uint64_t lines, Pattern p, unsigned which, LineEntries *out)
{
    std::size_t n = 0;
    for (; lines != 0; lines &= lines - 1) {
        const auto i = static_cast<unsigned>(std::countr_zero(lines));
        unsigned mask = 0;
        for (unsigned e = 0; e < line_entries; ++e) {
            const std::uint64_t seen =
                std::atomic_ref(table.entries[i * line_entries + e]).load(std::memory_order_seq_cst); // S4
            mask |= static_cast<unsigned>(p.matches(seen)) << e;
        }
        out[n] = table.line(i, mask, which);
        n += mask != 0 ? 1 : 0;
    }
    return n;
}

} // namespace scan

// Lists those of the table's lines `lines` in which entries match; room for table_lines. How many. Behind what took the
// lines from the summary (S4).
inline std::size_t find_lines(const OpenTable &table, std::uint64_t lines, Pattern p, unsigned which, LineEntries *out)
{
#if DIRTYRING_VECTORS
    std::atomic_signal_fence(std::memory_order_seq_cst);
    if (scan::has_avx512) {
        if (lines == ~0ull && !scan::any_avx512(table, p))
            return 0;
        return scan::find_avx512(table, lines, p, which, out);
    }
    if (scan::has_avx2)
        return scan::find_avx2(table, lines, p, which, out);
#endif
    return scan::find(table, lines, p, which, out);
}

// Clears D of one leaf. Where A is set, too, no device has anything to set, so nobody else stores there: a store will
// do. Release: who finds D clear also finds the summary bit taken (S4).
template <Format F> void make_clean(std::uint64_t &live)
{
    std::atomic_ref entry(live);
    const std::uint64_t seen = entry.load(std::memory_order_relaxed); // its own, or no longer settled
    if (F::leaf_settled.matches(seen))
        entry.store(seen ^ F::dirty_flip, std::memory_order_release); // S4
    else
        F::make_clean(live);
}

// Clears D of entries that have it, and empties the masks.
template <Format F> void make_clean(std::span<LineEntries> lines)
{
#if DIRTYRING_VECTORS
    if (scan::has_avx512) {
        const bool left = scan::flip_avx512(lines, F::leaf_settled, F::dirty_flip);
        std::atomic_signal_fence(std::memory_order_seq_cst); // before the advance
        if (!left)
            return;
    }
#endif
    for (LineEntries &l : lines) {
        for (; l.mask != 0; l.mask &= l.mask - 1)
            make_clean<F>(l.entries[std::countr_zero(l.mask)]);
    }
}

} // namespace dirtyring::iommu
