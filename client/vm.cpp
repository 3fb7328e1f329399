#include "client/vm.hpp"

#include <cstdarg>
#include <cstdio>
#include <cstring>

static_assert(sizeof(((struct dirtyring_device_info *)nullptr)->name) == DR_NAME_BYTES);

namespace dirtyring::client {

namespace {

constinit thread_local char sentence[320] = "nothing has failed";

// Maps what came with the reply.
int make_guest(Owned<Connection> connection, const dr_guest_create &request, const dr_guest &reply, FdList &fds,
               dirtyring_vm **vm)
{
    if (const int error = expect_descriptors(fds, 4); error != 0)
        return error;
    Mapping front_end;
    Mapping service;
    if (const int error = map_region(fds.take(0), DR_COMMAND_PRODUCER_OFFSET + DR_PAGE, PROT_READ | PROT_WRITE,
                                     "front-end region of the command ring", front_end);
        error != 0)
        return error;
    if (const int error = map_region(fds.take(1), DR_COMMAND_PRODUCER_OFFSET + DR_PAGE, PROT_READ,
                                     "service region of the command ring", service);
        error != 0)
        return error;
    dr_ring_header submissions{};
    dr_ring_header completions{};
    if (const int error =
            check_ring(front_end, DR_COMMAND_PRODUCER_OFFSET, DR_RING_SUBMISSION, sizeof(dr_command), submissions);
        error != 0)
        return error;
    if (const int error =
            check_ring(service, DR_COMMAND_PRODUCER_OFFSET, DR_RING_COMPLETION, sizeof(dr_completion), completions);
        error != 0)
        return error;
    if (submissions.capacity != Commands::entries || completions.capacity != Commands::entries)
        return fail(EPROTO, "asked for a command ring of %u entries, got %" PRIu64 " and %" PRIu64, Commands::entries,
                    submissions.capacity, completions.capacity);
    // What a predecessor queued but did not submit is not for us to submit.
    auto *ours = front_end.as<dr_ring_producer>(DR_COMMAND_PRODUCER_OFFSET);
    ours->staged = ours->head;
    Fd call;
    if (const int error = take_call_event(fds.take(3), call); error != 0)
        return error;
    std::uint64_t random = 0;
    if (const int error = draw(random); error != 0)
        return error;
    auto made = make<dirtyring_vm>(std::move(connection), request, reply, std::move(front_end), std::move(service),
                                   fds.take(2), std::move(call), random);
    if (!made)
        return -ENOMEM;
    *vm = made.release();
    return 0;
}

// connect(connection, reply, fds) makes the connection and sends the request as its introduction.
template <class Connect> int make_guest(dr_guest_create request, dirtyring_vm **vm, Connect connect)
{
    *vm = nullptr;
    auto connection = make<Connection>();
    if (!connection)
        return -ENOMEM;
    request.command_entries = Commands::entries;
    connection->introduce(DR_GUEST_CREATE, request);
    dr_guest reply{};
    FdList fds;
    if (const int error = connect(*connection, reply, fds); error != 0)
        return error;
    dr_guest_create again = request;
    again.flags = DR_GUEST_AGAIN;
    connection->introduce(DR_GUEST_CREATE, again);
    return make_guest(std::move(connection), request, reply, fds, vm);
}

int make_guest_at(const char *path, const dr_guest_create &request, dirtyring_vm **vm)
{
    return make_guest(request, vm, [path](Connection &connection, dr_guest &reply, FdList &fds) {
        return connection.open(path, reply, fds);
    });
}

template <class Bytes> bool all_zero(const Bytes &bytes)
{
    return std::all_of(std::begin(bytes), std::end(bytes), [](auto byte) { return byte == 0; });
}

} // namespace

int fail(int error, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(sentence, sizeof sentence, format, arguments);
    va_end(arguments);
    return -error;
}

} // namespace dirtyring::client

using namespace dirtyring::client;

int dirtyring_connect(const char *socket_path, dirtyring_vm **vm)
{
    const dirtyring_guest attr{};
    return dirtyring_connect_guest(socket_path, &attr, vm);
}

int dirtyring_connect_guest(const char *socket_path, const dirtyring_guest *attr, dirtyring_vm **vm)
{
    *vm = nullptr;
    if (!all_zero(attr->reserved))
        return fail(EINVAL, "reserved words of struct dirtyring_guest are not zero");
    dr_guest_create request{};
    request.linger_ms = attr->linger_ms;
    request.stall_ms = attr->stall_ms;
    std::memcpy(request.secret, attr->secret, sizeof request.secret);
    if (all_zero(attr->secret)) {
        if (const int error = draw(request.secret); error != 0)
            return error;
    }
    return make_guest_at(socket_path, request, vm);
}

int dirtyring_take(const char *socket_path, const uint8_t *secret, dirtyring_vm **vm)
{
    dr_guest_create request{};
    request.flags = DR_GUEST_TAKE;
    std::memcpy(request.secret, secret, sizeof request.secret);
    return make_guest_at(socket_path, request, vm);
}

int dirtyring_connect_fd(int socket, dirtyring_vm **vm)
{
    Fd owned(socket);
    *vm = nullptr;
    dr_guest_create request{};
    if (const int error = draw(request.secret); error != 0)
        return error;
    return make_guest(request, vm, [&owned](Connection &connection, dr_guest &reply, FdList &fds) {
        return connection.adopt(std::move(owned), reply, fds);
    });
}

