// Unmaps in IOVA space that an ENABLE overtakes, as a VMM with a RetainedMap sees them: what was written is copied to
// where it was mapped.
#include "client/retained_map.hpp"
#include "tests/service/supervised.hpp"

#include <algorithm>
#include <thread>

namespace dirtyring::test {
namespace {

// A VMM and a device of 64 pages of memory.
struct Guest {
    Guest(const Daemon &daemon, std::uint32_t shards) : map(shards, 34 - (shards - 1))
    {
        dirtyring_vm *v = nullptr;
        check(dirtyring_connect(daemon.socket().c_str(), &v));
        vm.reset(v);
        dirtyring_hwpt attributes{};
        attributes.space = DR_SPACE_IOVA;
        attributes.aperture_lg2 = 34;
        attributes.shards = shards;
        check(dirtyring_memory_add(v, 0, 64 * page, file.get(), 0));
        check(dirtyring_ioas_alloc(v, &ioas));
        check(dirtyring_hwpt_alloc(v, ioas, &attributes, &hwpt));
        dirtyring_set *s = nullptr;
        check(dirtyring_set_open(v, hwpt, &s));
        set.reset(s);
        EXPECT_EQ(memory.map(file.get(), 64 * page, PROT_READ | PROT_WRITE), 0);
        dirtyring_attach a{};
        a.token = dirtyring_token(v);
        a.hwpt = hwpt;
        a.pins = 8;
        dirtyring_device *d = nullptr;
        check(dirtyring_device_attach(daemon.socket().c_str(), &a, &d));
        device.reset(d);
    }

    void map_page(std::uint64_t iova, std::uint64_t oa)
    {
        check(dirtyring_map(vm.get(), ioas, iova, page, oa, read_write));
        map.map(iova, page, oa);
    }
    int pin(std::uint64_t iova, int rights, iovec &piece)
    {
        std::uint32_t count = 1;
        return check(
            dirtyring_dma_pin(dirtyring_device_dma(device.get(), 0), iova, page, rights, &piece, &count, nullptr));
    }
    void unpin(int slot) { check(dirtyring_dma_unpin(dirtyring_device_dma(device.get(), 0), slot)); }

    // Queued, and waiting for a pin.
    void begin_unmap(std::uint64_t iova, std::uint64_t length)
    {
        check(dirtyring_queue_unmap(vm.get(), ioas, iova, length, 0, 7));
        check(dirtyring_submit(vm.get()));
        std::this_thread::sleep_for(100ms);
    }
    // Whatever is left is asked for again. What the first completion said.
    dr_completion end_unmap(std::uint64_t iova, std::uint64_t length)
    {
        dr_completion first{};
        for (std::uint64_t at = iova; at < iova + length;) {
            dr_completion c{};
            EXPECT_TRUE(comes_true([&] { return dirtyring_reap(vm.get(), &c, 1) == 1; }));
            EXPECT_TRUE(c.result == 0 || c.result == -EAGAIN) << c.result;
            if (at == iova)
                first = c;
            map.unmapped(at, c.done, c.epoch);
            at += c.done;
            if (c.result != 0) {
                check(dirtyring_queue_unmap(vm.get(), ioas, at, iova + length - at, 0, 7));
                check(dirtyring_submit(vm.get()));
            }
        }
        return first;
    }
    void enable_and_copy()
    {
        check(dirtyring_enable(vm.get(), hwpt));
        std::copy_n(memory.data(), copy.size(), copy.data());
    }

    // Reads all there is. How many markers of epochs there were.
    unsigned consume()
    {
        unsigned epochs = 0;
        dirtyring_batch batch{};
        while (dirtyring_set_peek(set.get(), &batch)) {
            for (std::uint32_t i = 0; i < batch.count; ++i)
                epochs += take(batch.shard, batch.entries[i]) ? 1 : 0;
            dirtyring_set_release(set.get(), &batch);
        }
        return epochs;
    }
    bool take(std::uint32_t shard, std::uint64_t entry)
    {
        if (dr_is_marker(entry)) {
            if (dr_marker_kind(entry) != DR_MARKER_EPOCH)
                return false;
            map.passed(shard, dr_marker_payload(entry));
            return true;
        }
        EXPECT_TRUE(
            map.translate(shard, dr_run_address(entry), dr_run_length(entry), [&](std::uint64_t oa, std::uint64_t n) {
                std::copy_n(memory.data() + oa, n, copy.data() + oa);
            }));
        return false;
    }
    [[nodiscard]] bool equal() const { return std::equal(copy.begin(), copy.end(), memory.data()); }

