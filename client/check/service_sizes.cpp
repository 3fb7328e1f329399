// Area M, sizes of leaves: SPLIT and COLLAPSE.
#include "client/check/device.hpp"
#include "client/check/service_checks.hpp"

namespace dirtyring::check {
namespace {

constexpr std::uint64_t all = TrackedGuest::pages;

dr_command resize_command(dr_opcode opcode, std::uint32_t hwpt, std::uint64_t length, std::uint32_t leaf_lg2)
{
    dr_command c = command(opcode, hwpt);
    c.length = length;
    c.leaf_lg2 = leaf_lg2;
    return c;
}

void large_leaves(dr_hwpt_alloc &request)
{
    request.leaf_lg2_max = 21;
    request.flags |= DR_HWPT_ALL_SIZES;
}

void refusals(Context &c)
{
    TrackedGuest guest(c, large_leaves);
    const std::uint64_t space = 1ull << Guest::hwpt_request(guest.ioas).aperture_lg2;
    for (const dr_opcode opcode : {DR_OP_SPLIT, DR_OP_COLLAPSE}) {
        const auto expect = [&](int error, const std::string &what, auto change) {
            dr_command request = resize_command(opcode, guest.hwpt, all * page, 12);
            change(request);
            guest.expect("M-27", request, error, fmt::format("opcode {} {}", static_cast<unsigned>(opcode), what));
        };
        for (const std::uint32_t lg2 : {0u, 11u, 22u, 30u, 64u})
            expect(-EINVAL, fmt::format("to 2^{} bytes", lg2), [&](auto &r) { r.leaf_lg2 = lg2; });
        expect(-EINVAL, "with length 0", [](auto &r) { r.length = 0; });
        expect(-EINVAL, "of half a page", [](auto &r) { r.length = page / 2; });
        expect(-EINVAL, "with a flag", [](auto &r) { r.flags = 1; });
        expect(-EINVAL, "with an oa", [](auto &r) { r.oa = page; });
        expect(-EINVAL, "with a cookie", [](auto &r) { r.cookie = 1; });
        expect(-ERANGE, "outside the space", [&](auto &r) { r.iova = space; });
        expect(-ERANGE, "across its end", [&](auto &r) { r.iova = space - page; });
        for (const std::uint32_t object : {0u, guest.ioas, 999u})
            expect(-ENOENT, fmt::format("on object {}", object), [&](auto &r) { r.object = object; });
        expect(0, "where nothing is mapped", [&](auto &r) { r.iova = all * page; });
    }
}

void sizes(Context &c)
{
    TrackedGuest guest(c, large_leaves);
    Device device(c, guest);
    std::uint64_t p = 1;
    for (const auto &[opcode, lg2] : {std::pair{DR_OP_SPLIT, 16}, std::pair{DR_OP_SPLIT, 12},
                                      std::pair{DR_OP_COLLAPSE, 21}, std::pair{DR_OP_SPLIT, 12}}) {
        const std::string what = fmt::format("opcode {} to 2^{} bytes", static_cast<unsigned>(opcode), lg2);
        device.write(p);
        guest.expect("M-27", resize_command(opcode, guest.hwpt, all * page, static_cast<std::uint32_t>(lg2)), 0, what);
        device.enter();
        const auto reason = device.write_inside(p + 1);
        device.leave();
        c.expect(reason == iommu::FaultReason::none, "M-28", "DMA after " + what,
                 fmt::format("fault {}", static_cast<unsigned>(reason)), "no fault");
        if (reason != iommu::FaultReason::none)
            return;
        const Pages reported = guest.sync("a sync after " + what);
        c.expect(covers(reported, {p, p + 1}), "M-29", "DMA before and after " + what, text_of(reported),
                 text_of({p, p + 1}));
        p += 50;
    }
}

const Check checks[] = {
    {"what SPLIT and COLLAPSE refuse", refusals, {"M-27"}},
    {"SPLIT and COLLAPSE", sizes, {"M-27", "M-28", "M-29"}},
};

} // namespace

std::span<const Check> size_checks()
{
    return checks;
}

} // namespace dirtyring::check
