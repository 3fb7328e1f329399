// What can be told of a device by what it wrote and marked, each time that it is held still.
#pragma once

#include "client/check/played_service_hwpt.hpp"

#include <functional>

namespace dirtyring::check {

class Watch
{
  public:
    // Which rule is broken by a page that was written while its leaf is clean.
    using Blame = std::function<Rule(std::uint64_t page_number)>;

    Watch(Stage &stage, PlayedHwpt &hwpt) : stage_(stage), hwpt_(hwpt) {}

    // Lets the device run for a time, holds it still and looks. False: it has ended; then this was the last look.
    bool look(std::chrono::microseconds after);
    // What is dirty is taken; whoever writes from now on marks again.
    void sweep() { hwpt_.sweep(); }

    void blame(Blame blame) { blame_ = std::move(blame); }

    [[nodiscard]] const Pages &written() const { return written_; }     // ever
    [[nodiscard]] const Pages &rewritten() const { return rewritten_; } // marked, swept, written again and marked again
    [[nodiscard]] bool wrote() const { return wrote_; }                 // between the last look and the one before
    // It was seen to write and to be outside of sections.
    [[nodiscard]] bool quiet_between() const { return quiet_between_; }
    [[nodiscard]] bool holds_pins() const { return held_; } // a slot was seen held

    // What a device breaks that is known to; later situations would only say it again.
    static void need_sound(const Stage &stage);

  private:
    void check_marks(const Pages &changed);
    void check_sections(const Pages &changed);
    void check_summary(const Pages &changed);
    void check_slots();
    [[nodiscard]] Rule blame_for(std::uint64_t page_number) const;

    Stage &stage_;
    PlayedHwpt &hwpt_;
    Blame blame_;
    Pages written_;
    Pages rewritten_;
    std::vector<std::uint64_t> counts_; // of the cells, when it was held still before
    bool wrote_ = false;
    bool quiet_between_ = false;
    bool held_ = false;
};

} // namespace dirtyring::check
