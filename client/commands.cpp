#include "client/commands.hpp"
#include "client/connection.hpp"
#include "client/vm.hpp"

#include <mutex>

namespace dirtyring::client {

namespace {

// How long a waiting call looks before it sleeps: longer than a polling service takes, shorter than two wake-ups.
constexpr std::uint64_t spin_ns = 50'000;

void relax()
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

using Lock = std::lock_guard<Mutex>;

const char *command_name(std::uint32_t opcode)
{
    switch (opcode) {
    case DR_OP_MAP:
        return "map";
    case DR_OP_UNMAP:
        return "unmap";
    case DR_OP_SYNC:
        return "sync";
    case DR_OP_ENABLE:
        return "enable";
    default:
        return "disable";
    }
}

// In the words of struct dr_command.
const char *meaning(int error)
{
    switch (error) {
    case EINVAL:
        return "an address, a length or a flag is not valid";
    case ENOENT:
        return "no such object, nothing is mapped there, or the range cuts a map in two";
    case ERANGE:
        return "outside the IOVA space";
    case EEXIST:
        return "something is mapped there";
    case EFAULT:
        return "the output address is not in the guest's memory";
    case ENOSPC:
        return "the ioas has no hwpt";
    case EAGAIN:
        return "a ring is full: release entries, then ask for the rest";
    case EALREADY:
        return "it is so already";
    case EOPNOTSUPP:
        return "the hwpt has no dirty tracking";
    case ECANCELED:
        return "the object was destroyed meanwhile";
    default:
        return std::strerror(error);
    }
}

} // namespace

int command_result(const dr_command &command, std::int32_t result)
{
    if (result == 0)
        return 0;
    const char *name = command_name(command.opcode);
    constexpr std::int32_t errno_max = 4095;
    if (result > 0 || result < -errno_max)
        return fail(EPROTO, "the service answered the %s of object %u with %d", name, command.object, result);
    if (command.opcode == DR_OP_MAP || command.opcode == DR_OP_UNMAP)
        return fail(-result, "%s of iova %#" PRIx64 ", length %#" PRIx64 " in ioas %u: %s", name, command.iova,
                    command.length, command.object, meaning(-result));
    return fail(-result, "%s of hwpt %u: %s", name, command.object, meaning(-result));
}

Commands::Commands(Mapping front_end, Mapping service, Fd kick, Fd call, int socket)
    : front_end_(std::move(front_end)), service_(std::move(service)), kick_(std::move(kick)), call_(std::move(call)),
      socket_(socket), submissions_(front_end_.as<dr_ring_producer>(DR_COMMAND_PRODUCER_OFFSET),
                                    service_.as<dr_ring_consumer>(DR_COMMAND_CONSUMER_OFFSET)),
      completions_(front_end_.as<dr_ring_consumer>(DR_COMMAND_CONSUMER_OFFSET),
                   service_.as<dr_ring_producer>(DR_COMMAND_PRODUCER_OFFSET), entries)
{
    for (std::uint32_t i = 0; i < entries; ++i)
        free_[i] = i;
}

int Commands::queue(const dr_command &command)
{
    const Lock lock(mutex_);
    std::uint32_t slot = 0;
    if (failed_ != 0)
        return failure();
    if (!put(command, State::queued, slot))
        return fail(EAGAIN, "%u commands are queued or to be reaped: submit and reap", entries);
    return 0;
}

int Commands::submit()
{
    const Lock lock(mutex_);
    if (failed_ != 0)
        return failure();
    publish();
    return 0;
}

std::uint32_t Commands::reap(dr_completion *completions, std::uint32_t max)
{
    const Lock lock(mutex_);
    collect();
    std::uint32_t n = 0;
    for (; n < max && stash_first_ != stash_end_; ++n) {
        const std::uint32_t slot = stash_[stash_first_++ % entries];
        completions[n] = slots_[slot].completion;
        release(slot);
    }
    if (n > 0)
        user_armed_ = false;
    return n;
}

bool Commands::arm()
{
    reset_event(call_);
    const Lock lock(mutex_);
    for (;;) {
        collect();
        if (stash_first_ != stash_end_)
            return false;
        // After a failure nothing comes any more: let the caller sleep, its poll of the socket tells.
        if (failed_ != 0 || completions_.arm())
            return user_armed_ = true;
    }
}

int Commands::run(const dr_command &command, dr_completion &completion)
{
    std::uint32_t slot = 0;
    if (const int error = start(command, slot); error != 0)
        return error;
    const int error = wait(slot);
    const Lock lock(mutex_);
    if (error == 0) {
        completion = slots_[slot].completion;
        release(slot);
    }
    // The wait armed anew and may have taken a call that the user waits for: better one too many.
    if (user_armed_)
        signal_event(call_);
    return error;
}

int Commands::start(const dr_command &command, std::uint32_t &slot)
{
    const Lock lock(mutex_);
    if (failed_ != 0)
        return failure();
    if (!put(command, State::held, slot))
        return fail(EBUSY, "%u pipelined commands leave no room: reap first", entries);
    publish();
    return 0;
}

bool Commands::poll(std::uint32_t slot, dr_completion &completion)
{
    const Lock lock(mutex_);
    collect();
    if (slots_[slot].state != State::done)
        return false;
    completion = slots_[slot].completion;
    return true;
}

void Commands::drop(std::uint32_t slot)
{
    const Lock lock(mutex_);
    if (slots_[slot].state == State::done)
        release(slot);
    else
        slots_[slot].state = State::dropped;
}

int Commands::check_service()
{
    const bool gone = service_gone(false);
    const Lock lock(mutex_);
    if (failed_ == 0 && gone)
        failed_ = ESHUTDOWN;
    return failure();
}

bool Commands::put(const dr_command &command, State state, std::uint32_t &slot)
{
    if (free_count_ == 0 || submissions_.room() == 0)
        return false;
    slot = free_[--free_count_];
    slots_[slot].state = state;
    slots_[slot].user_data = command.user_data;
    dr_command sent = command;
    sent.user_data = slot;
    submissions_.put(0, sent);
    submissions_.stage(1);
    return true;
}

void Commands::publish()
{
    if (submissions_.publish())
        signal_event(kick_);
}

// Takes what has completed to its slots. Who sleeps until a completion comes is called all the same: only wait() and arm() move
// the index that is armed.
void Commands::collect()
{
    for (auto batch = completions_.peek(); !batch.empty() && failed_ != EPROTO; batch = completions_.peek()) {
        for (const dr_completion &completion : batch)
            complete(completion);
        if (completions_.release(batch.size()))
            signal_event(kick_);
    }
    if (completions_.peer_broke_rules())
        break_off();
}

void Commands::complete(const dr_completion &completion)
{
    const dr_completion copy = completion; // out of shared memory, then looked at
    if (copy.user_data >= entries)
        return break_off();
    const auto number = static_cast<std::uint32_t>(copy.user_data);
    Slot &slot = slots_[number];
    switch (slot.state) {
    case State::queued:
        slot.state = State::stashed;
        stash_[stash_end_++ % entries] = number;
        break;
    case State::held:
        slot.state = State::done;
        break;
    case State::dropped:
        return release(number);
    default:
        return break_off();
    }
    slot.completion = copy;
    slot.completion.user_data = slot.user_data;
}

void Commands::release(std::uint32_t slot)
{
    slots_[slot].state = State::free;
    free_[free_count_++] = slot;
}

void Commands::break_off()
{
    failed_ = EPROTO;
    ::shutdown(socket_, SHUT_RDWR);
}

int Commands::failure() const
{
    if (failed_ == 0)
        return 0;
    return fail(failed_, failed_ == EPROTO ? "the service broke the rules of the command ring" : "the service is gone");
}

int Commands::wait(std::uint32_t slot)
{
    const std::uint64_t sleep_at = monotonic_ns() + spin_ns;
    for (bool gone = false;;) {
        bool sleep = false;
        {
            const Lock lock(mutex_);
            collect(); // once more even when the service has gone
            if (gone && failed_ == 0)
                failed_ = ESHUTDOWN;
            if (slots_[slot].state == State::done)
                return 0;
            if (failed_ != 0) {
                slots_[slot].state = State::dropped;
                return failure();
            }
            if (monotonic_ns() >= sleep_at)
                sleep = completions_.arm();
        }
        if (sleep)
            gone = service_gone(true);
        else
            relax();
    }
}

// Looks at the socket; first sleeps, if asked, until there is something or call_ rings.
bool Commands::service_gone(bool sleep) const
{
    pollfd fds[] = {{socket_, POLLRDHUP, 0}, {call_.get(), POLLIN, 0}};
    if (::poll(fds, sleep ? 2 : 1, sleep ? -1 : 0) <= 0)
        return false;
    if ((fds[1].revents & POLLIN) != 0)
        reset_event(call_);
    return fds[0].revents != 0;
}

} // namespace dirtyring::client

