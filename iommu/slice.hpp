// The owner's side of the page tables: the slice of an hwpt that one walker owns.
//
// Goes by its private index: which tables there are, what they translate, what hangs under them. Of the shared tables it reads leaf
// entries and summary words, never a pointer. One thread.
//
//   node         one table, named by its number in the shard's index range (table index − first_table)
//   top node     numbers 0 .. top_words − 1: this slice's part of a top table; has a summary word, no page of its own
#pragma once

#include "iommu/extent_map.hpp"
#include "iommu/format.hpp"
#include "iommu/geometry.hpp"
#include "iommu/section.hpp"
#include "iommu/summary.hpp"

#include <array>
#include <atomic>
#include <cassert>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

namespace dirtyring::iommu {

// 8 entries that share a cache line and a summary bit.
struct Line {
    std::uint64_t *entries;
    std::uint64_t iova;  // of entries[0]
    unsigned leaf_lg2;   // what each leaf in it maps
    std::uint8_t leaves; // which entries can be leaves
    std::uint32_t node;
    unsigned number; // of the line in its table
};

// One leaf, found by the private index.
struct Leaf {
    std::uint64_t *entry;
    std::uint64_t iova;
    std::uint64_t length;
    std::uint32_t node;
    unsigned index;
};

template <Format F> class Slice
{
  public:
    // Makes bytes [offset, offset + length) of the tables region exist; 0 or -errno.
    using MakePresent = std::function<int(std::uint64_t offset, std::uint64_t length)>;

    Slice(const dr_translation_header &h, unsigned shard, Tables tables, unsigned leaf_lg2_max,
          MakePresent make_present)
        : h_(h), tables_(tables), first_table_(first_table(h, shard)), start_(std::uint64_t{shard} << h.slice_lg2),
          end_(start_ + (1ull << h.slice_lg2)), leaf_lg2_max_(leaf_lg2_max), make_present_(std::move(make_present))
    {
        for (std::uint64_t i = 0; i < top_words(h.slice_lg2); ++i)
            new_node((start_ >> top_span_lg2 << top_span_lg2) + (i << top_span_lg2), top_level);
    }

    [[nodiscard]] std::uint64_t start() const { return start_; }
    [[nodiscard]] std::uint64_t end() const { return end_; }
    [[nodiscard]] const ExtentMap &extents() const { return extents_; }

    // ---- map and unmap -------------------------------------------------------------------------------------------

    // Makes a step towards having the tables that mapping [start, end) to oa may need. 0: they are there; -EAGAIN: more steps
    // to go; -ENOMEM: they cannot be had, and nothing has changed.
    int reserve(std::uint64_t start, std::uint64_t end, std::uint64_t oa)
    {
        std::uint64_t wanted = 0;
        for (unsigned level = 0; level < top_level; ++level) {
            const unsigned span_lg2 = entry_lg2(level + 1);
            const std::uint64_t spans = ((end - 1) >> span_lg2) - (start >> span_lg2) + 1;
            const bool leaves_above = span_lg2 <= leaf_lg2_max_ && ((oa - start) & ((1ull << span_lg2) - 1)) == 0;
            wanted += leaves_above ? std::min<std::uint64_t>(spans, 2) : spans;
        }
        return wanted <= free_.size() + (present_ - nodes_.size()) ? 0 : make_tables();
    }

    // Maps one leaf, the largest that fits in [iova, end) and at oa; returns its length. Reserved before, nothing there.
    std::uint64_t map_leaf(std::uint64_t iova, std::uint64_t end, std::uint64_t oa, Rights rights)
    {
        unsigned level = 0;
        while (level < leaf_level_max && entry_lg2(level + 1) <= leaf_lg2_max_ &&
               ((iova | oa) & ((1ull << entry_lg2(level + 1)) - 1)) == 0 && end - iova >= 1ull << entry_lg2(level + 1))
            ++level;
        const std::uint32_t number = node_for(iova, level);
        const unsigned index = entry_index(iova, level);
        Node &node = nodes_[number];
        if (level > 0) {
            std::uint32_t &child = children_[node.children][index];
            assert(child != leaf_child);
            if (child != no_child)
                retire(child);
            child = leaf_child;
        }
        node.lines |= 1ull << (index / line_entries);
        node.live++;
        std::atomic_ref(entries(number)[index]).store(F::leaf(oa, level, rights), std::memory_order_seq_cst);
        return 1ull << entry_lg2(level);
    }

    void record(const Extent &e) { extents_.insert(e); }
    void forget(std::uint64_t start, std::uint64_t end) { extents_.erase(start, end); }

    // The leaf that maps iova, which lies in an extent.
    [[nodiscard]] Leaf find(std::uint64_t iova)
    {
        std::uint32_t number = top_node(iova);
        unsigned level = top_level;
        for (;;) {
            const unsigned index = entry_index(iova, level);
            const std::uint32_t child = level > 0 ? children_[nodes_[number].children][index] : leaf_child;
            if (child == leaf_child)
                return {entries(number) + index, iova >> entry_lg2(level) << entry_lg2(level), 1ull << entry_lg2(level),
                        number, index};
            assert(child != no_child);
            number = child;
            --level;
        }
    }

    // After the leaf's entry was taken out.
    void unmapped(const Leaf &leaf)
    {
        Node &node = nodes_[leaf.node];
        if (node.level > 0)
            children_[node.children][leaf.index] = no_child;
        drop(leaf.node);
    }

    // Unlinks the tables that became empty and lie wholly in [start, end); a table that is unmapped piece by piece stays, since it
    // is about to be mapped again. They come back by reuse_retired after advance and grace.
    void reclaim(std::uint64_t start, std::uint64_t end)
    {
        for (std::size_t i = 0; i < emptied_.size(); ++i) { // retiring may empty the parent and append it
            const std::uint32_t number = emptied_[i];
            const Node &node = nodes_[number];
            const bool inside = node.base >= start && node.base + (1ull << entry_lg2(node.level + 1u)) <= end;
            if (inside && node.live == 0 && node.level < top_level && linked_node(node.base, node.level) == number)
                retire(number);
        }
        emptied_.clear();
    }

    // Calls visit(iova, length) for each table that is unlinked but may still be walked.
    template <class Visit> void for_each_retired(Visit visit) const
    {
        for (const std::uint32_t number : retired_)
            visit(nodes_[number].base, 1ull << entry_lg2(nodes_[number].level + 1u));
    }

    [[nodiscard]] bool has_retired() const { return !retired_.empty(); }

    // A grace period after the advance over their range has passed: nobody walks them any more.
    void reuse_retired()
    {
        free_.insert(free_.end(), retired_.begin(), retired_.end());
        retired_.clear();
    }

    // ---- summary and dirty lines ---------------------------------------------------------------------------------

    // Words of table bits that matter.
    [[nodiscard]] std::uint64_t bit_words() const { return (nodes_.size() + 63) / 64; }

    [[nodiscard]] std::uint64_t take_tables(std::uint64_t i)
    {
        return take_bits(tables_.table_bits(first_table_ / 64 + i)) & existing_tables(i);
    }

    [[nodiscard]] std::uint64_t take_lines(std::uint32_t number)
    {
        return take_bits(tables_.line_word(first_table_ + number)) & nodes_[number].lines;
    }

    [[nodiscard]] bool any_table_bit() const
    {
        for (std::uint64_t i = 0; i < bit_words(); ++i) {
            const std::uint64_t bits =
                std::atomic_ref(tables_.table_bits(first_table_ / 64 + i)).load(std::memory_order_seq_cst);
            if ((bits & existing_tables(i)) != 0)
                return true;
        }
        return false;
    }

    [[nodiscard]] std::uint64_t existing_tables(std::uint64_t i) const
    {
        const std::uint64_t after = nodes_.size() - i * 64;
        return after >= 64 ? ~0ull : (1ull << after) - 1;
    }

    [[nodiscard]] std::uint64_t existing_lines(std::uint32_t number) const { return nodes_[number].lines; }

    [[nodiscard]] Line line(std::uint32_t number, unsigned line)
    {
        const Node &node = nodes_[number];
        const unsigned first = line * line_entries;
        std::uint8_t leaves = 0xff;
        if (node.level > 0) {
            leaves = 0;
            for (unsigned i = 0; i < line_entries; ++i) {
                if (children_[node.children][first + i] == leaf_child)
                    leaves = static_cast<std::uint8_t>(leaves | 1u << i);
            }
        }
        return {entries(number) + first,
                node.base + (std::uint64_t{first} << entry_lg2(node.level)),
                entry_lg2(node.level),
                leaves,
                number,
                line};
    }

    // Which leaves of the line are dirty. After its summary bit was taken (S4).
    [[nodiscard]] static unsigned dirty(const Line &line)
    {
        unsigned mask = 0;
        for (unsigned i = 0; i < line_entries; ++i) {
            if (F::dirty(std::atomic_ref(line.entries[i]).load(std::memory_order_seq_cst)))
                mask |= 1u << i;
        }
        return mask & line.leaves;
    }

    // Clears D of the leaves in mask, which were seen dirty.
    static void clean(const Line &line, unsigned mask)
    {
        for (; mask != 0; mask &= mask - 1)
            std::atomic_ref(line.entries[std::countr_zero(mask)]).fetch_and(~F::dirty_bit, std::memory_order_seq_cst);
    }

    // Sets D in the owner's name: a device may have written there and cannot say so any more. Summarized by nobody: the owner owes
    // a full scan.
    static void make_dirty(const Leaf &leaf)
    {
        std::atomic_ref(*leaf.entry).fetch_or(F::dirty_bit, std::memory_order_seq_cst);
    }

  private:
    static constexpr std::uint32_t no_child = 0xffff'ffff;
    static constexpr std::uint32_t leaf_child = 0xffff'fffe;
    static constexpr std::uint64_t chunk_tables = 512; // made present at once: 2 MiB

    struct Node {
        std::uint64_t base;     // IOVA of entry 0
        std::uint64_t lines;    // which lines may hold leaves
        std::uint32_t children; // of level > 0: index in children_
        std::uint16_t live;     // entries in use
        std::uint8_t level;
    };
    using Children = std::array<std::uint32_t, table_entries>;

    [[nodiscard]] std::uint64_t *entries(std::uint32_t number) const
    {
        const Node &node = nodes_[number];
        if (node.level == top_level)
            return tables_.entries(first_top_table(h_.aperture_lg2, top_level) + (node.base >> top_span_lg2));
        return tables_.entries(first_table_ + number);
    }

    [[nodiscard]] std::uint32_t top_node(std::uint64_t iova) const
    {
        return static_cast<std::uint32_t>((iova >> top_span_lg2) - (start_ >> top_span_lg2));
    }

    // The node at `level` that covers iova; no_child: none is linked there.
    [[nodiscard]] std::uint32_t linked_node(std::uint64_t iova, unsigned level) const
    {
        std::uint32_t number = top_node(iova);
        for (unsigned l = top_level; l > level; --l) {
            number = children_[nodes_[number].children][entry_index(iova, l)];
            if (number >= leaf_child)
                return no_child;
        }
        return number;
    }

    // The same, linking tables that are missing.
    std::uint32_t node_for(std::uint64_t iova, unsigned level)
    {
        std::uint32_t number = top_node(iova);
        for (unsigned l = top_level; l > level; --l) {
            const unsigned index = entry_index(iova, l);
            const std::uint32_t child = children_[nodes_[number].children][index];
            assert(child != leaf_child);
            if (child != no_child) {
                number = child;
                continue;
            }
            const std::uint32_t made = take_table(iova >> entry_lg2(l) << entry_lg2(l), l - 1);
            children_[nodes_[number].children][index] = made;
            nodes_[number].live++;
            std::atomic_ref(entries(number)[index])
                .store(F::table(first_table_ + made, l - 1), std::memory_order_seq_cst);
            number = made;
        }
        return number;
    }

    std::uint32_t new_node(std::uint64_t base, unsigned level)
    {
        nodes_.push_back({base, 0, 0, 0, 0});
        const auto number = static_cast<std::uint32_t>(nodes_.size() - 1);
        set_level(number, base, level);
        present_ = std::max<std::uint64_t>(present_, nodes_.size());
        return number;
    }

    void set_level(std::uint32_t number, std::uint64_t base, unsigned level)
    {
        Node &node = nodes_[number];
        node = {base, 0, 0, 0, static_cast<std::uint8_t>(level)};
        if (level == 0)
            return;
        if (free_children_.empty()) {
            children_.emplace_back();
            free_children_.push_back(static_cast<std::uint32_t>(children_.size() - 1));
        }
        node.children = free_children_.back();
        free_children_.pop_back();
        children_[node.children].fill(no_child);
    }

    std::uint32_t take_table(std::uint64_t base, unsigned level)
    {
        if (free_.empty())
            return new_node(base, level);
        const std::uint32_t number = free_.back();
        free_.pop_back();
        set_level(number, base, level);
        std::memset(entries(number), 0, 1u << table_size_lg2);
        return number;
    }

    // One entry of the node less.
    void drop(std::uint32_t number)
    {
        Node &node = nodes_[number];
        if (--node.live == 0) {
            node.lines = 0;
            emptied_.push_back(number);
        }
    }

    // Unlinks a table, and the tables below it, that map nothing.
    void retire(std::uint32_t number)
    {
        const Node node = nodes_[number];
        if (node.level > 0) {
            for (unsigned i = 0; i < table_entries; ++i) {
                if (const std::uint32_t child = children_[node.children][i]; child != no_child)
                    retire(child);
            }
            free_children_.push_back(node.children);
        }
        const std::uint32_t parent = linked_node(node.base, node.level + 1u);
        const unsigned index = entry_index(node.base, node.level + 1u);
        std::atomic_ref(entries(parent)[index]).store(0, std::memory_order_seq_cst);
        children_[nodes_[parent].children][index] = no_child;
        drop(parent);
        nodes_[number].lines = 0;
        retired_.push_back(number);
    }

    // One chunk more. -EAGAIN: done, look again. 0: every table that the slice could ever need has a page, linked or free.
    int make_tables()
    {
        const std::uint64_t upto = std::min(present_ + chunk_tables, shard_tables(h_.slice_lg2));
        if (upto == present_)
            return 0;
        const std::uint64_t first = first_table_ + present_;
        const std::uint64_t count = upto - present_;
        if (make_present_(h_.table_pages + (first << table_size_lg2), count << table_size_lg2) != 0 ||
            make_present_(h_.line_words + first * 8, count * 8) != 0 ||
            make_present_(h_.table_bits + first / 8, round_up(count / 8 + 1, 8)) != 0)
            return -ENOMEM;
        present_ = upto;
        return -EAGAIN;
    }

    dr_translation_header h_;
    Tables tables_;
    std::uint64_t first_table_;
    std::uint64_t start_;
    std::uint64_t end_;
    unsigned leaf_lg2_max_;
    MakePresent make_present_;
    ExtentMap extents_;
    std::vector<Node> nodes_;
    std::vector<Children> children_; // of nodes above level 0
    std::vector<std::uint32_t> free_children_;
    std::vector<std::uint32_t> free_;    // table pages
    std::vector<std::uint32_t> emptied_; // perhaps to be retired by reclaim
    std::vector<std::uint32_t> retired_; // unlinked, perhaps still walked
    std::uint64_t present_ = 0;          // numbers below this have a page
};

// Links the root to the top tables of an hwpt; the pages exist.
template <Format F> void make_top_tables(const dr_translation_header &h, const Tables &tables)
{
    for (unsigned level = h.root_level; level > top_level; --level) {
        const std::uint64_t parents = first_top_table(h.aperture_lg2, level);
        const std::uint64_t children = first_top_table(h.aperture_lg2, level - 1);
        for (std::uint64_t i = 0; i < covering(h.aperture_lg2, entry_lg2(level)); ++i)
            tables.entries(parents + i / table_entries)[i % table_entries] = F::table(children + i, level - 1);
    }
}

} // namespace dirtyring::iommu
