// What a guest's home walker does first after a restart.
#include "service/commands/command_checks.hpp"
#include "service/commands/commands.hpp"

#include <algorithm>
#include <cerrno>

namespace dirtyring::service {

void Commands::restore_extents(std::uint32_t ioas, std::span<const iommu::SliceRecord> slices)
{
    std::vector<iommu::SliceRecord::Found> pieces;
    for (const iommu::SliceRecord &slice : slices)
        slice.for_each([&](const iommu::SliceRecord::Found &found) { pieces.push_back(found); });
    std::sort(pieces.begin(), pieces.end(),
              [](const auto &a, const auto &b) { return a.extent.start < b.extent.start; });

    iommu::ExtentMap &extents = ioases_.at(ioas);
    for (std::size_t i = 0; i < pieces.size();) {
        iommu::Extent map = pieces[i].extent;
        // One map of the VMM's again, that no unmap may cut in two.
        for (++i; i < pieces.size(); ++i) {
            const iommu::Extent &next = pieces[i].extent;
            if (!pieces[i].continues || next.start != map.end || next.oa - next.start != map.oa - map.start ||
                next.rights != map.rights)
                break;
            map.end = next.end;
        }
        extents.insert(map);
    }
}

void Commands::restored()
{
    restarting_ = false;
    stirred_.set();
    // Before any record is free again: a record is what keeps its submission from being taken twice.
    static_cast<void>(submissions_.release(0));
    submissions_.disarm();
    completions_.unstage();
    completions_.want_kick(false);
    for (CommandRecord *record : journal_.left()) {
        const dr_completion &c = record->completion;
        if (record->state == CommandRecord::done)
            complete(*record, c.result, c.done, c.epoch);
        else if (record->state == CommandRecord::taken)
            taken_.push_back(record);
        else
            start_again(*record);
    }
    if (!broken(Rule::restart_without_call))
        call_();
}

// It had passed its checks when it began. What they look at may be half changed by it now, so they are not made again.
void Commands::start_again(CommandRecord &record)
{
    const dr_command &request = record.request;
    if (!well_formed(request))
        return complete(record, -EIO, 0, 0);
    const bool range = is_range(request.opcode);
    const bool resize = is_resize(request.opcode);
    const auto hwpt = hwpts_.find(request.object);
    const HwptRoute *route = range ? route_of(request.object) : hwpt != hwpts_.end() ? &hwpt->second : nullptr;
    if (route == nullptr)
        return complete(record, -ECANCELED, 0, 0);
    const bool rolling_back = record.state == CommandRecord::rolling_back;
    const std::uint64_t end = range || resize ? end_within(request, route->aperture_lg2) : 0;
    if ((range || resize ? end == 0 : !route->tracks) || meets_one_in_flight(request, end) ||
        (rolling_back && (request.opcode != DR_OP_MAP || record.completion.result >= 0)))
        return complete(record, -EIO, 0, 0);

    Command &command = enter(record, end);
    command.again = true;
    if (rolling_back) {
        command.rolling_back = true;
        command.result = record.completion.result;
        add_range_parts(command, ShardOp::Kind::unmap, *route);
        send_all(command);
    } else if (request.opcode == DR_OP_MAP) {
        // Of its parts some may be recorded: it is one map.
        iommu::ExtentMap &extents = ioases_.at(request.object);
        extents.erase(request.iova, end);
        extents.insert({request.iova, end, request.oa, rights_of(request)});
        send_map(command, *route);
    } else if (request.opcode == DR_OP_UNMAP) {
        send_unmap(command, *route);
    } else if (resize) {
        send_resize(command, *route);
    } else {
        send_on_hwpt(command, *route);
    }
}

} // namespace dirtyring::service
