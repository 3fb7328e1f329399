#include "service/walkers/lcores.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <chrono>
#include <cstdint>
#include <fstream>
#include <rte_cycles.h>
#include <rte_eal.h>
#include <rte_errno.h>
#include <rte_launch.h>
#include <rte_lcore.h>
#include <sched.h>
#include <thread>

// Where neither cpuid nor an MSR tells how fast the TSC is, as in most guests, the EAL sleeps for 100 ms to measure it:
// nine tenths of the time that a restart takes. Nobody here needs it that exactly. The linker puts this in place of the
// EAL's.
extern "C" std::uint64_t __wrap_get_tsc_freq()
{
    using Clock = std::chrono::steady_clock;
    const auto since = Clock::now();
    const std::uint64_t before = rte_rdtsc();
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    const std::uint64_t ticks = rte_rdtsc() - before;
    return static_cast<std::uint64_t>(static_cast<double>(ticks) /
                                      std::chrono::duration<double>(Clock::now() - since).count());
}

namespace dirtyring::service {

namespace {

std::vector<int> allowed_cpus()
{
    cpu_set_t set;
    CPU_ZERO(&set);
    ::sched_getaffinity(0, sizeof set, &set);
    std::vector<int> cpus;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
        if (CPU_ISSET(cpu, &set))
            cpus.push_back(cpu);
    }
    return cpus;
}

bool hugepages_free()
{
    std::ifstream file("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    unsigned n = 0;
    return file >> n && n >= 16;
}

int walk(void *walker)
{
    static_cast<Walker *>(walker)->run();
    return 0;
}

} // namespace

tl::expected<std::unique_ptr<Lcores>, std::string> Lcores::start(unsigned walkers)
{
    const std::vector<int> cpus = allowed_cpus();
    std::string lcores = fmt::format("0@({})", fmt::join(cpus, ","));
    for (unsigned i = 0; i < walkers; ++i)
        lcores += fmt::format(",{}@{}", i + 1, cpus[cpus.size() - 1 - i % cpus.size()]);

    // --in-memory takes hugepages, and leaves no file of them; without any, it is refused together with --no-huge.
    std::vector<std::string> words = {"dirtyringd",  "--lcores", lcores,
                                      "--no-shconf", "--no-pci", "--no-telemetry",
                                      "-m",          "16",       "--log-level=lib.*:error"};
    words.emplace_back(hugepages_free() ? "--in-memory" : "--no-huge");
    std::vector<char *> arguments;
    for (std::string &word : words)
        arguments.push_back(word.data());
    if (::rte_eal_init(static_cast<int>(arguments.size()), arguments.data()) < 0)
        return tl::unexpected(
            fmt::format("DPDK's EAL does not start ({}): {}", fmt::join(words, " "), rte_strerror(rte_errno)));

    std::unique_ptr<Lcores> self(new Lcores);
    for (unsigned i = 0; i < walkers; ++i)
        self->walkers_.push_back(std::make_unique<Walker>());
    self->running_ = true;
    for (unsigned i = 0; i < walkers; ++i)
        ::rte_eal_remote_launch(walk, self->walkers_[i].get(), i + 1);
    return self;
}

Lcores::~Lcores()
{
    stop();
    ::rte_eal_cleanup();
}

std::vector<Walker *> Lcores::walkers() const
{
    std::vector<Walker *> all;
    for (const auto &w : walkers_)
        all.push_back(w.get());
    return all;
}

void Lcores::stop()
{
    if (!std::exchange(running_, false))
        return;
    for (const auto &w : walkers_)
        w->stop();
    ::rte_eal_mp_wait_lcore();
}

} // namespace dirtyring::service
