// A DMA thread of an hwpt whose format is known at run time only.
#pragma once

#include "iommu/dma.hpp"
#include "iommu/formats.hpp"

#include <cstddef>
#include <cstdint>
#include <variant>

namespace dirtyring::iommu {

class AnyDmaThread
{
  public:
    static constexpr std::uint64_t pin_bytes_max = DmaThread<AmdV1>::pin_bytes_max;

    // The format of the view's header is known.
    AnyDmaThread(const TranslationView &view, const GuestMemory &memory, const DmaThreads &threads, std::size_t index)
        : engine_(with_format(view.header().format, [&](auto f) {
              return Engine(std::in_place_type<DmaThread<decltype(f)>>, view, memory, threads, index);
          }))
    {
    }

    void enter()
    {
        std::visit([](auto &engine) { engine.enter(); }, engine_);
    }
    [[nodiscard]] std::uint64_t leave()
    {
        return std::visit([](auto &engine) { return engine.leave(); }, engine_);
    }
    [[nodiscard]] bool inside() const
    {
        return std::visit([](const auto &engine) { return engine.inside(); }, engine_);
    }

    void set_stall_patience(std::uint64_t ns)
    {
        std::visit([&](auto &engine) { engine.set_stall_patience(ns); }, engine_);
    }

    DmaFault write(std::uint64_t iova, const void *data, std::uint64_t length)
    {
        return std::visit([&](auto &engine) { return engine.write(iova, data, length); }, engine_);
    }
    DmaFault read(std::uint64_t iova, void *data, std::uint64_t length)
    {
        return std::visit([&](auto &engine) { return engine.read(iova, data, length); }, engine_);
    }

    template <class Piece>
    int pin(std::uint64_t iova, std::uint64_t length, bool write, unsigned &slot, DmaFault &fault, Piece piece)
    {
        return std::visit([&](auto &engine) { return engine.pin(iova, length, write, slot, fault, piece); }, engine_);
    }
    [[nodiscard]] bool pinned(unsigned slot) const
    {
        return std::visit([&](const auto &engine) { return engine.pinned(slot); }, engine_);
    }
    [[nodiscard]] unsigned pins() const
    {
        return std::visit([](const auto &engine) { return engine.pins(); }, engine_);
    }
    void cancel_pin(unsigned slot)
    {
        std::visit([&](auto &engine) { engine.cancel_pin(slot); }, engine_);
    }
    DmaFault unpin(unsigned slot)
    {
        return std::visit([&](auto &engine) { return engine.unpin(slot); }, engine_);
    }

  private:
    template <class... F> using OneOf = std::variant<DmaThread<F>...>;
    using Engine = Formats::Of<OneOf>;

    Engine engine_;
};

} // namespace dirtyring::iommu
