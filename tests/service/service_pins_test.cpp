// dirtyringd and DMA that is in flight without a section: pins of devices that keep the protocol, die, or lie.
#include "tests/service/service_peers.hpp"

#include <algorithm>
#include <numeric>
#include <sys/resource.h>

namespace dirtyring::test {
namespace {

using testing::HasSubstr;

// A VMM that copies what is reported, as a migration does. All its memory is mapped from IOVA 0 and tracked, in maps of
// `map_bytes` that lie in it from end to start.
class CopyingVm
{
  public:
    explicit CopyingVm(const Daemon &daemon, std::uint64_t pages, std::uint64_t map_bytes)
        : socket(daemon.socket()), map_bytes(map_bytes), file_(memory_file(pages * page)), copy_(pages * page)
    {
        if (memory_.map(file_.get(), copy_.size(), PROT_READ | PROT_WRITE) != 0)
            throw std::runtime_error("mmap");
        dirtyring_vm *vm = nullptr;
        check(dirtyring_connect(socket.c_str(), &vm));
        vm_.reset(vm);
        dirtyring_hwpt attributes{};
        attributes.space = DR_SPACE_OA;
        attributes.ring_entries = 64;
        check(dirtyring_memory_add(vm, 0, copy_.size(), file_.get(), 0));
        check(dirtyring_ioas_alloc(vm, &ioas));
        check(dirtyring_hwpt_alloc(vm, ioas, &attributes, &hwpt));
        for (std::uint64_t at = 0; at < copy_.size(); at += map_bytes)
            check(map(at));
        check(dirtyring_enable(vm, hwpt));
        dirtyring_set *set = nullptr;
        check(dirtyring_set_open(vm, hwpt, &set));
        set_.reset(set);
    }

    [[nodiscard]] dirtyring_vm *vm() const { return vm_.get(); }
    [[nodiscard]] const std::uint8_t *token() const { return dirtyring_token(vm_.get()); }

    // One of the maps.
    int map(std::uint64_t iova) { return dirtyring_map(vm(), ioas, iova, map_bytes, oa(iova), read_write); }
    [[nodiscard]] std::uint64_t oa(std::uint64_t iova) const
    {
        return copy_.size() - (iova / map_bytes + 1) * map_bytes + iova % map_bytes;
    }

    // Copies what one entry names. False: there is none.
    bool take_one()
    {
        if (batch_.count == 0 && !dirtyring_set_peek(set_.get(), &batch_))
            return false;
        const std::uint64_t entry = batch_.entries[0];
        if (!dr_is_marker(entry))
            std::copy_n(memory_.data() + dr_run_address(entry), dr_run_length(entry), &copy_.at(dr_run_address(entry)));
        dirtyring_batch one = batch_;
        one.count = 1;
        dirtyring_set_release(set_.get(), &one);
        ++batch_.entries;
        --batch_.count;
        return true;
    }
    void take_all()
    {
        while (take_one()) {
        }
    }

    void start_sync() { check(dirtyring_set_sync(set_.get())); }
    // Of what has been taken.
    [[nodiscard]] bool synced() { return check(dirtyring_set_synced(set_.get())) == 1; }
    void finish_sync()
    {
        EXPECT_TRUE(comes_true([this] {
            take_all();
            return synced();
        })) << "a sync hangs";
    }
    void sync()
    {
        start_sync();
        finish_sync();
    }

    // Pages of the IOVA space.
    [[nodiscard]] bool copied(std::uint64_t p) const
    {
        return std::memcmp(memory_.data() + oa(p * page), &copy_[oa(p * page)], page) == 0;
    }
    [[nodiscard]] std::vector<std::uint64_t> lost() const
    {
        std::vector<std::uint64_t> pages;
        for (std::uint64_t p = 0; p < copy_.size() / page; ++p) {
            if (!copied(p))
                pages.push_back(p);
        }
        return pages;
    }
    // What the copy holds at an IOVA.
    [[nodiscard]] std::string at(std::uint64_t iova, std::uint64_t length) const
    {
        std::string all;
        for (const std::uint64_t end = iova + length; iova < end;) {
            const std::uint64_t n = std::min(page - iova % page, end - iova);
            all.append(reinterpret_cast<const char *>(&copy_[oa(iova)]), n);
            iova += n;
        }
        return all;
    }

