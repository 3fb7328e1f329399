// The peers of the service's tests: a VMM and devices that use the library, and guests that speak the protocol
// themselves.
#pragma once

#include "client/dirtyring_device.h"
#include "iommu/geometry.hpp"
#include "tests/service/daemon.hpp"

#include <fcntl.h>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <sys/epoll.h>

namespace dirtyring::test {

using namespace std::chrono_literals;
using testing::Not;

constexpr std::uint64_t page = 4096;
constexpr std::uint32_t read_write = DR_MAP_READ | DR_MAP_WRITE;

// Refused with this errno and a sentence.
inline void expect_refused(const Reply &reply, int error)
{
    ASSERT_FALSE(reply.closed) << "expected a refusal: " << std::strerror(error);
    EXPECT_EQ(reply.error(), error) << reply.sentence();
    EXPECT_EQ(reply.payload.size(), sizeof(dr_refusal));
    EXPECT_THAT(reply.fds, testing::IsEmpty());
    EXPECT_THAT(reply.sentence(), Not(testing::IsEmpty()));
    EXPECT_LT(reply.sentence().size(), std::size_t{DR_SENTENCE_BYTES});
}

inline void expect_done(const Reply &reply)
{
    ASSERT_FALSE(reply.closed);
    EXPECT_EQ(reply.error(), 0) << reply.sentence();
}

inline int check(int result)
{
    if (result < 0)
        throw std::runtime_error(dirtyring_error());
    return result;
}

template <auto close> struct Closer {
    template <class T> void operator()(T *handle) const { close(handle); }
};
using Library = std::unique_ptr<dirtyring_vm, Closer<dirtyring_close>>;
using Set = std::unique_ptr<dirtyring_set, Closer<dirtyring_set_close>>;
using Device = std::unique_ptr<dirtyring_device, Closer<dirtyring_device_detach>>;

inline Device attach(const std::string &socket, const std::uint8_t *token, std::uint32_t hwpt,
                     std::uint32_t threads = 1)
{
    dirtyring_attach attributes{};
    attributes.token = token;
    attributes.hwpt = hwpt;
    attributes.threads = threads;
    dirtyring_device *device = nullptr;
    check(dirtyring_device_attach(socket.c_str(), &attributes, &device));
    return Device(device);
}

inline void dma_write(const Device &device, std::uint64_t iova, std::uint64_t value = 1)
{
    check(dirtyring_dma_write(dirtyring_device_dma(device.get(), 0), iova, &value, sizeof value, nullptr));
}

inline dirtyring_hwpt sharded(std::uint32_t shards)
{
    dirtyring_hwpt attributes{};
    attributes.shards = shards;
    return attributes;
}

// A guest that keeps the rules, with all its memory mapped and tracked, page p in shard p % shards.
class Vm
{
  public:
    explicit Vm(const Daemon &daemon, dirtyring_hwpt attributes = {}, std::uint64_t pages = 256)
        : socket_(daemon.socket()), shards_(std::max(1u, attributes.shards)), pages_(pages),
          memory_(memory_file(pages * page))
    {
        if (attributes.aperture_lg2 == 0)
            attributes.aperture_lg2 = 34;
        attributes.space = DR_SPACE_OA;
        slice_ = (1ull << attributes.aperture_lg2) / shards_;
        dirtyring_vm *vm = nullptr;
        check(dirtyring_connect(socket_.c_str(), &vm));
        vm_.reset(vm);
        check(dirtyring_memory_add(vm, 0, pages * page, memory_.get(), 0));
        check(dirtyring_ioas_alloc(vm, &ioas));
        check(dirtyring_hwpt_alloc(vm, ioas, &attributes, &hwpt));
        for (std::uint64_t p = 0; p < pages; ++p)
            check(dirtyring_map(vm, ioas, iova(p), page, p * page, read_write));
        check(dirtyring_enable(vm, hwpt));
        dirtyring_set *set = nullptr;
        check(dirtyring_set_open(vm, hwpt, &set));
        set_.reset(set);
    }

    [[nodiscard]] std::uint64_t iova(std::uint64_t p) const { return p % shards_ * slice_ + p / shards_ * page; }
    [[nodiscard]] dirtyring_vm *vm() const { return vm_.get(); }
    [[nodiscard]] const std::uint8_t *token() const { return dirtyring_token(vm_.get()); }

