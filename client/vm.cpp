#include "client/vm.hpp"

#include <cstdarg>
#include <cstdio>

namespace dirtyring::client {

namespace {

constinit thread_local char sentence[320] = "nothing has failed";

int connect(Connection connection, dirtyring_vm **vm)
{
    if (const int error = connection.hello(); error != 0)
        return error;
    dr_guest_create request{};
    request.command_entries = Commands::entries;
    dr_guest guest{};
    FdList fds;
    if (const int error = connection.call(DR_GUEST_CREATE, request, guest, fds); error != 0)
        return error;
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
    Fd call;
    if (const int error = take_call_event(fds.take(3), call); error != 0)
        return error;

    auto made = make<dirtyring_vm>(std::move(connection), guest, std::move(front_end), std::move(service), fds.take(2),
                                   std::move(call));
    if (!made)
        return -ENOMEM;
    *vm = made.release();
    return 0;
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
    *vm = nullptr;
    Connection connection;
    if (const int error = connection.open(socket_path); error != 0)
        return error;
    return connect(std::move(connection), vm);
}

int dirtyring_connect_fd(int socket, dirtyring_vm **vm)
{
    *vm = nullptr;
    Connection connection;
    connection.adopt(Fd(socket));
    return connect(std::move(connection), vm);
}

void dirtyring_close(dirtyring_vm *vm)
{
    Owned<dirtyring_vm>{vm};
}

const char *dirtyring_error(void)
{
    return sentence;
}

const uint8_t *dirtyring_token(const dirtyring_vm *vm)
{
    return vm->guest.token;
}

int dirtyring_socket(const dirtyring_vm *vm)
{
    return vm->connection.socket();
}

int dirtyring_memory_add(dirtyring_vm *vm, uint64_t oa, uint64_t length, int memfd, uint64_t offset)
{
    Fd copy(::fcntl(memfd, F_DUPFD_CLOEXEC, 0)); // call() closes what it has sent
    if (!copy)
        return fail(errno, "cannot duplicate the memory's descriptor %d: %s", memfd, std::strerror(errno));
    dr_memory_region request{};
    request.oa = oa;
    request.length = length;
    request.offset = offset;
    dr_empty reply{};
    FdList fds;
    fds.add(std::move(copy));
    if (const int error = vm->connection.call(DR_MEMORY_ADD, request, reply, fds); error != 0)
        return error;
    return expect_descriptors(fds, 0);
}

int dirtyring_ioas_alloc(dirtyring_vm *vm, uint32_t *ioas)
{
    dr_object reply{};
    if (const int error = vm->connection.call(DR_IOAS_ALLOC, dr_empty{}, reply); error != 0)
        return error;
    *ioas = reply.id;
    return 0;
}

int dirtyring_hwpt_alloc(dirtyring_vm *vm, uint32_t ioas, const dirtyring_hwpt *attr, uint32_t *hwpt)
{
    for (const uint32_t word : attr->reserved) {
        if (word != 0)
            return fail(EINVAL, "reserved words of struct dirtyring_hwpt are not zero");
    }
    if (attr->space == DR_SPACE_OA && (vm->connection.features() & DR_FEATURE_OA_SPACE) == 0)
        return fail(EOPNOTSUPP, "the service has no rings of guest-physical addresses");
    const auto or_default = [](uint32_t value, uint32_t otherwise) { return value != 0 ? value : otherwise; };
    dr_hwpt_alloc request{};
    request.ioas = ioas;
    request.format = or_default(attr->format, DR_FORMAT_AMDV1);
    request.flags = attr->untracked != 0 ? 0 : DR_HWPT_DIRTY_TRACKING;
    request.aperture_lg2 = or_default(attr->aperture_lg2, 39);
    request.shards = or_default(attr->shards, 1);
    request.leaf_lg2_max = or_default(attr->leaf_lg2_max, DR_PAGE_LG2);
    request.space = attr->space;
    request.ring_entries = or_default(attr->ring_entries, 4096);
    request.min_interval_us = attr->min_interval_us;
    dr_hwpt reply{};
    if (const int error = vm->connection.call(DR_HWPT_ALLOC, request, reply); error != 0)
        return error;
    *hwpt = reply.id;
    return 0;
}

int dirtyring_destroy(dirtyring_vm *vm, uint32_t object)
{
    dr_object request{};
    request.id = object;
    dr_empty reply{};
    return vm->connection.call(DR_DESTROY, request, reply);
}
