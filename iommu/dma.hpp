// The hardware's side: one DMA thread of a device, with its IOTLB. No allocation, no system calls; used by one thread.
//
// The tables may have been scribbled on by another device of the same guest: every index taken from an entry is
// checked. The translation region is the service's and read-only, its header was checked by TranslationView::open.
#pragma once

#include "iommu/format.hpp"
#include "iommu/geometry.hpp"
#include "iommu/pins.hpp"
#include "iommu/rules.hpp"
#include "iommu/section.hpp"
#include "iommu/summary.hpp"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <optional>
#include <utility>

namespace dirtyring::iommu {

enum class FaultReason : std::uint32_t {
    none,
    not_present,
    read_denied,
    write_denied,
    aperture,
    table,
    memory,
    closed,
    stalled,
};

struct DmaFault {
    std::uint64_t iova = 0;
    FaultReason reason = FaultReason::none;
    bool write = false;
    std::uint64_t done = 0; // bytes transferred before it
};

// The guest's memory as this process has it mapped. Filled once, then shared by all threads.
class GuestMemory
{
  public:
    static constexpr unsigned regions_max = 64;

    // False: no room.
    bool add(std::uint64_t oa, std::uint64_t length, std::byte *host)
    {
        if (count_ == regions_max)
            return false;
        regions_[count_++] = {oa, length, host};
        return true;
    }

    // nullptr: not all of [oa, oa + length) is in one region.
    [[nodiscard]] std::byte *find(std::uint64_t oa, std::uint64_t length) const
    {
        for (unsigned i = 0; i < count_; ++i) {
            const Piece &r = regions_[i];
            if (oa >= r.oa && oa - r.oa < r.length && length <= r.length - (oa - r.oa))
                return r.host + (oa - r.oa);
        }
        return nullptr;
    }

  private:
    struct Piece {
        std::uint64_t oa;
        std::uint64_t length;
        std::byte *host;
    };
    Piece regions_[regions_max];
    unsigned count_ = 0;
};

// An hwpt as a device sees it.
class TranslationView
{
  public:
    // -EPROTO: the header does not describe regions of these sizes.
    static int open(const std::byte *translation, std::size_t translation_size, std::byte *tables,
                    std::size_t tables_size, TranslationView &out)
    {
        if (translation_size < sizeof(dr_translation_header))
            return -EPROTO;
        // Read-only memory, and only loaded from; atomic_ref wants a non-const object all the same.
        auto *base = const_cast<std::byte *>(translation);
        auto &shared = *reinterpret_cast<dr_translation_header *>(base);
        if (std::atomic_ref(shared.version).load(std::memory_order_acquire) !=
            DR_TRANSLATION_VERSION) // behind it, all is whole
            return -EPROTO;
        const dr_translation_header h = shared;
        if (h.magic != DR_TRANSLATION_MAGIC || h.shards == 0 || h.aperture_lg2 < aperture_lg2_min ||
            h.aperture_lg2 > aperture_lg2_max || !std::has_single_bit(h.shards) ||
            h.shards > shards_most(h.aperture_lg2) || h.root_level >= levels_max ||
            h.root_level + 1 < levels_needed(h.aperture_lg2))
            return -EPROTO;
        const dr_translation_header expected = make_geometry(h.format, h.aperture_lg2, h.shards, h.root_level + 1);
        if (std::memcmp(&h, &expected, sizeof h) != 0 || h.tables_size > tables_size ||
            h.translation_size > translation_size)
            return -EPROTO;
        out.h_ = h;
        out.tables_ = Tables(tables, h);
        out.shards_ = reinterpret_cast<dr_shard_control *>(base + h.shard_controls);
        out.generations_ = reinterpret_cast<std::uint64_t *>(base + h.generations);
        return 0;
    }

    [[nodiscard]] const dr_translation_header &header() const { return h_; }
    [[nodiscard]] const Tables &tables() const { return tables_; }
    [[nodiscard]] unsigned shard(std::uint64_t iova) const { return static_cast<unsigned>(iova >> h_.slice_lg2); }

    [[nodiscard]] std::uint64_t generation(std::uint64_t iova) const
    {
        return std::atomic_ref(generations_[iova >> h_.region_lg2]).load(std::memory_order_seq_cst); // S3
    }

