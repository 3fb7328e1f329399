// The limit of whoever looks at every entry: reading them as fast as this core can.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <immintrin.h>
#include <memory>
#include <new>
#include <span>
#include <sys/mman.h>

namespace dirtyring::perf {

// Something that depends on every entry. entries.size() is a multiple of 16. Which of the two ways is the limit depends
// on the processor.
enum class Ahead {
    left_to_hardware, // AMD EPYC: asking for lines takes up to half as long again
    asked_for, // lines 1 KiB ahead; Intel Xeon: a tenth less. Several streams at once, or other distances, are no
               // better
};

template <Ahead way>
[[gnu::target("avx512f")]] inline std::uint64_t read_all_avx512(std::span<const std::uint64_t> entries)
{
    constexpr std::size_t ahead = 128;
    const auto *at = entries.data();
    const auto *end = at + entries.size();
    __m512i a = _mm512_setzero_si512();
    __m512i b = a;
    for (; at < end; at += 16) {
        if constexpr (way == Ahead::asked_for) {
            _mm_prefetch(at + ahead, _MM_HINT_T0);
            _mm_prefetch(at + ahead + 8, _MM_HINT_T0);
        }
        a = _mm512_or_si512(a, _mm512_loadu_si512(at));
        b = _mm512_or_si512(b, _mm512_loadu_si512(at + 8));
    }
    a = _mm512_or_si512(a, b);
    return _mm512_test_epi64_mask(a, a);
}

inline std::uint64_t read_all_plain(std::span<const std::uint64_t> entries)
{
    std::uint64_t a = 0;
    std::uint64_t b = 0;
    std::uint64_t c = 0;
    std::uint64_t d = 0;
    for (std::size_t i = 0; i < entries.size(); i += 4) {
        a |= entries[i];
        b |= entries[i + 1];
        c |= entries[i + 2];
        d |= entries[i + 3];
    }
    return a | b | c | d;
}

template <Ahead way> std::uint64_t read_all(std::span<const std::uint64_t> entries)
{
    return __builtin_cpu_supports("avx512f") ? read_all_avx512<way>(entries) : read_all_plain(entries);
}

// As many entries in pages of 2 MiB, where the kernel gives them: what tables at their best are.
class EntriesAtBest
{
  public:
    explicit EntriesAtBest(std::size_t count)
        : count_(count), entries_(static_cast<std::uint64_t *>(::operator new(count * 8, alignment)))
    {
        ::madvise(entries_.get(), count * 8, MADV_HUGEPAGE);
        std::fill_n(entries_.get(), count, 1);
    }
    [[nodiscard]] std::span<const std::uint64_t> entries() const { return {entries_.get(), count_}; }

  private:
    static constexpr std::align_val_t alignment{2u << 20};
    struct Free {
        void operator()(std::uint64_t *entries) const { ::operator delete(entries, alignment); }
    };
    std::size_t count_;
    std::unique_ptr<std::uint64_t, Free> entries_;
};

} // namespace dirtyring::perf
