#include "service/commands.hpp"

#include <algorithm>
#include <cerrno>

namespace dirtyring::service {

namespace {

constexpr std::uint64_t payload_mask = (1ull << DR_PAYLOAD_BITS) - 1;
// Commands that may be overtaken by those behind them.
constexpr std::size_t waiting_max = 16;

// [start, end) ∩ [other_start, other_end) ≠ ∅
bool overlap(std::uint64_t start, std::uint64_t end, std::uint64_t other_start, std::uint64_t other_end)
{
    return start < other_end && other_start < end;
}

bool aligned(std::uint64_t value)
{
    return value % DR_PAGE == 0;
}

std::uint64_t end_of(const dr_command &request)
{
    return request.iova + std::min(request.length, UINT64_MAX - request.iova);
}

bool is_range(std::uint32_t opcode)
{
    return opcode == DR_OP_MAP || opcode == DR_OP_UNMAP;
}

} // namespace

Commands::Commands(Config config)
    : home_(config.home), submissions_(config.submissions, config.submissions_peer, config.capacity),
      completions_(config.completions, config.completions_peer), call_(std::move(config.call))
{
    for (std::uint32_t i = 0; i < config.capacity; ++i) {
        slots_.push_back(std::make_unique<Command>());
        free_.push_back(slots_.back().get());
    }
}

Commands::~Commands() = default;

bool Commands::poll()
{
    // A submission is taken only when its completion will have a slot.
    const std::uint64_t promised = in_flight_ + taken_.size();
    const std::uint64_t room = completions_.room();
    if (room > promised) {
        const auto fresh = submissions_.peek(room - promised);
        taken_.insert(taken_.end(), fresh.begin(), fresh.end());
        look_again_ |= !fresh.empty();
        if (!fresh.empty() && submissions_.release(fresh.size()))
            call_();
    }
    if (!std::exchange(look_again_, false))
        return false;
    std::size_t waiting = 0;
    const std::size_t taken = taken_.size();
    for (std::size_t i = 0; i < taken; ++i) {
        const dr_command request = taken_[i];
        const int result =
            waiting >= waiting_max || meets_one_waiting(request, waiting) ? -EINPROGRESS : start(request);
        if (result == -EINPROGRESS)
            taken_[waiting++] = request;
        else if (result < 0)
            complete(request, result, 0, 0);
    }
    taken_.resize(waiting);
    return waiting < taken;
}

bool Commands::prepare_sleep()
{
    if (completions_.room() <= in_flight_ + taken_.size()) {
        completions_.want_kick(true);
        asked_for_kick_ = true;
        return completions_.room() <= in_flight_ + taken_.size();
    }
    return submissions_.arm();
}

void Commands::wake()
{
    submissions_.disarm();
    if (std::exchange(asked_for_kick_, false))
        completions_.want_kick(false);
}

void Commands::cancel()
{
    for (const auto &c : slots_)
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
    for (const auto &c : slots_) {
        if (c->in_flight && c->request.object == (is_range(c->request.opcode) ? ioas : id))
            c->result = -ECANCELED;
    }
    ioases_[ioas] = {};
    hwpts_.erase(it);
}

// ---- checks ------------------------------------------------------------------------------------------------------------

int Commands::start(const dr_command &request)
{
    if (request.reserved0 != 0 || request.reserved1 != 0)
        return -EINVAL;
    switch (request.opcode) {
    case DR_OP_MAP:
        return start_map(request);
    case DR_OP_UNMAP:
        return start_unmap(request);
    case DR_OP_SYNC:
    case DR_OP_ENABLE:
    case DR_OP_DISABLE:
        return start_on_hwpt(request);
    default:
        return -EINVAL;
    }
}

// Has it to wait for one of the first `waiting` that were taken?
bool Commands::meets_one_waiting(const dr_command &request, std::size_t waiting) const
{
    return std::any_of(taken_.begin(), taken_.begin() + static_cast<std::ptrdiff_t>(waiting), [&](const dr_command &w) {
        if (w.object != request.object || is_range(w.opcode) != is_range(request.opcode))
            return false;
        if (!is_range(request.opcode))
            return w.opcode != DR_OP_SYNC || request.opcode != DR_OP_SYNC;
        return overlap(request.iova, end_of(request), w.iova, end_of(w));
    });
}

bool Commands::meets_one_in_flight(const dr_command &request, std::uint64_t end) const
{
    return in_flight_ > 0 && std::any_of(slots_.begin(), slots_.end(), [&](const auto &c) {
               return c->in_flight && c->request.object == request.object && is_range(c->request.opcode) &&
                      overlap(request.iova, end, c->request.iova, c->end);
           });
}

namespace {

// The hwpt of an ioas; nullptr: it has none.
template <class Map> auto *route_of(Map &hwpts, std::uint32_t ioas)
{
    const auto it = std::find_if(hwpts.begin(), hwpts.end(), [&](const auto &h) { return h.second.ioas == ioas; });
    return it == hwpts.end() ? nullptr : &it->second;
}

} // namespace

int Commands::start_map(const dr_command &request)
{
    constexpr std::uint32_t known = DR_MAP_READ | DR_MAP_WRITE | DR_MAP_IDEMPOTENT;
    const iommu::Rights rights{(request.flags & DR_MAP_READ) != 0, (request.flags & DR_MAP_WRITE) != 0};
    if ((request.flags & ~known) != 0 || (!rights.read && !rights.write) || !aligned(request.iova) ||
        !aligned(request.oa) || !aligned(request.length) || request.length == 0 || request.cookie != 0)
        return -EINVAL;
    const auto ioas = ioases_.find(request.object);
    if (ioas == ioases_.end())
        return -ENOENT;
    const HwptRoute *route = route_of(hwpts_, request.object);
    if (route == nullptr)
        return -ENOSPC;
    const std::uint64_t aperture = 1ull << route->aperture_lg2;
    if (request.iova >= aperture || request.length > aperture - request.iova)
        return -ERANGE;
    std::uint64_t backed = request.oa;
    for (const Memory &m : memory_) {
        if (m.oa <= backed && backed - m.oa < m.length)
            backed = m.oa + m.length;
    }
    if (backed - request.oa < request.length)
        return -EFAULT;
    const std::uint64_t end = request.iova + request.length;
    if (meets_one_in_flight(request, end))
        return -EINPROGRESS;
    iommu::ExtentMap &extents = ioas->second;
    if (extents.first_in(request.iova, end)) {
        if ((request.flags & DR_MAP_IDEMPOTENT) == 0 || !extents.maps_to(request.iova, end, request.oa, rights))
            return -EEXIST;
        complete(request, 0, 0, 0);
        return 0;
    }
    extents.insert({request.iova, end, request.oa, rights});

    Command &command = begin(request);
    command.end = end;
    add_range_parts(command, ShardOp::Kind::map, *route);
    for (Part &part : command.parts) {
        part.oa = request.oa + (part.start - request.iova);
        part.rights = rights;
    }
    send_all(command);
    return 0;
}

int Commands::start_unmap(const dr_command &request)
{
    constexpr std::uint32_t known = DR_UNMAP_EMPTY_OK | DR_UNMAP_DEFERRED | DR_UNMAP_DISCARD;
    constexpr std::uint32_t both = DR_UNMAP_DEFERRED | DR_UNMAP_DISCARD;
    const bool rest = request.length == UINT64_MAX;
    if ((request.flags & ~known) != 0 || (request.flags & both) == both || !aligned(request.iova) ||
        (!rest && !aligned(request.length)) || request.length == 0 || request.oa != 0 || request.cookie != 0)
        return -EINVAL;
    const auto ioas = ioases_.find(request.object);
    if (ioas == ioases_.end())
        return -ENOENT;
    HwptRoute *route = route_of(hwpts_, request.object);
    const bool empty_ok = (request.flags & DR_UNMAP_EMPTY_OK) != 0;
    if (route == nullptr)
        return empty_ok ? (complete(request, 0, request.length, 0), 0) : -ENOENT;
    const std::uint64_t aperture = 1ull << route->aperture_lg2;
    if (request.iova >= aperture || (!rest && request.length > aperture - request.iova))
        return -ERANGE;
    const std::uint64_t end = rest ? aperture : request.iova + request.length;
    if (meets_one_in_flight(request, end))
        return -EINPROGRESS;
    const iommu::ExtentMap &extents = ioas->second;
    if (extents.spans(request.iova) || extents.spans(end))
        return -ENOENT;
    if (!extents.first_in(request.iova, end))
        return empty_ok ? (complete(request, 0, end - request.iova, 0), 0) : -ENOENT;

    Command &command = begin(request);
    command.end = end;
    command.reached = request.iova;
    if (route->enabled && route->epochs)
        command.epoch = ++route->epoch & payload_mask;
    add_range_parts(command, ShardOp::Kind::unmap, *route);
    std::erase_if(command.parts, [&](const Part &part) { return !extents.first_in(part.start, part.end); });
    for (Part &part : command.parts) {
        part.epoch = command.epoch;
        part.harvest = (request.flags & DR_UNMAP_DEFERRED) != 0  ? ShardOp::Harvest::deferred
                       : (request.flags & DR_UNMAP_DISCARD) != 0 ? ShardOp::Harvest::discard
                                                                 : ShardOp::Harvest::now;
    }
    // One after the other, so that what is done is one piece from the start.
    command.sent = 1;
    command.parts.front().send();
    return 0;
}

int Commands::start_on_hwpt(const dr_command &request)
{
    if (request.flags != 0 || request.iova != 0 || request.length != 0 || request.oa != 0 ||
        request.cookie > (request.opcode == DR_OP_SYNC ? payload_mask : 0))
        return -EINVAL;
    const auto it = hwpts_.find(request.object);
    if (it == hwpts_.end())
        return -ENOENT;
    HwptRoute &route = it->second;
    if (!route.tracks)
        return -EOPNOTSUPP;
    // Syncs go side by side; a change of tracking goes alone, for it would take away what a sync has yet to find.
    const bool meets = std::any_of(slots_.begin(), slots_.end(), [&](const auto &c) {
        return c->in_flight && c->request.object == request.object && !is_range(c->request.opcode) &&
               (c->request.opcode != DR_OP_SYNC || request.opcode != DR_OP_SYNC);
    });
    if (meets)
        return -EINPROGRESS;
    ShardOp::Kind kind = ShardOp::Kind::sync;
    if (request.opcode != DR_OP_SYNC) {
        const bool enable = request.opcode == DR_OP_ENABLE;
        if (route.enabled == enable)
            return -EALREADY;
        route.enabled = enable;
        kind = enable ? ShardOp::Kind::enable : ShardOp::Kind::disable;
    }
    Command &command = begin(request);
    for (const Placed &place : route.shards)
        add_part(command, kind, place).cookie = request.cookie;
    send_all(command);
    return 0;
}

// ---- flight -------------------------------------------------------------------------------------------------------------

Commands::Command &Commands::begin(const dr_command &request)
{
    Command &command = *free_.back();
    free_.pop_back();
    ++in_flight_;
    command.request = request;
    command.in_flight = true;
    command.end = command.reached = command.epoch = 0;
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
    return part;
}

void Commands::add_range_parts(Command &command, ShardOp::Kind kind, const HwptRoute &route)
{
    const std::uint64_t slice = 1ull << route.slice_lg2;
    for (std::uint64_t at = command.request.iova; at < command.end;) {
        const std::uint64_t upto = std::min(command.end, (at / slice + 1) * slice);
        Part &part = add_part(command, kind, route.shards[at >> route.slice_lg2]);
        part.start = at;
        part.end = upto;
        at = upto;
    }
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
    if (command.request.opcode == DR_OP_UNMAP) {
        command.reached = part.result == 0 ? part.end : part.reached;
        if (command.result == 0 && command.sent < command.parts.size())
            return command.parts[command.sent++].send();
        if (command.result == 0)
            command.reached = command.end;
    }
    if (command.returned < command.sent)
        return;
    if (command.request.opcode == DR_OP_MAP && command.result != 0)
        return roll_back(command);
    finish(command);
}

// A map is whole or not at all: takes out the parts that did succeed. What devices wrote meanwhile is reported.
void Commands::roll_back(Command &command)
{
    std::erase_if(command.parts, [](const Part &part) { return part.result != 0; });
    // Given up: the shards go, and with them what they have mapped.
    if (command.rolling_back || command.result == -ECANCELED || command.parts.empty())
        return finish(command);
    command.rolling_back = true;
    for (Part &part : command.parts)
        part.kind = ShardOp::Kind::unmap;
    send_all(command);
}

void Commands::finish(Command &command)
{
    const dr_command &request = command.request;
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
    command.in_flight = false;
    --in_flight_;
    look_again_ = true;
    free_.push_back(&command);
    complete(request, command.result, done, command.epoch);
}

void Commands::complete(const dr_command &request, int result, std::uint64_t done, std::uint64_t epoch)
{
    completions_.put(0, {request.user_data, result, 0, done, epoch});
    completions_.stage(1);
    if (completions_.publish())
        call_();
}

} // namespace dirtyring::service
