#include "client/migrate/source.hpp"

#include "client/dirtyring.hpp"
#include "client/migrate/failure.hpp"
#include "client/migrate/mapper.hpp"
#include "client/migrate/page_queue.hpp"
#include "client/migrate/reports.hpp"
#include "iommu/formats.hpp"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <memory>
#include <optional>

namespace dirtyring::migrate {
namespace {

// The smallest IOVA space that holds all addresses: its slices then are, too, and share the work.
std::uint32_t aperture_lg2(const Options &options, const Plan &plan)
{
    constexpr std::uint32_t slice_lg2_min = 30;
    const auto shards_lg2 = static_cast<std::uint32_t>(std::countr_zero(options.shards));
    const std::uint64_t end = std::max(options.memory, plan.iova_end);
    return std::max(slice_lg2_min + shards_lg2, static_cast<std::uint32_t>(std::bit_width(end - 1)));
}

class Source
{
  public:
    Source(Shared &shared, const ring::Fd &link)
        : shared_(shared), control_(shared.control), guest_(must(Guest::connect(shared.socket_path))),
          link_(link, shared.options.bandwidth), queue_(shared.options.pages())
    {
    }

    void run()
    {
        set_up();
        attach_devices();
        const std::uint64_t began = now_ns();
        copy_live();
        const std::uint64_t stopped = now_ns();
        copy_rest();
        const std::uint64_t ended = now_ns();
        control_.downtime_ns.store(ended - stopped, std::memory_order_relaxed);
        control_.total_ns.store(ended - began, std::memory_order_relaxed);
        detach_devices();
    }

  private:
    void set_up()
    {
        const Options &options = shared_.options;
        must(guest_.memory_add(0, options.memory, shared_.source.fd.get()), "cannot add the guest's memory");
        ioas_ = must(guest_.ioas_alloc(), "cannot make an ioas");
        dirtyring_hwpt attributes{};
        attributes.aperture_lg2 = aperture_lg2(options, shared_.plan);
        attributes.shards = options.shards;
        attributes.format = options.format;
        attributes.levels = options.levels;
        attributes.bbml = options.bbml;
        attributes.leaf_lg2_max = options.leaf_lg2;
        attributes.all_sizes = options.all_sizes ? 1 : 0;
        attributes.split = options.split;
        attributes.space = options.space;
        attributes.ring_entries = options.ring_entries;
        attributes.min_interval_us = options.min_interval_us;
        attributes.untracked = options.tracking ? 0 : 1;
        // Devices come as they are, as a VMM's do: whether they can be tracked is asked when the migration begins.
        attributes.always_on = options.always_on ? 1 : 0;
        const bool always_on =
            options.always_on || iommu::with_format(options.format, [](auto f) { return f.always_on; });
        attributes.optional = options.tracking && !always_on ? 1 : 0;
        control_.hwpt = must(guest_.hwpt_alloc(ioas_, attributes), "cannot make an hwpt");
        std::memcpy(control_.token, guest_.token(), sizeof control_.token);

        if (options.tracking && options.space == DR_SPACE_IOVA) {
            const std::uint32_t slice_lg2 =
                attributes.aperture_lg2 - static_cast<std::uint32_t>(std::countr_zero(options.shards));
            meanings_.emplace(options.shards, slice_lg2);
        }
        SharedMap *meanings = meanings_ ? &*meanings_ : nullptr;
        reports_.emplace(shared_, queue_, meanings);
        if (shared_.plan.changes.empty()) {
            if (meanings != nullptr)
                meanings->map.map(0, options.memory, 0);
            must(guest_.map(ioas_, 0, options.memory, 0, DIRTYRING_READ | DIRTYRING_WRITE),
                 "cannot map the guest's memory");
        } else {
            mapper_.emplace(shared_, guest_, ioas_, meanings);
        }
    }

    void start_tracking()
    {
        auto enabled = guest_.enable(control_.hwpt);
        if (!enabled && enabled.error().code == ENODEV)
            throw Failure(fmt::format("{}; with such a device use --tracking none", what_cannot_be_tracked()));
        must(std::move(enabled), "cannot start the tracking");
        rings_.emplace(must(guest_.open_rings(control_.hwpt), "cannot open the rings"));
    }

    [[nodiscard]] std::string what_cannot_be_tracked()
    {
        const std::uint32_t id = must(guest_.hwpt_status(control_.hwpt)).in_the_way;
        const auto device = must(guest_.device_info(id - 1));
        return fmt::format("device {} ({}) does not set Dirty bits", device.id, device.name);
    }

    void attach_devices()
    {
        move_on(Phase::attaching);
        shared_.source_bell.wait(
            [&] { return control_.attached.load(std::memory_order_seq_cst) == shared_.options.devices; });
        if (shared_.options.tracking)
            start_tracking();
        control_.start_ns = now_ns();
        if (mapper_)
            mapper_->start();
        move_on(Phase::running);
    }

    // Round 1 sends everything, each later round what was reported during the one before it; the last is the one after
    // which the rest fits the downtime limit.
    void copy_live()
    {
        for (std::uint64_t page = 0; page < shared_.options.pages(); ++page)
            queue_.push(page);
        for (unsigned round = 1;; ++round) {
            copy_round(round);
            if (!rings_ || rest_fits_downtime()) {
                control_.converged.store(1, std::memory_order_relaxed);
                return;
            }
            if (round == shared_.options.max_rounds)
                return;
        }
    }

