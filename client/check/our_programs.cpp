#include "client/check/our_programs.hpp"

#include "client/check/played_service.hpp"
#include "client/check/subject.hpp"
#include "client/migrate/failure.hpp"

#include <nlohmann/json.hpp>

#include <fcntl.h>
#include <map>
#include <random>
#include <unistd.h>

namespace dirtyring::check {
namespace {

struct Ours {
    Role role;
    const char *arguments;
};

const std::map<std::string, Ours> ours = {
    {"vmm", {Role::consumer, "{socket} 4000"}},
    {"uring_consumer", {Role::consumer, "{socket} 4000"}},
    {"device", {Role::device, "{socket} {token} {hwpt} 5000 2"}},
    {"file_reader", {Role::device, "{socket} {token} {hwpt} 0 {file} 64"}},
};

// What a disk reads, at most what the kit maps.
class File
{
  public:
    File()
    {
        const ring::Fd fd(::open(path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
        std::mt19937_64 random(2);
        std::vector<std::uint64_t> chunk((1u << 20) / sizeof(std::uint64_t));
        for (int i = 0; i < 48; ++i) {
            std::generate(chunk.begin(), chunk.end(), random);
            if (::write(fd.get(), chunk.data(), 1u << 20) != 1 << 20)
                throw migrate::system_failure(path_);
        }
    }
    [[nodiscard]] const std::string &path() const { return path_; }

  private:
    migrate::TemporaryDirectory directory_;
    std::string path_ = fmt::format("{}/file", directory_.path());
};

} // namespace

unsigned OurPrograms::count(Outcome outcome) const
{
    unsigned n = 0;
    for (const Checked &c : checked_)
        n += c.verdicts.count(outcome);
    return n;
}

void OurPrograms::print(std::FILE *to) const
{
    for (const Checked &c : checked_) {
        fmt::print(to, "{}:\n", c.program);
        c.verdicts.print(to);
    }
    for (const Skipped &s : skipped_)
        fmt::print(to, "{}: skipped: {}\n", s.program, s.why);
    fmt::print(to, "all: {} passed, {} failed, {} skipped\n", count(Outcome::pass), count(Outcome::fail),
               count(Outcome::skip));
}

std::string OurPrograms::json() const
{
    nlohmann::ordered_json all{{"pass", count(Outcome::pass)},
                               {"fail", count(Outcome::fail)},
                               {"skip", count(Outcome::skip)},
                               {"programs", nlohmann::ordered_json::array()}};
    for (const Checked &c : checked_) {
        nlohmann::ordered_json one{{"program", c.program}};
        one.update(nlohmann::ordered_json::parse(c.verdicts.json()));
        all["programs"].push_back(std::move(one));
    }
    for (const Skipped &s : skipped_)
        all["programs"].push_back({{"program", s.program}, {"skipped", s.why}});
    return all.dump(2) + "\n";
}

std::optional<Verdicts> check_our_program(const std::string &name, std::chrono::milliseconds patience)
{
    const auto &[role, arguments] = ours.at(name);
    const std::string path = beside_us(name);
    if (path == name)
        return std::nullopt;
    std::string command = fmt::format("{} {}", path, arguments);
    std::optional<File> file;
    if (const std::size_t hole = command.find("{file}"); hole != std::string::npos)
        command.replace(hole, 6, file.emplace().path());
    return check_program(role, command, patience);
}

void check_our_programs(OurPrograms &all, std::chrono::milliseconds patience)
{
    for (const auto &[name, our] : ours) {
        if (auto verdicts = check_our_program(name, patience))
            all.add(name, std::move(*verdicts));
        else
            all.skip(name, "not installed beside this program");
    }
}

} // namespace dirtyring::check
