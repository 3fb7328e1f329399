// Which pages of its memory a consumer copies, and when.
#include "client/check/played_service_guest.hpp"

#include <algorithm>
#include <optional>
#include <sys/stat.h>
#include <unistd.h>

namespace dirtyring::check {
namespace {

// Which pages of the program's memory it reads: what is punched out of a memfd is there again once somebody has touched
// it.
class Touches
{
  public:
    explicit Touches(std::vector<PlayedGuest::Piece> pieces) : pieces_(std::move(pieces)) {}

    // False: this memory does not show it.
    [[nodiscard]] bool punch() const
    {
        bool small = !pieces_.empty();
        for (const auto &p : pieces_) {
            struct stat status {
            };
            small =
                small && ::fstat(p.fd.get(), &status) == 0 && status.st_blksize == static_cast<blksize_t>(page) &&
                ::fallocate(p.fd.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(p.bytes.start),
                            static_cast<off_t>(p.bytes.end - p.bytes.start)) == 0;
        }
        return small;
    }

    [[nodiscard]] bool any() const
    {
        return std::any_of(pieces_.begin(), pieces_.end(), [](const auto &p) {
            const off_t data = ::lseek(p.fd.get(), static_cast<off_t>(p.bytes.start), SEEK_DATA);
            return data >= 0 && static_cast<std::uint64_t>(data) < p.bytes.end;
        });
    }

    [[nodiscard]] bool all() const
    {
        return std::all_of(pieces_.begin(), pieces_.end(), [](const auto &p) {
            const off_t hole = ::lseek(p.fd.get(), static_cast<off_t>(p.bytes.start), SEEK_HOLE);
            return hole >= 0 && static_cast<std::uint64_t>(hole) >= p.bytes.end;
        });
    }

  private:
    std::vector<PlayedGuest::Piece> pieces_;
};

// It reads the pages that a run or all-dirty names. Once it has read what all-dirty names it is known to copy.
void copies(Stage &s)
{
    bool early = false;
    PlayedGuest guest(s);
    guest.before_enable = [&] {
        const Touches before(guest.memory());
        early = !before.punch() || !s.stays_false([&] { return before.any(); });
    };
    guest.start_and_wait();
    PlayedRing &ring = guest.fed();
    const Touches touches(guest.memory());
    if (!touches.punch() || !guest.never_comes([&] { return touches.any(); }))
        throw Broken("which pages the program reads is not seen: its memory is in use or not of 4 KiB pages");
    const auto feed = [&](const Entries &entries, const char *what) {
        if (!touches.punch())
            throw Broken("its memory cannot be punched any more");
        guest.feed(ring, entries);
        guest.need_released(ring, what);
    };
    const auto expect_read = [&](Rule rule, const char *what, bool all) {
        const bool read = guest.comes([&] { return all ? touches.all() : touches.any(); });
        if (!read)
            guest.need_running();
        s.need(read, rule, what, "pages that it names were not read", "all of them copied");
    };
    feed(guest.runs(1), "a run of one page");
    if (!guest.comes_soon([&] { return touches.any(); }))
        throw Broken("the program read no page that a run named, so that what it copies is not seen");
    if (!early)
        s.verdicts.pass("E-6");
    feed({200ull << 12}, "a marker of kind 200");
    expect_read("C-9", "a marker of kind 200", true);
    feed({dr_marker(DR_MARKER_ALL_DIRTY, 0)}, "an all-dirty marker");
    expect_read("C-10", "an all-dirty marker", true);
    feed(guest.runs(1), "a run of a page that all-dirty named before");
    expect_read("C-7", "a run of a page that all-dirty named before", false);
}

// One that reads all of its memory while ENABLE waits copies it, and has to do so again.
void copies_early(Stage &s)
{
    std::optional<Touches> touches;
    bool early = false;
    PlayedGuest guest(s);
    guest.before_enable = [&] {
        touches.emplace(guest.memory());
        early = touches->punch() && !s.stays_false([&] { return touches->any(); });
        const auto until = Deadline::Clock::now() + s.deadline.patience() / 4;
        while (early && !touches->all() && Deadline::Clock::now() < until)
            std::this_thread::sleep_for(1ms);
        early = early && touches->all() && guest.subject.hold_still() && touches->punch();
    };
    guest.start_and_wait();
    if (!early)
        return;
    PlayedRing &ring = guest.fed();
    const std::uint64_t run = guest.runs(1).front();
    while (guest.comes([&] { return ring.released(); }) && !guest.subject.ended() && !s.deadline.over())
        guest.feed(ring, Entries(std::min<std::uint64_t>(1024, ring.room() - DR_MARKER_SLOTS), run));
    if (!guest.subject.succeeded())
        throw Broken("the program did not come to its end, so that it might copy all of its memory yet");
    s.expect(touches->all(), "E-6", "memory that it copied while its ENABLE waited", "it did not copy it again",
             "a copy after the completion");
}

// A page is mapped elsewhere, and a run of it comes in front of the marker of the unmap.
void moves(Stage &s)
{
    PlayedGuest guest(s);
    guest.hold_epochs = true;
    guest.start_and_wait();
    if (guest.hwpt().space == DR_SPACE_OA)
        throw Broken("the program reads guest-physical addresses, which no map changes");
    if (!guest.fed_until([&] { return guest.moved.has_value(); }))
        throw Broken("the program unmapped nothing that it mapped elsewhere then");
    const Touches before(guest.pieces(guest.moved->from, page));
    const Touches after(guest.pieces(guest.moved->to, page));
    if (!before.punch() || !after.punch())
        throw Broken("which pages the program reads is not seen: they are not of 4 KiB");
    const char *what = "a run of a page that was unmapped, in front of the marker of the unmap";
    guest.feed(guest.fed(), {dr_run(guest.moved->iova / page, false, 1)});
    guest.need_released(guest.fed(), what);
    if (!guest.comes_soon([&] { return before.any() || after.any(); }))
        throw Broken("the program read no page that a run named, so that what it copies is not seen");
    s.expect(guest.comes([&] { return before.any(); }), "E-4", what, "only the page where it is mapped now was read",
             "a copy of the page where it was mapped before");
}

const Situation situations[] = {
    {"copying", copies, {"C-7", "C-9", "C-10", "E-6"}},
    {"copying before ENABLE", copies_early, {"E-6"}},
    {"maps that change", moves, {"E-4"}},
};

} // namespace

std::span<const Situation> consumer_copy_situations()
{
    return situations;
}

} // namespace dirtyring::check
