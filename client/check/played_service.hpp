// The kit as the service: listens, starts the program under test, and answers its requests, which are held to the rules
// of messages.
//
// One thread: serve() does what is to be done now, and whoever waits calls it over and over.
#pragma once

#include "client/check/guest.hpp"
#include "client/check/subject.hpp"
#include "client/migrate/temporary_directory.hpp"

#include <list>
#include <span>

namespace dirtyring::check {

// A context for one program under test after the other.
struct Stage : Context {
    std::string command;
    Rule crash; // what a program breaks that a signal ends
};

// What is played to a program, and the rules that it can speak of.
struct Situation {
    const char *name;
    void (*play)(Stage &);
    std::vector<Rule> rules; // the first is Stage::crash
};

void play(const Situation &situation, Verdicts &verdicts, const std::string &command,
          std::chrono::milliseconds patience);

std::span<const Situation> consumer_situations();      // messages, commands, the consumer's words
std::span<const Situation> consumer_copy_situations(); // which pages it copies, and when
std::span<const Situation> consumer_ring_situations(); // what it makes of what it reads
std::span<const Situation> device_situations();
std::span<const Situation> device_table_situations(); // other tables than a device may expect
std::span<const Situation> device_pin_situations();

void check_consumer(Verdicts &verdicts, const std::string &command, std::chrono::milliseconds patience);
void check_device(Verdicts &verdicts, const std::string &command, std::chrono::milliseconds patience);

// All of them, to a consumer or a device. `command`: the program under test; {socket} in it becomes the path on which
// the kit listens, and for a device {token} and {hwpt} what it attaches with. `patience` is for each situation. Throws
// migrate::Failure where the program cannot be started.
Verdicts check_program(Role role, const std::string &command, std::chrono::milliseconds patience);

// A request of the program.
struct Request {
    std::uint32_t number = 0;
    Bytes payload;
    std::vector<Fd> fds;

    // What is missing is zero.
    template <class T> [[nodiscard]] T as() const
    {
        T value{};
        std::memcpy(&value, payload.data(), std::min(payload.size(), sizeof value));
        return value;
    }
};

struct Answer {
    Bytes payload;
    std::vector<Fd> fds;
};

template <class T> Answer answer_of(T value, std::vector<Fd> fds = {})
{
    return {payload_of(value), std::move(fds)};
}

// Instead of an answer.
struct Refuse {
    int error;
    const char *sentence;
};

// Of regions, which return a negative errno.
void must(int error, const char *what);
Fd copy_of(const Fd &fd);
Fd read_only(const ring::Region &region);
Fd event();
void signal(const Fd &event);

class PlayedService
{
  public:
    explicit PlayedService(Stage &stage);
    PlayedService(const PlayedService &) = delete;
    PlayedService &operator=(const PlayedService &) = delete;
    virtual ~PlayedService();

    // ---- how it answers ----
    std::uint64_t features = DR_FEATURES_ALL;
    bool says_more = false; // replies have fields that version 1 does not know

    // ---- the program ----
    void start();
    Subject subject;
    // Does what is to be done now.
    void serve();
    // Serves until it comes true, the program ends, or the wait is over.
    template <class Condition> bool comes(Condition condition)
    {
        bool came = false;
        (void)context_.comes_true([&] {
            serve();
            return (came = condition()) || subject.ended();
        });
        serve(); // what it said last
        return came || condition();
    }
    // Serves until it comes true, but not for long. Nothing is concluded from its not coming.
    template <class Condition> bool comes_soon(Condition condition)
    {
        const auto soon = Deadline::Clock::now() + 10 * Context::look;
        while (!subject.ended() && Deadline::Clock::now() < soon) {
            serve_for(200us);
            if (condition())
                return true;
        }
        return condition();
    }
    void serve_for(std::chrono::microseconds time);
    // What comes true only of a program that breaks a rule. One that has ended breaks none any more.
    template <class Condition> bool never_comes(Condition condition)
    {
        bool came = false;
        (void)context_.stays_false([&] {
            serve();
            return (came = condition()) || subject.ended();
        });
        return !came && !condition();
    }
    // The check ends if the program has.
    void need_running();
    [[nodiscard]] bool greeted() const { return greeted_; }
    // No connection is left of those that came; another may come yet.
    [[nodiscard]] bool hung_up() const { return came_ && connections_.empty(); }
    // The last request, for the reader of a report.
    [[nodiscard]] std::string last_request() const;

  protected:
    enum class Kind { stranger, greeted, front_end, device };

    virtual Answer answer(Request &request) = 0;
    // Beside messages.
    virtual void work() {}
    // Of the connection whose request is being answered.
    Kind kind = Kind::stranger;
    Stage &context_;
    Placeholders placeholders;

  private:
    struct Connection {
        Fd socket;
        Kind kind = Kind::stranger;
        bool spoke = false;
        Bytes bytes; // of the message that is coming
        Request request;
        std::size_t fds_at_first = 0;
    };

    // False: it is over.
    bool receive(Connection &c);
    bool read(Connection &c, std::size_t upto);
    bool complete(Connection &c);
    void check_message(const Connection &c, const dr_message_header &header);
    Answer dispatch(Request &request);
    bool reply(Connection &c, dr_message_header header, Answer answer) const;

    migrate::TemporaryDirectory directory_;
    std::string path_;
    Fd listener_;
    std::list<Connection> connections_;
    bool came_ = false;
    bool greeted_ = false;
    std::uint32_t last_ = 0;
};

} // namespace dirtyring::check
