// The command ring from the service's side.
#include "client/check/played_service_guest.hpp"

#include <algorithm>

namespace dirtyring::check {

void PlayedGuest::work()
{
    for (Hwpt &hwpt : hwpts_) {
        for (PlayedRing &ring : hwpt.rings) {
            (void)ring.room(); // which looks at tail
            context_.need(!ring.peer_broke_rules(), "C-4", "a dirty ring",
                          fmt::format("tail {} with head {}", ring.tail(), ring.head()),
                          "a tail that stays below head and never goes back");
        }
    }
    if (submissions_)
        take_commands();
}

// Either for a submission that reached `armed`, or for the release of a completion: never both, so that it is known
// what a kick is for.
void PlayedGuest::check_kick()
{
    // One that was missed tells enough; a program that never kicks gets on, for we look by ourselves.
    const auto kicked = [&] { return take_signal(kick_) || context_.verdicts.outcome("E-3") == Outcome::fail; };
    if (armed_ && !submissions_->arm()) {
        armed_ = false;
        context_.expect(context_.comes_true(kicked), "E-3", "a submission that reached `armed`", context_.nothing(),
                        "a kick");
        submissions_->disarm();
    }
    if (wants_kick_ && completions_->released()) {
        wants_kick_ = false;
        context_.expect(context_.comes_true(kicked), "E-3", "a release of completions while `want_kick` is 1",
                        context_.nothing(), "a kick");
        completions_->want_kick(false);
    }
}

void PlayedGuest::take_commands()
{
    check_kick();
    if (armed_ || completions_->room() == 0)
        return;
    for (const dr_command &shared : submissions_->peek(1)) {
        const dr_command command = shared;
        (void)submissions_->release(1);
        ++commands;
        check_reserved(command);
        // Its completion's release is to kick; the next submission then need not.
        const std::uint64_t completed = completions_->head();
        const bool alone = completions_->released();
        completions_->want_kick(alone);
        execute(command);
        wants_kick_ = alone && completions_->head() != completed;
        if (!wants_kick_)
            completions_->want_kick(false);
    }
    if (!wants_kick_) {
        (void)take_signal(kick_);
        armed_ = submissions_->arm();
    }
}

void PlayedGuest::check_reserved(const dr_command &command)
{
    dr_command unused = command;
    unused.user_data = unused.opcode = unused.flags = unused.object = 0;
    const bool maps = command.opcode == DR_OP_MAP || command.opcode == DR_OP_UNMAP;
    if (maps)
        unused.iova = unused.length = 0;
    else
        unused.flags = command.flags;
    if (command.opcode == DR_OP_MAP)
        unused.oa = 0;
    if (command.opcode == DR_OP_SYNC)
        unused.cookie = 0;
    const dr_command zero{};
    context_.expect(std::memcmp(&unused, &zero, sizeof zero) == 0, "E-2", fmt::format("opcode {}", command.opcode),
                    "a field that it does not use is not zero", "zeroes there");
}

void PlayedGuest::finish(const dr_command &command, int result, std::uint64_t done, std::uint64_t epoch)
{
    completions_->put(0, {command.user_data, result, 0, done, epoch});
    completions_->stage(1);
    if (completions_->publish())
        signal(call_);
}

void PlayedGuest::execute(const dr_command &command)
{
    Hwpt *hwpt = find_hwpt(command.object);
    switch (command.opcode) {
    case DR_OP_MAP:
        return map(command);
    case DR_OP_UNMAP:
        return unmap(command);
    case DR_OP_SYNC:
        if (hold_syncs) {
            syncs.push_back(command);
            return;
        }
        if (hwpt == nullptr)
            return finish(command, -ENOENT);
        for (PlayedRing &ring : hwpt->rings)
            ring.publish({dr_marker(DR_MARKER_SYNC, command.cookie)});
        return finish(command, 0);
    case DR_OP_ENABLE:
    case DR_OP_DISABLE:
        if (hwpt == nullptr)
            return finish(command, -ENOENT);
        if (command.opcode == DR_OP_ENABLE && before_enable)
            before_enable();
        hwpt->tracked = command.opcode == DR_OP_ENABLE;
        finish(command, 0);
        return subject.go_on();
    default:
        return finish(command, -EINVAL);
    }
}

void PlayedGuest::map(const dr_command &command)
{
    for (const dr_command &old : unmapped_) {
        const std::uint64_t to = command.oa + (old.iova - command.iova);
        if (old.object == command.object && old.iova - command.iova < command.length && to != old.oa)
            moved = {old.iova, old.oa, to};
    }
    maps_.push_back(command);
    finish(command, 0);
}

// Of what touches the range, whole maps.
void PlayedGuest::unmap(const dr_command &command)
{
    const auto kept = std::stable_partition(maps_.begin(), maps_.end(), [&](const dr_command &m) {
        return m.object != command.object || m.iova - command.iova >= command.length;
    });
    const bool any = kept != maps_.end();
    unmapped_.insert(unmapped_.end(), kept, maps_.end());
    maps_.erase(kept, maps_.end());
    const std::uint64_t epoch = hwpt_.space == DR_SPACE_IOVA ? next_epoch_++ : 0;
    if (any && epoch != 0 && !hold_epochs) {
        for (PlayedRing &ring : *rings_)
            ring.publish({dr_marker(DR_MARKER_EPOCH, epoch)});
    }
    finish(command, any || (command.flags & DR_UNMAP_EMPTY_OK) != 0 ? 0 : -ENOENT, command.length, epoch);
}

} // namespace dirtyring::check