    // Loaded after the generation it may have changed with: enabling stores it, then advances.
    [[nodiscard]] std::uint64_t context(std::uint64_t iova) const
    {
        return std::atomic_ref(shards_[shard(iova)].context).load(std::memory_order_seq_cst); // S7
    }

    // Odd: leaves of the shard are being replaced, and an entry that is not there may be there again soon.
    [[nodiscard]] std::uint64_t breaking(std::uint64_t iova) const
    {
        return std::atomic_ref(shards_[shard(iova)].breaking).load(std::memory_order_seq_cst); // S8
    }

    // enum dr_asleep
    [[nodiscard]] std::uint64_t asleep(unsigned shard) const
    {
        return std::atomic_ref(shards_[shard].asleep).load(std::memory_order_seq_cst); // S5, P3
    }

    // May [start, last] not be pinned now?
    [[nodiscard]] bool closed(std::uint64_t start, std::uint64_t last) const
    {
        for (unsigned i = shard(start); i <= shard(last); ++i) {
            if (Closing(shards_[i]).covers(start, last))
                return true;
        }
        return false;
    }

    // The line word that stands for entries of `table`, where `iova` leads.
    [[nodiscard]] std::uint64_t line_word(std::uint64_t table, std::uint64_t iova) const
    {
        if (table >= h_.top_tables)
            return table;
        if (broken(Rule::summary_shared))
            return first_table(h_, 0);
        const std::uint64_t in_slice = iova & ((1ull << h_.slice_lg2) - 1);
        return first_table(h_, shard(iova)) + (in_slice >> top_span_lg2);
    }

