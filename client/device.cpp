#include "client/connection.hpp"
#include "client/dirtyring_device.h"
#include "iommu/any_dma.hpp"

#include <bit>

using namespace dirtyring::client;
using dirtyring::iommu::DmaFault;
using dirtyring::iommu::FaultReason;

namespace {

using Engine = dirtyring::iommu::AnyDmaThread;

// The longest section that we make: walkers wait for it.
constexpr std::uint64_t section_bytes = 64 * 1024;

constexpr bool same(FaultReason ours, dirtyring_fault_reason theirs)
{
    return static_cast<int>(ours) == static_cast<int>(theirs);
}
static_assert(same(FaultReason::none, DIRTYRING_FAULT_NONE));
static_assert(same(FaultReason::not_present, DIRTYRING_FAULT_NOT_PRESENT));
static_assert(same(FaultReason::read_denied, DIRTYRING_FAULT_READ));
static_assert(same(FaultReason::write_denied, DIRTYRING_FAULT_WRITE));
static_assert(same(FaultReason::aperture, DIRTYRING_FAULT_APERTURE));
static_assert(same(FaultReason::table, DIRTYRING_FAULT_TABLE));
static_assert(same(FaultReason::memory, DIRTYRING_FAULT_MEMORY));
static_assert(same(FaultReason::closed, DIRTYRING_FAULT_CLOSED));
static_assert(same(FaultReason::stalled, DIRTYRING_FAULT_STALLED));
static_assert(Engine::pin_bytes_max == DIRTYRING_PIN_MAX);
static_assert(dirtyring::iommu::Pins::slots_max == DR_DEVICE_PINS_MAX);

constexpr std::uint32_t formats_walked = [] {
    std::uint32_t mask = 0;
    dirtyring::iommu::for_each_format([&](auto f) { mask |= DR_FORMAT_BIT(f.id); });
    return mask;
}();

const char *meaning(FaultReason reason)
{
    switch (reason) {
    case FaultReason::none:
        break;
    case FaultReason::not_present:
        return "no translation";
    case FaultReason::read_denied:
        return "the map forbids reading";
    case FaultReason::write_denied:
        return "the map forbids writing";
    case FaultReason::aperture:
        return "outside the IOVA space";
    case FaultReason::table:
        return "a table entry points outside the tables";
    case FaultReason::memory:
        return "the output address is not in the guest's memory";
    case FaultReason::closed:
        return "it is being unmapped";
    case FaultReason::stalled:
        return "the leaf was being replaced for too long";
    }
    return "no fault";
}

} // namespace

struct alignas(DR_LINE_PAIR) dirtyring_dma {
    dirtyring_dma(const dirtyring::iommu::TranslationView &view, const dirtyring::iommu::GuestMemory &memory,
                  const dirtyring::iommu::DmaThreads &threads, std::size_t index, const Fd *bells)
        : engine(view, memory, threads, index), doorbells(bells)
    {
    }

    void end()
    {
        for (std::uint64_t owed = engine.leave(); owed != 0; owed &= owed - 1)
            signal_event(doorbells[std::countr_zero(owed)]);
    }

    // transfer(done, n) does a piece of the DMA, within a section.
    template <class Transfer> int run(std::uint64_t length, dirtyring_fault *fault, Transfer transfer)
    {
        DmaFault met;
        if (engine.inside()) {
            met = transfer(0, length);
        } else {
            std::uint64_t done = 0;
            while (done < length && met.reason == FaultReason::none) {
                engine.enter();
                met = transfer(done, std::min(section_bytes, length - done));
                end();
                done += met.done;
            }
            met.done = done;
        }
        return answer(met, fault);
    }

    // Calls step() within a section: the caller's, or one of its own.
    template <class Step> void in_section(Step step)
    {
        const bool own = !engine.inside();
        if (own)
            engine.enter();
        step();
        if (own)
            end();
    }

    int pin(std::uint64_t iova, std::uint64_t length, bool write, iovec *pieces, std::uint32_t *count,
            dirtyring_fault *fault);
    int unpin(int pin);

