#include "service/guests/holdings.hpp"

#include <cerrno>
#include <charconv>
#include <cstring>
#include <sys/eventfd.h>
#include <sys/stat.h>

namespace dirtyring::service {

namespace {

Result<ring::Region> make_region(const char *label, std::uint64_t size, ring::Pages pages)
{
    ring::Region region;
    if (const int error = region.make(label, size, pages); error != 0)
        return refusal(-error, fmt::format("no memory for {} ({} bytes): {}", label, size, std::strerror(-error)));
    return region;
}

Result<ring::Region> map_region(const std::string &name, const char *label, std::uint64_t size, ring::Fd fd)
{
    struct stat status {
    };
    if (::fstat(fd.get(), &status) != 0 || static_cast<std::uint64_t>(status.st_size) != size)
        return refusal(EINVAL,
                       fmt::format("descriptor {} ({}) has {} bytes, expected {}", name, label, status.st_size, size));
    ring::Region region;
    if (const int error = region.map.map(fd.get(), size, PROT_READ | PROT_WRITE); error != 0)
        return refusal(-error,
                       fmt::format("descriptor {} ({}) cannot be mapped: {}", name, label, std::strerror(-error)));
    region.fd = std::move(fd);
    return region;
}

} // namespace

std::optional<std::uint32_t> guest_of(std::string_view name)
{
    std::uint32_t guest = 0;
    const char *end = name.data() + name.size();
    if (name.empty() || name[0] != 'P')
        return std::nullopt;
    const auto parsed = std::from_chars(name.data() + 1, end, guest);
    return parsed.ec == std::errc{} && parsed.ptr == end ? std::optional(guest) : std::nullopt;
}

void forget(FdStore &store, const Names &names)
{
    for (const std::string &name : names)
        store.remove(name);
}

Result<ring::Region> Holdings::region(const std::string &name, const char *label, std::uint64_t size, ring::Pages pages)
{
    if (restored()) {
        auto fd = take(name);
        return fd ? map_region(name, label, size, std::move(*fd)) : tl::unexpected(fd.error());
    }
    auto region = make_region(label, size, pages);
    if (region) {
        if (auto ok = put(name, region->fd.get()); !ok)
            return tl::unexpected(ok.error());
    }
    return region;
}

Result<ring::Fd> Holdings::eventfd(const std::string &name)
{
    if (restored())
        return take(name);
    ring::Fd fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    if (!fd)
        return refusal(errno, fmt::format("no eventfd: {}", std::strerror(errno)));
    if (auto ok = put(name, fd.get()); !ok)
        return tl::unexpected(ok.error());
    return fd;
}

Result<void> Holdings::put(const std::string &name, int fd)
{
    const int error = store_.put(name, fd);
    if (error == -ENOSPC)
        return refusal(ENOSPC, "as many descriptors are kept for a successor of this service as can be");
    if (error != 0)
        return refusal(-error, fmt::format("a descriptor cannot be kept for a successor of this service: {}",
                                           std::strerror(-error)));
    names_.push_back(name);
    return {};
}

Result<ring::Fd> Holdings::take(const std::string &name)
{
    ring::Fd fd = store_.take(name);
    if (!fd)
        return refusal(ENOENT, fmt::format("descriptor {} is missing", name));
    names_.push_back(name);
    return fd;
}

} // namespace dirtyring::service
