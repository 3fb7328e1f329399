#include "client/check/device.hpp"

#include <bit>
#include <csignal>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

namespace dirtyring::check {

Device::Device(Context &context, const TrackedGuest &guest, std::uint32_t pins) : Peer(context)
{
    hello();
    dr_device_attach request = guest.attach_request();
    request.pins = pins;
    const std::uint32_t shards = guest.request.shards;
    constexpr unsigned regions = 1;
    info = get<dr_device>(DR_DEVICE_ATTACH, request, {}, &fds, 3 + shards + regions);
    context.need(info.shards == shards && info.regions == regions, "F-8", "DEVICE_ATTACH",
                 fmt::format("{} shards and {} regions", info.shards, info.regions),
                 fmt::format("{} and {}", shards, regions));
    tables = map_region(context, fds[0], page, PROT_READ | PROT_WRITE, "tables");
    translation_ = map_region(context, fds[1], page, PROT_READ, "translation");
    cells_ = map_region(context, fds[2], sizeof(dr_cell) + pins * sizeof(dr_pin), PROT_READ | PROT_WRITE, "cells");
    memory_map_ = map_region(context, fds[3 + shards], TrackedGuest::pages * page, PROT_READ | PROT_WRITE, "memory");
    memory_.add(info.region[0].oa, info.region[0].length, memory_map_.data());
    const int error =
        iommu::TranslationView::open(translation_.data(), translation_.size(), tables.data(), tables.size(), view_);
    context.need(error == 0 && geometry().format == guest.request.format && geometry().shards == shards, "S-4",
                 "the translation region", "a header that does not describe the regions",
                 fmt::format("that of an hwpt of format {} with {} shards", guest.request.format, shards));
    const iommu::DmaThreads threads{{&cell(), 1}, {&pin(0), pins}};
    dma_ = std::make_unique<iommu::AnyDmaThread>(view_, memory_, threads, 0);
}

void Device::leave()
{
    for (std::uint64_t owed = dma_->leave(); owed != 0; owed &= owed - 1)
        ::eventfd_write(fds[3 + static_cast<unsigned>(std::countr_zero(owed))].get(), 1);
}

iommu::FaultReason Device::write_inside(std::uint64_t page_number)
{
    ++value_;
    return dma_->write(page_number * page, &value_, sizeof value_).reason;
}

void Device::write(std::uint64_t page_number)
{
    enter();
    const iommu::FaultReason reason = write_inside(page_number);
    leave();
    context_.need(reason == iommu::FaultReason::none, "M-11", fmt::format("a DMA write to page {:#x}", page_number),
                  fmt::format("fault {}", static_cast<unsigned>(reason)), "a translation that allows it");
}

void Device::detach()
{
    get<dr_empty>(DR_DEVICE_DETACH, dr_empty{});
}

void Device::hold_pin(unsigned slot, std::uint64_t first, std::uint64_t last, bool write) const
{
    dr_pin &p = pin(slot);
    word(p.start).store(first * page, std::memory_order_release);            // P4
    word(p.last).store((last + 1) * page - 1, std::memory_order_release);    // P4
    word(p.write).store(write ? 1 : 0, std::memory_order_release);           // P4
    word(cell().pinned).store(cell().pinned + 1, std::memory_order_seq_cst); // P1
    word(p.count).store(p.count + 1, std::memory_order_seq_cst);             // P1
}

void Device::give_back_pin(unsigned slot) const
{
    word(pin(slot).count).store(pin(slot).count + 1, std::memory_order_seq_cst); // P2, P3
    word(cell().pinned).store(cell().pinned - 1, std::memory_order_release);
    ring_doorbell();
}

std::uint64_t *Device::leaf(std::uint64_t page_number, std::uint64_t *of_table) const
{
    std::uint64_t table = geometry().root;
    for (unsigned level = geometry().root_level; table < geometry().tables; --level) {
        std::uint64_t *entry = view_.tables().entries(table) + iommu::entry_index(page_number * page, level);
        const std::uint64_t now = word(*entry).load(std::memory_order_seq_cst);
        const iommu::Entry e = iommu::with_format(geometry().format, [&](auto f) { return f.decode(now, level); });
        if (e.kind == iommu::EntryKind::leaf) {
            if (of_table != nullptr)
                *of_table = table;
            return entry;
        }
        if (e.kind == iommu::EntryKind::none || level == 0)
            return nullptr;
        table = e.address;
    }
    return nullptr;
}

bool Device::dirty(std::uint64_t page_number) const
{
    std::uint64_t *entry = leaf(page_number);
    return entry != nullptr && iommu::with_format(geometry().format, [&](auto f) {
               return f.dirty(word(*entry).load(std::memory_order_seq_cst));
           });
}

void Device::set_dirty_silently(std::uint64_t page_number) const
{
    if (std::uint64_t *entry = leaf(page_number))
        iommu::with_format(geometry().format, [&](auto f) { f.make_dirty(*entry); });
}

void Device::summarize(std::uint64_t page_number) const
{
    std::uint64_t table = 0;
    if (leaf(page_number, &table) == nullptr)
        return;
    const std::uint64_t iova = page_number * page;
    iommu::mark_line(view_.tables(), view_.line_word(table, iova), iommu::entry_index(iova, 0));
}

void Device::ring_doorbell() const
{
    for (std::uint32_t shard = 0; shard < info.shards; ++shard)
        ::eventfd_write(fds[3 + shard].get(), 1);
}

// ---- in another process ---------------------------------------------------------------------------------------------

DeviceProcess::DeviceProcess(Context &context, const TrackedGuest &guest, const Deed &deed, std::uint32_t pins)
    : context_(context)
{
    int ends[2];
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0)
        throw std::runtime_error("socketpair");
    talk_ = Fd(ends[0]);
    const Fd theirs(ends[1]);
    std::fflush(nullptr);
    pid_ = ::fork();
    if (pid_ < 0)
        throw std::runtime_error("fork");
    if (pid_ == 0) {
        ::prctl(PR_SET_PDEATHSIG, SIGKILL);
        ::dup2(theirs.get(), STDIN_FILENO);
        ::syscall(SYS_close_range, 3u, ~0u, 0u); // the guests' lives hang on them
        live(context, guest, deed, pins);
    }
    wait_for('i');
}

