#include "tests/search/service.hpp"

#include "iommu/geometry.hpp"

#include <fmt/format.h>

#include <algorithm>

namespace dirtyring::search {

namespace {

std::uint64_t leaf_sizes_of(const Attributes &a, const dr_translation_header &h)
{
    const unsigned largest = std::min(a.leaf_lg2_max, iommu::entry_lg2(h.root_level));
    return iommu::bits_between(iommu::granule_lg2, largest + 1) &
           iommu::with_format(a.format, [&](auto f) { return iommu::leaf_sizes<decltype(f)>(a.all_sizes); });
}

} // namespace

Life::Life(World &w) : world(w), home_begun(w.lives == 0)
{
    const bool restarted = world.lives++ > 0;
    point(Point::restart_begun);
    service::Commands::Config config;
    config.home = &inboxes[0];
    config.capacity = world.attributes.commands;
    config.submissions = &world.submissions.consumer;
    config.submissions_peer = world.submissions.producer;
    config.completions = world.completions.producer;
    config.completions_peer = &world.completions.consumer;
    config.call = [this] { calls[0].push_back(&world.vmm_called); };
    config.journal = world.journal;
    config.restarted = restarted;
    commands.emplace(std::move(config));
    commands->add_memory(0, world.plan.memory());
    commands->add_ioas(World::ioas);
    if (world.hwpt)
        add_hwpt(restarted);
    point(Point::restart_rebuilt);
}

void Life::add_hwpt(bool restored)
{
    HwptWorld &hwpt = *world.hwpt;
    const Attributes &a = world.attributes;
    ++hwpt.lives;
    const unsigned oa_lg2 = iommu::with_format(a.format, [](auto f) { return unsigned{f.oa_lg2}; });
    service::HwptRoute route{World::ioas,
                             hwpt.geometry.aperture_lg2,
                             hwpt.geometry.slice_lg2,
                             oa_lg2,
                             leaf_sizes_of(a, hwpt.geometry),
                             true,
                             a.space == DR_SPACE_IOVA,
                             {},
                             &hwpt.record};
    for (unsigned i = 0; i < a.shards; ++i) {
        DirtyRing *ring = hwpt.rings[i].get();
        service::ShardConfig config;
        config.tables = iommu::Tables(hwpt.tables.data(), hwpt.geometry);
        config.geometry = hwpt.geometry;
        config.index = i;
        config.control = hwpt.control(i);
        config.generations = reinterpret_cast<std::uint64_t *>(hwpt.translation.data() + hwpt.geometry.generations);
        config.leaves = {a.leaf_lg2_max, a.all_sizes, a.collapse, a.split, a.how};
        config.visit = a.visit;
        config.producer = ring->mine();
        config.consumer = ring->peer();
        config.always_on = a.always_on;
        config.min_interval_ns = a.min_interval_ns;
        config.backing = {[this](std::uint64_t, std::uint64_t) { return world.make_present(); },
                          [&hwpt](std::uint64_t offset, std::uint64_t length) {
                              ::madvise(hwpt.tables.data() + offset, length, MADV_DONTNEED);
                          },
                          [&hwpt, i](std::uint64_t offset) { hwpt.large_wished.emplace_back(i, offset); }};
        config.record = hwpt.slice_record(i, [this] { return world.make_present(); });
        config.restored = restored;
        config.call = [this, ring, i] { calls[owner(i)].push_back(&ring->called); };
        shards.push_back(service::make_shard(a.format, std::move(config)));
        route.shards.push_back({shards.back().get(), &inboxes[owner(i)]});
    }
    sleeps.assign(a.shards, {});
    commands->add_hwpt(hwpt.id, std::move(route));
    if (!restored)
        return;
    std::vector<iommu::SliceRecord> slices;
    for (unsigned i = 0; i < a.shards; ++i)
        slices.push_back(hwpt.slice_record(i, [] { return 0; }));
    commands->restore_extents(World::ioas, slices);
    for (const auto &[id, device] : world.devices) {
        for (const auto &shard : shards)
            shard->add(device->threads());
        if (!device->capable && !commands->admit(hwpt.id, id))
            world.wrong("admit", "a device that was admitted is not after a restart");
    }
}

bool Service::run(unsigned walkers, const std::function<void()> &work)
{
    if (dying_ || (busy_ & walkers) != 0)
        return false;
    busy_ |= walkers;
    ++frames_;
    try {
        work();
    } catch (const ServiceDeath &) {
        dying_ = true;
    }
    --frames_;
    busy_ &= ~walkers;
    if (dying_) {
        if (frames_ == 0) {
            life_.reset();
            dying_ = false;
            ended();
        }
        return true;
    }
    for (unsigned w = 0; w < 2 && life_; ++w) {
        if ((walkers >> w & 1) == 0)
            continue;
        for (bool *called : std::exchange(life_->calls[w], {}))
            *called = true;
    }
    return true;
}

void Service::start()
{
    if (life_ || frames_ > 0)
        return;
    world_.say([] { return "a worker starts"; });
    run(3, [this] { life_ = std::make_unique<Life>(world_); });
    if (life_ && world_.lives > 1)
        world_.met(Event::service_returns);
}

void Service::kill()
{
    if (!alive())
        return;
    world_.say([] { return "the service dies"; });
    world_.met(Event::service_dies);
    if (frames_ > 0) {
        dying_ = true;
        return;
    }
    run(3, [] { throw ServiceDeath{}; });
}

bool Service::wake_shard(unsigned shard)
{
    Life::Sleep &sleep = life_->sleeps[shard];
    DirtyRing &ring = *world_.hwpt->rings[shard];
    if (sleep.asleep && !ring.rung && !life_->shards[shard]->stirred().is_set() && world_.now < sleep.until)
        return false;
    ring.rung = false;
    if (std::exchange(sleep.asleep, false)) {
        world_.met(Event::shard_wakes);
        life_->shards[shard]->wake();
    }
    return true;
}

void Service::step_shard(unsigned shard)
{
    if (!is_free(Life::owner(shard)) || shard >= life_->shards.size())
        return;
    world_.now += 1000;
    world_.say([&] { return fmt::format("shard {} takes a step", shard); });
    on(Life::owner(shard), [&] {
        if (wake_shard(shard))
            static_cast<void>(life_->shards[shard]->step(world_.now));
    });
}

bool Service::wake_home()
{
    if (life_->home_asleep && !world_.kicked && !life_->commands->stirred().is_set())
        return false;
    world_.kicked = false;
    if (std::exchange(life_->home_asleep, false))
        life_->commands->wake();
    return true;
}

void Service::step_home()
{
    if (!is_free(0))
        return;
    world_.say([&] { return "the home walker looks at commands"; });
    on(0, [&] {
        life_->inboxes[0].drain();
        if (!life_->home_begun) {
            life_->commands->restored();
            life_->home_begun = true; // only now peers are served
            world_.met(Event::home_returns);
        } else if (wake_home()) {
            static_cast<void>(life_->commands->step(world_.now));
        }
    });
}

void Service::drain(unsigned walker)
{
    if (!is_free(walker))
        return;
    world_.say([&] { return fmt::format("walker {} does its tasks", walker); });
    on(walker, [&] { life_->inboxes[walker].drain(); });
}

void Service::sleep_shard(unsigned shard)
{
    if (!is_free(Life::owner(shard)) || shard >= life_->shards.size() || life_->sleeps[shard].asleep)
        return;
    world_.say([&] { return fmt::format("shard {} goes to sleep", shard); });
    on(Life::owner(shard), [&] {
        service::Shard &s = *life_->shards[shard];
        const service::Rest rest = s.prepare_sleep(world_.now);
        if (rest.busy || s.stirred().is_set())
            return s.wake();
        life_->sleeps[shard] = {true, rest.until_ns};
        world_.met(Event::shard_sleeps);
    });
}

void Service::sleep_home()
{
    if (!is_free(0) || life_->home_asleep || !life_->home_begun)
        return;
    on(0, [&] {
        if (!life_->commands->prepare_sleep(world_.now).busy && !life_->commands->stirred().is_set())
            life_->home_asleep = true;
        else
            life_->commands->wake();
    });
}

std::uint64_t Service::settle()
{
    start();
    bool worked = true;
    for (unsigned round = 0; worked && round < 2000; ++round) {
        worked = false;
        run(3, [&] {
            Life &life = *life_;
            worked |= life.inboxes[0].drain();
            worked |= life.inboxes[1].drain();
            if (!std::exchange(life.home_begun, true)) {
                life.commands->restored();
                worked = true;
            } else if (wake_home()) {
                worked |= life.commands->step(world_.now);
            }
            for (unsigned i = 0; i < life.shards.size(); ++i) {
                world_.now += 1000;
                if (wake_shard(i))
                    worked |= life.shards[i]->step(world_.now);
            }
        });
    }
    std::uint64_t until = UINT64_MAX;
    for (unsigned i = 0; i < life_->shards.size(); ++i) {
        sleep_shard(i);
        until = std::min(until, life_->sleeps[i].asleep ? life_->sleeps[i].until : world_.now);
    }
    sleep_home();
    return until;
}

} // namespace dirtyring::search
