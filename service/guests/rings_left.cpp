#include "service/guests/rings_left.hpp"

#include "service/guests/end_ring.hpp"
#include "service/guests/holdings.hpp"
#include "service/walkers/uring.hpp"

#include <fcntl.h>
#include <string>
#include <sys/stat.h>
#include <unistd.h>

namespace dirtyring::service {

namespace {

ring::Fd copy(int fd)
{
    return ring::Fd(fd < 0 ? -1 : ::fcntl(fd, F_DUPFD_CLOEXEC, 0));
}

bool map_whole(ring::Mapping &map, const ring::Fd &fd)
{
    struct stat status {
    };
    return ::fstat(fd.get(), &status) == 0 && status.st_size >= DR_PAGE &&
           map.map(fd.get(), static_cast<std::size_t>(status.st_size), PROT_READ | PROT_WRITE) == 0;
}

// Calls with(ring) if the two regions are those of one; more staged than there are slots is taken back. False: they are
// not, or with() says so.
template <class With> bool with_ring(const ring::Fd &producer, const ring::Fd &consumer, With with)
{
    ring::Mapping mine;
    ring::Mapping peer;
    if (!map_whole(mine, producer) || !map_whole(peer, consumer))
        return false;
    auto *region = mine.as<dr_ring_producer>();
    if (!ring::is_producer_region(*region, mine.size(), sizeof(std::uint64_t)))
        return false;
    const bool whole = ring::has_whole_indices(*region);
    DirtyRing ring(region, peer.as<dr_ring_consumer>());
    if (!whole)
        ring.unstage();
    return with(ring);
}

bool mark(DirtyRing &ring)
{
    if (has_ended(ring)) { // a service before was about to take leave of this guest
        static_cast<void>(ring.publish());
        return true;
    }
    ring.unstage(); // all of it is dirty
    if (ring.room() == 0)
        return false;
    ring.put(0, dr_marker(DR_MARKER_ALL_DIRTY, 0));
    ring.stage(1);
    static_cast<void>(ring.publish()); // whoever sleeps is called in any case
    return true;
}

} // namespace

RingsLeft::RingsLeft(const FdStore &store, std::uint32_t guest) : RingsLeft(store, kept_name('H', guest) + '.') {}

RingsLeft::RingsLeft(const FdStore &store, std::uint32_t guest, std::uint32_t hwpt)
    : RingsLeft(store, kept_name('H', guest, hwpt) + '.')
{
}

RingsLeft::RingsLeft(const FdStore &store, const std::string &prefix)
{
    for (const std::string &name : store.names()) {
        if (name.starts_with(prefix)) {
            const std::string rest = name.substr(1);
            rings_.push_back({copy(store.get(name)), copy(store.get('U' + rest)), copy(store.get('C' + rest))});
        }
    }
}

unsigned RingsLeft::mark_all_dirty() const
{
    return for_each([](DirtyRing &ring) { return mark(ring); });
}

unsigned RingsLeft::end() const
{
    return for_each([](DirtyRing &ring) {
        end_ring(ring);
        return true;
    });
}

template <class With> unsigned RingsLeft::for_each(With with) const
{
    Uring calls(64);
    unsigned count = 0;
    for (const Ring &r : rings_) {
        if (!with_ring(r.producer, r.consumer, with))
            continue;
        ++count;
        calls.write_eventfd(r.call.get(), 0);
    }
    calls.submit(); // with NOWAIT they are over when it returns
    return count;
}

} // namespace dirtyring::service
