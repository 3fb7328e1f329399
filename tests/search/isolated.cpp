#include "tests/search/isolated.hpp"

#include <fmt/format.h>

#include <chrono>
#include <csignal>
#include <cstring>
#include <sstream>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

namespace dirtyring::search {

namespace {

constexpr unsigned schedule_takes_at_most_s = 60; // else it is taken for one that never ends

// What a process says of its schedule, one line each: kind, text, attributes; the number of steps; the numbers; what
// each step did.
std::string to_line(std::string text)
{
    std::replace(text.begin(), text.end(), '\n', ' ');
    return text + '\n';
}

void write_all(int fd, const std::string &text)
{
    for (std::size_t at = 0; at < text.size();) {
        const ssize_t n = ::write(fd, text.data() + at, text.size() - at);
        if (n <= 0)
            return;
        at += static_cast<std::size_t>(n);
    }
}

std::string report(const std::optional<Finding> &finding, const std::string &attributes, const Schedule &schedule,
                   const std::vector<std::string> &told)
{
    std::string all = to_line(finding ? finding->kind : "") + to_line(finding ? finding->text : "") +
                      to_line(attributes) + fmt::format("{}\n", schedule.steps.size()) + to_text(schedule);
    for (const std::string &line : told)
        all += to_line(line);
    return all;
}

// For the handler of signals.
const Choices *running = nullptr;
int running_fd = -1;

extern "C" void dies(int signal)
{
    const Finding finding{fmt::format("dies of signal {}", signal), "the process died: see what it said above"};
    write_all(running_fd, report(finding, "", running->schedule(), {}));
    ::_exit(3);
}

void handle_signals()
{
    for (const int signal : {SIGABRT, SIGSEGV, SIGBUS, SIGFPE, SIGALRM})
        std::signal(signal, dies);
}

Result parse(const std::string &all)
{
    Result result;
    std::istringstream lines(all);
    std::string kind;
    std::string text;
    std::string count;
    std::getline(lines, kind);
    std::getline(lines, text);
    std::getline(lines, result.attributes);
    std::getline(lines, count);
    if (count.empty()) {
        result.finding = Finding{"dies", "the process died without a word"};
        return result;
    }
    if (!kind.empty())
        result.finding = Finding{kind, text};
    const auto read_step = [&] {
        std::string line;
        std::getline(lines, line);
        std::istringstream words(line);
        Schedule::Step step;
        for (std::uint32_t n = 0; words >> n;)
            step.push_back(n);
        return step;
    };
    result.schedule.attributes = read_step();
    for (std::size_t n = std::stoul(count); n > 0; --n)
        result.schedule.steps.push_back(read_step());
    for (std::string line; std::getline(lines, line);)
        result.told.push_back(line);
    return result;
}

// Of a process that hunts.
struct Slot {
    std::uint64_t seed;
    std::uint64_t schedules;
    bool found;
    char kind[64];
    char text[512];
};

} // namespace

Result run_isolated(Choices choices, Coverage &coverage, bool telling)
{
    int ends[2];
    if (::pipe(ends) != 0)
        std::abort();
    const pid_t child = ::fork();
    if (child == 0) {
        ::close(ends[0]);
        running = &choices;
        running_fd = ends[1];
        handle_signals();
        ::alarm(schedule_takes_at_most_s);
        Run run(choices, coverage, telling);
        const auto finding = run.run();
        write_all(ends[1], report(finding, run.attributes(), choices.schedule(),
                                  telling ? run.told() : std::vector<std::string>{}));
        ::_exit(0);
    }
    ::close(ends[1]);
    std::string all;
    char buffer[65536];
    for (ssize_t n = 0; (n = ::read(ends[0], buffer, sizeof buffer)) > 0;)
        all.append(buffer, static_cast<std::size_t>(n));
    ::close(ends[0]);
    ::waitpid(child, nullptr, 0);
    return parse(all);
}

Found hunt(const Hunt &what, Coverage &coverage)
{
    const auto begin = std::chrono::steady_clock::now();
    const auto seconds = [&] {
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    };
    struct Shared {
        std::atomic<bool> stop;
        Slot slots[1];
    };
    const std::size_t size = sizeof(Shared) + what.jobs * sizeof(Slot);
    void *memory = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    auto *shared = new (memory) Shared{};
    std::vector<pid_t> children;
    for (unsigned job = 0; job < what.jobs; ++job) {
        const pid_t child = ::fork();
        if (child != 0) {
            children.push_back(child);
            continue;
        }
        Slot &slot = shared->slots[job];
        for (std::uint64_t i = job; i < what.schedules && !shared->stop && seconds() < what.seconds; i += what.jobs) {
            slot.seed = what.seed + i;
            ++slot.schedules;
            ::alarm(schedule_takes_at_most_s);
            Choices choices(slot.seed, steps_of(slot.seed));
            const auto finding = Run(choices, coverage).run();
            if (!finding || (!what.only.empty() && finding->kind != what.only))
                continue;
            if (what.all) {
                fmt::print("{}: {}: {}\n", slot.seed, finding->kind, finding->text);
                std::fflush(stdout);
                continue;
            }
            std::strncpy(slot.kind, finding->kind.c_str(), sizeof slot.kind - 1);
            std::strncpy(slot.text, finding->text.c_str(), sizeof slot.text - 1);
            slot.found = true;
            shared->stop = true;
        }
        ::_exit(0);
    }
    Found found;
    for (unsigned job = 0; job < what.jobs; ++job) {
        int status = 0;
        ::waitpid(children[job], &status, 0);
        Slot &slot = shared->slots[job];
        if (WIFSIGNALED(status)) {
            shared->stop = true;
            slot.found = true;
            std::strncpy(slot.kind, fmt::format("dies of signal {}", WTERMSIG(status)).c_str(), sizeof slot.kind - 1);
        }
        found.schedules += slot.schedules;
        if (slot.found && (!found.seed || slot.seed < *found.seed)) {
            found.seed = slot.seed;
            found.finding = {slot.kind, slot.text};
        }
    }
    found.seconds = seconds();
    ::munmap(memory, size);
    return found;
}

} // namespace dirtyring::search
