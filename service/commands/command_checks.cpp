#include "service/commands/command_checks.hpp"

namespace dirtyring::service {

namespace {

bool aligned(std::uint64_t value)
{
    return value % DR_PAGE == 0;
}

bool good_map(const dr_command &request)
{
    constexpr std::uint32_t rights = DR_MAP_READ | DR_MAP_WRITE;
    return (request.flags & ~(rights | DR_MAP_IDEMPOTENT)) == 0 && (request.flags & rights) != 0 &&
           aligned(request.iova) && aligned(request.oa) && aligned(request.length) && request.length != 0 &&
           request.cookie == 0;
}

bool good_unmap(const dr_command &request)
{
    constexpr std::uint32_t harvest = DR_UNMAP_DEFERRED | DR_UNMAP_DISCARD;
    return (request.flags & ~(harvest | DR_UNMAP_EMPTY_OK)) == 0 && (request.flags & harvest) != harvest &&
           aligned(request.iova) && (request.length == UINT64_MAX || aligned(request.length)) && request.length != 0 &&
           request.oa == 0 && request.cookie == 0;
}

bool good_on_hwpt(const dr_command &request)
{
    return request.flags == 0 && request.iova == 0 && request.length == 0 && request.oa == 0 &&
           request.cookie <= (request.opcode == DR_OP_SYNC ? payload_mask : 0);
}

bool good_resize(const dr_command &request)
{
    return request.flags == 0 && aligned(request.iova) && aligned(request.length) && request.length != 0 &&
           request.oa == 0 && request.cookie == 0;
}

bool good(const dr_command &request)
{
    switch (request.opcode) {
    case DR_OP_MAP:
        return good_map(request);
    case DR_OP_UNMAP:
        return good_unmap(request);
    case DR_OP_SYNC:
    case DR_OP_ENABLE:
    case DR_OP_DISABLE:
        return good_on_hwpt(request);
    case DR_OP_SPLIT:
    case DR_OP_COLLAPSE:
        return good_resize(request);
    default:
        return false;
    }
}

} // namespace

bool well_formed(const dr_command &request)
{
    return (request.leaf_lg2 == 0 || is_resize(request.opcode)) && request.reserved == 0 && good(request);
}

} // namespace dirtyring::service
