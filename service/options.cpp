#include "service/options.hpp"

#include "ring/control.h"

#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include <cstdio>

namespace dirtyring::service {

namespace {

constexpr int usage_error = 2;

// As vhost-user back-ends print theirs: one JSON object.
void print_capabilities()
{
    fmt::print("{{\n  \"type\": \"dirtyring\",\n  \"protocol\": {},\n  \"ring\": {},\n  \"features\": [\"summary\", "
               "\"oa-space\"],\n"
               "  \"formats\": [\"amdv1\"]\n}}\n",
               DR_PROTOCOL_VERSION, DR_RING_VERSION);
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
    app.add_option("--walkers", options.walkers, "lcores that walk page tables")
        ->check(CLI::Range(1, 64))
        ->capture_default_str();
    app.add_option("--log-level", options.log_level, "how much to say on stderr")
        ->check(CLI::IsMember({"debug", "info", "warn", "error", "off"}))
        ->capture_default_str();
    app.add_flag("--print-capabilities", capabilities, "print what this program can do, as JSON, and end");
    app.footer("SIGTERM or SIGINT ends it. Exit codes: 0 ended as asked, 1 failed, 2 wrong usage.");
    try {
        app.parse(argc, argv);
        if (!capabilities && path->count() == 0 && fd->count() == 0)
            throw CLI::RequiredError("--socket-path or --fd");
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