    static int answer(const DmaFault &met, dirtyring_fault *fault)
    {
        if (fault != nullptr)
            *fault = {met.iova, static_cast<std::uint32_t>(met.reason), met.write, met.done};
        if (met.reason == FaultReason::none)
            return 0;
        return fail(EFAULT, "DMA %s at iova %#" PRIx64 ": %s", met.write ? "write" : "read", met.iova,
                    meaning(met.reason));
    }

    Engine engine;
    const Fd *doorbells; // of the shards
};

int dirtyring_dma::pin(std::uint64_t iova, std::uint64_t length, bool write, iovec *pieces, std::uint32_t *count,
                       dirtyring_fault *fault)
{
    const std::uint32_t room = *count;
    std::uint32_t used = 0;
    std::byte *end = nullptr; // of the piece before
    const auto add = [&](std::byte *host, std::uint64_t n) {
        if (host != end && used++ < room)
            pieces[used - 1] = {host, 0};
        if (used <= room)
            pieces[used - 1].iov_len += n;
        end = host + n;
    };
    unsigned slot = 0;
    DmaFault met;
    int error = 0;
    in_section([&] {
        error = engine.pin(iova, length, write, slot, met, add);
        if (error == 0 && used > room)
            engine.cancel_pin(slot);
    });
    *count = used;
    if (error == -EAGAIN)
        return fail(EAGAIN, "all pins of this DMA thread are held");
    if (error != 0)
        return answer(met, fault);
    if (used > room)
        return fail(EMSGSIZE, "the range is in %u pieces, with room for %u", used, room);
    return static_cast<int>(slot);
}

int dirtyring_dma::unpin(int pin)
{
    const auto slot = static_cast<unsigned>(pin);
    if (!engine.pinned(slot))
        return fail(EINVAL, "pin %d is not held", pin);
    DmaFault met;
    in_section([&] { met = engine.unpin(slot); });
    return answer(met, nullptr);
}

struct dirtyring_device {
    int attach(const char *path, const dirtyring_attach &attach);
    int detach();
    int open(FdList &fds, const dr_device &reply, std::uint32_t threads, std::uint32_t pins);
    int open_tables(FdList &fds, std::uint32_t shards);
    int open_memory(FdList &fds, const dr_device &reply);
    int make_threads(const Fd &cells_fd, std::uint32_t threads, std::uint32_t pins);

    Connection connection;
    Mapping tables;
    Mapping translation;
    Mapping cells;
    Mapping memory_maps[DR_GUEST_REGIONS_MAX];
    Fd doorbells[DR_SHARDS_MAX];
    dirtyring::iommu::TranslationView view;
    dirtyring::iommu::GuestMemory memory;
    Owned<dirtyring_dma> dma[DR_DEVICE_THREADS_MAX];
};

static_assert(dirtyring::iommu::GuestMemory::regions_max >= DR_GUEST_REGIONS_MAX);

int dirtyring_device::attach(const char *path, const dirtyring_attach &attach)
{
    const std::uint32_t threads = attach.threads != 0 ? attach.threads : 1;
    dr_device_attach request{};
    request.hwpt = attach.hwpt;
    request.flags =
        (attach.cannot_track != 0 ? 0 : DR_DEVICE_CAN_TRACK) | (attach.not_coherent != 0 ? 0 : DR_DEVICE_COHERENT);
    request.formats = attach.formats != 0 ? attach.formats : formats_walked;
    std::strcpy(request.name, attach.name != nullptr ? attach.name : "unnamed");
    request.threads = threads;
    request.pins = attach.pins;
    std::memcpy(request.token, attach.token, sizeof request.token);
    if (const int error = draw(request.key); error != 0)
        return error;
    request.key |= 1; // 0 is none
    connection.introduce(DR_DEVICE_ATTACH, request);
    dr_device reply{};
    FdList fds;
    if (const int error = connection.open(path, reply, fds, offsetof(dr_device, region)); error != 0)
        return error;
    const int error = open(fds, reply, threads, attach.pins);
    if (error != 0)
        detach(); // or the hwpt would have a device for as long as this process lives
    return error;
}

