#include "client/check/check.hpp"

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

} // namespace

void declare(CLI::App &app, Options &options)
{
    app.add_option("--json", options.json, "where to write the verdicts")->type_name("FILE");
    app.add_option("--timeout", options.seconds, "seconds after which what has not happened never will (10)")
        ->check(CLI::Range(1u, 600u));
    app.require_subcommand(0, 1);
    app.footer("Without a role: the installed service. Exit codes: 0 no MUST failed, 1 one failed, 2 wrong usage.");
    CLI::App *service = app.add_subcommand("service", "a service, whose front-end, consumer and device the kit plays");
    auto *socket = service->add_option("--socket-path", options.socket_path, "of a running service")->type_name("PATH");
    service
        ->add_option("--program", options.program,
                     "starts the service; {socket} is where it is to listen (dirtyringd --socket-path {socket})")
        ->type_name("CMD")
        ->excludes(socket);
    service->fallthrough();
}

bool check(const Options &options)
{
    const File json = open(options.json);
    const Verdicts verdicts = check_service(options);
    verdicts.print(stdout);
    if (json) {
        const std::string text = verdicts.json();
        if (std::fwrite(text.data(), 1, text.size(), json.get()) != text.size() || std::fflush(json.get()) != 0)
            throw migrate::system_failure(fmt::format("{}: cannot be written", options.json));
    }
    return verdicts.count(Outcome::fail) == 0;
}

} // namespace dirtyring::check
