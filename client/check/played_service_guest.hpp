// The service as a VMM sees it: guests, maps, and dirty rings in which the kit puts what it likes.
#pragma once

#include "client/check/played_service.hpp"
#include "ring/consumer.hpp"
#include "ring/producer.hpp"

#include <deque>
#include <functional>
#include <optional>

namespace dirtyring::check {

// A range of page numbers.
struct PageRange {
    std::uint64_t first;
    std::uint64_t count;
};

class PlayedRing
{
  public:
    using Distort = std::function<void(dr_ring_header &)>;

    PlayedRing(const dr_hwpt_alloc &hwpt, std::uint32_t shard, const Distort &distort);

    // Puts entries behind those that are there and calls if asked to; false: not asked. There is room for them.
    bool publish(const Entries &entries);
    // It armed for an entry that was there already, so that nobody called it, and has not read it.
    [[nodiscard]] bool missed() const { return !called_ && armed() > tail() && armed() <= head(); }
    [[nodiscard]] std::uint64_t room() { return out_->room(); }
    [[nodiscard]] bool released() { return out_->released(); }
    [[nodiscard]] bool peer_broke_rules() const { return out_->peer_broke_rules(); }
    [[nodiscard]] std::uint64_t head() const { return out_->head(); }
    [[nodiscard]] std::uint64_t tail() const { return word(mine().tail).load(std::memory_order_seq_cst); }
    [[nodiscard]] std::uint64_t armed() const { return word(mine().armed).load(std::memory_order_seq_cst); }
    [[nodiscard]] bool waits() const { return armed() == head() + 1; }
    // What is in the slots that are not published.
    void bait(std::uint64_t entry);
    void want_kick(bool wanted) { out_->want_kick(wanted); }
    // Says what is not so.
    void set_head(std::uint64_t head) const;
    // Takes the program's wish to be called away: when it is there again, the program has looked.
    void disarm() const;

    std::vector<Fd> descriptors() const;
    Fd call = event();
    Fd kick = event();
    bool opened = false;
    Span slice{};

  private:
    [[nodiscard]] dr_ring_consumer &mine() const { return *consumer_.map.as<dr_ring_consumer>(); }

    ring::Region producer_;
    ring::Region consumer_;
    std::optional<ring::Producer<std::uint64_t>> out_;
    bool called_ = false; // for what was published last
};

class PlayedGuest : public PlayedService
{
  public:
    explicit PlayedGuest(Stage &stage);

    // ---- what it does otherwise than a service ----
    PlayedRing::Distort distort;         // the header of each ring
    Entries first_entries;               // of each ring, there when it is handed out
    bool hold_syncs = false;             // their markers and completions are the situation's business
    bool hold_epochs = false;            // the markers of unmaps are
    std::function<void()> before_enable; // may hold the program still until it has completed

    // Starts the program and waits until it has an hwpt that is tracked and all of whose rings it has got. The check
    // ends without.
    void start_and_wait();
    // Of that hwpt.
    [[nodiscard]] std::deque<PlayedRing> &rings() { return *rings_; }
    [[nodiscard]] const dr_hwpt_alloc &hwpt() const { return hwpt_; }
    // A ring whose slice has something mapped, and what.
    [[nodiscard]] PlayedRing &fed() { return (*rings_)[fed_]; }
    // Runs of one page each, of what is mapped there; as many again, other pages.
    Entries runs(std::uint64_t n);
    // Publishes when the program is asleep, if it ever is: what comes before is for whoever looks at that.
    void feed(PlayedRing &ring, const Entries &entries);
    // Serves until all that was published in the ring is released; the rule is broken if that does not come, or C-6 if
    // the program sleeps and was not called. The check ends if the program has ended, or sleeps until more has come.
    void need_released(PlayedRing &ring, const std::string &what, Rule rule = "C-4");
    // Feeds the fed ring until it comes true, but not for ever. False: it did not.
    bool fed_until(const std::function<bool()> &condition);

    // ---- what the program did ----
    [[nodiscard]] bool has_hwpt() const { return hwpt_.ioas != 0; }
    std::vector<dr_command> syncs; // held
    void finish(const dr_command &command, int result, std::uint64_t done = 0, std::uint64_t epoch = 0);
    std::uint64_t commands = 0;
    bool got_rings = false;
    // Of guest memory that is mapped where the fed ring looks: a descriptor of our own and the bytes there.
    struct Piece {
        Fd fd;
        Span bytes;
    };
    std::vector<Piece> memory();
    std::vector<Piece> pieces(std::uint64_t oa, std::uint64_t length);
    // The first page of a map that it took out and then mapped elsewhere.
    struct Moved {
        std::uint64_t iova;
        std::uint64_t from; // OA
        std::uint64_t to;
    };
    std::optional<Moved> moved;

  private:
    struct Memory {
        dr_memory_region region;
        Fd fd;
    };
    struct Hwpt {
        std::uint32_t id;
        dr_hwpt_alloc request;
        std::deque<PlayedRing> rings;
        bool tracked = false;
    };

    Answer answer(Request &request) override;
    Answer create_guest(const dr_guest_create &request);
    Answer alloc_hwpt(const dr_hwpt_alloc &request);
    Answer get_ring(const dr_ring_get &request);
    Answer destroy(std::uint32_t id);
    void work() override;
    void take_commands();
    void check_kick();
    void execute(const dr_command &command);
    void check_reserved(const dr_command &command);
    void map(const dr_command &command);
    void unmap(const dr_command &command);
    void choose();
    Hwpt *find_hwpt(std::uint32_t id);

    dr_guest guest_{};
    ring::Region front_end_;
    ring::Region service_;
    Fd kick_ = event();
    Fd call_ = event();
    std::optional<ring::Consumer<dr_command>> submissions_;
    std::optional<ring::Producer<dr_completion>> completions_;
    bool armed_ = false;      // and so a kick is owed for the next submission
    bool wants_kick_ = false; // for the release of a completion
    std::uint32_t next_id_ = 1;
    std::uint64_t next_epoch_ = 1;
    std::vector<std::uint32_t> ioases_;
    std::vector<Memory> memory_;
    std::vector<dr_command> maps_;
    std::vector<dr_command> unmapped_;
    std::list<Hwpt> hwpts_;
    std::deque<PlayedRing> *rings_ = nullptr;
    dr_hwpt_alloc hwpt_{};
    std::size_t fed_ = 0;
    std::vector<PageRange> pages_; // that runs of the fed ring may name
    std::uint64_t fed_pages_ = 0;  // named so far
    bool sleeps_ = true;           // as far as is known
};

} // namespace dirtyring::check