    void attach() { device_ = test::attach(socket_, token(), hwpt); }
    [[nodiscard]] const Device &device() const { return device_; }
    void dirty(std::uint64_t p) { dma_write(device_, iova(p), ++value_); }

    void start_sync() { check(dirtyring_set_sync(set_.get())); }

    // Takes what is there.
    bool synced()
    {
        dirtyring_batch batch{};
        while (dirtyring_set_peek(set_.get(), &batch)) {
            for (std::uint32_t i = 0; i < batch.count; ++i) {
                const std::uint64_t entry = batch.entries[i];
                for (std::uint64_t at = 0; !dr_is_marker(entry) && at < dr_run_length(entry); at += page)
                    reported.insert((dr_run_address(entry) + at) / page);
            }
            dirtyring_set_release(set_.get(), &batch);
        }
        return check(dirtyring_set_synced(set_.get())) == 1;
    }

    void sync()
    {
        start_sync();
        EXPECT_TRUE(comes_true([this] { return synced(); })) << "a sync hangs";
    }

    // Some pages are written, and reported. A guest that nobody disturbs passes this at any time.
    void expect_tracks()
    {
        if (!device_)
            attach();
        reported.clear();
        std::set<std::uint64_t> written;
        for (int i = 0; i < 8; ++i)
            written.insert(random_() % pages_);
        for (const std::uint64_t p : written)
            dirty(p);
        sync();
        EXPECT_THAT(reported, testing::IsSupersetOf(written));
    }

    void close()
    {
        set_.reset();
        vm_.reset();
    }
    void detach() { device_.reset(); }

    std::uint32_t ioas = 0;
    std::uint32_t hwpt = 0;
    std::set<std::uint64_t> reported; // pages

  private:
    std::string socket_;
    std::uint64_t shards_;
    std::uint64_t pages_;
    Fd memory_;
    std::uint64_t slice_ = 0;
    Library vm_;
    Set set_;
    Device device_;
    std::uint64_t value_ = 0;
    std::mt19937_64 random_{1};
};

inline dr_command command(dr_opcode opcode, std::uint32_t object)
{
    static std::uint64_t serial = 0;
    dr_command c{};
    c.user_data = ++serial;
    c.opcode = opcode;
    c.object = object;
    return c;
}

inline dr_command map_command(std::uint32_t ioas, std::uint64_t iova, std::uint64_t length, std::uint64_t oa,
                              std::uint32_t flags = read_write)
{
    dr_command c = command(DR_OP_MAP, ioas);
    c.iova = iova;
    c.length = length;
    c.oa = oa;
    c.flags = flags;
    return c;
}

inline dr_command unmap_command(std::uint32_t ioas, std::uint64_t iova, std::uint64_t length, std::uint32_t flags = 0)
{
    dr_command c = command(DR_OP_UNMAP, ioas);
    c.iova = iova;
    c.length = length;
    c.flags = flags;
    return c;
}

inline dr_command sync_command(std::uint32_t hwpt, std::uint64_t cookie)
{
    dr_command c = command(DR_OP_SYNC, hwpt);
    c.cookie = cookie;
    return c;
}

// A raw guest with memory, an ioas and an hwpt; 256 pages mapped at IOVA 0 and tracked.
class TrackedGuest : public RawGuest
{
  public:
    explicit TrackedGuest(const Daemon &daemon, const std::function<void(dr_hwpt_alloc &)> &change = {},
                          std::uint32_t command_entries = 64)
        : TrackedGuest(daemon, new_guest(command_entries), change)
    {
    }
    TrackedGuest(const Daemon &daemon, const dr_guest_create &create,
                 const std::function<void(dr_hwpt_alloc &)> &change = {})
        : RawGuest(daemon, create), socket(daemon.socket())
    {
        add_memory(0, pages * page, memory);
        ioas = get<dr_object>(DR_IOAS_ALLOC, dr_empty{}).id;
        dr_hwpt_alloc request = hwpt_request(ioas);
        if (change)
            change(request);
        hwpt = get<dr_hwpt>(DR_HWPT_ALLOC, request).id;
        EXPECT_EQ(run(map_command(ioas, 0, pages * page, 0)), 0);
        if ((request.flags & DR_HWPT_DIRTY_TRACKING) != 0) {
            EXPECT_EQ(run(command(DR_OP_ENABLE, hwpt)), 0);
        }
    }
    Device attach() { return test::attach(socket, info.token, hwpt); }

