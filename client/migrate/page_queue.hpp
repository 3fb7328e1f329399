// Guest pages that wait to be sent, in the order of their reports, each at most once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <optional>
#include <vector>

namespace dirtyring::migrate {

struct PageRange {
    std::uint64_t first;
    std::uint64_t count;
};

class PageQueue
{
  public:
    explicit PageQueue(std::uint64_t pages) : queued_(pages) {}

    [[nodiscard]] std::uint64_t size() const { return size_; }
    [[nodiscard]] bool empty() const { return size_ == 0; }

    void push(std::uint64_t page)
    {
        if (queued_[page])
            return;
        queued_[page] = true;
        ++size_;
        if (!ranges_.empty() && ranges_.back().first + ranges_.back().count == page)
            ++ranges_.back().count;
        else
            ranges_.push_back({page, 1});
    }

    // Up to `max` pages that lie together. From here on a report queues them again, so copy them after.
    [[nodiscard]] std::optional<PageRange> pop(std::uint64_t max)
    {
        if (ranges_.empty())
            return std::nullopt;
        PageRange &front = ranges_.front();
        const PageRange taken{front.first, std::min(max, front.count)};
        front.first += taken.count;
        front.count -= taken.count;
        if (front.count == 0)
            ranges_.pop_front();
        for (std::uint64_t page = taken.first; page < taken.first + taken.count; ++page)
            queued_[page] = false;
        size_ -= taken.count;
        return taken;
    }

  private:
    std::deque<PageRange> ranges_;
    std::vector<bool> queued_;
    std::uint64_t size_ = 0;
};

} // namespace dirtyring::migrate
