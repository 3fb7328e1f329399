// Beside PAGEMAP_SCAN: memory that a process writes, which the kernel write-protects and whose protection faults lift
// (userfaultfd, write-protect async). The ioctl takes all written pages and protects them again.
#include "perf/bench_hwpt.hpp"
#include "perf/figures.hpp"

#include <fmt/format.h>
#include <linux/userfaultfd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <random>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <vector>

namespace {

using namespace dirtyring;
using namespace dirtyring::perf;

// linux/fs.h and linux/userfaultfd.h of Linux 6.7; Debian 12 has those of 6.1.
struct PageRegion {
    std::uint64_t start;
    std::uint64_t end;
    std::uint64_t categories;
};
struct ScanArgument {
    std::uint64_t size;
    std::uint64_t flags;
    std::uint64_t start;
    std::uint64_t end;
    std::uint64_t walk_end;
    std::uint64_t vec;
    std::uint64_t vec_len;
    std::uint64_t max_pages;
    std::uint64_t category_inverted;
    std::uint64_t category_mask;
    std::uint64_t category_anyof_mask;
    std::uint64_t return_mask;
};
constexpr unsigned long pagemap_scan = _IOWR('f', 16, ScanArgument);
constexpr std::uint64_t scan_wp_matching = 1u << 0;
constexpr std::uint64_t scan_check_wpasync = 1u << 1;
constexpr std::uint64_t page_is_written = 1u << 1;
constexpr std::uint64_t feature_wp_unpopulated = 1u << 13;
constexpr std::uint64_t feature_wp_async = 1u << 15;

struct Unsupported : std::runtime_error {
    using std::runtime_error::runtime_error;
};

class WrittenMemory
{
  public:
    explicit WrittenMemory(std::uint64_t pages) : size_(pages << DR_PAGE_LG2), regions_(1 << 16)
    {
        faults_ = ring::Fd(static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY)));
        uffdio_api api{};
        api.api = UFFD_API;
        api.features = UFFD_FEATURE_PAGEFAULT_FLAG_WP | feature_wp_unpopulated | feature_wp_async;
        if (!faults_ || ::ioctl(faults_.get(), UFFDIO_API, &api) != 0)
            throw Unsupported(fmt::format("userfaultfd has no WP_ASYNC here: {}", std::strerror(errno)));
        base_ = static_cast<std::byte *>(
            ::mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        if (base_ == MAP_FAILED)
            throw Failure("no memory for PAGEMAP_SCAN");
        ::madvise(base_, size_, MADV_NOHUGEPAGE);
        for (std::uint64_t at = 0; at < size_; at += DR_PAGE)
            base_[at] = std::byte{1};
        uffdio_register range{};
        range.range = {reinterpret_cast<std::uint64_t>(base_), size_};
        range.mode = UFFDIO_REGISTER_MODE_WP;
        pagemap_ = ring::Fd(::open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
        if (::ioctl(faults_.get(), UFFDIO_REGISTER, &range) != 0 || !pagemap_)
            throw Unsupported(fmt::format("memory cannot be registered: {}", std::strerror(errno)));
        take([](auto...) {});
    }
    WrittenMemory(const WrittenMemory &) = delete;
    WrittenMemory &operator=(const WrittenMemory &) = delete;
    ~WrittenMemory() { ::munmap(base_, size_); }

    void write(std::uint64_t page) { base_[page << DR_PAGE_LG2] = std::byte{2}; }

    // What was written since: each(first page, pages).
    template <class Each> void take(Each each)
    {
        const auto base = reinterpret_cast<std::uint64_t>(base_);
        ScanArgument scan{};
        scan.size = sizeof scan;
        scan.flags = scan_wp_matching | scan_check_wpasync;
        scan.start = base;
        scan.end = base + size_;
        scan.vec = reinterpret_cast<std::uint64_t>(regions_.data());
        scan.vec_len = regions_.size();
        scan.category_mask = page_is_written;
        scan.return_mask = page_is_written;
        while (scan.start < scan.end) {
            const int n = ::ioctl(pagemap_.get(), pagemap_scan, &scan);
            if (n < 0)
                throw Unsupported(fmt::format("PAGEMAP_SCAN: {}", std::strerror(errno)));
            for (int i = 0; i < n; ++i) {
                const PageRegion &r = regions_[static_cast<std::size_t>(i)];
                each((r.start - base) >> DR_PAGE_LG2, (r.end - r.start) >> DR_PAGE_LG2);
            }
            scan.start = scan.walk_end;
        }
    }

  private:
    std::uint64_t size_;
    std::byte *base_ = nullptr;
    ring::Fd faults_;
    ring::Fd pagemap_;
    std::vector<PageRegion> regions_;
};

// Which pages take() tells of.
template <class Take> std::vector<bool> found(std::uint64_t pages, Take take)
{
    std::vector<bool> all(pages);
    take([&](std::uint64_t first, std::uint64_t n) {
        std::fill_n(all.begin() + static_cast<std::ptrdiff_t>(first), n, true);
    });
    return all;
}

void compare(Session &session, BenchHwpt &hwpt, WrittenMemory &memory, std::uint64_t one_in, const char *unit,
             std::uint64_t per)
{
    std::vector<bool> chosen(hwpt.pages());
    std::mt19937_64 random(1);
    for (std::uint64_t i = 0; one_in != 0 && i < hwpt.pages() / one_in; ++i)
        chosen[random() % hwpt.pages()] = true;
    const auto count = static_cast<double>(std::count(chosen.begin(), chosen.end(), true));
    const auto dirty = [&](auto write) {
        for (std::uint64_t page = 0; page < hwpt.pages(); ++page) {
            if (chosen[page])
                write(page);
        }
    };
    std::uint64_t sum = 0;
    const auto read = [&](std::uint64_t first, std::uint64_t n) { sum += first + n; };
    const auto ours = [&](auto each) { hwpt.sweep_and_visit(each); };
    const auto theirs = [&](auto each) { memory.take(each); };
    const auto dirty_ours = [&] { dirty([&](std::uint64_t page) { hwpt.mark_dirty(page); }); };
    const auto dirty_theirs = [&] { dirty([&](std::uint64_t page) { memory.write(page); }); };

    dirty_ours();
    dirty_theirs();
    if (found(hwpt.pages(), ours) != chosen || found(hwpt.pages(), theirs) != chosen)
        throw Failure("PAGEMAP_SCAN or our walker found other pages than were dirty");
    const double by = per == 0 ? count : static_cast<double>(per);
    const auto samples = in_turns(session.turns(), {[&] {
                                                        dirty_ours();
                                                        return timed([&] { ours(read); }) / by;
                                                    },
                                                    [&] {
                                                        dirty_theirs();
                                                        return timed([&] { theirs(read); }) / by;
                                                    }});
    session.add(Figure{.name = fmt::format("{} GiB, {} % dirty, beside PAGEMAP_SCAN", hwpt.pages() >> 18,
                                           one_in == 0 ? 0 : 100 / one_in),
                       .unit = unit,
                       .ours = samples[0],
                       .peer = Other{"PAGEMAP_SCAN", samples[1]},
                       .ratio = Ratio::ours_to_peer});
}

void measure_pagemap(Session &session)
{
    const unsigned memory_lg2 = session.pick(26u, 31u, 31u);
    BenchHwpt hwpt(memory_lg2);
    try {
        WrittenMemory memory(hwpt.pages());
        compare(session, hwpt, memory, 0, "ns/page", hwpt.pages());
        compare(session, hwpt, memory, 100, "ns/dirty", 0);
        compare(session, hwpt, memory, 10, "ns/dirty", 0);
    } catch (const Unsupported &e) {
        session.skip("beside PAGEMAP_SCAN", e.what());
    }
}

} // namespace

int main(int argc, char **argv)
{
    return run(argc, argv, measure_pagemap);
}