    static constexpr std::uint64_t pages = 256;
    std::string socket;
    Fd memory = memory_file(pages * page);
    std::uint32_t ioas = 0;
    std::uint32_t hwpt = 0;
};

// A device in a process of its own, which attaches, enters a section, writes a page at each IOVA, and stays inside.
class DeviceProcess
{
  public:
    DeviceProcess(const Daemon &daemon, const std::uint8_t *token, std::uint32_t hwpt,
                  const std::vector<std::uint64_t> &iovas)
    {
        int ends[2];
        need(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), "socketpair");
        socket_ = Fd(ends[0]);
        const Fd theirs(ends[1]);
        const std::string path = daemon.socket();
        pid_ = need(::fork(), "fork");
        if (pid_ == 0)
            be_device(theirs.get(), path, token, hwpt, iovas);
    }
    DeviceProcess(const DeviceProcess &) = delete;
    DeviceProcess &operator=(const DeviceProcess &) = delete;
    ~DeviceProcess() { kill(); }

    [[nodiscard]] pid_t pid() const { return pid_; }
    void wait_inside() { expect_word('i'); }
    void leave_section() { tell('l'); }
    void close_socket() { tell('s'); }
    // False: it could not.
    bool detach()
    {
        send('d');
        return word() == 'd';
    }
    void stop() const { ::kill(pid_, SIGSTOP); }
    void kill()
    {
        if (pid_ > 0) {
            ::kill(pid_, SIGKILL);
            ::waitpid(std::exchange(pid_, -1), nullptr, 0);
        }
    }

  private:
    void send(char c) const { need(static_cast<int>(::send(socket_.get(), &c, 1, MSG_NOSIGNAL)), "send"); }
    [[nodiscard]] char word() const
    {
        pollfd waiting{socket_.get(), POLLIN, 0};
        char c = 0;
        if (::poll(&waiting, 1, 10'000) != 1 || ::read(socket_.get(), &c, 1) != 1)
            throw std::runtime_error("the device's process is gone or hangs");
        return c;
    }
    void expect_word(char c) const { EXPECT_EQ(word(), c); }
    void tell(char c) const
    {
        send(c);
        expect_word(c);
    }

    [[noreturn]] static void be_device(int talk, const std::string &path, const std::uint8_t *token, std::uint32_t hwpt,
                                       const std::vector<std::uint64_t> &iovas)
    {
        ::prctl(PR_SET_PDEATHSIG, SIGKILL);
        ::dup2(talk, STDIN_FILENO);
        ::syscall(SYS_close_range, 3u, ~0u, 0u); // the guest's life hangs on its VMM's descriptors
        dirtyring_attach attributes{};
        attributes.token = token;
        attributes.hwpt = hwpt;
        dirtyring_device *device = nullptr;
        if (dirtyring_device_attach(path.c_str(), &attributes, &device) != 0)
            ::_exit(1);
        dirtyring_dma *dma = dirtyring_device_dma(device, 0);
        dirtyring_dma_begin(dma);
        for (const std::uint64_t iova : iovas) {
            const std::uint64_t value = iova | 1;
            if (dirtyring_dma_write(dma, iova, &value, sizeof value, nullptr) != 0)
                ::_exit(1);
        }
        char c = 'i';
        while (::write(STDIN_FILENO, &c, 1) == 1 && ::read(STDIN_FILENO, &c, 1) == 1) {
            if (c == 'l')
                dirtyring_dma_end(dma);
            else if (c == 's')
                ::close(dirtyring_device_socket(device));
            else if (c == 'd' && dirtyring_device_detach(device) != 0)
                c = 'e';
        }
        ::_exit(0);
    }

    Fd socket_;
    pid_t pid_ = -1;
};

// With the guest that it attaches to.
class RawDevice : public Peer
{
  public:
    explicit RawDevice(const Daemon &daemon) : Peer(daemon), guest(daemon) { hello(); }
    [[nodiscard]] dr_device_attach request() const { return new_device(guest.hwpt, guest.info.token); }

    TrackedGuest guest;
};

inline std::set<std::uint64_t> pages_of(const std::vector<std::uint64_t> &entries)
{
    std::set<std::uint64_t> pages;
    for (const std::uint64_t entry : entries) {
        for (std::uint64_t at = 0; !dr_is_marker(entry) && at < dr_run_length(entry); at += page)
            pages.insert((dr_run_address(entry) + at) / page);
    }
    return pages;
}

} // namespace dirtyring::test
