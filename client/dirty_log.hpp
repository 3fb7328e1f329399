// A set of dirty pages, for those who want a bitmap: a bit for each page of 4 KiB, and above it one for each 128 MiB in
// which any is set. No allocation but the mapping; one thread.
#pragma once

#include "ring/region.hpp"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstdint>
#include <sys/mman.h>

namespace dirtyring::client {

class DirtyLog
{
  public:
    static constexpr unsigned page_lg2 = 12;

    DirtyLog() = default;
    DirtyLog(const DirtyLog &) = delete;
    DirtyLog &operator=(const DirtyLog &) = delete;
    ~DirtyLog()
    {
        if (words_ != nullptr)
            ::munmap(words_, bytes());
    }

    // Of addresses below 2^space_lg2. 0 or -errno. Memory comes when bits are set.
    int open(unsigned space_lg2)
    {
        pages_ = 1ull << (space_lg2 - page_lg2);
        void *base =
            ::mmap(nullptr, bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (base == MAP_FAILED)
            return -errno;
        words_ = static_cast<std::uint64_t *>(base);
        chunks_ = words_ + pages_ / 64;
        return 0;
    }

    // Pages [first, first + n); what is outside the space is no page of it.
    void set(std::uint64_t first, std::uint64_t n)
    {
        const std::uint64_t end = first < pages_ ? first + std::min(n, pages_ - first) : first;
        for (std::uint64_t p = first; p < end;) {
            const std::uint64_t upto = std::min(end, (p / 64 + 1) * 64);
            words_[p / 64] |= mask(p, upto);
            chunks_[p / chunk / 64] |= 1ull << (p / chunk % 64);
            p = upto;
        }
    }

    // Calls visit(page) for each that is set in [first, last], and clears it unless `keep`.
    template <class Visit> void take(std::uint64_t first, std::uint64_t last, bool keep, Visit visit)
    {
        last = std::min(last, pages_ - 1);
        for (std::uint64_t p = first; p <= last;) {
            const std::uint64_t c = p / chunk;
            const std::uint64_t chunk_bits = chunks_[c / 64] >> (c % 64);
            if (chunk_bits == 0) {
                p = (c / 64 + 1) * 64 * chunk;
                continue;
            }
            if ((chunk_bits & 1) == 0) {
                p = (c + static_cast<unsigned>(std::countr_zero(chunk_bits))) * chunk;
                continue;
            }
            const std::uint64_t upto = std::min(last + 1, (p / 64 + 1) * 64);
            const std::uint64_t found = words_[p / 64] & mask(p, upto);
            for (std::uint64_t rest = found; rest != 0; rest &= rest - 1)
                visit(p / 64 * 64 + static_cast<unsigned>(std::countr_zero(rest)));
            if (!keep && found != 0)
                words_[p / 64] &= ~found;
            if (!keep && upto % chunk == 0 && first <= c * chunk)
                chunks_[c / 64] &= ~(1ull << (c % 64)); // all of it was taken
            p = upto;
        }
    }

  private:
    static constexpr std::uint64_t chunk = 1u << 15; // pages

    // Bits of [from, upto), within one word.
    static std::uint64_t mask(std::uint64_t from, std::uint64_t upto)
    {
        return ~0ull << (from % 64) & ~0ull >> (63 - (upto - 1) % 64);
    }
    [[nodiscard]] std::size_t bytes() const { return pages_ / 8 + std::max<std::size_t>(pages_ / chunk / 8, 8); }

    std::uint64_t *words_ = nullptr;
    std::uint64_t *chunks_ = nullptr;
    std::uint64_t pages_ = 0;
};

} // namespace dirtyring::client
