// What one VMM has here. Made and owned by the control thread; walkers hold pointers from adopt to drop.
#pragma once

#include "ring/control.h"
#include "ring/region.hpp"
#include "ring/socket.hpp"
#include "service/commands.hpp"
#include "service/shard.hpp"
#include "service/walker.hpp"

#include <tl/expected.hpp>

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace dirtyring::service {

// Why a request is not done.
struct Refusal {
    int error; // a positive errno
    std::string sentence;
};

template <class T> using Result = tl::expected<T, Refusal>;
using Token = std::array<std::uint8_t, DR_TOKEN_BYTES>;

// An eventfd as peers get it.
Result<ring::Fd> make_eventfd();

struct MemoryRegion {
    std::uint64_t oa;
    std::uint64_t length;
    std::uint64_t offset;
    ring::Fd fd; // passed on to devices, never mapped
};

// One shard with its regions and descriptors.
struct ShardHome {
    ring::Region producer;
    ring::Region consumer;
    ring::Fd call;     // service → VMM
    ring::Fd doorbell; // VMM and devices → owner
    std::unique_ptr<Shard> shard;
    Walker *owner = nullptr;
};

struct Hwpt {
    std::uint32_t ioas;
    bool tracks;
    dr_translation_header geometry;
    ring::Region tables;
    ring::Region translation;
    std::vector<ShardHome> shards;
    unsigned devices = 0;

    // Checks the request and makes all of it; the shards are not adopted yet.
    static Result<std::unique_ptr<Hwpt>> make(const dr_hwpt_alloc &request, const std::vector<Walker *> &owners);
};

// A device from its attach until its process is gone or it has detached.
struct Device {
    std::uint32_t id;
    std::uint32_t hwpt;
    int pid;
    ring::Fd pidfd;
    ring::Region cells;
    iommu::DmaThreads threads; // in cells
};

struct Guest {
    Token token;
    Token secret;
    Walker *home;
    ring::Region front_end; // the VMM writes
    ring::Region service;   // we write
    ring::Fd kick;
    ring::Fd call;
    std::unique_ptr<Commands> commands;
    std::uint32_t command_entries;

    std::vector<MemoryRegion> memory;
    std::map<std::uint32_t, bool> ioases; // id; whether it has an hwpt
    std::map<std::uint32_t, std::unique_ptr<Hwpt>> hwpts;
    std::map<std::uint32_t, std::shared_ptr<Device>> devices;
    std::uint32_t next_id = 1;

    static Result<std::unique_ptr<Guest>> make(std::uint32_t command_entries, Walker &home);

    // Checks a region against those there are, and takes the descriptor out of the list if it is good.
    Result<void> add_memory(const dr_memory_region &request, ring::FdList &fds);
};

} // namespace dirtyring::service
