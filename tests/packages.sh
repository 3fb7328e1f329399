#!/bin/bash
# Sourced by the scripts that build: sees to it that what the build needs is installed. Debian and its kin; elsewhere
# the configure step names what is missing.

packages=(
    binutils            # readelf, for the check of the library's NEEDED list
    clang               # the second compiler
    clang-format
    cmake
    g++
    gnuplot-nox         # perf/: plots
    libbenchmark-dev    # perf/
    libboost-dev        # lockfree queues
    libbsd-dev          # DPDK's static EAL
    libclang-rt-dev     # sanitizers
    libcli11-dev        # command lines
    libdpdk-dev         # lcores, rings, telemetry
    libexpected-dev     # tl::expected
    libfmt-dev
    libgmock-dev        # tests/
    libgtest-dev        # tests/
    libnuma-dev         # DPDK's static EAL
    librapidcheck-dev   # tests/: properties
    libspdlog-dev       # logs
    libsystemd-dev      # sd_notify
    liburing-dev        # event loop
    llvm                # names of functions in what the sanitizers report
    ninja-build
    nlohmann-json3-dev  # results of the tool
    pkg-config
    relacy-dev          # tests/models/: memory orderings
    spin                # tests/models/: the protocol
    zlib1g-dev          # traces
)

install_packages()
{
    command -v dpkg-query >/dev/null || return 0
    local as_root=() missing
    mapfile -t missing < <(comm -23 <(printf '%s\n' "${packages[@]}" | sort) \
        <(dpkg-query -W -f '${db:Status-Status} ${Package}\n' "${packages[@]}" 2>/dev/null |
            sed -n 's/^installed //p' | sort))
    [ ${#missing[@]} -gt 0 ] || return 0
    echo "installing: ${missing[*]}"
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null || { echo "as root: apt-get install ${missing[*]}" >&2; return 1; }
        as_root=(sudo)
    fi
    "${as_root[@]}" apt-get update -qq
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
}

install_packages
