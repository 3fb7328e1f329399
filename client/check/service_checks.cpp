#include "client/check/service_checks.hpp"

#include "client/check/peer.hpp"

namespace dirtyring::check {

bool run(const Check &check, Verdicts &verdicts, const std::string &socket, std::chrono::milliseconds patience,
         const HowItEnded &end)
{
    Context context{verdicts, socket, check.name, Deadline(patience)};
    bool there = true;
    std::string why;
    try {
        check.run(context);
    } catch (const Broken &e) {
        why = fmt::format("\"{}\" ended early: {}", check.name, e.what());
    } catch (const Gone &e) {
        there = false;
        why = e.what();
    }
    const auto ended = end ? end() : std::nullopt;
    if (!there || ended) {
        there = false;
        context.expect(false, "S-8", "the service", ended.value_or(why), "it serves others whatever one of them does");
        why = "the service is gone";
    }
    for (const Rule rule : check.rules)
        verdicts.skip(rule, why);
    return there;
}

void check_service(Verdicts &verdicts, const std::string &socket, std::chrono::milliseconds patience,
                   const HowItEnded &end)
{
    Context first{verdicts, socket, "the first connection", Deadline(patience)};
    const Peer somebody(first);
    bool there = true;
    for (const auto &area : {message_checks(), object_checks(), memory_checks(), ring_checks(), command_checks(),
                             map_checks(), tracking_checks(), size_checks(), device_checks()}) {
        for (const Check &check : area) {
            if (there)
                there = run(check, verdicts, socket, patience, end);
            else
                for (const Rule rule : check.rules)
                    verdicts.skip(rule, "the service is gone");
        }
    }
}

} // namespace dirtyring::check