int dirtyring_device::detach()
{
    dr_empty reply{};
    return connection.call(DR_DEVICE_DETACH, dr_empty{}, reply);
}

int dirtyring_device::open(FdList &fds, const dr_device &reply, std::uint32_t threads, std::uint32_t pins)
{
    if (reply.shards > DR_SHARDS_MAX || reply.regions > DR_GUEST_REGIONS_MAX)
        return fail(EPROTO, "the service speaks of %u shards and %u regions of memory", reply.shards, reply.regions);
    if (const int error = expect_descriptors(fds, 3 + reply.shards + reply.regions); error != 0)
        return error;
    if (const int error = open_tables(fds, reply.shards); error != 0)
        return error;
    if (const int error = open_memory(fds, reply); error != 0)
        return error;
    return make_threads(fds.take(2), threads, pins);
}

int dirtyring_device::open_tables(FdList &fds, std::uint32_t shards)
{
    if (const int error = map_region(fds.take(0), 1, PROT_READ | PROT_WRITE, "tables region", tables); error != 0)
        return error;
    if (const int error = map_region(fds.take(1), 1, PROT_READ, "translation region", translation); error != 0)
        return error;
    if (dirtyring::iommu::TranslationView::open(translation.data(), translation.size(), tables.data(), tables.size(),
                                                view) != 0)
        return fail(EPROTO, "the translation region does not describe tables of %zu bytes", tables.size());
    if (!dirtyring::iommu::knows_format(view.header().format) || view.header().shards != shards)
        return fail(EPROTO, "expected page tables of a known format in %u shards, got format %u in %u", shards,
                    view.header().format, view.header().shards);
    for (std::uint32_t i = 0; i < shards; ++i)
        doorbells[i] = fds.take(3 + i);
    return 0;
}

int dirtyring_device::open_memory(FdList &fds, const dr_device &reply)
{
    for (std::uint32_t i = 0; i < reply.regions; ++i) {
        const dr_device_region &region = reply.region[i];
        if (region.length == 0 || ((region.oa | region.length | region.offset) & (DR_PAGE - 1)) != 0 ||
            region.oa + region.length < region.oa || region.offset + region.length < region.offset)
            return fail(EPROTO, "region %u of the guest's memory makes no sense: %#" PRIx64 " bytes at %#" PRIx64, i,
                        region.length, region.oa);
        const Fd fd = fds.take(3 + reply.shards + i);
        struct stat status;
        if (::fstat(fd.get(), &status) != 0)
            return fail(errno, "cannot stat the guest's memory: %s", std::strerror(errno));
        if (static_cast<std::uint64_t>(status.st_size) < region.offset + region.length)
            return fail(EPROTO, "region %u of the guest's memory ends behind its file", i);
        if (const int error =
                memory_maps[i].map(fd.get(), region.length, PROT_READ | PROT_WRITE, static_cast<off_t>(region.offset));
            error != 0)
            return fail(-error, "cannot map region %u of the guest's memory: %s", i, std::strerror(-error));
        memory.add(region.oa, region.length, memory_maps[i].data());
    }
    return 0;
}

int dirtyring_device::make_threads(const Fd &cells_fd, std::uint32_t threads, std::uint32_t pins)
{
    const std::size_t cells_size = threads * sizeof(dr_cell);
    const std::size_t slots = std::size_t{threads} * pins;
    if (const int error = map_region(cells_fd, cells_size + slots * sizeof(dr_pin), PROT_READ | PROT_WRITE,
                                     "region of cells and pins", cells);
        error != 0)
        return error;
    const dirtyring::iommu::DmaThreads all{{cells.as<dr_cell>(), threads}, {cells.as<dr_pin>(cells_size), slots}};
    for (std::uint32_t i = 0; i < threads; ++i) {
        dma[i] = make<dirtyring_dma>(view, memory, all, i, doorbells);
        if (!dma[i])
            return -ENOMEM;
    }
    return 0;
}

