// What the kit does to a service, by area of ring/SPEC.md.
#pragma once

#include "client/check/context.hpp"

#include <functional>
#include <optional>
#include <span>
#include <string>

namespace dirtyring::check {

std::span<const Check> message_checks();  // F, H
std::span<const Check> object_checks();   // O
std::span<const Check> memory_checks();   // S-1 to S-9
std::span<const Check> ring_checks();     // Q
std::span<const Check> command_checks();  // M-1 to M-10
std::span<const Check> map_checks();      // M-11 to M-20
std::span<const Check> tracking_checks(); // M-21 to M-26
std::span<const Check> size_checks();     // M-27 to M-29
std::span<const Check> device_checks();   // devices' sections, deaths, pins

// How the service ended, if it has.
using HowItEnded = std::function<std::optional<std::string>()>;

// One check against the service at `socket`, within `patience`. False: nobody is there any more.
bool run(const Check &check, Verdicts &verdicts, const std::string &socket, std::chrono::milliseconds patience,
         const HowItEnded &end = {});

// All of them. Throws Gone if nobody listens there to begin with.
void check_service(Verdicts &verdicts, const std::string &socket, std::chrono::milliseconds patience,
                   const HowItEnded &end = {});

} // namespace dirtyring::check