using dirtyring::client::command_result;
using dirtyring::client::fail;

namespace {

dr_command map_command(std::uint32_t ioas, std::uint64_t iova, std::uint64_t length, std::uint64_t oa,
                       std::uint32_t flags)
{
    dr_command command{};
    command.opcode = DR_OP_MAP;
    command.flags = flags;
    command.object = ioas;
    command.iova = iova;
    command.length = length;
    command.oa = oa;
    return command;
}

dr_command unmap_command(std::uint32_t ioas, std::uint64_t iova, std::uint64_t length, std::uint32_t harvest)
{
    dr_command command{};
    command.opcode = DR_OP_UNMAP;
    command.flags = harvest;
    command.object = ioas;
    command.iova = iova;
    command.length = length;
    return command;
}

int run(dirtyring_vm *vm, const dr_command &command)
{
    dr_completion completion{};
    const int error = vm->commands.run(command, completion);
    return error != 0 ? error : command_result(command, completion.result);
}

int queue(dirtyring_vm *vm, dr_command command, std::uint64_t user_data)
{
    command.user_data = user_data;
    return vm->commands.queue(command);
}

int switch_tracking(dirtyring_vm *vm, std::uint32_t hwpt, dr_opcode opcode)
{
    dr_command command{};
    command.opcode = opcode;
    command.object = hwpt;
    return run(vm, command);
}

} // namespace

