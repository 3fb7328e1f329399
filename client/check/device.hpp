// A device of the kit's own: one DMA thread on the real engine of iommu/, and hands on its tables and cell for what an
// engine would not do.
#pragma once

#include "client/check/guest.hpp"
#include "iommu/any_dma.hpp"

#include <memory>
#include <sys/types.h>

namespace dirtyring::check {

class Device : public Peer
{
  public:
    // Attaches to the guest's hwpt.
    Device(Context &context, const TrackedGuest &guest, std::uint32_t pins = 0);

    // ---- as devices do ----
    void enter() { dma_->enter(); }
    void leave();
    // Inside a section. The reason of the fault, if there was one.
    iommu::FaultReason write_inside(std::uint64_t page_number);
    // In a section of its own, of which nothing may go wrong.
    void write(std::uint64_t page_number);
    void write(const Pages &pages)
    {
        for (const std::uint64_t p : pages)
            write(p);
    }
    void detach();

    // ---- by hand ----
    [[nodiscard]] dr_cell &cell() const { return *cells_.as<dr_cell>(); }
    [[nodiscard]] dr_pin &pin(unsigned slot) const { return cells_.as<dr_pin>(sizeof(dr_cell))[slot]; }
    // As an engine takes a slot and gives it back; the range is not translated.
    void hold_pin(unsigned slot, std::uint64_t first, std::uint64_t last, bool write) const;
    void give_back_pin(unsigned slot) const;
    // The leaf of a page that is mapped; nullptr: none.
    [[nodiscard]] std::uint64_t *leaf(std::uint64_t page_number, std::uint64_t *table = nullptr) const;
    [[nodiscard]] bool dirty(std::uint64_t page_number) const;
    // D, and nothing in the summary; then the summary.
    void set_dirty_silently(std::uint64_t page_number) const;
    void summarize(std::uint64_t page_number) const;
    [[nodiscard]] std::uint64_t generation(std::uint64_t page_number) const
    {
        return view_.generation(page_number * page);
    }
    void ring_doorbell() const;

    std::vector<Fd> fds; // of the attach reply
    dr_device info{};
    Mapping tables;
    [[nodiscard]] const dr_translation_header &geometry() const { return view_.header(); }

  private:
    Mapping translation_;
    Mapping cells_;
    Mapping memory_map_;
    iommu::GuestMemory memory_;
    iommu::TranslationView view_;
    std::unique_ptr<iommu::AnyDmaThread> dma_;
    std::uint64_t value_ = 0;
};

// A device in a process of its own, inside a section in which it did `deed`.
class DeviceProcess
{
  public:
    using Deed = std::function<void(Device &)>;

    DeviceProcess(Context &context, const TrackedGuest &guest, const Deed &deed, std::uint32_t pins = 0);
    DeviceProcess(const DeviceProcess &) = delete;
    DeviceProcess &operator=(const DeviceProcess &) = delete;
    ~DeviceProcess() { kill(); }

    void leave_section() { tell('l'); }
    void close_socket() { tell('s'); }
    void kill();

  private:
    [[noreturn]] static void live(Context &context, const TrackedGuest &guest, const Deed &deed, std::uint32_t pins);
    void tell(char c);
    void wait_for(char c);

    Context &context_;
    Fd talk_;
    pid_t pid_ = -1;
};

// A guest and a device that keep the rules, beside one that does not. S-8 is broken if they notice.
class Bystander
{
  public:
    explicit Bystander(Context &context) : context_(context), guest_(context), device_(context, guest_) {}
    void expect_undisturbed(const std::string &by);

  private:
    Context &context_;
    TrackedGuest guest_;
    Device device_;
    std::uint64_t round_ = 0;
};

} // namespace dirtyring::check