void dirtyring_close(dirtyring_vm *vm)
{
    const Owned<dirtyring_vm> owned(vm);
    if (!owned)
        return;
    owned->connection->limit(2);
    dr_empty reply{};
    (void)owned->connection->call(DR_GUEST_DESTROY, dr_empty{}, reply); // a service that is gone needs no word
}

void dirtyring_leave(dirtyring_vm *vm)
{
    Owned<dirtyring_vm>{vm};
}

int dirtyring_reconnect(dirtyring_vm *vm)
{
    return vm->connection->reconnect();
}

const char *dirtyring_error(void)
{
    return sentence;
}

const uint8_t *dirtyring_token(const dirtyring_vm *vm)
{
    return vm->guest.token;
}

const uint8_t *dirtyring_secret(const dirtyring_vm *vm)
{
    return vm->created.secret;
}

bool dirtyring_stalled(const dirtyring_vm *vm, struct dirtyring_stalled *out)
{
    const dr_guest_status status = vm->commands.status();
    *out = {status.since, status.device, status.pid};
    return status.since != 0;
}

int dirtyring_socket(const dirtyring_vm *vm)
{
    return vm->connection->socket();
}

int dirtyring_memory_add(dirtyring_vm *vm, uint64_t oa, uint64_t length, int memfd, uint64_t offset)
{
    Fd copy(::fcntl(memfd, F_DUPFD_CLOEXEC, 0)); // the list closes what it holds
    if (!copy)
        return fail(errno, "cannot duplicate the memory's descriptor %d: %s", memfd, std::strerror(errno));
    dr_memory_region request{};
    request.oa = oa;
    request.length = length;
    request.offset = offset;
    dr_empty reply{};
    FdList sent;
    sent.add(std::move(copy));
    FdList got;
    if (const int error = vm->connection->call(DR_MEMORY_ADD, request, reply, sent, got); error != 0)
        return error;
    return expect_descriptors(got, 0);
}

int dirtyring_ioas_alloc(dirtyring_vm *vm, uint32_t *ioas)
{
    dr_object reply{};
    if (const int error = vm->connection->call(DR_IOAS_ALLOC, dr_empty{}, reply); error != 0)
        return error;
    *ioas = reply.id;
    return 0;
}

int dirtyring_hwpt_alloc(dirtyring_vm *vm, uint32_t ioas, const dirtyring_hwpt *attr, uint32_t *hwpt)
{
    if (attr->reserved != 0)
        return fail(EINVAL, "the reserved word of struct dirtyring_hwpt is not zero");
    if (attr->untracked != 0 && attr->optional != 0)
        return fail(EINVAL, "an hwpt that is untracked and optional at once");
    if (attr->space == DR_SPACE_OA && (vm->connection->features() & DR_FEATURE_OA_SPACE) == 0)
        return fail(EOPNOTSUPP, "the service has no rings of guest-physical addresses");
    const auto or_default = [](uint32_t value, uint32_t otherwise) { return value != 0 ? value : otherwise; };
    dr_hwpt_alloc request{};
    request.ioas = ioas;
    request.format = or_default(attr->format, DR_FORMAT_AMDV1);
    request.flags = (attr->untracked != 0  ? 0
                     : attr->optional != 0 ? DR_HWPT_DIRTY_OPTIONAL
                                           : DR_HWPT_DIRTY_TRACKING) |
                    (attr->always_on != 0 ? DR_HWPT_ALWAYS_ON : 0) | (attr->all_sizes != 0 ? DR_HWPT_ALL_SIZES : 0) |
                    (attr->collapse != 0 ? DR_HWPT_COLLAPSE : 0);
    request.split = attr->split;
    request.bbml = attr->bbml;
    request.levels = attr->levels;
    request.aperture_lg2 = or_default(attr->aperture_lg2, 39);
    request.shards = or_default(attr->shards, 1);
    request.leaf_lg2_max = or_default(attr->leaf_lg2_max, DR_PAGE_LG2);
    request.space = attr->space;
    request.ring_entries = or_default(attr->ring_entries, 4096);
    request.min_interval_us = attr->min_interval_us;
    dr_hwpt reply{};
    if (const int error = vm->connection->call(DR_HWPT_ALLOC, request, reply); error != 0)
        return error;
    *hwpt = reply.id;
    return 0;
}

int dirtyring_device_info(dirtyring_vm *vm, uint32_t above, struct dirtyring_device_info *out)
{
    dr_object request{};
    request.id = above;
    dr_device_info reply{};
    if (const int error = vm->connection->call(DR_DEVICE_INFO, request, reply); error != 0)
        return error;
    *out = {reply.id, reply.hwpt, reply.pid, reply.flags, reply.formats, {}};
    std::memcpy(out->name, reply.name, sizeof out->name - 1); // whatever the service says, it ends
    return 0;
}

int dirtyring_hwpt_status(dirtyring_vm *vm, uint32_t hwpt, struct dirtyring_hwpt_status *out)
{
    dr_object request{};
    request.id = hwpt;
    dr_hwpt_status reply{};
    if (const int error = vm->connection->call(DR_HWPT_STATUS, request, reply); error != 0)
        return error;
    *out = {reply.format, (reply.flags & DR_TRACKING_SUPPORTED) != 0, (reply.flags & DR_TRACKING_ENABLED) != 0,
            reply.devices, reply.in_the_way};
    return 0;
}

int dirtyring_destroy(dirtyring_vm *vm, uint32_t object)
{
    dr_object request{};
    request.id = object;
    dr_empty reply{};
    return vm->connection->call(DR_DESTROY, request, reply);
}
