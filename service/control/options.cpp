#include "service/control/options.hpp"

#include "iommu/formats.hpp"
#include "ring/control.h"
#include "service/keeper/listener.hpp"
#include "service/keeper/supervisor.hpp"

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <systemd/sd-daemon.h>

#include <cstdio>
#include <string>

namespace dirtyring::service {

namespace {

// As vhost-user back-ends print theirs: one JSON object.
void print_capabilities()
{
    std::string formats;
    iommu::for_each_format([&](auto f) { formats += fmt::format("{}\"{}\"", formats.empty() ? "" : ", ", f.name); });
    fmt::print("{{\n  \"type\": \"dirtyring\",\n  \"protocol\": {},\n  \"ring\": {},\n  \"features\": [\"summary\", "
               "\"oa-space\"],\n"
               "  \"formats\": [{}]\n}}\n",
               DR_PROTOCOL_VERSION, DR_RING_VERSION, formats);
}

} // namespace

std::variant<Options, int> parse_options(int argc, char **argv)
{
    Options options;
    bool capabilities = false;
    CLI::App app("dirtyringd: tracks the pages that devices write by DMA and publishes them in shared-memory rings.");
    app.name("dirtyringd");
    auto *path = app.add_option("--socket-path", options.socket_path, "listen on this Unix socket");
    auto *fd = app.add_option("--fd", options.fd, "use this descriptor: a listening Unix socket, or one connected peer")
                   ->check(CLI::NonNegativeNumber)
                   ->excludes(path);
    app.add_flag("--supervise", options.supervise,
                 "start a worker with the other options, and again when it dies; keep its descriptors meanwhile")
        ->disable_flag_override();
    app.add_option("--walkers", options.walkers, "lcores that walk page tables")
        ->check(CLI::Range(1, 64))
        ->capture_default_str();
    app.add_option("--log-level", options.log_level, "how much to say on stderr")
        ->check(CLI::IsMember({"debug", "info", "warn", "error", "off"}))
        ->capture_default_str();
    app.add_flag("--print-capabilities", capabilities, "print what this program can do, as JSON, and end");
    app.footer(
        "A listening socket that was handed over by LISTEN_FDS, as systemd does, comes before --socket-path and --fd.\n"
        "SIGTERM or SIGINT ends it. Exit codes: 0 ended as asked, 1 failed, 2 wrong usage. A supervisor ends with its\n"
        "worker's, and with 1 when ten workers in a row have died as soon as they lived.");
    try {
        app.parse(argc, argv);
        const bool handed_over = !options.supervise && ::sd_listen_fds(0) > 0;
        if (!capabilities && path->count() == 0 && fd->count() == 0 && !handed_over)
            throw CLI::RequiredError("--socket-path or --fd");
        if (options.supervise && options.fd >= 0 && !is_listening(options.fd))
            throw CLI::ValidationError("--supervise", fmt::format("--fd {} is not a listening socket", options.fd));
    } catch (const CLI::ParseError &e) {
        return app.exit(e) == 0 ? 0 : usage_error;
    }
    if (capabilities) {
        print_capabilities();
        return 0;
    }
    return options;
}

} // namespace dirtyring::service
