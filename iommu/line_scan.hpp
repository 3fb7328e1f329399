// Many entries of a table at once: which match a pattern, and D taken out of those that have it. By the widest instructions that the
// processor has.
//
// A mask of the whole table comes first, then it is acted on: a branch for each line is bound by mispredictions.
#pragma once

#include "iommu/format.hpp"

#include <array>
#include <atomic>
#include <bit>
#include <cstdint>

// TSan takes no vector for atomic; a model of memory orderings knows none.
#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__) && !defined(DIRTYRING_NO_VECTORS)
#define DIRTYRING_VECTORS 1
#include <immintrin.h>
#endif

namespace dirtyring::iommu {

// Some entries of a table.
class EntrySet
{
  public:
    static constexpr unsigned words = table_entries / 64;

    [[nodiscard]] std::uint64_t word(unsigned i) const { return words_[i]; }
    // Of a line: bit i is its entry i.
    [[nodiscard]] unsigned line(unsigned i) const
    {
        return static_cast<unsigned>(words_[i / 8] >> (i % 8 * line_entries)) & 0xff;
    }
    void set_line(unsigned i, unsigned mask) { words_[i / 8] |= std::uint64_t{mask} << (i % 8 * line_entries); }
    void set_word(unsigned i, std::uint64_t bits) { words_[i] = bits; }

    // Of each line in which there are any, those of keep(line).
    template <class Keep> void keep_lines(Keep keep)
    {
        for (std::uint64_t rest = lines(); rest != 0; rest &= rest - 1) {
            const auto i = static_cast<unsigned>(std::countr_zero(rest));
            words_[i / 8] &= ~(std::uint64_t{0xff & ~keep(i)} << (i % 8 * line_entries));
        }
    }

    // Calls keep(first, n) for each stretch of n entries of a word, which may make n smaller; those for which it says no go.
    template <class Keep> void keep_stretches(Keep keep)
    {
        unsigned occupied = 0; // words: one misprediction for all that are empty
        for (unsigned w = 0; w < words; ++w)
            occupied |= static_cast<unsigned>(words_[w] != 0) << w;
        for (; occupied != 0; occupied &= occupied - 1) {
            const auto w = static_cast<unsigned>(std::countr_zero(occupied));
            for (std::uint64_t rest = words_[w]; rest != 0;) {
                const auto first = static_cast<unsigned>(std::countr_zero(rest));
                auto n = static_cast<unsigned>(std::countr_one(rest >> first));
                const bool kept = keep(w * 64 + first, n);
                const std::uint64_t these = ~0ull >> (64 - n) << first;
                rest &= ~these;
                if (!kept)
                    words_[w] &= ~these;
            }
        }
    }

    // [first, first + n), within one word.
    void add(unsigned first, unsigned n) { words_[first / 64] |= ~0ull >> (64 - n) << (first % 64); }

    [[nodiscard]] bool any() const
    {
        std::uint64_t all = 0;
        for (const std::uint64_t w : words_)
            all |= w;
        return all != 0;
    }

    // Lines in which there is one.
    [[nodiscard]] std::uint64_t lines() const
    {
        std::uint64_t lines = 0;
        for (unsigned i = 0; i < words; ++i)
            lines |= lines_of(words_[i]) << (i * 8);
        return lines;
    }

  private:
    // A bit for each byte that is not 0.
    static std::uint64_t lines_of(std::uint64_t word)
    {
        constexpr std::uint64_t low_bits = 0x7f7f'7f7f'7f7f'7f7f;
        const std::uint64_t high_bits = (((word & low_bits) + low_bits) | word) & ~low_bits;
        return (high_bits >> 7) * 0x0102'0408'1020'4080 >> 56;
    }

