// A dirtyringd of our own, and guests at it, for figures that a whole service must stand behind.
#pragma once

#include "client/dirtyring.hpp"
#include "client/migrate/failure.hpp"
#include "client/migrate/temporary_directory.hpp"
#include "perf/figures.hpp"
#include "ring/region.hpp"

#include <algorithm>
#include <chrono>
#include <csignal>
#include <filesystem>
#include <optional>
#include <string>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>

namespace dirtyring::perf {

using migrate::must;

// One walker, on the last core; the control plane, which sleeps, anywhere.
class Service
{
  public:
    Service()
    {
        const std::string program = std::filesystem::read_symlink("/proc/self/exe").parent_path() / "dirtyringd";
        pid_ = ::fork();
        if (pid_ == 0) {
            ::prctl(PR_SET_PDEATHSIG, SIGKILL);
            unpin();
            ::execl(program.c_str(), program.c_str(), "--log-level", "error", "--socket-path", socket().c_str(),
                    nullptr);
            ::_exit(EXIT_FAILURE);
        }
        const std::uint64_t deadline = now_ns() + 10'000'000'000;
        while (!is_listening()) {
            if (now_ns() > deadline || ::waitpid(pid_, nullptr, WNOHANG) != 0)
                throw Failure("dirtyringd does not start");
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
    }
    Service(const Service &) = delete;
    Service &operator=(const Service &) = delete;
    ~Service()
    {
        ::kill(pid_, SIGTERM);
        ::waitpid(pid_, nullptr, 0);
    }

    [[nodiscard]] std::string socket() const { return directory_.path() + "/service.sock"; }
    [[nodiscard]] pid_t pid() const { return pid_; }

  private:
    // Its file is there a moment before that.
    [[nodiscard]] bool is_listening() const
    {
        sockaddr_un address{};
        address.sun_family = AF_UNIX;
        socket().copy(address.sun_path, sizeof address.sun_path - 1);
        const ring::Fd probe(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
        return ::connect(probe.get(), reinterpret_cast<const sockaddr *>(&address), sizeof address) == 0;
    }

    migrate::TemporaryDirectory directory_;
    pid_t pid_ = 0;
};

// Memory at 0, one hwpt with a ring, tracked, and one device with one DMA thread. Runs name guest-physical pages.
class ServedGuest
{
  public:
    struct Options {
        std::uint64_t memory_bytes;
        unsigned aperture_lg2 = 39;
        std::uint32_t ring_entries = 1 << 16;
        bool mapped = true; // all of it, to the same addresses
    };

    ServedGuest(const std::string &socket, const Options &options) : guest_(must(Guest::connect(socket)))
    {
        if (memory_.make("perf-guest", options.memory_bytes, ring::Pages::sparse) != 0)
            throw Failure("no memory for the guest");
        must(guest_.memory_add(0, options.memory_bytes, memory_.fd.get()));
        ioas_ = must(guest_.ioas_alloc());
        dirtyring_hwpt attributes{};
        attributes.aperture_lg2 = options.aperture_lg2;
        attributes.space = DR_SPACE_OA;
        attributes.ring_entries = options.ring_entries;
        hwpt_ = must(guest_.hwpt_alloc(ioas_, attributes));
        if (options.mapped)
            must(guest_.map(ioas_, 0, options.memory_bytes, 0, DIRTYRING_READ | DIRTYRING_WRITE));
        must(guest_.enable(hwpt_));
        rings_.emplace(must(guest_.open_rings(hwpt_)));
        dirtyring_attach attach{};
        attach.token = guest_.token();
        attach.hwpt = hwpt_;
        device_.emplace(must(Device::attach(socket, attach)));
    }

    void write(std::uint64_t iova)
    {
        const std::uint64_t data = iova;
        write(iova, &data, sizeof data);
    }
    void write(std::uint64_t iova, const void *data, std::uint64_t length)
    {
        if (dirtyring_dma_write(device_->dma(0), iova, data, length, nullptr) != 0)
            throw Failure(dirtyring_error());
    }

    // Takes what is there; each(first page, pages) for each run. How many entries that were.
    template <class Each> std::uint64_t drain(Each each) { return drain_some(UINT64_MAX, each); }

    // The same, until it were `enough` entries.
    template <class Each> std::uint64_t drain_some(std::uint64_t enough, Each each)
    {
        std::uint64_t entries = 0;
        while (entries < enough) {
            if (peeked_.count == 0) {
                const auto batch = rings_->peek();
                if (!batch)
                    break;
                peeked_ = *batch;
            }
            dirtyring_batch batch = peeked_;
            batch.count = static_cast<std::uint32_t>(std::min<std::uint64_t>(batch.count, enough - entries));
            peeked_.entries += batch.count;
            peeked_.count -= batch.count;
            for (std::uint32_t i = 0; i < batch.count; ++i) {
                if (const std::uint64_t entry = batch.entries[i]; !dr_is_marker(entry))
                    each(dr_run_address(entry) >> DR_PAGE_LG2, dr_run_length(entry) >> DR_PAGE_LG2);
                else if (dr_marker_kind(entry) == DR_MARKER_ALL_DIRTY)
                    throw Failure("the service takes everything for dirty");
            }
            entries += batch.count;
            rings_->release(batch);
        }
        return entries;
    }

    // Everything whose DMA has ended, to the last marker.
    template <class Each> void sync(Each each)
    {
        must(rings_->sync());
        while (!must(rings_->synced()))
            drain(each);
    }

    // The guest's memory at a multiple of 8.
    [[nodiscard]] std::uint64_t word(std::uint64_t oa) const { return *memory_.map.as<std::uint64_t>(oa); }

    Guest &guest() { return guest_; }
    RingSet &rings() { return *rings_; }
    [[nodiscard]] std::uint32_t ioas() const { return ioas_; }

  private:
    ring::Region memory_;
    Guest guest_;
    std::uint32_t ioas_ = 0;
    std::uint32_t hwpt_ = 0;
    std::optional<RingSet> rings_;
    std::optional<Device> device_;
    dirtyring_batch peeked_{}; // of it, what is not read yet
};

} // namespace dirtyring::perf
