// A recorded trace, as fast as a guest at a service can take it: maps and unmaps through the command ring, pipelined,
// the device's writes and the consumer in the same thread. Who wrote what is kept: every page written must be reported.
#pragma once

#include "client/trace.hpp"
#include "perf/service.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace dirtyring::perf {

class Replay
{
  public:
    static constexpr std::uint64_t memory_bytes = 512ull << 20; // of the guest that was recorded

    Replay(const Service &service, const std::string &trace)
        : guest_(service.socket(), {.memory_bytes = memory_bytes, .aperture_lg2 = 39, .mapped = false}),
          owed_(memory_bytes >> DR_PAGE_LG2)
    {
        auto events = load_trace(trace);
        if (!events)
            throw Failure(events.error());
        events_ = std::move(*events);
        viommu_ = std::any_of(events_.begin(), events_.end(),
                              [](const TraceEvent &e) { return e.kind == TraceEvent::Kind::map; });
        note_pages();
        if (!viommu_)
            must(guest_.guest().map(guest_.ioas(), 0, memory_bytes, 0, flags));
    }

    [[nodiscard]] std::uint64_t recorded_us() const { return events_.back().time_us - events_.front().time_us; }

    // Once from beginning to end. It begins and ends with nothing mapped, if there is a vIOMMU.
    void run()
    {
        for (std::size_t i = 0; i < events_.size(); ++i) {
            const TraceEvent &e = events_[i];
            switch (e.kind) {
            case TraceEvent::Kind::map:
                map(e);
                break;
            case TraceEvent::Kind::unmap:
                unmap(e.address, e.length);
                break;
            case TraceEvent::Kind::write:
                write(i);
                break;
            case TraceEvent::Kind::read:
                break; // sets no D
            }
        }
        if (viommu_)
            unmap(0, UINT64_MAX);
        await([&] { return outstanding_ == 0; });
    }

    // How many pages were written and not reported since: 0, or the service is wrong.
    std::uint64_t lost()
    {
        guest_.sync([this](std::uint64_t first, std::uint64_t n) { report(first, n); });
        return static_cast<std::uint64_t>(std::count(owed_.begin(), owed_.end(), true));
    }

    [[nodiscard]] std::uint64_t pages_written() const { return pages_written_; }
    // Most entries that there were to be read at once.
    [[nodiscard]] std::uint64_t backlog() const { return backlog_; }

  private:
    static constexpr std::uint32_t flags = DIRTYRING_READ | DIRTYRING_WRITE | DIRTYRING_IDEMPOTENT;
    static constexpr std::uint64_t is_map = 1;

    // Which guest pages each write reaches, so that the replay itself has little to do.
    void note_pages()
    {
        std::map<std::uint64_t, std::uint64_t> mapped; // IOVA to OA, page by page
        for (const TraceEvent &e : events_) {
            first_page_.push_back(pages_.size());
            if (e.kind == TraceEvent::Kind::map) {
                for (std::uint64_t at = 0; at < e.length; at += DR_PAGE)
                    mapped[e.address + at] = e.oa + at;
            } else if (e.kind == TraceEvent::Kind::unmap) {
                mapped.erase(mapped.lower_bound(e.address), e.length >= UINT64_MAX - e.address
                                                                ? mapped.end()
                                                                : mapped.lower_bound(e.address + e.length));
            } else if (e.kind == TraceEvent::Kind::write) {
                for (std::uint64_t at = e.address / DR_PAGE * DR_PAGE; at < e.address + e.length; at += DR_PAGE)
                    pages_.push_back((viommu_ ? mapped.at(at) : at) / DR_PAGE);
                data_.resize(std::max<std::size_t>(data_.size(), e.length), std::byte{1});
            }
        }
        first_page_.push_back(pages_.size());
    }

    void map(const TraceEvent &e)
    {
        queue([&] { return guest_.guest().queue_map(guest_.ioas(), e.address, e.length, e.oa, flags, is_map); });
        ++maps_outstanding_;
    }

    void unmap(std::uint64_t iova, std::uint64_t length)
    {
        queue([&] {
            return guest_.guest().queue_unmap(guest_.ioas(), iova, length,
                                              DIRTYRING_HARVEST_NOW | DIRTYRING_UNMAP_EMPTY_OK, 0);
        });
    }

    void write(std::size_t event)
    {
        if (maps_outstanding_ > 0)
            await([&] { return maps_outstanding_ == 0; }); // a guest tells its device of a buffer when it is mapped
        for (std::size_t i = first_page_[event]; i < first_page_[event + 1]; ++i)
            owed_[pages_[i]] = true;
        pages_written_ += first_page_[event + 1] - first_page_[event];
        guest_.write(events_[event].address, data_.data(), events_[event].length);
        if (++writes_ % drain_every == 0)
            drain();
    }

    void report(std::uint64_t first, std::uint64_t n)
    {
        for (std::uint64_t page = first; page < std::min<std::uint64_t>(first + n, owed_.size()); ++page)
            owed_[page] = false;
    }

    void drain()
    {
        const std::uint64_t entries = guest_.drain([this](std::uint64_t first, std::uint64_t n) { report(first, n); });
        backlog_ = std::max(backlog_, entries);
    }

    template <class Command> void queue(Command command)
    {
        for (;;) {
            const Result<void> queued = command();
            if (queued)
                break;
            if (queued.error().code != EAGAIN)
                throw Failure(queued.error().sentence);
            must(guest_.guest().submit());
            reap();
        }
        ++outstanding_;
    }

    template <class Done> void await(Done done)
    {
        must(guest_.guest().submit());
        const std::uint64_t deadline = now_ns() + 10'000'000'000;
        while (!done()) {
            reap();
            if (now_ns() > deadline)
                throw Failure("the service completes nothing within 10 s");
        }
    }

    void reap()
    {
        drain(); // an unmap harvests, and needs room
        std::array<dr_completion, 64> completions;
        const std::uint32_t n = guest_.guest().reap(completions.data(), completions.size());
        for (std::uint32_t i = 0; i < n; ++i) {
            if (completions[i].result != 0)
                throw Failure("a map change has failed: " + std::to_string(completions[i].result));
            --outstanding_;
            maps_outstanding_ -= completions[i].user_data == is_map;
        }
    }

    static constexpr std::uint64_t drain_every = 64; // writes

    ServedGuest guest_;
    std::vector<TraceEvent> events_;
    bool viommu_ = false;
    std::vector<std::uint64_t> pages_;    // of all writes, in order
    std::vector<std::size_t> first_page_; // of them, for each event and for the end
    std::vector<bool> owed_;              // pages that were written and not reported since
    std::vector<std::byte> data_;
    std::uint64_t outstanding_ = 0;
    std::uint64_t maps_outstanding_ = 0;
    std::uint64_t writes_ = 0;
    std::uint64_t pages_written_ = 0;
    std::uint64_t backlog_ = 0;
};

} // namespace dirtyring::perf