int dirtyring_device_attach(const char *socket_path, const dirtyring_attach *attach, dirtyring_device **dev)
{
    *dev = nullptr;
    if (attach->threads > DR_DEVICE_THREADS_MAX)
        return fail(EINVAL, "a device has at most %u threads, not %u", DR_DEVICE_THREADS_MAX, attach->threads);
    const std::uint32_t threads = std::max(1u, attach->threads);
    if (attach->pins > DR_DEVICE_PINS_MAX / threads)
        return fail(EINVAL, "a device has at most %u pins, not %u for each of %u threads", DR_DEVICE_PINS_MAX,
                    attach->pins, threads);
    for (const uint32_t word : attach->reserved) {
        if (word != 0)
            return fail(EINVAL, "reserved words of struct dirtyring_attach are not zero");
    }
    if (attach->name != nullptr && ::strnlen(attach->name, DR_NAME_BYTES) == DR_NAME_BYTES)
        return fail(EINVAL, "the name of a device has at most %d bytes", DR_NAME_BYTES - 1);
    auto made = make<dirtyring_device>();
    if (!made)
        return -ENOMEM;
    if (const int error = made->attach(socket_path, *attach); error != 0)
        return error;
    *dev = made.release();
    return 0;
}

int dirtyring_device_detach(dirtyring_device *dev)
{
    Owned<dirtyring_device> owned(dev);
    if (!owned)
        return 0;
    const auto keep = [&](int error) {
        (void)owned.release();
        return error;
    };
    for (const auto &dma : owned->dma) {
        if (dma && dma->engine.inside())
            return keep(fail(EBUSY, "a thread of the device is inside a section"));
        if (dma && dma->engine.pins() > 0)
            return keep(fail(EBUSY, "a thread of the device holds %u pins", dma->engine.pins()));
    }
    const int error = owned->detach();
    return error == 0 || error == -ESHUTDOWN ? 0 : keep(error);
}

dirtyring_dma *dirtyring_device_dma(dirtyring_device *dev, uint32_t index)
{
    return index < DR_DEVICE_THREADS_MAX ? dev->dma[index].get() : nullptr;
}

int dirtyring_device_socket(const dirtyring_device *dev)
{
    return dev->connection.socket();
}

void dirtyring_dma_begin(dirtyring_dma *dma)
{
    dma->engine.enter();
}

void dirtyring_dma_end(dirtyring_dma *dma)
{
    dma->end();
}

int dirtyring_dma_write(dirtyring_dma *dma, uint64_t iova, const void *data, uint64_t length, dirtyring_fault *fault)
{
    const auto *from = static_cast<const std::byte *>(data);
    return dma->run(length, fault, [=](std::uint64_t done, std::uint64_t n) {
        return dma->engine.write(iova + done, from + done, n);
    });
}

int dirtyring_dma_read(dirtyring_dma *dma, uint64_t iova, void *data, uint64_t length, dirtyring_fault *fault)
{
    auto *to = static_cast<std::byte *>(data);
    return dma->run(length, fault,
                    [=](std::uint64_t done, std::uint64_t n) { return dma->engine.read(iova + done, to + done, n); });
}

int dirtyring_dma_pin(dirtyring_dma *dma, uint64_t iova, uint64_t length, uint32_t direction, iovec *pieces,
                      uint32_t *count, dirtyring_fault *fault)
{
    if (length == 0 || length > DIRTYRING_PIN_MAX)
        return fail(EINVAL, "a pin of %" PRIu64 " bytes, expected 1 to %u", length, DIRTYRING_PIN_MAX);
    if (direction != DIRTYRING_READ && direction != DIRTYRING_WRITE)
        return fail(EINVAL, "direction %#x, expected DIRTYRING_READ or DIRTYRING_WRITE", direction);
    return dma->pin(iova, length, direction == DIRTYRING_WRITE, pieces, count, fault);
}

int dirtyring_dma_unpin(dirtyring_dma *dma, int pin)
{
    return dma->unpin(pin);
}