    std::array<std::uint64_t, words> words_{};
};

namespace scan {

#if DIRTYRING_VECTORS

inline const bool has_avx512 = __builtin_cpu_supports("avx512f") != 0;
inline const bool has_avx2 = __builtin_cpu_supports("avx2") != 0;

// An aligned vector is loaded and stored entry by entry or as a whole, no entry torn, and ordered as any load and store is; entries that a
// masked store leaves out are not written.

__attribute__((target("avx512f"), always_inline)) inline std::uint64_t line_avx512(const std::uint64_t *line, Pattern p)
{
    const __m512i mask = _mm512_set1_epi64(static_cast<long long>(p.mask));
    const __m512i value = _mm512_set1_epi64(static_cast<long long>(p.value));
    return _mm512_cmpeq_epi64_mask(_mm512_and_si512(_mm512_load_si512(line), mask), value);
}

__attribute__((target("avx512f"))) inline void match_avx512(const std::uint64_t *entries, std::uint64_t lines,
                                                            Pattern p, EntrySet &found)
{
    if (~lines == 0) {
        for (unsigned w = 0; w < EntrySet::words; ++w) {
            std::uint64_t bits = 0;
            for (unsigned i = 0; i < 8; ++i)
                bits |= line_avx512(entries + (w * 8 + i) * line_entries, p) << (i * line_entries);
            found.set_word(w, bits);
        }
        return;
    }
    for (; lines != 0; lines &= lines - 1) {
        const auto i = static_cast<unsigned>(std::countr_zero(lines));
        found.set_line(i, static_cast<unsigned>(line_avx512(entries + i * line_entries, p)));
    }
}

__attribute__((target("avx2"), always_inline)) inline unsigned half_line_avx2(const std::uint64_t *half, Pattern p)
{
    const __m256i mask = _mm256_set1_epi64x(static_cast<long long>(p.mask));
    const __m256i value = _mm256_set1_epi64x(static_cast<long long>(p.value));
    const __m256i seen = _mm256_load_si256(reinterpret_cast<const __m256i *>(half));
    const __m256i equal = _mm256_cmpeq_epi64(_mm256_and_si256(seen, mask), value);
    return static_cast<unsigned>(_mm256_movemask_pd(_mm256_castsi256_pd(equal)));
}

__attribute__((target("avx2"))) inline void match_avx2(const std::uint64_t *entries, std::uint64_t lines, Pattern p,
                                                       EntrySet &found)
{
    for (; lines != 0; lines &= lines - 1) {
        const auto i = static_cast<unsigned>(std::countr_zero(lines));
        const std::uint64_t *line = entries + i * line_entries;
        found.set_line(i, half_line_avx2(line, p) | half_line_avx2(line + line_entries / 2, p) << (line_entries / 2));
    }
}

// Flips bits of those entries in `set` that match; returns the others of that line.
__attribute__((target("avx512f"))) inline unsigned flip_line_avx512(std::uint64_t *line, unsigned set, Pattern p,
                                                                    std::uint64_t flip)
{
    const __m512i v = _mm512_load_si512(line);
    const __m512i masked = _mm512_and_si512(v, _mm512_set1_epi64(static_cast<long long>(p.mask)));
    const __mmask8 matching = _mm512_mask_cmpeq_epi64_mask(static_cast<__mmask8>(set), masked,
                                                           _mm512_set1_epi64(static_cast<long long>(p.value)));
    _mm512_mask_store_epi64(line, matching, _mm512_xor_si512(v, _mm512_set1_epi64(static_cast<long long>(flip))));
    return set & ~static_cast<unsigned>(matching);
}

#endif

inline void match(std::uint64_t *entries, std::uint64_t lines, Pattern p, EntrySet &found)
{
    for (; lines != 0; lines &= lines - 1) {
        const auto i = static_cast<unsigned>(std::countr_zero(lines));
        unsigned mask = 0;
        for (unsigned e = 0; e < line_entries; ++e) {
            const std::uint64_t seen =
                std::atomic_ref(entries[i * line_entries + e]).load(std::memory_order_seq_cst); // S4
            mask |= static_cast<unsigned>(p.matches(seen)) << e;
        }
        found.set_line(i, mask);
    }
}

} // namespace scan

// Which entries of the table's lines `lines` match. Behind what took the lines from the summary (S4).
inline EntrySet match(std::uint64_t *entries, std::uint64_t lines, Pattern p)
{
    EntrySet found;
#if DIRTYRING_VECTORS
    std::atomic_signal_fence(std::memory_order_seq_cst);
    if (scan::has_avx512)
        scan::match_avx512(entries, lines, p, found);
    else if (scan::has_avx2)
        scan::match_avx2(entries, lines, p, found);
    else
#endif
        scan::match(entries, lines, p, found);
    return found;
}

// Clears D of one leaf. Where A is set, too, no device has anything to set, so nobody else stores there: a store will do. Release: who finds D
// clear also finds the summary bit taken (S4).
template <Format F> void make_clean(std::uint64_t &live)
{
    std::atomic_ref entry(live);
    const std::uint64_t seen = entry.load(std::memory_order_relaxed); // its own, or no longer settled
    if (F::leaf_settled.matches(seen))
        entry.store(seen ^ F::dirty_flip, std::memory_order_release); // S4
    else
        F::make_clean(live);
}

// Clears D of leaves that have it.
template <Format F> void make_clean(std::uint64_t *entries, const EntrySet &dirty)
{
    for (std::uint64_t lines = dirty.lines(); lines != 0; lines &= lines - 1) {
        const auto i = static_cast<unsigned>(std::countr_zero(lines));
        std::uint64_t *line = entries + i * line_entries;
        unsigned left = dirty.line(i);
#if DIRTYRING_VECTORS
        if (scan::has_avx512)
            left = scan::flip_line_avx512(line, left, F::leaf_settled, F::dirty_flip);
#endif
        for (; left != 0; left &= left - 1)
            make_clean<F>(line[std::countr_zero(left)]);
    }
#if DIRTYRING_VECTORS
    std::atomic_signal_fence(std::memory_order_seq_cst); // before the advance
#endif
}

} // namespace dirtyring::iommu
