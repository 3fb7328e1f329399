#include "client/commands.hpp"
#include "client/vm.hpp"

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
    case DR_OP_SPLIT:
        return "split";
    case DR_OP_COLLAPSE:
        return "collapse";
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
        return "a ring is full, or an enable came in between: release entries, then ask for the rest";
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

Commands::Commands(Connection &connection, Mapping front_end, Mapping service, Fd kick, Fd call, std::uint64_t series)
    : connection_(connection), front_end_(std::move(front_end)), service_(std::move(service)), kick_(std::move(kick)),
      call_(std::move(call)), series_(series & ~std::uint64_t{entries - 1}),
      submissions_(front_end_.as<dr_ring_producer>(DR_COMMAND_PRODUCER_OFFSET),
                   service_.as<dr_ring_consumer>(DR_COMMAND_CONSUMER_OFFSET)),
      completions_(front_end_.as<dr_ring_consumer>(DR_COMMAND_CONSUMER_OFFSET),
                   service_.as<dr_ring_producer>(DR_COMMAND_PRODUCER_OFFSET), entries),
      taken_(submissions_.head() != 0)
{
    for (std::uint32_t i = 0; i < entries; ++i)
        free_[i] = i;
    connection_.signal_return_to(kick_);
}

int Commands::queue(const dr_command &command)
{
    const Lock lock(mutex_);
    std::uint32_t slot = 0;
    if (const int error = failure(); error != 0)
        return error;
    if (!put(command, State::queued, slot))
        return fail(EAGAIN, "%u commands are queued or to be reaped: submit and reap", entries);
    return 0;
}

int Commands::submit()
{
    const Lock lock(mutex_);
    if (const int error = failure(); error != 0)
        return error;
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
        if (broken_ || completions_.arm())
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
    if (const int error = failure(); error != 0)
        return error;
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
    {
        const Lock lock(mutex_);
        if (const int error = failure(); error != 0)
            return error;
    }
    return connection_.check();
}

dr_guest_status Commands::status() const
{
    auto *told = service_.as<dr_guest_status>(DR_GUEST_STATUS_OFFSET);
    const std::atomic_ref since(told->since);
    dr_guest_status seen{};
    do {
        seen.since = since.load(std::memory_order_acquire);
        // Acquire: the second look at `since` comes last.
        seen.device = std::atomic_ref(told->device).load(std::memory_order_acquire);
        seen.pid = std::atomic_ref(told->pid).load(std::memory_order_acquire);
    } while (since.load(std::memory_order_relaxed) != seen.since);
    return seen;
}

bool Commands::put(const dr_command &command, State state, std::uint32_t &slot)
{
    if (free_count_ == 0 || submissions_.room() == 0)
        return false;
    slot = free_[--free_count_];
    slots_[slot].state = state;
    slots_[slot].user_data = command.user_data;
    dr_command sent = command;
    sent.user_data = series_ | slot;
    submissions_.put(0, sent);
    submissions_.stage(1);
    return true;
}

void Commands::publish()
{
    if (submissions_.publish())
        signal_event(kick_);
}

// Takes what has completed to its slots. Who sleeps until a completion comes is called all the same: only wait() and
// arm() move the index that is armed.
void Commands::collect()
{
    for (auto batch = completions_.peek(); !batch.empty() && !broken_; batch = completions_.peek()) {
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
    const std::uint64_t number_in_series = copy.user_data - series_;
    if (number_in_series >= entries) {
        if (!taken_)
            break_off();
        return;
    }
    const auto number = static_cast<std::uint32_t>(number_in_series);
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
    broken_ = true;
    connection_.give_up("it had broken the rules of the command ring");
}

int Commands::failure() const
{
    return broken_ ? fail(EPROTO, "the service broke the rules of the command ring") : connection_.failure();
}

int Commands::wait(std::uint32_t slot)
{
    const std::uint64_t sleep_at = monotonic_ns() + spin_ns;
    for (int error = 0;;) {
        bool sleep = false;
        {
            const Lock lock(mutex_);
            collect(); // once more even when the service has gone
            if (slots_[slot].state == State::done)
                return 0;
            if (error == 0)
                error = failure();
            if (error != 0) {
                slots_[slot].state = State::dropped;
                return error;
            }
            if (monotonic_ns() >= sleep_at)
                sleep = completions_.arm();
        }
        if (sleep) {
            error = connection_.sleep(call_);
            reset_event(call_);
        } else {
            relax();
        }
    }
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

int resize(dirtyring_vm *vm, std::uint32_t hwpt, std::uint64_t iova, std::uint64_t length, std::uint32_t leaf_lg2,
           dr_opcode opcode)
{
    dr_command command{};
    command.opcode = opcode;
    command.object = hwpt;
    command.iova = iova;
    command.length = length;
    command.leaf_lg2 = leaf_lg2;
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

int dirtyring_split(dirtyring_vm *vm, uint32_t hwpt, uint64_t iova, uint64_t length, uint32_t leaf_lg2)
{
    return resize(vm, hwpt, iova, length, leaf_lg2, DR_OP_SPLIT);
}

int dirtyring_collapse(dirtyring_vm *vm, uint32_t hwpt, uint64_t iova, uint64_t length, uint32_t leaf_lg2)
{
    return resize(vm, hwpt, iova, length, leaf_lg2, DR_OP_COLLAPSE);
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