  private:
    dr_translation_header h_{};
    Tables tables_;
    dr_shard_control *shards_ = nullptr;
    std::uint64_t *generations_ = nullptr;
};

template <Format F> class DmaThread
{
  public:
    static constexpr std::uint64_t pin_bytes_max = 4ull << 20; // so that a section stays short

    // Thread `index` of a device.
    DmaThread(const TranslationView &view, const GuestMemory &memory, const DmaThreads &threads, std::size_t index)
        : view_(view), memory_(memory), section_(&threads.cells[index]),
          pins_(&threads.cells[index], threads.pins_of(index))
    {
    }

    void enter()
    {
        if (!(broken(Rule::section_over_io) && section_.inside()))
            section_.enter();
    }

    // Bit i: shard i's walker sleeps and must be rung.
    [[nodiscard]] std::uint64_t leave()
    {
        if (!(broken(Rule::section_over_io) && pins_.count() > 0))
            section_.leave();
        const std::uint64_t turned = std::exchange(turned_, 0);
        const std::uint64_t given_back = std::exchange(given_back_, 0);
        std::uint64_t bells = 0;
        for (std::uint64_t owed = turned | given_back; owed != 0; owed &= owed - 1) {
            const auto shard = static_cast<unsigned>(std::countr_zero(owed));
            const std::uint64_t bit = owed & -owed;
            const std::uint64_t asleep = view_.asleep(shard);
            if ((asleep != DR_AWAKE && (turned & bit) != 0 && !broken(Rule::no_doorbell)) ||
                (asleep == DR_ASLEEP_PINS && (given_back & bit) != 0 && !broken(Rule::no_pin_bell)))
                bells |= bit;
        }
        return bells;
    }

    [[nodiscard]] bool inside() const { return section_.inside(); }

    // How long to wait for an entry that is being replaced before FaultReason::stalled.
    void set_stall_patience(std::uint64_t ns) { stall_patience_ns_ = ns; }

    // Inside a section. reason == none: all was transferred.
    DmaFault write(std::uint64_t iova, const void *data, std::uint64_t length)
    {
        const auto *from = static_cast<const std::byte *>(data);
        return for_pieces(iova, length, true, true, [&](std::byte *host, std::uint64_t done, std::uint64_t n) {
            std::memcpy(host, from + done, n);
        });
    }

    DmaFault read(std::uint64_t iova, void *data, std::uint64_t length)
    {
        auto *to = static_cast<std::byte *>(data);
        return for_pieces(iova, length, false, false, [&](const std::byte *host, std::uint64_t done, std::uint64_t n) {
            std::memcpy(to + done, host, n);
        });
    }

    // Inside a section: pins [iova, iova + length) for DMA that goes on when the section is over. Calls piece(host, n)
    // for each contiguous piece of guest memory, in order. length: 1 to pin_bytes_max. -EAGAIN: all slots are held;
    // -EFAULT: see `fault`.
    template <class Piece>
    int pin(std::uint64_t iova, std::uint64_t length, bool write, unsigned &slot, DmaFault &fault, Piece piece)
    {
        const std::uint64_t last = iova + length - 1;
        fault = {iova, FaultReason::aperture, write, 0};
        if (last < iova || last >> view_.header().aperture_lg2 != 0)
            return -EFAULT;
        const bool closed_before = broken(Rule::pin_after_look) && view_.closed(iova, last);
        point(Point::device_before_pin);
        const std::optional<unsigned> taken = pins_.take({iova, last, write});
        if (!taken)
            return -EAGAIN;
        if (broken(Rule::pin_after_look) ? closed_before : view_.closed(iova, last)) // P1
            fault = {iova, FaultReason::closed, write, 0};
        else
            fault = for_pieces(iova, length, write, broken(Rule::mark_before_data),
                               [&](std::byte *host, std::uint64_t, std::uint64_t n) { piece(host, n); });
        if (fault.reason != FaultReason::none) {
            give_back(*taken);
            return -EFAULT;
        }
        slot = *taken;
        return 0;
    }

    [[nodiscard]] bool pinned(unsigned slot) const { return pins_.held(slot); }
    [[nodiscard]] unsigned pins() const { return pins_.count(); }

    // Inside a section: gives back a pin whose DMA was never begun.
    void cancel_pin(unsigned slot) { give_back(slot); }

    // Inside a section, after the data has landed: sets D where the pin was for writing, and gives the slot back.
    DmaFault unpin(unsigned slot)
    {
        const PinRange range = pins_.range(slot);
        DmaFault fault;
        if (range.write && !broken(Rule::mark_before_data))
            fault = for_pieces(range.start, range.last - range.start + 1, true, true, [](auto...) {});
        give_back(slot);
        return fault;
    }

  private:
    // A translation in pieces of 2^lg2 bytes, never wider than a region.
    struct Cached {
        std::uint64_t generation = 0;
        std::uint64_t piece = ~0ull; // iova >> lg2
        std::byte *host = nullptr;
        std::uint64_t *leaf = nullptr;
        std::uint64_t seen = 0; // the leaf's value
        std::uint64_t word = 0; // its line word
        unsigned index = 0;     // its index in its table
        Rights rights;
        bool writes_freely = false; // D is set, or nobody tracks
    };

    static constexpr unsigned small_lg2 = granule_lg2;
    static constexpr unsigned middle_lg2 = 16;
    static constexpr unsigned large_lg2 = entry_lg2(1);
    static constexpr unsigned small_sets = 1024;
    static constexpr unsigned middle_sets = 64;
    static constexpr unsigned large_sets = 64;

    // Calls use(host, done, n) for each piece that one translation covers. mark: set D as well.
    template <class Use> DmaFault for_pieces(std::uint64_t iova, std::uint64_t length, bool write, bool mark, Use use)
    {
        std::uint64_t done = 0;
        while (done < length) {
            const std::uint64_t at = iova + done;
            std::byte *host = nullptr;
            std::uint64_t contiguous = 0;
            const FaultReason reason = translate(at, write, mark, host, contiguous);
            if (reason == FaultReason::stalled && wait_for_entry(at))
                continue;
            if (reason != FaultReason::none)
                return {at, reason, write, done};
            const std::uint64_t n = std::min(contiguous, length - done);
            use(host, done, n);
            done += n;
        }
        return {0, FaultReason::none, write, done};
    }

    // Outside the section: the owner waits for those who are inside. False: for too long.
    [[nodiscard]] bool wait_for_entry(std::uint64_t iova)
    {
        const std::uint64_t patience_ends = now_ns() + stall_patience_ns_;
        section_.leave();
        while ((view_.breaking(iova) & 1) != 0 && now_ns() < patience_ends) {
        }
        section_.enter();
        return now_ns() < patience_ends;
    }

    static std::uint64_t now_ns()
    {
        timespec now;
        ::clock_gettime(CLOCK_MONOTONIC, &now);
        return static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<std::uint64_t>(now.tv_nsec);
    }

    void give_back(unsigned slot)
    {
        const PinRange range = pins_.range(slot);
        pins_.give_back(slot);
        for (unsigned i = view_.shard(range.start); i <= view_.shard(range.last); ++i)
            given_back_ |= 1ull << i;
    }

    FaultReason translate(std::uint64_t iova, bool write, bool mark, std::byte *&host, std::uint64_t &contiguous)
    {
        if (iova >> view_.header().aperture_lg2 != 0)
            return FaultReason::aperture;
        const std::uint64_t generation = view_.generation(iova);
        Cached &small = small_[(iova >> small_lg2) % small_sets];
        Cached &large = large_[(iova >> large_lg2) % large_sets];
        if (small.generation == generation && small.piece == iova >> small_lg2)
            return use(small, small_lg2, iova, write, mark, host, contiguous);
        Cached &middle = middle_[(iova >> middle_lg2) % middle_sets];
        if (middle.generation == generation && middle.piece == iova >> middle_lg2)
            return use(middle, middle_lg2, iova, write, mark, host, contiguous);
        if (broken(Rule::iotlb_across_regions) && large.piece == iova >> large_lg2)
            return use(large, large_lg2, iova, write, mark, host, contiguous);
        if (large.generation == generation && large.piece == iova >> large_lg2)
            return use(large, large_lg2, iova, write, mark, host, contiguous);
        return walk(iova, write, mark, generation, host, contiguous);
    }

    FaultReason use(Cached &c, unsigned lg2, std::uint64_t iova, bool write, bool mark, std::byte *&host,
                    std::uint64_t &contiguous)
    {
        if (write ? !c.rights.write : !c.rights.read)
            return write ? FaultReason::write_denied : FaultReason::read_denied;
        if (mark && !c.writes_freely) {
            // The entry keeps its tag: it is only as fresh as its walk.
            if (!set_accessed(c.leaf, c.seen, true, c.word, c.index, iova))
                return walk(iova, write, mark, c.generation, host, contiguous);
            c.writes_freely = true;
        }
        const std::uint64_t offset = iova & ((1ull << lg2) - 1);
        host = c.host + offset;
        contiguous = (1ull << lg2) - offset;
        return FaultReason::none;
    }

    FaultReason walk(std::uint64_t iova, bool write, bool mark, std::uint64_t generation, std::byte *&host,
                     std::uint64_t &contiguous)
    {
        std::optional<FaultReason> reason;
        while (!reason)
            reason = walk_once(iova, write, mark, generation, host, contiguous);
        return *reason;
    }

    // Nothing: the leaf changed before it was marked.
    std::optional<FaultReason> walk_once(std::uint64_t iova, bool write, bool mark, std::uint64_t generation,
                                         std::byte *&host, std::uint64_t &contiguous)
    {
        const dr_translation_header &h = view_.header();
        // Loaded after the generation; enabling advances after the store, so a stale word is waited for or walked
        // again.
        const bool tracking = F::tracks(view_.context(iova));
        const std::uint64_t breaking = view_.breaking(iova);
        Rights rights{true, true};
        std::uint64_t table = h.root;
        for (unsigned level = h.root_level;; --level) {
            std::uint64_t *entry = view_.tables().entries(table) + entry_index(iova, level);
            const std::uint64_t seen = std::atomic_ref(*entry).load(std::memory_order_seq_cst);
            const Entry e = F::decode(seen, level);
            rights.read &= e.rights.read;
            rights.write &= e.rights.write;
            if (e.kind == EntryKind::none)
                return ((breaking & 1) != 0 || view_.breaking(iova) != breaking) && !broken(Rule::break_taken_for_fault)
                           ? FaultReason::stalled
                           : FaultReason::not_present;
            if (e.kind == EntryKind::table) {
                if (e.address >= h.tables)
                    return FaultReason::table;
                if (tracking)
                    set_accessed_table(*entry, seen);
                table = e.address;
                continue;
            }
            if (!tracking) {
                rights.read &= F::usable_as_is(seen, false);
                rights.write &= F::usable_as_is(seen, true);
            }
            if (write ? !rights.write : !rights.read)
                return write ? FaultReason::write_denied : FaultReason::read_denied;
            const std::uint64_t word = view_.line_word(table, iova);
            const unsigned index = entry_index(iova, level);
            if (tracking && !set_accessed(entry, seen, mark, word, index, iova))
                return std::nullopt; // it was split, or unmapped

            const std::uint64_t oa = e.address + (iova & ((1ull << e.lg2) - 1));
            // In pieces, of which none spans two regions. A large one that straddles two regions of memory is cached in
            // small ones.
            unsigned lg2 = e.lg2 >= large_lg2 ? large_lg2 : e.lg2 >= middle_lg2 ? middle_lg2 : small_lg2;
            std::byte *base = piece_of_memory(oa, lg2);
            if (base == nullptr && lg2 != small_lg2)
                base = piece_of_memory(oa, lg2 = small_lg2);
            if (base == nullptr)
                return FaultReason::memory;
            point(Point::device_before_tag);
            if (broken(Rule::tag_after_walk))
                generation = view_.generation(iova);
            if (level == 0 || (seen & F::nt) == 0)
                cached(iova, lg2) = {generation, iova >> lg2,      base, entry, seen, word, index,
                                     rights,     mark || !tracking};
            const std::uint64_t offset = iova & ((1ull << lg2) - 1);
            host = base + offset;
            contiguous = (1ull << lg2) - offset;
            return FaultReason::none;
        }
    }

    Cached &cached(std::uint64_t iova, unsigned lg2)
    {
        const std::uint64_t piece = iova >> lg2;
        return lg2 == small_lg2    ? small_[piece % small_sets]
               : lg2 == middle_lg2 ? middle_[piece % middle_sets]
                                   : large_[piece % large_sets];
    }

    std::byte *piece_of_memory(std::uint64_t oa, unsigned lg2) const
    {
        return memory_.find(oa >> lg2 << lg2, 1ull << lg2);
    }

    // Nobody's translation depends on it: the entry may have changed, and is left alone then.
    static void set_accessed_table(std::uint64_t &entry, std::uint64_t seen)
    {
        if (const std::uint64_t wanted = F::accessed_table(seen); wanted != seen)
            std::atomic_ref(entry).compare_exchange_strong(seen, wanted, std::memory_order_seq_cst);
    }

    // Sets A, and D if `dirty`, by compare-and-swap on the live leaf, as long as it still translates as `seen` does;
    // then the summary, if it was this call that set D. False: the entry has changed.
    bool set_accessed(std::uint64_t *entry, std::uint64_t seen, bool dirty, std::uint64_t word, unsigned index,
                      std::uint64_t iova)
    {
        std::atomic_ref live(*entry);
        std::uint64_t now = live.load(std::memory_order_seq_cst);
        for (;;) {
            if (!F::same_translation(now, seen))
                return false;
            const std::uint64_t wanted = F::accessed(now, dirty);
            if (wanted == now)
                return true;
            const bool cleans = dirty && !F::dirty(now);
            if (broken(Rule::summary_without_order) && cleans)
                summarize(word, index, iova);
            if (broken(Rule::summary_without_order))
                point(Point::device_between_dirty_and_summary);
            if (live.compare_exchange_weak(now, wanted, std::memory_order_seq_cst)) { // S4
                if (cleans && !broken(Rule::summary_without_order)) {
                    point(Point::device_between_dirty_and_summary);
                    summarize(word, index, iova);
                }
                return true;
            }
        }
    }

    void summarize(std::uint64_t word, unsigned index, std::uint64_t iova)
    {
        if (mark_line(view_.tables(), word, index))
            turned_ |= 1ull << view_.shard(iova);
    }

    TranslationView view_;
    const GuestMemory &memory_;
    Section section_;
    Pins pins_;
    std::uint64_t stall_patience_ns_ = 500'000'000;
    std::uint64_t turned_ = 0;     // shards whose table bits this section turned
    std::uint64_t given_back_ = 0; // shards of the pins that this section gave back
    Cached small_[small_sets];
    Cached middle_[middle_sets];
    Cached large_[large_sets];
};

} // namespace dirtyring::iommu
