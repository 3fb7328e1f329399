// The memory of tables in pages of 2 MiB: dirt in a large guest would otherwise cost a TLB miss for each table. The
// kernel waits for all processors before it makes one, so that no walker asks for it.
#include "service/control/control.hpp"

#include <spdlog/spdlog.h>

#include <cerrno>
#include <cstring>

namespace dirtyring::service {

namespace {

constexpr unsigned tries_max = 5; // somebody may have hold of one of the small pages

} // namespace

// One each time: requests do not wait for a TiB of them.
void Control::make_large_page()
{
    LargePage page = to_make_large_.extract(to_make_large_.begin()).value();
    const auto guest = guests_.find(page.guest);
    if (guest == guests_.end())
        return;
    const auto hwpt = guest->second->hwpts.find(page.hwpt);
    if (hwpt == guest->second->hwpts.end())
        return;
    const int error = hwpt->second->tables.make_large(page.offset);
    const ShardHome &home = hwpt->second->shards[page.shard];
    if (error == 0)
        ask({{home.owner, [shard = home.shard.get(), offset = page.offset] { shard->made_large(offset); }}}, [] {});
    else if (error == -EAGAIN && ++page.tries < tries_max)
        to_make_large_.insert(page);
    else
        spdlog::debug("guest {}: tables of hwpt {} stay in small pages: {}", guest->second->number(), page.hwpt,
                      std::strerror(-error));
}

} // namespace dirtyring::service