    const std::string socket;
    const std::uint64_t map_bytes;
    std::uint32_t ioas = 0;
    std::uint32_t hwpt = 0;

  private:
    Fd file_;
    Mapping memory_;
    std::vector<std::byte> copy_;
    Library vm_;
    Set set_;
    dirtyring_batch batch_{}; // peeked, not released
};

Device attach_with_pins(const std::string &socket, const std::uint8_t *token, std::uint32_t hwpt, std::uint32_t pins)
{
    dirtyring_attach attributes{};
    attributes.token = token;
    attributes.hwpt = hwpt;
    attributes.threads = 2;
    attributes.pins = pins;
    dirtyring_device *device = nullptr;
    check(dirtyring_device_attach(socket.c_str(), &attributes, &device));
    return Device(device);
}

// One page in flight.
struct Pin {
    int id;
    std::byte *host;
};

Pin pin_page(const Device &device, std::uint64_t p, std::uint32_t direction = DIRTYRING_WRITE)
{
    iovec piece{};
    std::uint32_t count = 1;
    const int id = check(
        dirtyring_dma_pin(dirtyring_device_dma(device.get(), 0), p * page, page, direction, &piece, &count, nullptr));
    return {id, static_cast<std::byte *>(piece.iov_base)};
}

void land(const Pin &pin, std::uint64_t value)
{
    for (std::size_t at = 0; at < page; at += sizeof value)
        std::memcpy(pin.host + at, &value, sizeof value);
}

void unpin(const Device &device, const Pin &pin)
{
    check(dirtyring_dma_unpin(dirtyring_device_dma(device.get(), 0), pin.id));
}

// A process that lives until it is killed, and says when it has come to `ready()`.
class Child
{
  public:
    explicit Child(const std::function<void(const std::function<void()> &ready)> &life)
    {
        int ends[2];
        need(::pipe2(ends, O_CLOEXEC), "pipe2");
        said_ = Fd(ends[0]);
        const Fd says(ends[1]);
        pid_ = need(::fork(), "fork");
        if (pid_ != 0)
            return;
        ::prctl(PR_SET_PDEATHSIG, SIGKILL);
        ::dup2(says.get(), STDIN_FILENO);
        ::syscall(SYS_close_range, 3u, ~0u, 0u); // the guest's life hangs on its VMM's descriptors
        try {
            life([] { need(static_cast<int>(::write(STDIN_FILENO, "r", 1)), "write"); });
            ::pause();
        } catch (const std::exception &) {
        }
        ::_exit(1);
    }
    Child(const Child &) = delete;
    Child &operator=(const Child &) = delete;
    ~Child() { kill(); }

