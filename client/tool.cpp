// dirtyring: what one does with a dirtyring service from a shell.
#include "client/check/check.hpp"
#include "client/migrate/failure.hpp"
#include "client/migrate/migrate.hpp"
#include "client/migrate/options.hpp"

#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include <cstdio>

namespace {

enum ExitCode { fine = 0, failed = 1, usage = 2 };

int complain(ExitCode code, const char *sentence)
{
    fmt::print(stderr, "dirtyring: {}\n", sentence);
    return code;
}

} // namespace

int main(int argc, char **argv)
{
    try {
        CLI::App app("Dirty pages reported by rings: live migration, and a check of who speaks the protocol.",
                     "dirtyring");
        app.require_subcommand(1);
        dirtyring::migrate::Options options;
        CLI::App *migrate =
            app.add_subcommand("migrate", "migrate a guest from one process to another while devices write to it");
        dirtyring::migrate::declare(*migrate, options);
        dirtyring::check::Options check_options;
        CLI::App *check = app.add_subcommand("check", "hold a service to the sentences of the specification");
        dirtyring::check::declare(*check, check_options);
        try {
            app.parse(argc, argv);
        } catch (const CLI::CallForHelp &e) {
            return app.exit(e);
        } catch (const CLI::RequiredError &) {
            return complain(usage, "expected a subcommand; dirtyring --help lists them");
        } catch (const CLI::ParseError &e) {
            return complain(usage, e.what());
        }
        if (check->parsed())
            return dirtyring::check::check(check_options) ? fine : failed;
        dirtyring::migrate::migrate(options);
        return fine;
    } catch (const dirtyring::migrate::BadInput &e) {
        return complain(usage, e.what());
    } catch (const std::exception &e) {
        return complain(failed, e.what());
    }
}