int dirtyring_map(dirtyring_vm *vm, uint32_t ioas, uint64_t iova, uint64_t length, uint64_t oa, uint32_t flags)
{
    return run(vm, map_command(ioas, iova, length, oa, flags));
}

int dirtyring_unmap(dirtyring_vm *vm, uint32_t ioas, uint64_t iova, uint64_t length, uint32_t harvest,
                    dirtyring_unmapped *result)
{
    const dr_command command = unmap_command(ioas, iova, length, harvest);
    dr_completion completion{};
    const int error = vm->commands.run(command, completion);
    if (completion.done > length) // the caller will unmap what is left
        return fail(EPROTO, "the service says it unmapped %#" PRIx64 " bytes of %#" PRIx64, completion.done, length);
    if (result != nullptr)
        *result = {completion.done, completion.epoch};
    return error != 0 ? error : command_result(command, completion.result);
}

int dirtyring_enable(dirtyring_vm *vm, uint32_t hwpt)
{
    return switch_tracking(vm, hwpt, DR_OP_ENABLE);
}

int dirtyring_disable(dirtyring_vm *vm, uint32_t hwpt)
{
    return switch_tracking(vm, hwpt, DR_OP_DISABLE);
}

int dirtyring_queue_map(dirtyring_vm *vm, uint32_t ioas, uint64_t iova, uint64_t length, uint64_t oa, uint32_t flags,
                        uint64_t user_data)
{
    return queue(vm, map_command(ioas, iova, length, oa, flags), user_data);
}

int dirtyring_queue_unmap(dirtyring_vm *vm, uint32_t ioas, uint64_t iova, uint64_t length, uint32_t harvest,
                          uint64_t user_data)
{
    return queue(vm, unmap_command(ioas, iova, length, harvest), user_data);
}

int dirtyring_queue_sync(dirtyring_vm *vm, uint32_t hwpt, uint64_t cookie, uint64_t user_data)
{
    if (cookie >= dirtyring::client::own_cookies)
        return fail(EINVAL, "the cookie %#" PRIx64 " has more than %d bits", cookie, DR_PAYLOAD_BITS - 1);
    dr_command command{};
    command.opcode = DR_OP_SYNC;
    command.object = hwpt;
    command.cookie = cookie;
    return queue(vm, command, user_data);
}

int dirtyring_submit(dirtyring_vm *vm)
{
    return vm->commands.submit();
}

uint32_t dirtyring_reap(dirtyring_vm *vm, dr_completion *completions, uint32_t max)
{
    return vm->commands.reap(completions, max);
}

bool dirtyring_command_arm(dirtyring_vm *vm)
{
    return vm->commands.arm();
}

int dirtyring_command_fd(const dirtyring_vm *vm)
{
    return vm->commands.fd();
}