    // Ends when all that was queued as it began has been sent.
    void copy_round(unsigned number)
    {
        const std::uint64_t began = now_ns();
        const std::uint64_t reported = control_.pages_reported.load(std::memory_order_relaxed);
        const std::uint64_t pages = queue_.size();
        const std::uint64_t goal = copied_ + pages;
        copy_until([&] { return copied_ >= goal; });
        control_.rounds[number - 1] = {.pages = pages,
                                       .reported = control_.pages_reported.load(std::memory_order_relaxed) - reported,
                                       .us = (now_ns() - began) / 1000};
        control_.rounds_done.store(number, std::memory_order_release); // pairs with Progress
    }

    // What devices have written and no walker has reported yet is of the rest, too.
    [[nodiscard]] bool rest_fits_downtime()
    {
        if (!queue_fits_downtime())
            return false;
        sync();
        return queue_fits_downtime();
    }

    [[nodiscard]] bool queue_fits_downtime() const
    {
        const double ms = static_cast<double>(queue_.size() * page_size) * 1000 / link_.rate();
        return ms <= static_cast<double>(shared_.options.downtime_limit_ms);
    }

    void copy_rest()
    {
        move_on(Phase::stopping);
        shared_.mapper_bell.ring();
        // Unmaps under way may need room in the rings, so these are read until the mapper has ended.
        copy_until([&] {
            return control_.stopped.load(std::memory_order_seq_cst) == shared_.options.devices &&
                   (!mapper_ || mapper_->finished());
        });
        if (mapper_)
            mapper_->join();
        if (rings_)
            sync();
        else
            reports_->all();
        copy_until([&] { return queue_.empty(); });
        link_.finish();
        show();
    }

    void sync()
    {
        auto started = rings_->sync();
        for (; !started && started.error().code == EBUSY; started = rings_->sync()) {
            // The mapper's commands leave no room until it has reaped some.
            const std::uint64_t again = now_ns() + retry_pause_ns;
            copy_until([&] { return now_ns() >= again; }, again);
        }
        must(std::move(started), "cannot sync");
        copy_until([&] { return must(rings_->synced(), "the sync failed"); });
    }

    void detach_devices()
    {
        move_on(Phase::finished);
        shared_.source_bell.wait([&] { return control_.attached.load(std::memory_order_seq_cst) == 0; });
    }

    void move_on(Phase phase)
    {
        control_.phase.store(phase, std::memory_order_seq_cst);
        shared_.ring_devices();
    }

    // Reads the rings and sends what is queued until done(); sleeps, to the deadline at most, when there is neither
    // anything to read nor to send.
    template <class Done> void copy_until(Done done, std::uint64_t deadline_ns = never)
    {
        for (;;) {
            if (rings_)
                reports_->drain(*rings_);
            if (done())
                return;
            if (!queue_.empty() && now_ns() >= link_.free_at())
                send();
            else
                sleep(done, deadline_ns);
        }
    }

    void send()
    {
        const auto range = queue_.pop(link_.chunk() / page_size);
        link_.send(range->first * page_size,
                   {shared_.source.map.data() + range->first * page_size, range->count * page_size});
        copied_ += range->count;
        show();
    }

    template <class Done> void sleep(Done done, std::uint64_t deadline_ns)
    {
        show();
        if (queue_.empty())
            link_.idle();
        shared_.source_bell.arm();
        if ((rings_ && !rings_->arm()) || done())
            return;
        const int reports = rings_ ? rings_->fd() : -1;
        // The guest is the mapper's as long as that is at work, and its socket too.
        const int service = !mapper_ || mapper_->finished() ? guest_.socket() : -1;
        const std::uint64_t sendable_at = queue_.empty() ? never : link_.free_at();
        const auto [reported, gone] = shared_.source_bell.sleep(std::min(sendable_at, deadline_ns), {reports, service});
        if (gone)
            must(guest_.reconnect());
    }

    void show()
    {
        control_.pages_copied.store(copied_, std::memory_order_relaxed);
        control_.pages_remaining.store(queue_.size(), std::memory_order_relaxed);
        control_.bytes_sent.store(link_.bytes_sent(), std::memory_order_relaxed);
        control_.link_rate.store(static_cast<std::uint64_t>(link_.rate()), std::memory_order_relaxed);
    }

    Shared &shared_;
    Control &control_;
    Guest guest_;
    std::uint32_t ioas_ = 0;
    std::optional<SharedMap> meanings_; // IOVA rings only
    std::optional<Mapper> mapper_;      // a trace with maps only
    std::optional<RingSet> rings_;      // with tracking only; closed before the guest
    Link link_;
    PageQueue queue_;
    std::optional<Reports> reports_;
    std::uint64_t copied_ = 0; // pages
};

} // namespace

void run_source(Shared &shared, const ring::Fd &link)
{
    Source source(shared, link);
    try {
        source.run();
    } catch (const std::exception &e) {
        end_failed(shared.control, fmt::format("source VMM: {}", e.what())); // while the mapper may be at work
    }
}

} // namespace dirtyring::migrate