    void wait_ready() const
    {
        pollfd waiting{said_.get(), POLLIN, 0};
        char c = 0;
        if (::poll(&waiting, 1, 10'000) != 1 || ::read(said_.get(), &c, 1) != 1)
            throw std::runtime_error("the device's process is gone or hangs");
    }
    void kill()
    {
        if (pid_ > 0) {
            ::kill(pid_, SIGKILL);
            ::waitpid(std::exchange(pid_, -1), nullptr, 0);
        }
    }

  private:
    Fd said_;
    pid_t pid_ = -1;
};

// ---- attach and detach ----------------------------------------------------------------------------------------------

TEST(ServicePins, AreRoomBehindTheCells)
{
    Daemon daemon;
    for (const auto &[threads, pins] :
         {std::pair{1u, 0u}, {1u, 1u}, {1u, DR_DEVICE_PINS_MAX}, {3u, 1000u}, {64u, 64u}}) {
        RawDevice device(daemon);
        dr_device_attach request = device.request();
        request.threads = threads;
        request.pins = pins;
        std::vector<Fd> fds;
        device.get<dr_device>(DR_DEVICE_ATTACH, request, {}, &fds);
        const std::size_t size = threads * (sizeof(dr_cell) + pins * sizeof(dr_pin));
        struct stat status {
        };
        ASSERT_EQ(::fstat(fds.at(2).get(), &status), 0);
        EXPECT_GE(status.st_size, static_cast<off_t>(size)) << threads << " threads, " << pins << " pins";
        EXPECT_LT(status.st_size, static_cast<off_t>(size + page)) << threads << " threads, " << pins << " pins";
        Mapping region;
        ASSERT_EQ(region.map(fds[2].get(), size, PROT_READ), 0);
        EXPECT_EQ(std::count(region.data(), region.data() + size, std::byte{0}), static_cast<std::ptrdiff_t>(size));
    }
}

TEST(ServicePins, OfADeviceAreLimited)
{
    Daemon daemon({}, [] { // or a service that takes what overflows takes all memory
        const rlimit limit{1u << 30, 1u << 30};
        ::setrlimit(RLIMIT_FSIZE, &limit);
    });
    RawDevice device(daemon);
    struct Case {
        std::uint32_t threads;
        std::uint32_t pins;
    };
    for (const Case &c : {Case{1, DR_DEVICE_PINS_MAX + 1}, Case{64, 65}, Case{64, 1u << 26}, Case{2, 1u << 31},
                          Case{3, UINT32_MAX / 3 + 1}, Case{1, UINT32_MAX}, Case{0, 1}, Case{65, 1}}) {
        dr_device_attach request = device.request();
        request.threads = c.threads;
        request.pins = c.pins;
        SCOPED_TRACE(testing::Message() << c.threads << " threads, " << c.pins << " pins");
        expect_refused(device.call(DR_DEVICE_ATTACH, request), EINVAL);
    }
    expect_done(device.call(DR_DEVICE_ATTACH, device.request()));
}

TEST(ServicePins, HeldKeepTheDeviceAttached)
{
    Daemon daemon;
    RawDevice device(daemon);
    dr_device_attach request = device.request();
    request.threads = 2;
    request.pins = 100;
    std::vector<Fd> fds;
    device.get<dr_device>(DR_DEVICE_ATTACH, request, {}, &fds);
    Mapping region;
    ASSERT_EQ(region.map(fds[2].get(), 2 * (sizeof(dr_cell) + 100 * sizeof(dr_pin)), PROT_READ | PROT_WRITE), 0);
    for (const std::size_t slot : {0u, 99u, 100u, 199u}) {
        SCOPED_TRACE(slot);
        std::atomic_ref count(region.as<dr_pin>(2 * sizeof(dr_cell))[slot].count);
        count.store(1);
        expect_refused(device.call(DR_DEVICE_DETACH, dr_empty{}), EBUSY);
        expect_refused(device.guest.call(DR_DESTROY, dr_object{0, device.guest.hwpt}), EBUSY);
        count.store(2);
    }
    expect_done(device.call(DR_DEVICE_DETACH, dr_empty{}));
}

// ---- who waits ------------------------------------------------------------------------------------------------------

// Pages 1000 to 1031 of the IOVA space, each with a map of its own.
class ServicePinsAndMaps : public testing::Test
{
  protected:
    ServicePinsAndMaps()
    {
        for (std::uint64_t p = 1000; p < 1032; ++p)
            EXPECT_EQ(map(p), 0);
        device = attach_with_pins(guest->socket, guest->info.token, guest->hwpt, 8);
    }

    [[nodiscard]] dr_command unmap_of(std::uint64_t p, std::uint64_t count = 1) const
    {
        return unmap_command(guest->ioas, p * page, count * page);
    }
    [[nodiscard]] dr_command map_of(std::uint64_t p) const
    {
        return map_command(guest->ioas, p * page, page, p % 256 * page);
    }
    int map(std::uint64_t p) { return guest->run(map_of(p)); }
    int unmap(std::uint64_t p) { return guest->run(unmap_of(p)); }

    Daemon daemon;
    std::unique_ptr<TrackedGuest> guest = std::make_unique<TrackedGuest>(daemon);
    Vm bystander{daemon};
    Device device;
};

TEST_F(ServicePinsAndMaps, OnlyTheUnmapThatMeetsThemWaits)
{
    const RawRing ring = guest->ring(guest->hwpt);
    const Pin pin = pin_page(device, 1010);
    const dr_command meets = unmap_of(1008, 4);
    guest->submit(meets);
    for (std::uint64_t p = 1012; p < 1032; ++p) {
        EXPECT_EQ(unmap(p), 0);
        EXPECT_EQ(map(p), 0);
        EXPECT_EQ(map(p + 100), 0);
        (void)ring.take();
        bystander.expect_tracks();
    }
    EXPECT_FALSE(guest->completed());

    land(pin, 7);
    unpin(device, pin);
    const dr_completion completion = guest->next_completion();
    EXPECT_EQ(completion.user_data, meets.user_data);
    EXPECT_EQ(completion.result, 0);
    EXPECT_EQ(completion.done, 4 * page);
    EXPECT_THAT(pages_of(ring.take()), testing::Contains(1010u)) << "what landed in it";
    EXPECT_THROW(pin_page(device, 1010), std::runtime_error);
    EXPECT_EQ(map(1010), 0);
    unpin(device, pin_page(device, 1010));
}

// More of them than ranges can be closed.
TEST_F(ServicePinsAndMaps, ManyUnmapsWaitSideBySide)
{
    std::vector<Pin> pins;
    std::set<std::uint64_t> waiting;
    for (std::uint64_t p = 1000; p < 1008; ++p) {
        pins.push_back(pin_page(device, p));
        const dr_command c = unmap_of(p);
        waiting.insert(c.user_data);
        guest->submit(c);
    }
    bystander.expect_tracks();
    EXPECT_FALSE(guest->completed());
    for (; !pins.empty(); pins.pop_back())
        unpin(device, pins.back());
    while (!waiting.empty()) {
        const dr_completion completion = guest->next_completion();
        EXPECT_EQ(completion.result, 0);
        EXPECT_EQ(waiting.erase(completion.user_data), 1u);
    }
}

// An unmap waits for its pin, a map of the same range for the unmap, a sync for both; the guest goes meanwhile.
TEST_F(ServicePinsAndMaps, TheGuestGoesWhileAllWaits)
{
    const Pin pin = pin_page(device, 1010);
    guest->submit(unmap_of(1010));
    guest->submit(map_of(1010));
    guest->submit(sync_command(guest->hwpt, 1));
    bystander.expect_tracks();
    EXPECT_FALSE(guest->completed());
    guest.reset();
    bystander.expect_tracks();
    land(pin, 1);
    unpin(device, pin);
    bystander.expect_tracks();
}

TEST(ServicePins, AThousandDelayNothingAndLoseNothing)
{
    constexpr std::uint32_t in_flight = 1024;
    constexpr std::uint64_t pages = 4096;
    constexpr std::uint64_t written = pages - 512; // pages from there on are not pinned
    Daemon daemon;
    CopyingVm vm(daemon, pages, 256 * page);
    const Device device = attach_with_pins(vm.socket, vm.token(), vm.hwpt, in_flight);
    std::mt19937_64 random(1);
    std::vector<std::uint64_t> order(written);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    std::vector<Pin> pins;
    for (std::uint32_t i = 0; i < in_flight; ++i)
        pins.push_back(pin_page(device, order[i]));

    // More runs than the ring holds, and the consumer takes one at a time.
    for (std::uint64_t p = written; p < pages; p += 2)
        dma_write(device, p * page, p);
    for (std::uint64_t p = written; p < pages; p += 2) {
        while (!vm.copied(p) && comes_true([&] { return vm.take_one(); })) {
        }
        ASSERT_TRUE(vm.copied(p)) << "page " << p << " is not published";
    }

    // Always that many are in flight, and every sync ends nevertheless.
    const auto finish = [&](Pin &pin) {
        land(pin, random());
        unpin(device, pin);
        pin = pin_page(device, random() % written);
        vm.take_one();
    };
    for (int syncs = 0; syncs < 3; ++syncs) {
        for (int i = 0; i < 2000; ++i)
            finish(pins[random() % in_flight]);
        vm.start_sync();
        EXPECT_TRUE(comes_true([&] {
            std::for_each(pins.begin(), pins.end(), finish);
            return vm.synced();
        })) << "a sync hangs";
    }
    for (const Pin &pin : pins) {
        land(pin, random());
        unpin(device, pin);
    }
    vm.sync();
    EXPECT_THAT(vm.lost(), testing::IsEmpty());
}

// ---- devices that die -----------------------------------------------------------------------------------------------

// A device has reads from its disk in flight when it is killed; all of them have landed, and none is given back. Its
// ring cannot hold them.
class ServicePinsOfADeadDevice : public testing::Test
{
  protected:
    static constexpr std::uint64_t pages = 2048;

    ServicePinsOfADeadDevice()
    {
        device.wait_ready();
        EXPECT_EQ(vm.lost().size(), pages / 2) << "they have not landed";
    }

    // And what the next device leaves is, too.
    void expect_all_is_reported()
    {
        EXPECT_THAT(vm.lost(), testing::IsEmpty());
        Child next(life());
        next.wait_ready();
        EXPECT_EQ(vm.lost().size(), pages / 2) << "they have not landed";
        next.kill();
        vm.sync();
        EXPECT_THAT(vm.lost(), testing::IsEmpty());
    }

    std::function<void(const std::function<void()> &)> life()
    {
        return [this, value = ++lives](const std::function<void()> &ready) {
            const Device dma = attach_with_pins(vm.socket, vm.token(), vm.hwpt, pages / 2);
            for (std::uint64_t p = 0; p < pages; p += 2)
                land(pin_page(dma, p), value);
            ready();
            ::pause();
        };
    }

    std::uint64_t lives = 0;
    Daemon daemon;
    CopyingVm vm{daemon, pages, 256 * page};
    Vm bystander{daemon};
    Child device{life()};
};

TEST_F(ServicePinsOfADeadDevice, AreReportedAtTheNextSync)
{
    device.kill();
    vm.sync();
    expect_all_is_reported();
}

TEST_F(ServicePinsOfADeadDevice, AreReportedAtTheSyncThatWaits)
{
    vm.start_sync();
    for (int i = 0; i < 3; ++i) {
        bystander.expect_tracks();
        vm.take_all();
        EXPECT_FALSE(vm.synced());
    }
    device.kill();
    vm.finish_sync();
    expect_all_is_reported();
}

TEST_F(ServicePinsOfADeadDevice, AreReportedByTheUnmapThatWaits)
{
    check(dirtyring_queue_unmap(vm.vm(), vm.ioas, 0, vm.map_bytes, DIRTYRING_HARVEST_NOW, 5));
    check(dirtyring_submit(vm.vm()));
    bystander.expect_tracks();
    dr_completion completion{};
    EXPECT_EQ(dirtyring_reap(vm.vm(), &completion, 1), 0u);
    device.kill();
    EXPECT_TRUE(comes_true([&] { return dirtyring_reap(vm.vm(), &completion, 1) == 1; }));
    // More is dirty than there is room.
    std::uint64_t done = completion.done;
    for (int result = completion.result; done < vm.map_bytes; vm.take_all()) {
        ASSERT_EQ(result, -EAGAIN);
        dirtyring_unmapped unmapped{};
        result = dirtyring_unmap(vm.vm(), vm.ioas, done, vm.map_bytes - done, DIRTYRING_HARVEST_NOW, &unmapped);
        done += unmapped.done;
    }
    vm.take_all();
    for (std::uint64_t p = 0; p < vm.map_bytes / page; ++p)
        EXPECT_TRUE(vm.copied(p)) << p;
    check(vm.map(0));
    vm.sync();
    expect_all_is_reported();
}

// ---- devices that lie -----------------------------------------------------------------------------------------------

TEST(ServicePins, ThatAreNonsenseHarmTheirOwnGuestOnly)
{
    Daemon daemon;
    TrackedGuest guest(daemon);
    Vm bystander(daemon);
    const RawRing ring = guest.ring(guest.hwpt);
    constexpr std::uint32_t threads = 4;
    constexpr std::uint32_t pins = 1024;
    constexpr std::size_t words = threads * (sizeof(dr_cell) + pins * sizeof(dr_pin)) / 8;
    Child scribbler([&](const std::function<void()> &ready) {
        Peer device(daemon);
        device.hello();
        dr_device_attach request = new_device(guest.hwpt, guest.info.token);
        request.threads = threads;
        request.pins = pins;
        std::vector<Fd> fds;
        device.get<dr_device>(DR_DEVICE_ATTACH, request, {}, &fds);
        Mapping region;
        if (region.map(fds.at(2).get(), words * 8, PROT_READ | PROT_WRITE) != 0)
            return;
        ready();
        for (std::mt19937_64 random(1);;) {
            const std::uint64_t where = random() % words;
            const std::uint64_t what = random() >> random() % 64; // also small ones: addresses, and counts
            std::atomic_ref(region.as<std::uint64_t>()[where]).store(what, std::memory_order_relaxed);
            if (where % 64 == 0)
                ::eventfd_write(fds[3].get(), 1);
        }
    });
    scribbler.wait_ready();

    unsigned waiting = 0;
    const auto reap = [&] {
        while (guest.completed())
            --waiting;
        (void)ring.take();
        return waiting == 0;
    };
    for (std::uint64_t i = 0; i < 300; ++i) {
        if (waiting < 32) {
            const std::uint64_t at = i / 4 % 16 * 16 * page;
            const dr_command commands[] = {unmap_command(guest.ioas, at, 16 * page, DR_UNMAP_EMPTY_OK),
                                           map_command(guest.ioas, at, 16 * page, at, read_write | DR_MAP_IDEMPOTENT),
                                           sync_command(guest.hwpt, i)};
            for (const dr_command &c : commands) {
                guest.submit(c);
                ++waiting;
            }
        }
        (void)reap();
        if (i % 10 == 0)
            bystander.expect_tracks();
    }
    scribbler.kill();
    EXPECT_TRUE(comes_true(reap)) << waiting << " commands hang";
    bystander.expect_tracks();

    // And its guest is as good as before.
    EXPECT_EQ(guest.run(unmap_command(guest.ioas, 0, UINT64_MAX, DR_UNMAP_EMPTY_OK | DR_UNMAP_DISCARD)), 0);
    EXPECT_EQ(guest.run(map_command(guest.ioas, 0, TrackedGuest::pages * page, 0)), 0);
    (void)ring.take();
    const Device device = attach_with_pins(guest.socket, guest.info.token, guest.hwpt, 8);
    const Pin pin = pin_page(device, 77);
    land(pin, 1);
    unpin(device, pin);
    EXPECT_EQ(guest.run(sync_command(guest.hwpt, 1)), 0);
    EXPECT_THAT(pages_of(ring.take()), testing::Contains(77u));
}

// ---- examples/file_reader.c -----------------------------------------------------------------------------------------

class FileReader : public testing::TestWithParam<std::string>
{
  protected:
    static constexpr std::uint64_t memory_bytes = 32ull << 20;
    static constexpr std::uint64_t file_bytes = (16ull << 20) + 123;
    static constexpr std::uint64_t iova = 3 * page + 512;

    FileReader()
    {
        std::mt19937_64 random(1);
        for (char &c : data)
            c = static_cast<char>(random());
        need(static_cast<int>(::pwrite(file.get(), data.data(), data.size(), 0)), "pwrite");
        ::fsync(file.get());
        ::posix_fadvise(file.get(), 0, 0,
                        POSIX_FADV_DONTNEED); // so that reads are in flight for a while, if it is on a disk
    }
    ~FileReader() override { ::unlink(path.c_str()); }

    std::vector<std::string> words(std::uint64_t at, const std::vector<std::string> &more = {}) const
    {
        std::string token;
        for (int i = 0; i < DR_TOKEN_BYTES; ++i) {
            constexpr const char *digits = "0123456789abcdef";
            token += {digits[vm.token()[i] >> 4], digits[vm.token()[i] & 15]};
        }
        std::vector<std::string> all{FILE_READER_PATH,        daemon.socket(),    token,
                                     std::to_string(vm.hwpt), std::to_string(at), path};
        all.insert(all.end(), more.begin(), more.end());
        return all;
    }

    // Consumes until it ends.
    std::optional<int> exit_code(Process &reader)
    {
        EXPECT_TRUE(comes_true([&] {
            vm.take_all();
            return reader.ended();
        })) << "it hangs";
        return reader.exit_code();
    }

    Daemon daemon;
    CopyingVm vm{daemon, memory_bytes / page, page}; // each page is a piece
    TemporaryDirectory directory;
    std::string path = directory.path() + "/file";
    Fd file{need(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600), "open")};
    std::string data = std::string(file_bytes, '\0');
};

INSTANTIATE_TEST_SUITE_P(Depths, FileReader, testing::Values("1", "64", "1024"),
                         [](const auto &tested) { return tested.param; });

TEST_P(FileReader, ReadsAFileThatTheVmmThenHas)
{
    Process reader(words(iova, {GetParam()}));
    EXPECT_EQ(exit_code(reader), 0) << reader.said();
    vm.sync();
    EXPECT_TRUE(vm.at(iova, file_bytes) == data) << "the copy is not the file";
    EXPECT_THAT(vm.lost(), testing::IsEmpty());
    const std::uint64_t most = std::min<std::uint64_t>(std::stoull(GetParam()), file_bytes / 65536 + 1);
    EXPECT_EQ(reader.printed(),
              "read " + std::to_string(file_bytes) + " bytes, at most " + std::to_string(most) + " reads in flight\n");
    check(dirtyring_destroy(vm.vm(), vm.hwpt)); // it has detached
}

TEST_F(FileReader, SaysWhereNothingIsMapped)
{
    Process reader(words(memory_bytes - 100 * 65536)); // with 36 behind the first 64 in flight
    EXPECT_EQ(exit_code(reader), 1);
    EXPECT_EQ(reader.said(), "file_reader: pin: DMA write at iova 0x2000000: no translation\n");
    EXPECT_EQ(reader.printed(), "");
    vm.sync();
    EXPECT_THAT(vm.lost(), testing::IsEmpty());
    check(dirtyring_destroy(vm.vm(), vm.hwpt)); // it has detached
}

// Truncated after its size was taken: a short read, and then none.
TEST_F(FileReader, EndsWithTheFile)
{
    constexpr off_t shorter = 100'000;
    daemon.process().signal(SIGSTOP);
    Process reader(words(iova));
    const auto it_attaches = [&] { // to a service that is stopped
        for (const auto &fd : std::filesystem::directory_iterator(reader.proc("fd"))) {
            std::error_code ignored;
            if (std::filesystem::read_symlink(fd, ignored).string().find("io_uring") != std::string::npos)
                return true;
        }
        return false;
    };
    EXPECT_TRUE(comes_true(it_attaches));
    EXPECT_EQ(::ftruncate(file.get(), shorter), 0);
    daemon.process().signal(SIGCONT);
    EXPECT_EQ(exit_code(reader), 0) << reader.said();
    EXPECT_EQ(reader.printed(), "read 100000 bytes, at most 64 reads in flight\n");
    vm.sync();
    EXPECT_TRUE(vm.at(iova, shorter) == data.substr(0, shorter)) << "the copy is not the file";
}

} // namespace
} // namespace dirtyring::test