    RetainedMap map;
    Fd file = memory_file(64 * page);
    Mapping memory;
    std::vector<std::byte> copy = std::vector<std::byte>(64 * page);
    Library vm;
    Set set;
    Device device;
    std::uint32_t ioas = 0;
    std::uint32_t hwpt = 0;
};

class Overtaken
{
  public:
    explicit Overtaken(Rule rule)
        : daemon_(
              {}, [=] { break_rule(rule); }, DIRTYRINGD_BREAKABLE_PATH)
    {
    }
    Daemon *operator->() { return &daemon_; }
    Daemon &operator*() { return daemon_; }

  private:
    Daemon daemon_;
};

// A page is pinned for writing, its unmap waits, an ENABLE comes, the data lands, and the IOVA is mapped to another
// page before its run is read. True: the copy is right.
bool pinned_and_enabled(Rule rule)
{
    Overtaken daemon(rule);
    Guest g(*daemon, 1);
    const std::uint64_t iova = 100 * page;
    g.map_page(iova, page);
    iovec piece{};
    const int slot = g.pin(iova, DIRTYRING_WRITE, piece);
    g.begin_unmap(iova, page);
    g.enable_and_copy();
    std::memset(piece.iov_base, 0x5a, page);
    g.unpin(slot);
    const dr_completion done = g.end_unmap(iova, page);
    g.map_page(iova, 2 * page);
    const unsigned epochs = g.consume();
    if (rule == Rule::none) {
        EXPECT_EQ(done.result, 0);
        EXPECT_NE(done.epoch, 0u);
        EXPECT_EQ(epochs, 1u);
        EXPECT_EQ(g.map.retained(), 0u);
    }
    return g.equal();
}

TEST(ServiceOvertaken, APinnedUnmapThatAnEnableOvertakesHasAnEpoch)
{
    EXPECT_TRUE(pinned_and_enabled(Rule::none));
    EXPECT_FALSE(pinned_and_enabled(Rule::epoch_at_submission));
}

// The last page of a slice and the first of the next, each a map. The first is pinned, the second written behind the
// ENABLE.
bool second_slice_written(Rule rule)
{
    Overtaken daemon(rule);
    Guest g(*daemon, 2);
    const std::uint64_t border = 1ull << 33;
    g.map_page(border - page, page);
    g.map_page(border, 2 * page);
    iovec piece{};
    const int slot = g.pin(border - page, DIRTYRING_READ, piece);
    g.begin_unmap(border - page, 2 * page);
    g.enable_and_copy();
    const std::uint64_t value = 0x5a;
    check(dirtyring_dma_write(dirtyring_device_dma(g.device.get(), 0), border, &value, sizeof value, nullptr));
    g.unpin(slot);
    static_cast<void>(g.end_unmap(border - page, 2 * page));
    g.map_page(border - page, 11 * page);
    g.map_page(border, 12 * page);
    const unsigned epochs = g.consume();
    if (rule == Rule::none) {
        EXPECT_EQ(epochs, 2u) << "one in each ring";
        EXPECT_EQ(g.map.retained(), 0u);
    }
    return g.equal();
}

TEST(ServiceOvertaken, BothSlicesOfAnUnmapThatAnEnableOvertakesHaveItsMarker)
{
    EXPECT_TRUE(second_slice_written(Rule::none));
    EXPECT_FALSE(second_slice_written(Rule::epoch_at_submission));
}

// The first slice's part is done before the ENABLE, the second's waits for a pin: the unmap ends between them.
bool second_slice_pinned(Rule rule)
{
    Overtaken daemon(rule);
    Guest g(*daemon, 2);
    const std::uint64_t border = 1ull << 33;
    g.map_page(border - page, page);
    g.map_page(border, 2 * page);
    iovec piece{};
    const int slot = g.pin(border, DIRTYRING_WRITE, piece);
    g.begin_unmap(border - page, 2 * page);
    g.enable_and_copy();
    std::memset(piece.iov_base, 0x5a, page);
    g.unpin(slot);
    const dr_completion done = g.end_unmap(border - page, 2 * page);
    g.map_page(border - page, 11 * page);
    g.map_page(border, 12 * page);
    const unsigned epochs = g.consume();
    if (rule == Rule::none) {
        EXPECT_EQ(done.result, -EAGAIN);
        EXPECT_EQ(done.done, page);
        EXPECT_EQ(done.epoch, 0u);
        EXPECT_EQ(epochs, 1u);
        EXPECT_EQ(g.map.retained(), 0u);
    }
    return g.equal();
}

TEST(ServiceOvertaken, AnUnmapEndsBetweenASliceThatWasNotReportedAndOneThatIs)
{
    EXPECT_TRUE(second_slice_pinned(Rule::none));
    EXPECT_FALSE(second_slice_pinned(Rule::unmap_passes_enable));
}

} // namespace
} // namespace dirtyring::test
