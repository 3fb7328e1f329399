// The command ring from the VMM's side.
#pragma once

#include "client/connection.hpp"
#include "ring/consumer.hpp"
#include "ring/producer.hpp"

namespace dirtyring::client {

// -error, with a sentence about the command that it answers; 0 if it is none.
int command_result(const dr_command &command, std::int32_t result);

// What the service gets as user_data is this process's series and the number of a slot here; what the user gave waits
// in that slot. So the library's own commands cannot be mistaken for the user's, whatever values those use, each finds
// its completion, and those of a predecessor that had the guest are known as not ours.
//
// The set's syncs come from any thread, all else from the thread of the guest. A mutex keeps them apart; nobody waits
// under it.
class Commands
{
  public:
    static constexpr std::uint32_t entries = 256;

    // The two memfds of ring/layout.h, checked. `series` is random.
    Commands(Connection &connection, Mapping front_end, Mapping service, Fd kick, Fd call, std::uint64_t series);

    // The user's commands. queue: -EAGAIN: full.
    int queue(const dr_command &command);
    int submit();
    std::uint32_t reap(dr_completion *completions, std::uint32_t max);
    bool arm();
    [[nodiscard]] int fd() const { return call_.get(); }

    // One of the library's: submits it and waits for its completion. -EBUSY: full.
    int run(const dr_command &command, dr_completion &completion);

    // The same without waiting: `poll` until it says true, then, or at any time before, `drop`.
    int start(const dr_command &command, std::uint32_t &slot);
    [[nodiscard]] bool poll(std::uint32_t slot, dr_completion &completion);
    void drop(std::uint32_t slot);

    // 0, -ESHUTDOWN: the service is gone, -EPROTO: it broke the rules of the ring.
    int check_service();

    // Whom the guest waits for; `since` is 0: nobody.
    [[nodiscard]] dr_guest_status status() const;

  private:
    enum class State : std::uint8_t {
        free,
        queued,  // the user's, on its way
        stashed, // the user's, completed
        held,    // the library's, on its way
        done,    // the library's, completed
        dropped, // the library's, on its way, but nobody waits for it
    };
    struct Slot {
        State state = State::free;
        std::uint64_t user_data = 0;
        dr_completion completion{};
    };

    // All of these under mutex_.
    bool put(const dr_command &command, State state, std::uint32_t &slot);
    void publish();
    void collect();
    void complete(const dr_completion &completion);
    void release(std::uint32_t slot);
    void break_off();
    [[nodiscard]] int failure() const;

    int wait(std::uint32_t slot);

    Connection &connection_;
    Mapping front_end_;
    Mapping service_;
    Fd kick_;
    Fd call_;
    const std::uint64_t series_; // the slot's bits are zero

    Mutex mutex_;
    ring::Producer<dr_command> submissions_;
    ring::Consumer<dr_completion> completions_;
    const bool taken_;        // a predecessor's commands may be on their way
    bool broken_ = false;     // the service broke the rules; every later command answers so
    bool user_armed_ = false; // the user waits for call_, and has reaped nothing since arming

    Slot slots_[entries];
    std::uint32_t free_[entries]; // numbers of free slots, a stack
    std::uint32_t free_count_ = entries;
    std::uint32_t stash_[entries]; // numbers of stashed slots, in order of completion; free-running indices
    std::uint32_t stash_first_ = 0;
    std::uint32_t stash_end_ = 0;
};

} // namespace dirtyring::client
