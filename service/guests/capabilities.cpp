#include "service/guests/capabilities.hpp"

#include "iommu/formats.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <iterator>

namespace dirtyring::service {

namespace {

bool printable(char c)
{
    return c >= ' ' && c <= '~';
}

// Messages name the device by it, and the front-end gets all of its bytes.
bool good_name(const char (&name)[DR_NAME_BYTES])
{
    const char *end = std::find(std::begin(name), std::end(name), '\0');
    return end != std::begin(name) && end != std::end(name) && std::all_of(std::begin(name), end, printable) &&
           std::all_of(end, std::end(name), [](char c) { return c == '\0'; });
}

} // namespace

Result<Capabilities> Capabilities::of(const dr_device_attach &request)
{
    constexpr std::uint32_t flags = DR_DEVICE_CAN_TRACK | DR_DEVICE_COHERENT;
    if (!good_name(request.name))
        return refusal(EINVAL, fmt::format("the device's name: expected 1 to {} printable characters of ASCII, then "
                                           "zeroes",
                                           DR_NAME_BYTES - 1));
    if ((request.flags & ~flags) != 0)
        return refusal(EINVAL, fmt::format("flags {:#x} of device \"{}\": only {:#x} are known", request.flags,
                                           request.name, flags));
    if (request.formats == 0)
        return refusal(EINVAL, fmt::format("device \"{}\" walks no format, expected the bits of some of {}",
                                           request.name, format_names(UINT32_MAX)));
    Capabilities can{request.flags, request.formats, {}};
    std::memcpy(can.name, request.name, sizeof can.name);
    return can;
}

bool Capabilities::walks(std::uint32_t format) const
{
    return (formats & DR_FORMAT_BIT(format)) != 0;
}

bool Capabilities::tracks(std::uint32_t format) const
{
    const bool coherent_only =
        iommu::knows_format(format) && iommu::with_format(format, [](auto f) { return f.coherent_only; });
    return (flags & DR_DEVICE_CAN_TRACK) != 0 && (!coherent_only || (flags & DR_DEVICE_COHERENT) != 0);
}

std::string Capabilities::why_not(std::uint32_t format) const
{
    if ((flags & DR_DEVICE_CAN_TRACK) == 0)
        return "does not set Dirty bits";
    return fmt::format("sets Dirty bits in {} only with coherent walks, which it has not",
                       format_names(DR_FORMAT_BIT(format)));
}

std::string format_names(std::uint32_t mask)
{
    std::string names;
    iommu::for_each_format([&](auto f) {
        if ((mask & DR_FORMAT_BIT(f.id)) != 0)
            names += fmt::format("{}{} ({})", names.empty() ? "" : ", ", f.name, unsigned{f.id});
    });
    return names.empty() ? "none that is known here" : names;
}

} // namespace dirtyring::service
