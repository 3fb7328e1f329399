// What a device does, step by step: a share of a trace, or a pattern.
#pragma once

#include "client/migrate/shared.hpp"

#include <cstdint>
#include <memory>
#include <optional>
#include <span>

namespace dirtyring::migrate {

struct Step {
    std::uint64_t due_ns; // after Control::start_ns
    std::uint64_t iova;
    std::uint64_t length;
    std::span<const std::uint32_t> pages; // the guest's, of [iova, iova + length)
    std::uint64_t maps_before;            // all loops together
    std::uint32_t line;                   // of the trace; 0: none
    bool write;
};

class Load
{
  public:
    Load() = default;
    Load(const Load &) = delete;
    Load &operator=(const Load &) = delete;
    virtual ~Load() = default;

    // nullopt: nothing more. A step is valid until the next call.
    virtual std::optional<Step> next() = 0;
};

std::unique_ptr<Load> make_load(const Options &options, const Plan &plan, unsigned device);

// How many of the first `accesses` of an endlessly repeated trace are this device's.
constexpr std::uint64_t share(std::uint64_t accesses, unsigned device, unsigned devices)
{
    return (accesses + devices - 1 - device) / devices;
}

// When a moment of the trace comes in its n-th replay, n from 0, ns after the start.
std::uint64_t replay_ns(const Options &options, const Plan &plan, std::uint64_t loop, std::uint64_t time_us);

} // namespace dirtyring::migrate
