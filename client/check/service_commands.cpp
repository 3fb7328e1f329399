// Area M, the command ring, and what commands refuse.
#include "client/check/device.hpp"
#include "client/check/service_checks.hpp"

#include <sys/eventfd.h>

namespace dirtyring::check {
namespace {

constexpr std::uint64_t mapped = TrackedGuest::pages * page; // [0, mapped) at OA 0
constexpr std::uint64_t space = 1ull << 32;

void fields(Context &c)
{
    TrackedGuest guest(c);
    const auto refused = [&](dr_command command, const std::string &what) {
        guest.expect("M-5", command, -EINVAL, what);
    };
    for (const std::uint32_t opcode : {0u, 6u, UINT32_MAX}) {
        dr_command unknown = sync_command(guest.hwpt, 1);
        unknown.opcode = opcode;
        refused(unknown, fmt::format("opcode {}", opcode));
    }
    // Each opcode as it is right, but for one field; none of them is done.
    const dr_command map = map_command(guest.ioas, mapped, page, 0);
    const dr_command unmap = unmap_command(guest.ioas, 0, mapped);
    const dr_command on_hwpt[] = {sync_command(guest.hwpt, 1), command(DR_OP_ENABLE, guest.hwpt),
                                  command(DR_OP_DISABLE, guest.hwpt)};
    const auto with = [&](dr_command right, const char *field, auto change) {
        change(right);
        refused(right, fmt::format("opcode {} with {}", right.opcode, field));
    };
    const auto common = [&](const dr_command &right) {
        with(right, "an unknown flag", [](auto &r) { r.flags |= 1u << 31; });
        with(right, "leaf_lg2 12", [](auto &r) { r.leaf_lg2 = 12; });
        with(right, "reserved 1", [](auto &r) { r.reserved = 1; });
    };
    common(map);
    with(map, "a cookie", [](auto &r) { r.cookie = 1; });
    common(unmap);
    with(unmap, "an oa", [](auto &r) { r.oa = page; });
    with(unmap, "a cookie", [](auto &r) { r.cookie = 1; });
    with(unmap, "a flag of MAP", [](auto &r) { r.flags |= DR_MAP_READ; });
    for (const dr_command &right : on_hwpt) {
        common(right);
        with(right, "an iova", [](auto &r) { r.iova = page; });
        with(right, "a length", [](auto &r) { r.length = page; });
        with(right, "an oa", [](auto &r) { r.oa = page; });
        if (right.opcode != DR_OP_SYNC)
            with(right, "a cookie", [](auto &r) { r.cookie = 1; });
    }
}

void maps(Context &c)
{
    TrackedGuest guest(c);
    const auto expect = [&](int result, const char *what, std::uint64_t iova, std::uint64_t length, std::uint64_t oa,
                            std::uint32_t flags = read_write) {
        guest.expect("M-6", map_command(guest.ioas, iova, length, oa, flags), result, fmt::format("MAP {}", what));
    };
    expect(-EINVAL, "of half a page", mapped + 1, page, 0);
    expect(-EINVAL, "of a page and a byte", mapped, page + 1, 0);
    expect(-EINVAL, "to OA 1", mapped, page, 1);
    expect(-EINVAL, "of nothing", mapped, 0, 0);
    expect(-EINVAL, "without rights", mapped, page, 0, 0);
    expect(-ERANGE, "at the end of the space", space, page, 0);
    expect(-ERANGE, "across the end of the space", space - page, 2 * page, 0);
    expect(-ERANGE, "of a length that wraps", mapped, ~0ull << 12, 0);
    expect(-EFAULT, "to an OA behind the memory", mapped, page, mapped);
    expect(-EFAULT, "across the end of the memory", mapped, 2 * page, mapped - page);
    expect(-EEXIST, "where something is mapped", 0, page, 0);
    expect(-EEXIST, "half of which is mapped", mapped - page, 2 * page, 0);
    expect(-EEXIST, "IDEMPOTENT to another OA", 0, page, page, read_write | DR_MAP_IDEMPOTENT);
    expect(-EEXIST, "IDEMPOTENT with other rights", 0, page, 0, DR_MAP_READ | DR_MAP_IDEMPOTENT);
    expect(0, "of the last page", space - page, page, 0);
    guest.expect("M-12", map_command(guest.ioas, page, page, page, read_write | DR_MAP_IDEMPOTENT), 0,
                 "MAP IDEMPOTENT of what is mapped");
    for (const std::uint32_t object : {0u, guest.hwpt, 999u})
        guest.expect("M-6", map_command(object, mapped, page, 0), -ENOENT, fmt::format("MAP in object {}", object));
    const std::uint32_t bare = guest.get<dr_object>(DR_IOAS_ALLOC, dr_empty{}).id;
    guest.expect("M-6", map_command(bare, 0, page, 0), -ENOSPC, "MAP in an ioas without hwpt");
}

void unmaps(Context &c)
{
    TrackedGuest guest(c);
    const auto expect = [&](Rule rule, int result, const char *what, std::uint64_t iova, std::uint64_t length,
                            std::uint32_t flags = 0) {
        guest.expect(rule, unmap_command(guest.ioas, iova, length, flags), result, fmt::format("UNMAP {}", what));
    };
    expect("M-7", -EINVAL, "of half a page", 1, page);
    expect("M-7", -EINVAL, "of a page less a byte", 0, page - 1);
    expect("M-7", -EINVAL, "of nothing", 0, 0);
    expect("M-7", -EINVAL, "both DEFERRED and DISCARD", 0, mapped, DR_UNMAP_DEFERRED | DR_UNMAP_DISCARD);
    expect("M-7", -ERANGE, "at the end of the space", space, page);
    expect("M-7", -ERANGE, "across the end of the space", space - page, 2 * page);
    expect("M-7", -ENOENT, "where nothing is mapped", mapped, page);
    expect("M-7", -ENOENT, "that cuts a map behind its start", 0, page);
    expect("M-7", -ENOENT, "that cuts a map before its end", page, mapped);
    expect("M-12", 0, "EMPTY_OK where nothing is mapped", mapped, page, DR_UNMAP_EMPTY_OK);
    for (const std::uint32_t object : {0u, guest.hwpt, 999u})
        guest.expect("M-7", unmap_command(object, 0, mapped), -ENOENT, fmt::format("UNMAP in object {}", object));
    const dr_completion all = guest.run(unmap_command(guest.ioas, 0, UINT64_MAX), "UNMAP to the end of the space");
    c.expect(all.result == 0 && all.done == space, "M-7", "UNMAP to the end of the space",
             fmt::format("result {}, done {:#x}", all.result, all.done), fmt::format("0 and {:#x}", space));
}

void on_hwpts(Context &c)
{
    TrackedGuest guest(c);
    TrackedGuest untracked(c, [](auto &r) { r.flags = 0; });
    for (const dr_opcode opcode : {DR_OP_SYNC, DR_OP_ENABLE, DR_OP_DISABLE}) {
        for (const std::uint32_t object : {0u, guest.ioas, 999u})
            guest.expect("M-8", command(opcode, object), -ENOENT,
                         fmt::format("opcode {} on object {}", static_cast<unsigned>(opcode), object));
        untracked.expect("M-8", command(opcode, untracked.hwpt), -EOPNOTSUPP,
                         fmt::format("opcode {} on an hwpt without tracking", static_cast<unsigned>(opcode)));
    }
    guest.expect("M-8", command(DR_OP_ENABLE, guest.hwpt), -EALREADY, "ENABLE of what is tracked");
    guest.enable(false);
    guest.expect("M-8", command(DR_OP_DISABLE, guest.hwpt), -EALREADY, "DISABLE of what is not tracked");
    guest.expect("M-8", sync_command(guest.hwpt, 1ull << DR_PAYLOAD_BITS), -EINVAL, "SYNC with a cookie of 45 bits");
}

void completions(Context &c)
{
    constexpr std::uint64_t capacity = 4;
    Guest guest(c, capacity);
    for (std::uint64_t i = 0; i < capacity; ++i) {
        dr_command unknown{};
        unknown.user_data = i;
        guest.submit(unknown);
    }
    c.need(c.comes_true([&] { return guest.taken() == capacity; }), "M-4", "a command ring of 4 with 4 submissions",
           fmt::format("{} taken", guest.taken()), "4");
    for (std::uint64_t i = capacity; i < 2 * capacity; ++i) {
        dr_command unknown{};
        unknown.user_data = i;
        guest.submit(unknown);
    }
    c.expect(c.stays_false([&] { return guest.taken() > capacity; }), "M-3", "4 completions that nobody takes",
             fmt::format("{} submissions taken", guest.taken()), "4");
    for (std::uint64_t i = 0; i < 2 * capacity; ++i) {
        const auto completion = guest.next_completion("8 commands with opcode 0");
        c.expect(completion.user_data == i, "M-2", "8 commands that are refused in order",
                 fmt::format("user_data {}", completion.user_data), fmt::format("{}", i));
    }
    c.expect(c.stays_false([&] { return guest.completed().has_value(); }), "M-2", "8 commands", "a ninth completion",
             "8");

    // Asleep until called, as event loops are.
    for (int i = 0; i < 5; ++i) {
        const std::uint64_t head = word(guest.completion_region().head).load(std::memory_order_seq_cst);
        (void)take_signal(guest.call_event);
        word(guest.completion_consumer().armed).store(head + 1, std::memory_order_seq_cst);
        std::this_thread::sleep_for(3ms); // let the service go to sleep, too
        guest.submit({});
        c.need(c.comes_true([&] { return take_signal(guest.call_event); }), "M-4",
               "a completion that reaches `armed`, after a kick where that was asked for", c.nothing(), "a call");
        guest.next_completion("a command with opcode 0");
    }
}

void order(Context &c)
{
    TrackedGuest guest(c);
    Device device(c, guest);
    // Pairs in flight together: each map needs the unmap before it, each unmap the map.
    constexpr int rounds = 16;
    for (int i = 0; i < rounds; ++i) {
        guest.submit(unmap_command(guest.ioas, 0, mapped));
        guest.submit(map_command(guest.ioas, 0, mapped, 0));
    }
    bool in_order = true;
    int bad = 0;
    for (int i = 0; i < 2 * rounds; ++i) {
        // Room for the markers of the unmaps.
        std::optional<dr_completion> completion;
        const bool came = c.comes_true([&] {
            (void)guest.rings[0].take();
            return (completion = guest.completed()).has_value();
        });
        c.need(came, "M-2", "32 commands in flight", c.nothing(), "their completions");
        if (completion->result != 0 && in_order) {
            in_order = false;
            bad = completion->result;
        }
    }
    c.expect(in_order, "M-9", "UNMAP and MAP of the same range, submitted together", fmt::format("result {}", bad),
             "0");
    device.write(9);
    // ENABLE behind DISABLE, and a sync between them that no longer tracks.
    dr_command last{};
    for (const dr_opcode opcode : {DR_OP_DISABLE, DR_OP_SYNC, DR_OP_ENABLE, DR_OP_DISABLE, DR_OP_ENABLE})
        guest.submit(last = command(opcode, guest.hwpt));
    bool all = true;
    for (int i = 0; i < 5; ++i)
        all = guest.next_completion("DISABLE, SYNC, ENABLE, DISABLE, ENABLE in flight").result == 0 && all;
    c.expect(all, "M-10", "DISABLE, SYNC, ENABLE, DISABLE, ENABLE, submitted together", "not all of them 0", "0 each");
}

const Check checks[] = {
    {"fields of commands", fields, {"M-1", "M-2", "M-5"}}, {"what MAP refuses", maps, {"M-6", "M-12"}},
    {"what UNMAP refuses", unmaps, {"M-7", "M-12"}},       {"what ENABLE, DISABLE and SYNC refuse", on_hwpts, {"M-8"}},
    {"completions", completions, {"M-2", "M-3", "M-4"}},   {"commands in flight together", order, {"M-9", "M-10"}},
};

} // namespace

std::span<const Check> command_checks()
{
    return checks;
}

} // namespace dirtyring::check
