// Who wrote what, and whether the VMM has it: as tests/engine/oracle.hpp, for memory of which few pages are ever
// written.
#pragma once

#include "tests/search/world.hpp"

#include <cstdint>
#include <cstring>
#include <map>
#include <optional>
#include <utility>
#include <vector>

namespace dirtyring::search {

class Oracle
{
  public:
    static constexpr std::uint64_t slot_size = 64;
    static constexpr std::uint64_t slot_at(unsigned device) { return device * 512; } // in its page

    explicit Oracle(World &world) : world_(world) {}

    std::uint64_t new_stamp() { return ++stamp_; }
    [[nodiscard]] std::uint64_t newest_stamp() const { return stamp_; }

    // The write is over: it shall not be lost.
    void complete(unsigned device, std::uint64_t page, std::uint64_t stamp)
    {
        std::uint64_t &last = done_[{page, device}];
        last = std::max(last, stamp);
    }

    struct Complete {
        std::uint64_t page;
        unsigned device;
        std::uint64_t stamp;
    };
    using Snapshot = std::vector<Complete>;
    // Those with a later stamp than `since`.
    [[nodiscard]] Snapshot completed(std::uint64_t since = 0) const
    {
        Snapshot all;
        for (const auto &[key, stamp] : done_) {
            if (stamp > since)
                all.push_back({key.first, key.second, stamp});
        }
        return all;
    }

    // Nobody asks any more for what was written to this memory up to now.
    void forgive(std::uint64_t oa, std::uint64_t length)
    {
        for (auto it = done_.lower_bound({oa / page_size, 0});
             it != done_.end() && it->first.first < (oa + length) / page_size;)
            it = done_.erase(it);
        forgiven_.push_back({oa / page_size, (oa + length) / page_size, stamp_});
    }

    // The first slot of the VMM's copy that is older than the snapshot, but for memory that exempt(page) names.
    template <class Exempt> [[nodiscard]] std::optional<Complete> missing(const Snapshot &s, Exempt exempt) const
    {
        for (const Complete &c : s) {
            const std::byte *slot = world_.destination.data() + c.page * page_size + slot_at(c.device);
            for (std::uint64_t at = 0; at < slot_size; at += 8) {
                if (test::peek_word(slot + at) < c.stamp && !is_forgiven(c) && !exempt(c.page))
                    return c;
            }
        }
        return std::nullopt;
    }

  private:
    [[nodiscard]] bool is_forgiven(const Complete &c) const
    {
        return std::any_of(forgiven_.begin(), forgiven_.end(), [&](const Forgiven &f) {
            return f.from <= c.page && c.page < f.upto && c.stamp <= f.stamp;
        });
    }

    struct Forgiven {
        std::uint64_t from;
        std::uint64_t upto;
        std::uint64_t stamp;
    };

    World &world_;
    std::map<std::pair<std::uint64_t, unsigned>, std::uint64_t> done_;
    std::vector<Forgiven> forgiven_;
    std::uint64_t stamp_ = 0;
};

} // namespace dirtyring::search
