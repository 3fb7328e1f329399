#include "client/check/check.hpp"

#include "client/check/our_programs.hpp"
#include "client/check/played_service.hpp"
#include "client/check/program.hpp"
#include "client/check/service_checks.hpp"
#include "client/migrate/failure.hpp"

#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include <cstdio>
#include <memory>
#include <optional>

namespace dirtyring::check {
namespace {

using File = std::unique_ptr<std::FILE, decltype([](std::FILE *file) { std::fclose(file); })>;

File open(const std::string &path)
{
    File file(path.empty() ? nullptr : std::fopen(path.c_str(), "we"));
    if (!path.empty() && !file)
        throw migrate::BadInput(fmt::format("{}: cannot be written: {}", path, std::strerror(errno)));
    return file;
}

Verdicts check_service(const Options &options)
{
    Verdicts verdicts(Role::service);
    const std::chrono::seconds patience(options.seconds);
    if (!options.socket_path.empty()) {
        check_service(verdicts, options.socket_path, patience);
        return verdicts;
    }
    Program program(options.program.empty() ? fmt::format("{} --socket-path {{socket}}", beside_us("dirtyringd"))
                                            : options.program);
    check_service(verdicts, program.socket(), patience, [&] { return program.end(); });
    return verdicts;
}

Verdicts check_program(const Options &options)
{
    if (options.program.empty())
        throw migrate::BadInput(fmt::format("check {}: expected --program CMD", options.role));
    Verdicts verdicts = check_program(options.role == "consumer" ? Role::consumer : Role::device, options.program,
                                      std::chrono::seconds(options.seconds));
    if (verdicts.count(Outcome::pass) + verdicts.count(Outcome::fail) == 0) {
        verdicts.print(stdout);
        throw migrate::Failure(fmt::format("{}: nothing could be checked", options.program));
    }
    return verdicts;
}

// Whose program is to connect to the kit.
void declare_role(CLI::App &app, Options &options, const char *role, const char *what, const char *placeholders)
{
    CLI::App *command = app.add_subcommand(role, what);
    command
        ->add_option("--program", options.program, fmt::format("starts the program, again and again; {}", placeholders))
        ->type_name("CMD");
    command->callback([&options, role] { options.role = role; });
    command->fallthrough();
}

void write(const Options &options, const File &json, const std::string &text)
{
    if (json && (std::fwrite(text.data(), 1, text.size(), json.get()) != text.size() || std::fflush(json.get()) != 0))
        throw migrate::system_failure(fmt::format("{}: cannot be written", options.json));
}

} // namespace

void declare(CLI::App &app, Options &options)
{
    app.add_option("--json", options.json, "where to write the verdicts")->type_name("FILE");
    app.add_option("--timeout", options.seconds, "seconds after which what has not happened never will (10)")
        ->check(CLI::Range(1u, 600u));
    app.require_subcommand(0, 1);
    app.footer(
        "Without a role: the installed service, and our own consumers and devices. Exit codes: 0 no MUST failed, "
        "1 one failed, 2 wrong usage.");
    CLI::App *service = app.add_subcommand("service", "a service, whose front-end, consumer and device the kit plays");
    auto *socket = service->add_option("--socket-path", options.socket_path, "of a running service")->type_name("PATH");
    service
        ->add_option("--program", options.program,
                     "starts the service; {socket} is where it is to listen (dirtyringd --socket-path {socket})")
        ->type_name("CMD")
        ->excludes(socket);
    service->callback([&options] { options.role = "service"; });
    service->fallthrough();
    declare_role(app, options, "consumer", "a VMM, a front-end that consumes, whose service the kit plays",
                 "{socket} is where the kit listens");
    declare_role(app, options, "device", "a device, whose service and guest the kit plays",
                 "{socket} is where the kit listens, {token} (hex) and {hwpt} are what to attach with");
}

bool check(const Options &options)
{
    const File json = open(options.json);
    if (options.role.empty()) {
        OurPrograms all;
        all.add("dirtyringd", check_service(options));
        check_our_programs(all, std::chrono::seconds(options.seconds));
        all.print(stdout);
        write(options, json, all.json());
        return all.count(Outcome::fail) == 0;
    }
    const Verdicts verdicts = options.role == "service" ? check_service(options) : check_program(options);
    verdicts.print(stdout);
    write(options, json, verdicts.json());
    return verdicts.count(Outcome::fail) == 0;
}

} // namespace dirtyring::check
