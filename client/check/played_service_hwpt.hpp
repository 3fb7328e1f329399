// The service as a device sees it: page tables, generations, cells, the guest's memory, of which no change is
// overlooked.
#pragma once

#include "client/check/played_service.hpp"
#include "iommu/dma.hpp"
#include "iommu/format_amdv1.hpp"

#include <array>
#include <functional>
#include <unordered_map>

namespace dirtyring::check {

class PlayedHwpt : public PlayedService
{
  public:
    static constexpr std::uint64_t pages = 16384; // mapped at IOVA 0
    static constexpr std::uint64_t oa_base = 1ull << 32;

    enum class Leaves { small, one_of_1_gib };

    explicit PlayedHwpt(Stage &stage, Leaves leaves = Leaves::small);

    // Starts the program and waits until it has attached. The check ends if it does not.
    void start_and_attach();
    std::uint32_t threads = 0; // 0: it has not attached
    std::uint32_t pins = 0;    // of each thread
    bool detached = false;

    // ---- what is shared ----
    [[nodiscard]] dr_translation_header &header() const { return *translation_.map.as<dr_translation_header>(); }
    [[nodiscard]] dr_shard_control &control(unsigned shard = 0) const;
    [[nodiscard]] std::uint64_t &generation(std::uint64_t region) const;
    [[nodiscard]] std::uint64_t &root() const { return tables().entries(geometry_.root)[0]; }
    [[nodiscard]] std::uint64_t &leaf(std::uint64_t page_number) const;
    [[nodiscard]] std::span<dr_cell> cells() const { return {cells_.map.as<dr_cell>(), threads}; }
    [[nodiscard]] std::span<dr_pin> slots() const;
    [[nodiscard]] bool inside() const; // is a thread inside a section?
    [[nodiscard]] bool dirty(std::uint64_t page_number) const;
    // Line and table bit of its leaf.
    [[nodiscard]] bool line_bit(std::uint64_t page_number) const;
    [[nodiscard]] bool table_bit(std::uint64_t page_number) const;
    [[nodiscard]] bool any_table_bit() const;
    void fill_summary() const;
    [[nodiscard]] bool rung() const { return take_signal(bells_[0]); }
    // Did the program ever set a bit in an entry?
    [[nodiscard]] bool entries_touched() const;
    [[nodiscard]] std::uint64_t sections() const;
    [[nodiscard]] bool gave_back() const; // a slot
    [[nodiscard]] bool has_pinned() const;
    [[nodiscard]] bool pinned(std::uint64_t page_number) const; // for writing, now

    // ---- as the service does ----
    void clean() const; // takes the summary, clears D
    void advance() const;
    // Waits until every section that is open now has ended; D-13 is broken by one that does not.
    void grace();
    // All of it, and looks what is there now.
    void sweep();

    // ---- what the program does ----
    // Lets it run for a time, and holds it still.
    void burst(std::chrono::microseconds time);
    // Of guest memory, since it was remembered, and until it detached.
    [[nodiscard]] Pages changed() const { return detached ? changed_at_detach_ : differing(); }
    [[nodiscard]] Pages changed_after_detach() const { return differing(); }
    void remember(const Pages &changed);

  private:
    using Content = std::array<std::byte, page>;

    [[nodiscard]] Pages differing() const;
    [[nodiscard]] const Content &remembered(std::uint64_t page_number) const;
    Answer answer(Request &request) override;
    Answer attach(const dr_device_attach &request);
    void build(Leaves leaves);
    [[nodiscard]] iommu::Tables tables() const { return {tables_.map.data(), geometry_}; }
    [[nodiscard]] std::uint64_t summary_word(std::uint64_t page_number) const;
    [[nodiscard]] unsigned leaf_index(std::uint64_t page_number) const;

    Leaves leaves_;
    dr_translation_header geometry_;
    dr_device_attach expected_{}; // token and hwpt
    ring::Region tables_;
    ring::Region translation_;
    ring::Region cells_;
    ring::Region memory_;
    std::vector<Fd> bells_;
    std::uint64_t first_ = 0;                               // table below the root
    std::unordered_map<std::uint64_t, Content> remembered_; // of each page; zeroes where nothing stands
    Pages changed_at_detach_;
};

} // namespace dirtyring::check
