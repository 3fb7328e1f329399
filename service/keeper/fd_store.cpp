#include "service/keeper/fd_store.hpp"

#include <fmt/format.h>
#include <systemd/sd-daemon.h>

#include <algorithm>
#include <cassert>
#include <cctype>
#include <cerrno>
#include <cstdlib>
#include <string_view>
#include <system_error>

namespace dirtyring::service {

namespace {

[[maybe_unused]] bool is_ours(std::string_view name)
{
    return !name.empty() && name.size() <= FdStore::name_max &&
           std::all_of(name.begin(), name.end(), [](unsigned char c) { return std::isalnum(c) != 0 || c == '.'; });
}

} // namespace

FdStore FdStore::inherit()
{
    FdStore self;
    char **names = nullptr;
    const int count = ::sd_listen_fds_with_names(1, &names); // they are closed on exec from here on
    if (count < 0)
        throw std::system_error(-count, std::generic_category(), "descriptors handed over by LISTEN_FDS");
    for (int i = 0; i < count; ++i) {
        self.inherited_.emplace(names[i], ring::Fd(SD_LISTEN_FDS_START + i));
        self.remember(names[i]);
        std::free(names[i]);
    }
    std::free(names);
    return self;
}

bool FdStore::kept() const
{
    return std::getenv("NOTIFY_SOCKET") != nullptr;
}

int FdStore::put(const std::string &name, int fd)
{
    assert(is_ours(name));
    if (!kept())
        return 0;
    if (stored_.size() >= fds_max || names_size_ + name.size() + 1 > names_max)
        return -ENOSPC;
    const std::string message = fmt::format("FDSTORE=1\nFDNAME={}\nFDPOLL=0", name);
    if (const int result = ::sd_pid_notify_with_fds(0, 0, message.c_str(), &fd, 1); result < 0)
        return result;
    remember(name);
    return 0;
}

void FdStore::remove(const std::string &name)
{
    if (const std::size_t removed = stored_.erase(name); removed > 0) {
        names_size_ -= removed * (name.size() + 1);
        ::sd_notify(0, fmt::format("FDSTOREREMOVE=1\nFDNAME={}", name).c_str());
    }
}

std::vector<std::string> FdStore::names() const
{
    std::vector<std::string> all;
    for (const auto &[name, fd] : inherited_)
        all.push_back(name);
    return all;
}

int FdStore::get(const std::string &name) const
{
    const auto it = inherited_.find(name);
    return it == inherited_.end() ? -1 : it->second.get();
}

ring::Fd FdStore::take(const std::string &name)
{
    auto node = inherited_.extract(name);
    return node ? std::move(node.mapped()) : ring::Fd();
}

void FdStore::drop_rest()
{
    for (const auto &[name, fd] : inherited_) {
        if (inherited_.count(name) == stored_.count(name))
            remove(name);
    }
    inherited_.clear();
}

void FdStore::remember(const std::string &name)
{
    stored_.insert(name);
    names_size_ += name.size() + 1;
}

} // namespace dirtyring::service
