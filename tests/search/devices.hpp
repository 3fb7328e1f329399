// The devices: their DMA in sections and with pins, how they stop and die; and what the control plane does for them.
#pragma once

#include "tests/search/oracle.hpp"
#include "tests/search/service.hpp"
#include "tests/search/vmm.hpp"
#include "tests/search/world.hpp"

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <vector>

namespace dirtyring::search {

// Unwinds what a device was doing.
struct DeviceDeath {
};

class Devices
{
  public:
    Devices(World &world, Oracle &oracle, Vmm &vmm, Service &service);

    // ---- moves

    void act();     // one of them does some DMA, or stops, or dies
    void attach();  // a device comes, or gets a step further
    void see_off(); // a device that leaves or is dead gets a step further
    void detach();  // perhaps one leaves
    // A device stands within a step: others write the same page, or what they have pinned lands and is given back.
    void others_go_on(bool write);
    // The area that was written or pinned last.
    [[nodiscard]] const Plan::Area *last_area() const { return last_area_; }
    void take_reports();

    // At the end: all that is in flight ends, and nobody is left between two steps. False: not yet.
    bool come_to_rest();
    // One of them, all alone, writes the pages that are written most.
    void write_everywhere();

    // ---- what others ask

    // May the device whose code is running die here?
    [[nodiscard]] bool may_die() const { return running_ != nullptr; }
    // Others take steps within a step of a device: who runs now, to be given back.
    struct Running;
    [[nodiscard]] Running *running() const { return running_; }
    void set_running(Running *r) { running_ = r; }
    [[nodiscard]] bool none_has_a_slot() const { return world_.devices.empty(); }
    [[nodiscard]] bool owed() const;
    [[nodiscard]] bool attaching() const;
    [[nodiscard]] bool none() const { return devices_.empty(); }
    void service_died();

  private:
    // unanswered: the worker died before its attach or detach was answered. Until it has said ATTACH again it does no
    // DMA.
    enum class Stage { attaching, attached, leaving, unanswered, dead, burying };
    struct Dma {
        std::uint64_t page; // OA
        std::uint64_t stamp;
    };
    struct InFlight {
        unsigned slot;
        bool write;
        std::uint64_t iova;
        std::uint64_t time;
        std::span<std::byte> memory;
        std::optional<Dma> landed;
    };
    struct Device {
        std::uint32_t id;
        unsigned number; // its slot in each page
        Stage stage = Stage::attaching;
        std::unique_ptr<iommu::AnyDmaThread> engine;
        bool inside = false;
        bool busy = false; // on the stack
        std::uint64_t entered = 0;
        std::uint64_t stamp = 0;
        std::vector<Dma> written; // in this section
        std::deque<InFlight> pins;
        std::set<unsigned> shards; // that have been told of the stage
        unsigned unreported = 0;
    };
    friend struct Running;

    [[nodiscard]] DeviceMemory &memory(const Device &d) { return *world_.devices.at(d.id); }
    template <class Work> void as(Device &d, Work work);
    void enter(Device &d);
    void leave(Device &d);
    void stop(Device &d); // its process ends
    void ring(std::uint64_t bells);
    void write(Device &d, const Plan::Area &area, std::uint64_t page);
    void read(Device &d, const Plan::Area &area, std::uint64_t page);
    void pin(Device &d, const Plan::Area &area, std::uint64_t page);
    void go_on(Device &d);
    void judge_fault(const Device &d, const iommu::DmaFault &fault, std::uint64_t iova, bool write);
    [[nodiscard]] std::uint64_t any_page(const Plan::Area &area);
    [[nodiscard]] std::uint64_t busy_page(const Plan::Area *&area);
    void tell_shard(Device &d);
    void release(Device &d);

    World &world_;
    Oracle &oracle_;
    Vmm &vmm_;
    Service &service_;
    std::vector<std::unique_ptr<Device>> devices_;
    Running *running_ = nullptr;
    const Plan::Area *last_area_ = nullptr;
    std::uint64_t last_page_ = 0;
};

} // namespace dirtyring::search