void DeviceProcess::live(Context &context, const TrackedGuest &guest, const Deed &deed, std::uint32_t pins)
{
    try {
        auto device = std::make_unique<Device>(context, guest, pins);
        device->enter();
        deed(*device);
        char c = 'i';
        while (::write(STDIN_FILENO, &c, 1) == 1 && ::read(STDIN_FILENO, &c, 1) == 1) {
            if (c == 'l')
                device->leave();
            else if (c == 's')
                device->close();
        }
    } catch (const std::exception &) {
        ::_exit(1); // the parent reports that it did not come up
    }
    ::_exit(0);
}

void DeviceProcess::wait_for(char c)
{
    pollfd readable{talk_.get(), POLLIN, 0};
    char got = 0;
    const bool came =
        ::poll(&readable, 1, context_.deadline.of_a_wait().ms_left()) == 1 && ::read(talk_.get(), &got, 1) == 1;
    context_.need(came && got == c, "F-17", "a device in a process of its own", "it cannot attach and write", "it can");
}

void DeviceProcess::tell(char c)
{
    (void)::send(talk_.get(), &c, 1, MSG_NOSIGNAL);
    wait_for(c);
}

void DeviceProcess::kill()
{
    if (pid_ <= 0)
        return;
    ::kill(pid_, SIGKILL);
    ::waitpid(std::exchange(pid_, -1), nullptr, 0);
}

// ---- the bystander --------------------------------------------------------------------------------------------------

void Bystander::expect_undisturbed(const std::string &by)
{
    const Pages written{round_ % 7, 64 + round_ % 11, 255 - round_ % 13};
    ++round_;
    Pages reported;
    try {
        device_.write(written);
        reported = guest_.sync("another guest's sync");
    } catch (const Broken &) {
        // what was broken there is recorded; here it counts as disturbance
    }
    context_.need(covers(reported, written), "S-8", fmt::format("another guest, after {}", by), text_of(reported),
                  text_of(written));
}

} // namespace dirtyring::check
