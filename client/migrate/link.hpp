// The link from the source VMM to the destination VMM, and its rate.
//
//    ┌─────────┬────────┬──────────────┐           address and length in bytes; length 0: the end, which the
//    │ address │ length │ length bytes │  …        destination acknowledges with one byte when all is in its memory
//    │   u64   │  u64   │              │
//    └─────────┴────────┴──────────────┘
#pragma once

#include "ring/region.hpp"

#include <cstddef>
#include <cstdint>
#include <span>

namespace dirtyring::migrate {

struct LinkEnds {
    ring::Fd source;
    ring::Fd destination;
};

LinkEnds make_link();

class Link
{
  public:
    // bytes_per_second 0: unlimited.
    Link(const ring::Fd &socket, std::uint64_t bytes_per_second) : socket_(socket), bandwidth_(bytes_per_second) {}

    // Not before this may something be sent, CLOCK_MONOTONIC ns.
    [[nodiscard]] std::uint64_t free_at() const { return free_at_; }

    // Bytes that are sent in one go.
    [[nodiscard]] std::uint64_t chunk() const;

    // What it sends may change meanwhile.
    void send(std::uint64_t address, std::span<const std::byte> data);

    // There was nothing to send since the last send(): that time says nothing about the rate.
    void idle() { last_ns_ = 0; }

    // Sends the end and waits until the destination has acknowledged it.
    void finish();

    // Bytes/s, over the last fifth of a second that the link was busy.
    [[nodiscard]] double rate() const { return rate_; }
    [[nodiscard]] std::uint64_t bytes_sent() const { return bytes_sent_; }

  private:
    void measure(std::uint64_t sent, std::uint64_t began_ns);

    const ring::Fd &socket_;
    std::uint64_t bandwidth_;
    std::uint64_t free_at_ = 0;
    std::uint64_t bytes_sent_ = 0;

    std::uint64_t last_ns_ = 0; // when the last send ended; 0: idle since
    std::uint64_t window_ns_ = 0;
    std::uint64_t window_bytes_ = 0;
    bool measured_ = false; // a whole window
    double rate_ = 0;
};

// The destination VMM: writes what comes into `memory` until the end. Returns false if the source went away.
bool receive(const ring::Fd &socket, std::span<std::byte> memory);

} // namespace dirtyring::migrate
