// What others do for the same work, written to their behaviour: go over all, note what is dirty in a bitmap, and have
// somebody scan the bitmap for bits. They go over the very tables that ours goes over. Their invalidations are left
// out, in their favour.
#pragma once

#include "iommu/format_amdv1.hpp"
#include "iommu/geometry.hpp"

#include <atomic>
#include <bit>
#include <cstdint>
#include <span>
#include <vector>

namespace dirtyring::perf {

class Bitmap
{
  public:
    explicit Bitmap(std::uint64_t pages) : words_((pages + 63) / 64) {}

    // By whoever has it to itself, as the IOMMU's walkers.
    void set(std::uint64_t page) { words_[page / 64] |= 1ull << (page % 64); }

    // By one of many devices, as vhost's log.
    void set_shared(std::uint64_t page)
    {
        std::atomic_ref(words_[page / 64]).fetch_or(1ull << (page % 64), std::memory_order_seq_cst);
    }

    // Takes all bits: loads each word and exchanges those that are not 0. each(page).
    template <class Each> void take(Each each)
    {
        for (std::uint64_t i = 0; i < words_.size(); ++i) {
            std::atomic_ref word(words_[i]);
            if (word.load(std::memory_order_relaxed) == 0)
                continue;
            for (std::uint64_t bits = word.exchange(0, std::memory_order_seq_cst); bits != 0; bits &= bits - 1)
                each(i * 64 + static_cast<unsigned>(std::countr_zero(bits)));
        }
    }

  private:
    std::vector<std::uint64_t> words_;
};

// iommufd's IOMMU_HWPT_GET_DIRTY_BITMAP over 4 KiB leaves in AMD v1 tables.
class Iommufd
{
  public:
    Iommufd(const dr_translation_header &geometry, iommu::Tables tables, std::uint64_t pages)
        : geometry_(geometry), tables_(tables), pages_(pages)
    {
    }

    // The walker of Linux up to 6.12: for each page from the root down (fetch_pte), then test and clear.
    void walk_each_page(Bitmap &bitmap)
    {
        for (std::uint64_t page = 0; page < pages_; ++page) {
            std::uint64_t table = geometry_.root;
            for (unsigned level = geometry_.root_level; level > 0; --level)
                table = next(table, iommu::entry_index(page << iommu::granule_lg2, level), level);
            read_and_clear(tables_.entries(table)[page % iommu::table_entries], page, bitmap);
        }
    }

    // The newer one (generic_pt): table by table.
    void walk_tables(Bitmap &bitmap) { walk(geometry_.root, geometry_.root_level, 0, bitmap); }

  private:
    [[nodiscard]] std::uint64_t next(std::uint64_t table, unsigned index, unsigned level) const
    {
        const auto entry = std::atomic_ref(tables_.entries(table)[index]).load(std::memory_order_relaxed);
        return iommu::AmdV1::decode(entry, level).address;
    }

    void walk(std::uint64_t table, unsigned level, std::uint64_t first_page, Bitmap &bitmap)
    {
        const std::uint64_t each = 1ull << (level * iommu::table_lg2); // pages
        for (unsigned i = 0; i < iommu::table_entries && first_page + i * each < pages_; ++i) {
            if (level == 0)
                read_and_clear(tables_.entries(table)[i], first_page + i, bitmap);
            else
                walk(next(table, i, level), level - 1, first_page + i * each, bitmap);
        }
    }

    static void read_and_clear(std::uint64_t &entry, std::uint64_t page, Bitmap &bitmap)
    {
        std::atomic_ref live(entry);
        if ((live.load(std::memory_order_relaxed) & iommu::AmdV1::dirty_bit) == 0)
            return;
        live.fetch_and(~iommu::AmdV1::dirty_bit, std::memory_order_seq_cst);
        bitmap.set(page);
    }

    const dr_translation_header &geometry_;
    iommu::Tables tables_;
    std::uint64_t pages_;
};

} // namespace dirtyring::perf
