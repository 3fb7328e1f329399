// What ring/SPEC.md asks for, sentence by sentence. A test holds the two to be the same.
#pragma once

#include <cstddef>
#include <iterator>
#include <string_view>

namespace dirtyring::check {

// Whom a sentence binds. A client is a front-end or a device; a sender is either end of a control connection.
enum class Role { sender, client, service, front_end, consumer, device };

struct Requirement {
    std::string_view number;
    Role role;
    std::string_view sentence;
};

// clang-format off
inline constexpr Requirement requirements[] = {
    {"F-1", Role::sender, "A sender MUST set the version bits of `flags` to `DR_PROTOCOL_VERSION` = 1 and every bit "
     "above bit 3 to zero."},
    {"F-2", Role::sender, "A sender MUST begin each payload with its own size, equal to `size` of the header, and "
     "send at least the fields of version 1."},
    {"F-3", Role::sender, "A sender MUST send the descriptors of a message with the first byte of its header."},
    {"F-4", Role::service, "The service MUST send exactly one reply to each request, in the order in which the "
     "requests came."},
    {"F-5", Role::service, "The service MUST reply with the request's number and sequence and with bit 2 of `flags` "
     "set."},
    {"F-6", Role::service, "The service MUST answer a request that it does not do with bit 3 of `flags` set and a "
     "struct dr_refusal whose errno is positive and whose sentence is not empty and ends with a NUL."},
    {"F-7", Role::service, "The service MUST NOT send a descriptor with a refusal."},
    {"F-8", Role::service, "The service MUST send with a reply exactly the descriptors that the table of requests "
     "lists, in that order."},
    {"F-9", Role::service, "The service MUST close a connection on which a header comes whose version bits are not "
     "1, whose bit 2 is set, or whose `size` is below 4 or above `DR_MESSAGE_MAX`."},
    {"F-10", Role::service, "The service MUST accept a message in pieces of any size."},
    {"F-11", Role::service, "The service MUST refuse with EOPNOTSUPP a request whose number it does not know."},
    {"F-12", Role::service, "The service MUST refuse with EINVAL a request whose payload misstates its size or lacks "
     "a field of version 1."},
    {"F-13", Role::service, "The service MUST refuse with E2BIG a request that has a byte other than zero beyond the "
     "fields that the service knows, and accept zeroes there."},
    {"F-14", Role::service, "The service MUST refuse with EINVAL a request that comes with more or fewer descriptors "
     "than the table of requests lists."},
    {"F-15", Role::service, "The service MUST close every descriptor of a request that it refuses."},
    {"F-16", Role::service, "The service MUST serve a connection after a refusal as if the refused request had not "
     "come."},
    {"F-17", Role::service, "The service MUST NOT refuse a request for which none of the reasons listed for it "
     "holds."},
    {"F-18", Role::client, "A client MUST ignore what a reply has beyond the fields that the client knows."},
    {"H-1", Role::client, "A client MUST send HELLO, with the newest version that it speaks, before any other "
     "request."},
    {"H-2", Role::client, "A client MUST NOT use a feature that the reply to its HELLO lacks."},
    {"H-3", Role::service, "The service MUST refuse with EPROTO each request that it knows, other than HELLO, on a "
     "connection whose HELLO has not been done."},
    {"H-4", Role::service, "The service MUST refuse with EPROTONOSUPPORT a HELLO whose version is older than any "
     "that the service speaks."},
    {"H-5", Role::service, "The service MUST answer HELLO with the newest version that both speak and with exactly "
     "the features that both offered."},
    {"H-6", Role::service, "The service MUST refuse with EPROTO a second HELLO, and every request that is for "
     "connections of another kind, except as H-7 says."},
    {"H-7", Role::service, "The service MUST refuse with EBUSY a GUEST_CREATE on a front-end and a DEVICE_ATTACH on "
     "an attached device."},
    {"O-1", Role::service, "The service MUST refuse a GUEST_CREATE whose `command_entries` is no power of two from "
     "`DR_COMMAND_CAPACITY_MIN` = 2 to `DR_COMMAND_CAPACITY_MAX` = 4096 with EINVAL."},
    {"O-2", Role::service, "The service MUST give each guest a token of `DR_TOKEN_BYTES` = 16 bytes that no "
     "other guest has."},
    {"O-3", Role::service, "The service MUST refuse a MEMORY_ADD with the errno that control.h lists for it: EINVAL, "
     "EEXIST, ENOSPC, EBUSY or EBADF."},
    {"O-4", Role::service, "The service MUST refuse a HWPT_ALLOC with the errno that control.h lists for it: ENOENT, "
     "EOPNOTSUPP, EINVAL or EBUSY."},
    {"O-5", Role::service, "The service MUST answer HWPT_ALLOC with the shards that were asked for and `slice_lg2` = "
     "`aperture_lg2` − log2(shards)."},
    {"O-6", Role::service, "The service MUST refuse a RING_GET with ENOENT where there is no such hwpt or shard, and "
     "with EOPNOTSUPP where the hwpt has no dirty tracking."},
    {"O-7", Role::service, "The service MUST refuse a DESTROY with ENOENT of what is not there, and with EBUSY of an "
     "ioas with an hwpt or of an hwpt with a device."},
    {"O-8", Role::service, "The service MUST NOT give an id to two objects of one guest, one after the other "
     "included."},
    {"O-9", Role::service, "The service MUST NOT find an object of one guest by an id that another guest sends."},
    {"O-10", Role::service, "The service MUST leave an ioas without maps when its hwpt is destroyed."},
    {"O-11", Role::service, "The service MUST complete each command in flight on a destroyed hwpt, or on its ioas, "
     "with ECANCELED."},
    {"O-12", Role::service, "The service MUST refuse a DEVICE_ATTACH with the errno that control.h lists for it: "
     "EACCES, ENOENT, EINVAL or EOPNOTSUPP."},
    {"O-13", Role::service, "The service MUST refuse a DEVICE_DETACH with EBUSY while a thread of the device is "
     "inside a section or holds a pin."},
    {"O-14", Role::service, "The service MUST know the cells of a device to every walker of its hwpt before it "
     "answers DEVICE_ATTACH."},
    {"O-15", Role::service, "The service MUST forget a guest when the connection of its front-end has closed and "
     "`linger_ms` have passed without a successor: its token is refused with EACCES from then on."},
    {"O-16", Role::service, "The service MUST hang up on the devices of a guest that is gone."},
    {"O-17", Role::service, "The service MUST answer a GUEST_CREATE with the secret of a guest as it answered the "
     "first, with the guest's token and descriptors, and hang up on the front-end that had it."},
    {"O-18", Role::service, "The service MUST refuse with ENOENT a GUEST_CREATE that has a flag and a secret that no "
     "guest has."},
    {"O-19", Role::service, "The service MUST answer a MEMORY_ADD, IOAS_ALLOC, HWPT_ALLOC or DESTROY that comes again "
     "with the sequence of the last that it did as it answered that one, and do nothing."},
    {"O-20", Role::service, "The service MUST take a DEVICE_ATTACH with the key of a device of the same process for "
     "that device."},
    {"O-21", Role::service, "The service MUST forget a guest at GUEST_DESTROY, whatever its `linger_ms`."},
    {"O-22", Role::service, "The service MUST answer a DEVICE_INFO with what the device declared that has the "
     "smallest id above the one asked for, and refuse it with ENOENT where there is none."},
    {"O-23", Role::service, "The service MUST answer a HWPT_STATUS with the hwpt's format, the number of its devices, "
     "the smallest id of those that cannot track it, whether it is supported and whether it is "
     "enabled, or refuse it with ENOENT where there is no such hwpt."},
    {"O-24", Role::service, "The service MUST let a device that cannot track it attach to an hwpt with "
     "`DR_HWPT_DIRTY_OPTIONAL` while that is not enabled."},
    {"O-25", Role::service, "The service MUST refuse with EINVAL a DEVICE_ATTACH of a device that cannot track it to "
     "an hwpt that is enabled."},
    {"O-26", Role::service, "The service MUST complete with ENODEV, and change nothing for, an ENABLE of an hwpt to "
     "which a device is attached that cannot track it."},
    {"E-1", Role::front_end, "A front-end MUST take everything that it tracks for dirty when its guest is gone."},
    {"S-1", Role::service, "The service MUST seal each region that it hands out against shrinking, growing and "
     "further seals."},
    {"S-2", Role::service, "The service MUST give each region mode 0600 and hand out those marked (ro) by a "
     "descriptor that was opened read-only."},
    {"S-3", Role::service, "The service MUST make the pages of ring regions and cells before it hands them out."},
    {"S-4", Role::service, "The service MUST make a region's header whole before it hands the region out, `version` "
     "last."},
    {"S-5", Role::service, "The service MUST ignore a `tail` outside [last good tail, head] and go on with the last "
     "good one."},
    {"S-6", Role::service, "The service MUST NOT take another command from a submission ring whose head it saw "
     "behind its own tail or more than the capacity before it."},
    {"S-7", Role::service, "The service MUST NOT wait for an eventfd, whatever a peer has done to its counter or its "
     "flags."},
    {"S-8", Role::service, "The service MUST NOT let a peer's words, silence or death hold up or change what another "
     "guest gets."},
    {"S-9", Role::service, "The service MUST NOT report what is not mapped, whatever a device writes into entries "
     "and summary."},
    {"S-10", Role::service, "The service MUST go on waiting for the cells of a device whose connection has closed "
     "until its process has ended."},
    {"S-11", Role::service, "The service MUST take the cells of a device whose process has ended as left, and report "
     "all that its threads had made dirty."},
    {"Q-1", Role::service, "The service MUST make a dirty ring with kind 1, entries of 8 bytes, the capacity and "
     "space that were asked for, and the slice in [start, last]."},
    {"Q-2", Role::service, "The service MUST NOT move `head` back, beyond `staged`, or more than the capacity beyond "
     "`tail`."},
    {"Q-3", Role::service, "The service MUST NOT write a slot in [tail, head)."},
    {"Q-4", Role::service, "The service MUST leave `DR_MARKER_SLOTS` = 4 slots of a ring that runs never take."},
    {"Q-5", Role::service, "The service MUST NOT publish a run that reaches out of the slice (IOVA rings) or the "
     "guest's memory (OA rings)."},
    {"Q-6", Role::service, "The service MUST begin a run of 2 MiB units on a multiple of 2 MiB."},
    {"Q-7", Role::service, "The service MUST clear the Dirty bits that a run stands for after the run is staged and "
     "before it is published."},
    {"Q-8", Role::service, "The service MUST advance the generation of every region that a run overlaps after its "
     "Dirty bits are cleared and before it is published."},
    {"Q-9", Role::service, "The service MUST NOT publish a run before every thread that was inside a section after "
     "that advance has left it."},
    {"Q-10", Role::service, "The service MUST keep the Dirty bit of each leaf for which the ring has no slot, and "
     "report it when there is one."},
    {"Q-11", Role::service, "The service MUST sweep a tracked slice when its doorbell is rung, pacing and room "
     "permitting."},
    {"Q-12", Role::service, "The service MUST go on with a ring when its `tail` has moved and, where `want_kick` was "
     "1, kick was signalled."},
    {"Q-13", Role::service, "The service MUST signal call when `head` passes from below `armed` to it or beyond."},
    {"Q-14", Role::service, "The service MUST NOT signal call where `head` did not pass `armed`."},
    {"Q-15", Role::service, "The service MUST NOT begin a sweep, but for a sync or the end of a device, within "
     "`min_interval_us` after the beginning of one that found something dirty in that slice."},
    {"Q-16", Role::service, "The service MUST NOT begin a sweep where `min_interval_us` is 0, but for a sync or the "
     "end of a device, before the consumer has released all that an earlier one found."},
    {"Q-17", Role::service, "The service MUST end the rings of a destroyed hwpt with one end marker where there is "
     "room for it, and publish nothing behind it."},
    {"C-1", Role::consumer, "A consumer MUST NOT use a ring whose magic is not `DR_RING_MAGIC` = 0x676e697279747264, "
     "whose version is not `DR_RING_VERSION` = 1, whose kind or entry size it did not expect, or whose capacity is no "
     "power of two or does not fit into the region."},
    {"C-2", Role::consumer, "A consumer MUST load `head` with acquire and read no slot at or beyond it."},
    {"C-3", Role::consumer, "A consumer MUST stop reading a ring whose `head` went back or is more than the capacity "
     "before its own `tail`."},
    {"C-4", Role::consumer, "A consumer MUST store `tail` with release, never back and never beyond the head that it "
     "read, when it needs the slots no more."},
    {"C-5", Role::consumer, "A consumer MUST load `want_kick` (seq_cst) after each store of `tail` (seq_cst) and "
     "signal kick if it is not 0."},
    {"C-6", Role::consumer, "A consumer MUST look at `head` (seq_cst) again between storing `armed` (seq_cst) and "
     "going to sleep."},
    {"C-7", Role::consumer, "A consumer MUST copy a dirty page after it has read the run that names it, not before."},
    {"C-8", Role::consumer, "A consumer MUST skip a marker whose kind it does not know and which is below 128."},
    {"C-9", Role::consumer, "A consumer MUST take a marker whose kind it does not know and which is 128 or more for "
     "all-dirty."},
    {"C-10", Role::consumer, "A consumer MUST take every page that is mapped in the slice for dirty when it meets "
     "all-dirty."},
    {"C-11", Role::consumer, "A consumer MUST NOT take a sync for done before it has read the marker with its cookie "
     "in every ring of the hwpt."},
    {"C-12", Role::consumer, "A consumer MUST NOT wait for anything more in a ring in which it has read an end "
     "marker."},
    {"M-1", Role::service, "The service MUST make both command rings with the capacity of GUEST_CREATE, kinds 2 and "
     "3, and entries of 64 and 32 bytes."},
    {"M-2", Role::service, "The service MUST complete each command that it takes once, with its `user_data`."},
    {"M-3", Role::service, "The service MUST NOT take a submission for whose completion no slot is free."},
    {"M-4", Role::service, "The service MUST take submissions after a kick that its `armed` asked for, and call for "
     "a completion that reaches the front-end's `armed`."},
    {"M-5", Role::service, "The service MUST complete with EINVAL a command with an unknown opcode or flag, or with "
     "a field other than zero that it does not use."},
    {"M-6", Role::service, "The service MUST complete a MAP with 0, or with the errno that layout.h lists for what "
     "is wrong with it: EINVAL, ENOENT, ENOSPC, ERANGE, EFAULT or EEXIST."},
    {"M-7", Role::service, "The service MUST complete an UNMAP with 0, or with the errno that layout.h lists for "
     "what is wrong with it: EAGAIN, EINVAL, ENOENT or ERANGE."},
    {"M-8", Role::service, "The service MUST complete an ENABLE, DISABLE or SYNC with 0, or with the errno that "
     "layout.h lists for what is wrong with it: EINVAL, ENOENT, EOPNOTSUPP, EALREADY or "
     "ENODEV."},
    {"M-9", Role::service, "The service MUST do commands on overlapping IOVAs of one ioas in the order in which they "
     "were submitted."},
    {"M-10", Role::service, "The service MUST do ENABLE, DISABLE and SYNC of one hwpt in the order in which they "
     "were submitted."},
    {"E-2", Role::front_end, "A front-end MUST set to zero the fields of a command that its opcode does not use."},
    {"E-3", Role::front_end, "A front-end MUST signal kick when its head of submissions passes from below the "
     "service's `armed` to it or beyond, and when it releases completions while `want_kick` is not 0."},
    {"M-11", Role::service, "The service MUST translate as a MAP says, with its rights, for every section that "
     "begins after its completion with 0."},
    {"M-12", Role::service, "The service MUST accept a MAP with IDEMPOTENT of what is mapped so already, and an "
     "UNMAP with EMPTY_OK where nothing is mapped."},
    {"M-13", Role::service, "The service MUST NOT complete an UNMAP before each thread has left the section in which "
     "it may have translated by what was taken out."},
    {"M-14", Role::service, "The service MUST publish what was dirty in the range of an UNMAP without DEFERRED or "
     "DISCARD before it completes it."},
    {"M-15", Role::service, "The service MUST publish what was dirty in the range of an UNMAP with DEFERRED before "
     "the marker of any sync submitted after its completion."},
    {"M-16", Role::service, "The service MUST NOT publish a run for what an UNMAP with DISCARD took out."},
    {"M-17", Role::service, "The service MUST complete an UNMAP that finds no room in a ring with EAGAIN and `done` "
     "short of the range, without waiting for room."},
    {"M-18", Role::service, "The service MUST complete an UNMAP of a tracked range in IOVA space with an epoch of "
     "its own, and put one marker with it into each ring of whose slice it took something out."},
    {"M-19", Role::service, "The service MUST NOT publish a run of a map that an UNMAP took out behind the marker of "
     "its epoch."},
    {"M-20", Role::service, "The service MUST complete an UNMAP with `epoch` 0 and put no marker into rings where "
     "the space is OA."},
    {"E-4", Role::front_end, "A front-end MUST translate a run of an IOVA ring by the map of before an unmap until "
     "it has read the marker of that unmap's epoch in that ring."},
    {"E-5", Role::front_end, "A front-end MUST NOT use an unmapped page of memory for something else before the "
     "UNMAP has completed."},
    {"M-21", Role::service, "The service MUST clear every Dirty bit of an hwpt for ENABLE before it stores a "
     "`context` that tracks or, where devices track always, before it advances."},
    {"M-22", Role::service, "The service MUST report each page written by DMA that begins after the completion of "
     "ENABLE, also through translations cached before."},
    {"M-23", Role::service, "The service MUST NOT report a page for DMA that begins between the completion of "
     "DISABLE and the next ENABLE."},
    {"M-24", Role::service, "The service MUST publish, before the marker of a SYNC, all that was written by DMA that "
     "ended before the SYNC was submitted."},
    {"M-25", Role::service, "The service MUST put one sync marker with the cookie of a SYNC into every ring of the "
     "hwpt and publish it before it completes the SYNC with 0."},
    {"M-26", Role::service, "The service MUST NOT hold up a map change for a SYNC that waits for room."},
    {"M-27", Role::service, "The service MUST complete a SPLIT or COLLAPSE with 0, or with the errno that layout.h "
                            "lists for what is wrong with it: EINVAL, ENOENT or ERANGE."},
    {"M-28", Role::service, "The service MUST translate what is mapped during a SPLIT and a COLLAPSE as before and "
                            "after."},
    {"M-29", Role::service, "The service MUST report what was dirty before a SPLIT or COLLAPSE, and what is written "
                            "during it."},
    {"M-30", Role::service, "The service MUST end an UNMAP in IOVA space that took something out while nothing was "
     "tracked with EAGAIN and `epoch` 0 before what it would take out while its range is tracked."},
    {"E-6", Role::front_end, "A front-end MUST wait for the completion of ENABLE before it copies what it wants to "
     "be told of."},
    {"E-7", Role::front_end, "A front-end MUST have its devices' DMA ended before it submits the SYNC after which it "
     "copies for the last time."},
    {"D-1", Role::device, "A device MUST NOT use a translation region whose magic is not `DR_TRANSLATION_MAGIC` = "
     "0x6e61727474726964, whose version is not `DR_TRANSLATION_VERSION` = 1, or whose format it does not know."},
    {"D-2", Role::device, "A device MUST make a thread's cell odd (seq_cst) before it loads a generation, and write "
     "each cell from one thread only."},
    {"D-3", Role::device, "A device MUST load the generation of a page's region (seq_cst) inside the section, before "
     "it uses an IOTLB entry or walks."},
    {"D-4", Role::device, "A device MUST NOT use an IOTLB entry whose tag is not the generation just loaded."},
    {"D-5", Role::device, "A device MUST tag an IOTLB entry with the generation loaded before its walk, and keep the "
     "tag when it marks the entry dirty."},
    {"D-6", Role::device, "A device MUST NOT let an IOTLB entry span two regions of 2^24 bytes (`DR_REGION_LG2` = "
     "24)."},
    {"D-7", Role::device, "A device MUST load `context` of the shard (seq_cst) at each walk, after the generation."},
    {"D-8", Role::device, "A device MUST change an entry by compare-and-swap only, and only while it translates as "
     "it did at the walk."},
    {"D-9", Role::device, "A device MUST set D in the leaf before it writes data through a clean translation of a "
     "tracked shard."},
    {"D-10", Role::device, "A device MUST set the line bit and then the table bit of a leaf, each unless it reads as "
     "set, after it turned D on."},
    {"D-11", Role::device, "A device MUST NOT write where the map forbids it."},
    {"D-12", Role::device, "A device MUST check every table index and address that it takes from an entry before it "
     "uses them."},
    {"D-13", Role::device, "A device MUST make the cell even (release) after the last byte of data, behind a fence "
     "if it wrote with non-temporal stores."},
    {"D-14", Role::device, "A device MUST load `asleep` (seq_cst) after it left a section in which it turned a table "
     "bit on, and ring the shard's doorbell if it is not 0."},
    {"D-15", Role::device, "A device MUST NOT do DMA after DEVICE_DETACH, nor from a process other than the one that "
     "connected."},
    {"D-16", Role::device, "A device MUST store range and direction of a slot, then `pinned`, before it makes the "
     "slot's count odd (seq_cst)."},
    {"D-17", Role::device, "A device MUST load `closing` of each shard of the range (seq_cst) behind that, and give "
     "the slot back where a closed range overlaps it."},
    {"D-18", Role::device, "A device MUST mark every leaf of a pin for writing after the data has landed and before "
     "it gives the slot back."},
    {"D-19", Role::device, "A device MUST make the count even (seq_cst) before it makes `pinned` one less, before it "
     "tells the guest, and never while data may still land."},
    {"D-20", Role::device, "A device MUST ring a shard's doorbell when it has given back a pin there and `asleep` is "
     "`DR_ASLEEP_PINS` = 2."},
    {"D-21", Role::device, "A device MUST set neither A nor D by a walk whose `context` does not say so."},
    {"S-12", Role::service, "The service MUST NOT take a leaf out while a pin that covers it is held, nor complete "
     "the UNMAP."},
    {"S-13", Role::service, "The service MUST NOT publish a sync marker before the pins for writing that were held "
     "when the SYNC was submitted are given back."},
    {"S-14", Role::service, "The service MUST NOT hold back the publication of a run for a pin."},
    {"S-15", Role::service, "The service MUST report all that was pinned for writing by a device whose process has "
     "ended."},
};
// clang-format on

// A requirement by its number; a number that is not there does not compile.
class Rule
{
  public:
    consteval Rule(const char *number) : index_(find(number)) {}
    [[nodiscard]] constexpr std::size_t index() const { return index_; }
    [[nodiscard]] constexpr const Requirement &requirement() const { return requirements[index_]; }

  private:
    static consteval std::size_t find(std::string_view number)
    {
        for (std::size_t i = 0; i < std::size(requirements); ++i) {
            if (requirements[i].number == number)
                return i;
        }
        throw "SPEC.md has no such number";
    }

    std::size_t index_;
};

// Does a sentence for `bound` bind a program that plays `checked`?
constexpr bool binds(Role bound, Role checked)
{
    if (bound == checked || bound == Role::sender)
        return true;
    if (bound == Role::client)
        return checked != Role::service;
    return bound == Role::front_end && checked == Role::consumer; // who consumes has a front-end too
}

} // namespace dirtyring::check
