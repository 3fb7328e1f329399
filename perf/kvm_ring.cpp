// Beside KVM's dirty ring: a tiny guest writes pages, KVM puts an entry for each into its ring, the VMM reads them
// (harvest) and has them write-protected again (reset). Ours finds, clears, publishes and reads as many.
#include "perf/bench_hwpt.hpp"
#include "perf/figures.hpp"
#include "ring/region.hpp"

#include <fmt/format.h>
#include <linux/kvm.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

namespace {

using namespace dirtyring;
using namespace dirtyring::perf;

constexpr std::uint64_t memory_bytes = 256ull << 20;
constexpr std::uint64_t code_at = 0x1000;
constexpr std::uint64_t data_at = 1ull << 20;
constexpr std::uint32_t entries = 1 << 16;
constexpr std::uint64_t dirty_pages = 30'000; // KVM keeps some of the ring to itself
constexpr std::uint64_t stride = 2 * DR_PAGE; // so that ours, too, has an entry for each

struct Unsupported : std::runtime_error {
    using std::runtime_error::runtime_error;
};

int checked(int result, const char *what)
{
    if (result < 0)
        throw Unsupported(fmt::format("{}: {}", what, std::strerror(errno)));
    return result;
}

// One processor, in protected mode without paging, which writes a word in each of dirty_pages pages and halts.
class TinyGuest
{
  public:
    TinyGuest()
    {
        kvm_ = ring::Fd(checked(::open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm"));
        vm_ = ring::Fd(checked(::ioctl(kvm_.get(), KVM_CREATE_VM, 0), "KVM_CREATE_VM"));
        kvm_enable_cap cap{};
        cap.cap = KVM_CAP_DIRTY_LOG_RING;
        cap.args[0] = entries * sizeof(kvm_dirty_gfn);
        checked(::ioctl(vm_.get(), KVM_ENABLE_CAP, &cap), "KVM_CAP_DIRTY_LOG_RING");
        checked(memory_.make("perf-kvm", memory_bytes, ring::Pages::present), "memory");
        kvm_userspace_memory_region slot{};
        slot.flags = KVM_MEM_LOG_DIRTY_PAGES;
        slot.memory_size = memory_bytes;
        slot.userspace_addr = reinterpret_cast<std::uint64_t>(memory_.map.data());
        checked(::ioctl(vm_.get(), KVM_SET_USER_MEMORY_REGION, &slot), "KVM_SET_USER_MEMORY_REGION");
        cpu_ = ring::Fd(checked(::ioctl(vm_.get(), KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU"));
        const auto size = static_cast<std::size_t>(checked(::ioctl(kvm_.get(), KVM_GET_VCPU_MMAP_SIZE, 0), "mmap"));
        checked(run_.map(cpu_.get(), size, PROT_READ | PROT_WRITE), "the processor");
        checked(ring_.map(cpu_.get(), entries * sizeof(kvm_dirty_gfn), PROT_READ | PROT_WRITE,
                          KVM_DIRTY_LOG_PAGE_OFFSET * DR_PAGE),
                "the dirty ring");
        set_up_cpu();
    }

    // It writes its pages.
    void run()
    {
        kvm_regs regs{};
        regs.rip = code_at;
        regs.rflags = 2;
        regs.rdi = data_at;
        regs.rcx = dirty_pages;
        checked(::ioctl(cpu_.get(), KVM_SET_REGS, &regs), "KVM_SET_REGS");
        checked(::ioctl(cpu_.get(), KVM_RUN, 0), "KVM_RUN");
        if (const auto reason = run_.as<kvm_run>()->exit_reason; reason != KVM_EXIT_HLT)
            throw Unsupported(fmt::format("the tiny guest ends with exit reason {}", reason));
    }

    // each(page)
    template <class Each> void harvest(Each each)
    {
        for (;; ++next_) {
            kvm_dirty_gfn &entry = ring_.as<kvm_dirty_gfn>()[next_ % entries];
            const std::atomic_ref flags(entry.flags);
            if ((flags.load(std::memory_order_acquire) & KVM_DIRTY_GFN_F_DIRTY) == 0)
                return;
            each(entry.offset);
            flags.store(KVM_DIRTY_GFN_F_RESET, std::memory_order_release);
        }
    }

    void reset() { checked(::ioctl(vm_.get(), KVM_RESET_DIRTY_RINGS, 0), "KVM_RESET_DIRTY_RINGS"); }

  private:
    void set_up_cpu()
    {
        constexpr unsigned char code[] = {
            0x89, 0x07,                                 // next: mov [edi], eax
            0x81, 0xc7, 0x00, stride >> 8 & 0xff, 0, 0, // add edi, stride
            0x49,                                       // dec ecx
            0x75, 0xf5,                                 // jnz next
            0xf4,                                       // hlt
        };
        std::memcpy(memory_.map.data() + code_at, code, sizeof code);
        kvm_sregs regs{};
        checked(::ioctl(cpu_.get(), KVM_GET_SREGS, &regs), "KVM_GET_SREGS");
        kvm_segment flat{};
        flat.limit = 0xffffffff;
        flat.present = flat.s = flat.db = flat.g = 1;
        flat.type = 3; // data, writable
        flat.selector = 16;
        regs.ds = regs.es = regs.ss = regs.fs = regs.gs = flat;
        flat.type = 11; // code, readable
        flat.selector = 8;
        regs.cs = flat;
        regs.cr0 |= 1; // protected mode
        checked(::ioctl(cpu_.get(), KVM_SET_SREGS, &regs), "KVM_SET_SREGS");
    }

    ring::Region memory_;
    ring::Fd kvm_;
    ring::Fd vm_;
    ring::Fd cpu_;
    ring::Mapping run_;
    ring::Mapping ring_;
    std::uint64_t next_ = 0;
};

void measure_kvm(Session &session)
{
    const char *name = "30,000 dirty pages, beside KVM's dirty ring";
    BenchHwpt hwpt(28);
    std::uint64_t sum = 0;
    constexpr double each = 1. / dirty_pages;
    try {
        TinyGuest guest;
        const auto dirty = [&] {
            for (std::uint64_t i = 0; i < dirty_pages; ++i)
                hwpt.mark_dirty((data_at + i * stride) >> DR_PAGE_LG2);
        };
        std::vector<bool> theirs(hwpt.pages());
        guest.run();
        guest.harvest([&](std::uint64_t page) { theirs[page] = true; });
        guest.reset();
        std::vector<bool> ours(hwpt.pages());
        dirty();
        hwpt.sweep_and_visit([&](std::uint64_t first, std::uint64_t n) {
            std::fill_n(ours.begin() + static_cast<std::ptrdiff_t>(first), n, true);
        });
        if (ours != theirs)
            throw Failure("KVM's ring or our walker found other pages than were dirty");
        const auto samples =
            in_turns(session.turns(), {[&] {
                                           dirty();
                                           return each * timed([&] { hwpt.sweep_and_consume(); });
                                       },
                                       [&] {
                                           guest.run();
                                           return each * timed([&] {
                                                      guest.harvest([&](std::uint64_t page) { sum += page; });
                                                      guest.reset();
                                                  });
                                       }});
        session.add(Figure{.name = name,
                           .unit = "ns/page",
                           .ours = samples[0],
                           .peer = Other{"KVM, harvest and reset", samples[1]},
                           .ratio = Ratio::ours_to_peer});
    } catch (const Unsupported &e) {
        session.skip(name, e.what());
    }
}

} // namespace

int main(int argc, char **argv)
{
    return run(argc, argv, measure_kvm);
}
