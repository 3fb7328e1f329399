// dirtyringd --supervise, whose worker can be killed.
#pragma once

#include "client/migrate/newest_child.hpp"
#include "iommu/rules.hpp"
#include "tests/service/service_peers.hpp"

#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <string>
#include <system_error>
#include <vector>

namespace dirtyring::test {

inline std::size_t count(const std::string &text, const std::string &word)
{
    std::size_t n = 0;
    for (std::size_t at = 0; (at = text.find(word, at)) != std::string::npos; at += word.size())
        ++n;
    return n;
}

// For the environment of a dirtyringd_breakable: the rule is broken; it dies at the point, once, and then that file is
// there.
inline void break_rule(Rule rule)
{
    ::setenv("DIRTYRING_BREAK", std::to_string(static_cast<int>(rule)).c_str(), 1);
}
inline void die_once_at(const std::string &point, const std::string &file)
{
    ::setenv("DIRTYRING_DIE_AT", point.c_str(), 1);
    ::setenv("DIRTYRING_DIE_ONCE", file.c_str(), 1);
}

// A supervisor and its worker.
class Supervised : public Daemon
{
  public:
    explicit Supervised(std::vector<std::string> options = {}, const std::function<void()> &in_child = {},
                        const char *program = DIRTYRINGD_PATH)
        : Daemon(supervise(std::move(options)), in_child, program)
    {
        EXPECT_TRUE(comes_true([this] { return count(said(), " was ready after ") == 1; })) << said();
        idle_ = process().descriptors();
    }

    [[nodiscard]] pid_t worker() const { return migrate::newest_child(process().pid()); }
    [[nodiscard]] std::size_t lives() const { return count(said(), " was ready after "); }

    void wait_for_life(std::size_t n) const
    {
        EXPECT_TRUE(comes_true([&] { return lives() >= n; })) << said();
    }
    void kill_worker() const
    {
        const std::size_t next = lives() + 1;
        ::kill(worker(), SIGKILL);
        wait_for_life(next);
    }
    // While no worker lives; then the next one comes.
    void kill_worker_and(const std::function<void()> &meanwhile)
    {
        const std::size_t next = lives() + 1;
        const pid_t dead = worker();
        process().signal(SIGSTOP);
        ::kill(dead, SIGKILL);
        const std::string stat = "/proc/" + std::to_string(dead) + "/stat";
        EXPECT_TRUE(comes_true([&] {
            std::ifstream file(stat);
            const std::string all{std::istreambuf_iterator<char>(file), {}};
            return all.empty() || all.find(") Z") != std::string::npos;
        }));
        meanwhile();
        process().signal(SIGCONT);
        wait_for_life(next);
    }

    // The supervisor holds nothing for a guest any more.
    void expect_empty_store() const
    {
        EXPECT_TRUE(comes_true([this] { return process().descriptors() == idle_; }))
            << process().descriptors() << " descriptors, expected " << idle_ << "\n"
            << said();
    }
    [[nodiscard]] bool holds_something() const { return process().descriptors() > idle_; }

    // The supervisor's descriptors of files of such a name.
    [[nodiscard]] std::vector<int> numbers(const std::string &file) const
    {
        std::vector<int> all;
        for (const auto &entry : std::filesystem::directory_iterator(process().proc("fd"))) {
            std::error_code error;
            if (std::filesystem::read_symlink(entry.path(), error).string().find(file) != std::string::npos)
                all.push_back(std::stoi(entry.path().filename()));
        }
        return all;
    }

  private:
    static std::vector<std::string> supervise(std::vector<std::string> options)
    {
        options.emplace_back("--supervise");
        return options;
    }

    std::size_t idle_ = 0;
};

} // namespace dirtyring::test
