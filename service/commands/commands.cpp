#include "service/commands/commands.hpp"

#include "service/commands/command_checks.hpp"

#include <algorithm>
#include <cassert>
#include <cerrno>

namespace dirtyring::service {

namespace {

// Commands that may be overtaken by those behind them.
constexpr std::size_t waiting_max = 16;

bool goes_alone(std::uint32_t opcode)
{
    return opcode == DR_OP_ENABLE || opcode == DR_OP_DISABLE;
}

// Must one of them wait for the other? Syncs and resizes go side by side; a change of tracking goes alone, for it would
// take away what a sync has yet to find.
bool meet(const dr_command &a, std::uint64_t a_end, const dr_command &b, std::uint64_t b_end)
{
    if (a.object != b.object || is_range(a.opcode) != is_range(b.opcode))
        return false;
    if (!is_range(a.opcode))
        return goes_alone(a.opcode) || goes_alone(b.opcode);
    return a.iova < b_end && b.iova < a_end;
}

} // namespace

Commands::Commands(Config config)
    : Agent(Turn::first), home_(config.home),
      journal_(config.journal, config.submissions->tail, config.completions->head),
      submissions_(config.submissions, config.submissions_peer, config.capacity, journal_.tail()),
      completions_(config.completions, config.completions_peer, journal_.left().size()), call_(std::move(config.call)),
      restarting_(config.restarted)
{
    assert(config.journal.size() == config.capacity);
    in_flight_.reserve(config.capacity);
    for (std::uint32_t i = 0; i < config.capacity; ++i) {
        slots_.push_back(std::make_unique<Command>());
        free_.push_back(slots_.back().get());
    }
}

Commands::~Commands() = default;

bool Commands::step(std::uint64_t /*now_ns*/)
{
    if (restarting_)
        return false;
    // A submission is taken only when its completion will have a slot.
    const std::uint64_t promised = journal_.in_use();
    const std::uint64_t room = completions_.room();
    if (room > promised)
        take(submissions_.peek(room - promised));
    if (!stirred_.take())
        return false;
    std::size_t waiting = 0;
    std::size_t tried = 0;
    for (; tried < taken_.size() && waiting < waiting_max; ++tried) {
        CommandRecord &record = *taken_[tried];
        const int result = meets_one_waiting(record.request, waiting) ? -EINPROGRESS : start(record);
        if (result == -EINPROGRESS)
            taken_[waiting++] = &record;
        else if (result < 0)
            complete(record, result, 0, 0);
    }
    const auto place = [&](std::size_t i) { return taken_.begin() + static_cast<std::ptrdiff_t>(i); };
    taken_.erase(place(waiting), place(tried));
    return waiting < tried;
}

// Recorded first: once the tail has passed it, the ring no longer holds it for us.
void Commands::take(std::span<const dr_command> fresh)
{
    if (fresh.empty())
        return;
    std::uint64_t index = submissions_.tail();
    for (const dr_command &request : fresh) {
        taken_.push_back(&journal_.take(request, index++));
        point(Point::command_recorded);
    }
    stirred_.set();
    const bool wanted = submissions_.release(fresh.size()); // J2
    point(Point::command_taken);
    if (wanted)
        call_();
}

Rest Commands::prepare_sleep(std::uint64_t /*now_ns*/)
{
    if (restarting_)
        return {};
    if (completions_.room() <= journal_.in_use()) {
        completions_.want_kick(true); // R5
        asked_for_kick_ = true;
        return {.busy = completions_.room() > journal_.in_use()}; // R5: look again
    }
    return {.busy = !submissions_.arm()}; // R4
}

void Commands::wake()
{
    submissions_.disarm();
    if (std::exchange(asked_for_kick_, false))
        completions_.want_kick(false);
}

void Commands::cancel()
{
    for (Command *c : in_flight_)
        c->result = -ECANCELED;
}

void Commands::add_memory(std::uint64_t oa, std::uint64_t length)
{
    memory_.push_back({oa, length});
    std::sort(memory_.begin(), memory_.end(), [](const Memory &a, const Memory &b) { return a.oa < b.oa; });
}

void Commands::add_ioas(std::uint32_t id)
{
    ioases_.try_emplace(id);
}

void Commands::remove_ioas(std::uint32_t id)
{
    ioases_.erase(id);
}

bool Commands::ioas_has_maps(std::uint32_t id) const
{
    return !ioases_.at(id).empty();
}

void Commands::add_hwpt(std::uint32_t id, HwptRoute route)
{
    hwpts_.emplace(id, std::move(route));
}

void Commands::remove_hwpt(std::uint32_t id)
{
    const auto it = hwpts_.find(id);
    const std::uint32_t ioas = it->second.ioas;
    for (Command *c : in_flight_) {
        if (c->request().object == (is_range(c->request().opcode) ? ioas : id))
            c->result = -ECANCELED;
    }
    ioases_[ioas] = {};
    hwpts_.erase(it);
}

bool Commands::admit(std::uint32_t hwpt, std::uint32_t device)
{
    HwptRoute &route = hwpts_.at(hwpt);
    if (enabled(hwpt, route))
        return false;
    route.in_the_way.insert(device);
    return true;
}

void Commands::withdraw(std::uint32_t hwpt, std::uint32_t device)
{
    if (const auto it = hwpts_.find(hwpt); it != hwpts_.end())
        it->second.in_the_way.erase(device);
}

Tracking Commands::tracking(std::uint32_t hwpt) const
{
    const HwptRoute &route = hwpts_.at(hwpt);
    return {enabled(hwpt, route), route.in_the_way.empty() ? 0 : *route.in_the_way.begin()};
}

// A DISABLE that is on its way has not ended it yet.
bool Commands::enabled(std::uint32_t hwpt, const HwptRoute &route) const
{
    return route.record->enabled != 0 || std::any_of(in_flight_.begin(), in_flight_.end(), [&](const Command *c) {
               return c->request().object == hwpt && goes_alone(c->request().opcode);
           });
}

// ---- checks ---------------------------------------------------------------------------------------------------------

int Commands::start(CommandRecord &record)
{
    if (!well_formed(record.request))
        return -EINVAL;
    switch (record.request.opcode) {
    case DR_OP_MAP:
        return start_map(record);
    case DR_OP_UNMAP:
        return start_unmap(record);
    case DR_OP_SPLIT:
    case DR_OP_COLLAPSE:
        return start_resize(record);
    default:
        return start_on_hwpt(record);
    }
}

// Has it to wait for one of the first `waiting` that were taken?
bool Commands::meets_one_waiting(const dr_command &request, std::size_t waiting) const
{
    return std::any_of(taken_.begin(), taken_.begin() + static_cast<std::ptrdiff_t>(waiting),
                       [&](const auto *w) { return meet(request, end_of(request), w->request, end_of(w->request)); });
}

bool Commands::meets_one_in_flight(const dr_command &request, std::uint64_t end) const
{
    return std::any_of(in_flight_.begin(), in_flight_.end(),
                       [&](const Command *c) { return meet(request, end, c->request(), c->end); });
}

HwptRoute *Commands::route_of(std::uint32_t ioas)
{
    const auto it = std::find_if(hwpts_.begin(), hwpts_.end(), [&](const auto &h) { return h.second.ioas == ioas; });
    return it == hwpts_.end() ? nullptr : &it->second;
}

int Commands::start_map(CommandRecord &record)
{
    const dr_command &request = record.request;
    const auto ioas = ioases_.find(request.object);
    if (ioas == ioases_.end())
        return -ENOENT;
    const HwptRoute *route = route_of(request.object);
    if (route == nullptr)
        return -ENOSPC;
    const std::uint64_t end = end_within(request, route->aperture_lg2);
    if (end == 0)
        return -ERANGE;
    std::uint64_t backed = request.oa;
    for (const Memory &m : memory_) {
        if (m.oa <= backed && backed - m.oa < m.length)
            backed = m.oa + m.length;
    }
    if (backed - request.oa < request.length || request.oa + request.length > 1ull << route->oa_lg2)
        return -EFAULT;
    if (meets_one_in_flight(request, end))
        return -EINPROGRESS;
    iommu::ExtentMap &extents = ioas->second;
    const iommu::Rights rights = rights_of(request);
    if (extents.first_in(request.iova, end)) {
        if ((request.flags & DR_MAP_IDEMPOTENT) == 0 || !extents.maps_to(request.iova, end, request.oa, rights))
            return -EEXIST;
        complete(record, 0, 0, 0);
        return 0;
    }
    extents.insert({request.iova, end, request.oa, rights});
    send_map(begin(record, end, 0), *route);
    return 0;
}

int Commands::start_unmap(CommandRecord &record)
{
    const dr_command &request = record.request;
    const auto ioas = ioases_.find(request.object);
    if (ioas == ioases_.end())
        return -ENOENT;
    const HwptRoute *route = route_of(request.object);
    const bool empty_ok = (request.flags & DR_UNMAP_EMPTY_OK) != 0;
    if (route == nullptr)
        return empty_ok ? (complete(record, 0, request.length, 0), 0) : -ENOENT;
    const std::uint64_t end = end_within(request, route->aperture_lg2);
    if (end == 0)
        return -ERANGE;
    if (meets_one_in_flight(request, end))
        return -EINPROGRESS;
    const iommu::ExtentMap &extents = ioas->second;
    if (extents.spans(request.iova) || extents.spans(end))
        return -ENOENT;
    if (!extents.first_in(request.iova, end))
        return empty_ok ? (complete(record, 0, end - request.iova, 0), 0) : -ENOENT;
    // Whether it is used the shard says that the unmap begins in: an ENABLE may overtake it.
    std::uint64_t epoch = 0;
    if (route->tracks && route->epochs && (route->record->enabled != 0 || !broken(Rule::epoch_at_submission))) {
        // Counted before it is used: a death in between skips one, and none is used twice.
        record_word(route->record->epoch, route->record->epoch + 1);
        epoch = route->record->epoch & payload_mask;
    }
    send_unmap(begin(record, end, epoch), *route);
    return 0;
}

int Commands::start_resize(CommandRecord &record)
{
    const dr_command &request = record.request;
    const auto it = hwpts_.find(request.object);
    if (it == hwpts_.end())
        return -ENOENT;
    const HwptRoute &route = it->second;
    if (request.leaf_lg2 >= 64 || (route.leaf_sizes >> request.leaf_lg2 & 1) == 0)
        return -EINVAL;
    const std::uint64_t end = end_within(request, route.aperture_lg2);
    if (end == 0)
        return -ERANGE;
    if (meets_one_in_flight(request, 0))
        return -EINPROGRESS;
    send_resize(begin(record, end, 0), route);
    return 0;
}

int Commands::start_on_hwpt(CommandRecord &record)
{
    const dr_command &request = record.request;
    const auto it = hwpts_.find(request.object);
    if (it == hwpts_.end())
        return -ENOENT;
    const HwptRoute &route = it->second;
    if (!route.tracks)
        return -EOPNOTSUPP;
    if (meets_one_in_flight(request, 0))
        return -EINPROGRESS;
    if (request.opcode != DR_OP_SYNC && (route.record->enabled != 0) == (request.opcode == DR_OP_ENABLE))
        return -EALREADY;
    if (request.opcode == DR_OP_ENABLE && !route.in_the_way.empty())
        return -ENODEV;
    send_on_hwpt(begin(record, 0, 0), route);
    return 0;
}

// ---- flight ---------------------------------------------------------------------------------------------------------

Commands::Command &Commands::begin(CommandRecord &record, std::uint64_t end, std::uint64_t epoch)
{
    CommandJournal::begin(record, epoch);
    point(Point::command_begun);
    return enter(record, end);
}

Commands::Command &Commands::enter(CommandRecord &record, std::uint64_t end)
{
    Command &command = *free_.back();
    free_.pop_back();
    in_flight_.push_back(&command);
    command.record = &record;
    command.again = false;
    command.end = end;
    command.reached = record.request.iova;
    command.sent = command.returned = 0;
    command.result = 0;
    command.rolling_back = false;
    command.parts.clear();
    return command;
}

Commands::Part &Commands::add_part(Command &command, ShardOp::Kind kind, const Placed &place)
{
    Part &part = command.parts.emplace_back();
    part.commands = this;
    part.command = &command;
    part.place = place;
    part.kind = kind;
    part.again = command.again;
    part.note = &command.record->note;
    return part;
}

void Commands::add_range_parts(Command &command, ShardOp::Kind kind, const HwptRoute &route)
{
    const std::uint64_t slice = 1ull << route.slice_lg2;
    for (std::uint64_t at = command.request().iova; at < command.end;) {
        const std::uint64_t upto = std::min(command.end, (at / slice + 1) * slice);
        Part &part = add_part(command, kind, route.shards[at >> route.slice_lg2]);
        part.start = at;
        part.end = upto;
        at = upto;
    }
}

void Commands::send_map(Command &command, const HwptRoute &route)
{
    const dr_command &request = command.request();
    add_range_parts(command, ShardOp::Kind::map, route);
    for (Part &part : command.parts) {
        part.oa = request.oa + (part.start - request.iova);
        part.rights = rights_of(request);
        part.continues = part.start != request.iova;
    }
    send_all(command);
}

void Commands::send_unmap(Command &command, const HwptRoute &route)
{
    const dr_command &request = command.request();
    add_range_parts(command, ShardOp::Kind::unmap, route);
    // Where it was at work before a restart nothing may be left, and yet there is a marker to put.
    if (!command.again) {
        const iommu::ExtentMap &extents = ioases_.at(request.object);
        std::erase_if(command.parts, [&](const Part &part) { return !extents.first_in(part.start, part.end); });
    }
    for (Part &part : command.parts) {
        part.epoch = command.record->epoch;
        part.harvest = (request.flags & DR_UNMAP_DEFERRED) != 0  ? ShardOp::Harvest::deferred
                       : (request.flags & DR_UNMAP_DISCARD) != 0 ? ShardOp::Harvest::discard
                                                                 : ShardOp::Harvest::now;
    }
    // One after the other, so that what is done is one piece from the start.
    command.sent = 1;
    command.parts.front().send();
}

void Commands::send_resize(Command &command, const HwptRoute &route)
{
    const dr_command &request = command.request();
    add_range_parts(command, request.opcode == DR_OP_SPLIT ? ShardOp::Kind::split : ShardOp::Kind::collapse, route);
    for (Part &part : command.parts)
        part.leaf_lg2 = request.leaf_lg2;
    send_all(command);
}

void Commands::send_on_hwpt(Command &command, const HwptRoute &route)
{
    const dr_command &request = command.request();
    ShardOp::Kind kind = ShardOp::Kind::sync;
    if (request.opcode != DR_OP_SYNC) {
        const bool enable = request.opcode == DR_OP_ENABLE;
        kind = enable ? ShardOp::Kind::enable : ShardOp::Kind::disable;
        // After it has begun: a restart that found it set and the command not begun would refuse with EALREADY.
        record_word(route.record->enabled, enable ? 1 : 0);
    }
    for (const Placed &place : route.shards)
        add_part(command, kind, place).cookie = request.cookie;
    send_all(command);
}

void Commands::Part::send()
{
    back = false;
    if (place.owner == commands->home_)
        place.shard->submit(*this);
    else
        place.owner->post(*this);
}

void Commands::Part::done()
{
    back = true;
    if (place.owner == commands->home_)
        commands->part_done(*this);
    else
        commands->home_->post(*this);
}

void Commands::Part::run()
{
    if (back)
        commands->part_done(*this);
    else
        place.shard->submit(*this);
}

void Commands::send_all(Command &command)
{
    command.sent = command.parts.size();
    command.returned = 0;
    for (Part &part : command.parts)
        part.send();
}

void Commands::part_done(Part &part)
{
    Command &command = *part.command;
    if (command.rolling_back && part.result == -EAGAIN && command.result != -ECANCELED)
        return part.send(); // its consumer will make room
    ++command.returned;
    if (command.result == 0)
        command.result = part.result;
    if (command.request().opcode == DR_OP_UNMAP) {
        command.reached = part.result == 0 ? part.end : part.reached;
        if (command.result == 0 && command.sent < command.parts.size())
            return command.parts[command.sent++].send();
        if (command.result == 0)
            command.reached = command.end;
    }
    if (command.returned < command.sent)
        return;
    if (command.request().opcode == DR_OP_MAP && command.result != 0)
        return roll_back(command);
    finish(command);
}

// A map is whole or not at all: takes out the parts that did succeed. What devices wrote meanwhile is reported.
void Commands::roll_back(Command &command)
{
    // Of one that was done before a restart something may be there even so.
    std::erase_if(command.parts, [](const Part &part) { return part.result != 0 && !part.again; });
    // Given up: the shards go, and with them what they have mapped.
    if (command.rolling_back || command.result == -ECANCELED || command.parts.empty())
        return finish(command);
    CommandJournal::roll_back(*command.record, command.result);
    command.rolling_back = true;
    for (Part &part : command.parts)
        part.kind = ShardOp::Kind::unmap;
    send_all(command);
}

void Commands::finish(Command &command)
{
    CommandRecord &record = *command.record;
    const dr_command &request = record.request;
    std::uint64_t done = 0;
    // A destroyed object takes its record along.
    if (const auto ioas = ioases_.find(request.object); ioas != ioases_.end()) {
        if (request.opcode == DR_OP_MAP && command.result != 0)
            ioas->second.erase(request.iova, command.end);
        if (request.opcode == DR_OP_UNMAP)
            ioas->second.erase(request.iova, command.reached);
    }
    if (request.opcode == DR_OP_UNMAP)
        done = command.reached - request.iova;
    std::erase(in_flight_, &command);
    stirred_.set();
    free_.push_back(&command);
    complete(record, command.result, done, (record.note & UnmapNote::marked) != 0 ? record.epoch : 0);
}

void Commands::complete(CommandRecord &record, int result, std::uint64_t done, std::uint64_t epoch)
{
    const dr_completion completion{record.request.user_data, result, 0, done, epoch};
    CommandJournal::finish(record, completion, completions_.staged());
    point(Point::command_done);
    completions_.put(0, completion);
    completions_.stage(1);
    const bool wanted = completions_.publish(); // J6
    point(Point::command_completed);
    journal_.release(record);
    if (wanted)
        call_();
}

} // namespace dirtyring::service
