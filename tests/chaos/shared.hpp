// What the processes of a run share, made by the judge before it forks the first: the guests' memory and its copies,
// the journals, what a dead process's successor must know, and what has happened lately.
#pragma once

#include "client/migrate/clock.hpp"
#include "client/migrate/failure.hpp"
#include "ring/control.h"
#include "ring/region.hpp"
#include "tests/chaos/journal.hpp"
#include "tests/chaos/options.hpp"

#include <fmt/format.h>

#include <cstdint>
#include <deque>
#include <string>
#include <string_view>

namespace dirtyring::chaos {

using migrate::now_ns;
inline constexpr std::uint64_t ms = 1'000'000; // ns

struct DeviceState {
    Word inside;      // 1: it is within a section
    Word stop_inside; // 1: it is asked to stop itself within its next one
    Word die_at;      // a Point + 1, where it is to kill itself; 0: nowhere
    // 1: as long as its VMM waits for ENABLE, it is to kill itself between D and the summary of a page that is written
    // alone. Should that page be cleaned already, nothing beside it tells of D.
    Word die_cleaned;
    Word dying; // 1: it does
    Word lives;
    Word writes; // pages
    Word pins;
};

// A block of IOVA space, as the VMM left it. A change that was under way when the VMM died may have been made or not.
struct BlockState {
    enum Change : std::uint64_t { none, mapping, unmapping, discarding };
    Word place;  // where it is mapped, + 1; 0: it is not
    Word change; // enum Change; stored before the command is submitted, none after all else
};

struct GuestState {
    Word begun;   // 1: a VMM has begun to set it up
    Word ready;   // 1: devices may attach, a successor can take it
    Word tracked; // 1: since the last enable everything was copied once
    Word leave;   // 1: the VMM is asked to leave the guest to a successor
    Word finish;  // 1: no device is left; the VMM is to look at everything and close
    Word done;    // 1: it has
    Word hold;    // 1: the VMM is asked to leave tracking as it is, and to hear who holds it up
    Word switching;
    Word stalled_pid;  // whom dirtyring_stalled names; 0: nobody
    Word spared_until; // ns: no device of it is killed before, as each death has all of the guest looked at
    std::uint8_t secret[16];
    std::uint8_t token[DR_TOKEN_BYTES];
    std::uint32_t ioas;
    std::uint32_t hwpt;
    BlockState block[blocks];

    // For the judge. All in ns of CLOCK_MONOTONIC.
    Word synced_since; // when the last sync that has completed was asked for
    Word change_since; // when the oldest change of maps under way was asked for; 0: none

    Word lives;
    Word syncs;
    Word reported;      // pages
    Word over_reported; // of these, equal to their copy
    Word unknown;       // runs of which a part was not mapped
    Word changes;       // of maps, and of tracking
    Word again;         // unmaps for which a ring was full
    Word asleep_syncs;  // that were waited for by calls alone
    Word overtaken;     // unmaps that were under way when ENABLE came
    Word died_cleaned;  // devices that died while it was under way
};

struct Guest {
    Guest(unsigned number, const Layout &layout, unsigned devices);

    unsigned index;
    const Layout &layout;
    ring::Region source;
    SharedArray<std::byte> destination;
    Journal journal;
    SharedArray<GuestState> states;
    SharedArray<DeviceState> device;
    GuestState &state;
    ring::Fd bell; // an eventfd that wakes the VMM
};

// What chaos looks for: a dirty page that is lost, and somebody who hangs. Anything else that should not be is a
// Failure.
struct Lost : migrate::Failure {
    using Failure::Failure;
};
struct Hang : migrate::Failure {
    using Failure::Failure;
};

// The first counts.
struct Verdict {
    std::atomic<std::uint32_t> taken;
    std::atomic<std::uint32_t> whole; // the sentence can be read
    Finding finding;                  // nothing: another Failure
    char sentence[1024];
};

struct Event {
    std::uint64_t ns;
    char text[88];
};

class Shared
{
  public:
    Shared(const Options &options, std::string socket_path);

    // Says what has happened, for who looks for the reason of a failure.
    template <class... Args> void note(fmt::format_string<Args...> format, Args &&...args) const
    {
        const std::uint64_t number = event_count_[0].fetch_add(1, std::memory_order_relaxed);
        Event &event = events_[number % events_.size()];
        event.ns = now_ns();
        *fmt::format_to_n(event.text, sizeof event.text - 1, format, std::forward<Args>(args)...).out = '\0';
    }
    void print_events(std::size_t last) const;

    // A child's last words.
    void condemn(const std::exception &failure) const;
    [[nodiscard]] Verdict &verdict() const { return verdict_[0]; }

    const Options &options;
    const std::string socket_path;
    std::deque<Guest> guests;

    [[nodiscard]] Word &visits() const { return counts_[0]; }
    [[nodiscard]] Word &destroyed() const { return counts_[3]; }
    // 1: devices and visitors are to end.
    [[nodiscard]] Word &over() const { return counts_[1]; }
    // Processes to which the service did not answer within the library's 10 s.
    [[nodiscard]] Word &gave_up() const { return counts_[2]; }

  private:
    const std::uint64_t began_ = now_ns();
    SharedArray<Verdict> verdict_{1};
    SharedArray<Word> event_count_{1};
    SharedArray<Event> events_{4096};
    SharedArray<Word> counts_{4};
};

} // namespace dirtyring::chaos
