// libdirtyring's pins: the pieces they give, what they refuse, and what they leave in shared memory.
#include "tests/client/fake_service.hpp"

#include <climits>

namespace dirtyring::test {
namespace {

constexpr std::uint32_t slots = 4;

class ClientPins : public ClientDevice
{
  protected:
    struct Pin {
        int result;
        std::uint32_t count; // as it came back
        std::vector<iovec> pieces;
        dirtyring_fault fault;
    };

    ClientPins() : ClientDevice(slots) {}

    void SetUp() override
    {
        using iommu::AmdV1;
        ClientDevice::SetUp();
        for (const auto &[from, to] : {std::pair{16, 20}, {17, 21}, {18, 40}, {19, 41}})
            entry(first + 1, from) = AmdV1::leaf(to * page, 12, {true, true});
        entry(first + 1, 24) = AmdV1::leaf(3 * page, 12, {false, true});
        entry(first, 2) = AmdV1::leaf(0, 21, {true, true}); // so that 4 MiB are mapped from large_iova
        attach();
        dma = dirtyring_device_dma(device, 0);
        ASSERT_NE(dma, nullptr);
    }

    Pin pin(std::uint64_t at, std::uint64_t length, std::uint32_t direction = DIRTYRING_WRITE, std::uint32_t room = 16)
    {
        Pin p{0, room, std::vector<iovec>(room), {}};
        p.result = dirtyring_dma_pin(dma, at, length, direction, p.pieces.data(), &p.count, &p.fault);
        p.pieces.resize(std::min(room, p.count));
        return p;
    }

    static std::vector<std::uint64_t> lengths(const Pin &p)
    {
        std::vector<std::uint64_t> all;
        for (const iovec &piece : p.pieces)
            all.push_back(piece.iov_len);
        return all;
    }

    // As a disk does it; returns what it wrote.
    static std::string land(const Pin &p)
    {
        std::string data;
        for (const iovec &piece : p.pieces) {
            const std::size_t from = data.size();
            for (std::size_t i = 0; i < piece.iov_len; ++i)
                data.push_back(static_cast<char>(1 + (from + i) % 251));
            std::memcpy(piece.iov_base, data.data() + from, piece.iov_len);
        }
        return data;
    }
    std::string memory_at(std::uint64_t oa, std::uint64_t length)
    {
        return {memory.map.as<char>(oa), static_cast<std::size_t>(length)};
    }

    void expect_unpin(const Pin &p) { EXPECT_EQ(dirtyring_dma_unpin(dma, p.result), 0) << dirtyring_error(); }
    void expect_detach() { EXPECT_EQ(dirtyring_device_detach(device), 0) << dirtyring_error(); }
    void expect_nothing_held()
    {
        for (std::uint32_t i = 0; i < threads; ++i)
            EXPECT_EQ(cell(i).pinned, 0u) << "thread " << i;
        for (std::uint32_t i = 0; i < threads * slots; ++i)
            EXPECT_EQ(slot(i).count % 2, 0u) << "slot " << i;
    }

    dr_cell &cell(std::uint32_t thread) { return cells.map.as<dr_cell>()[thread]; }
    dr_pin &slot(std::uint32_t index) { return cells.map.as<dr_pin>(threads * sizeof(dr_cell))[index]; }

    dirtyring_dma *dma = nullptr;
};

// ---- what a pin gives

TEST_F(ClientPins, MergesPiecesThatTouch)
{
    const Pin p = pin(16 * page, 4 * page);
    ASSERT_GE(p.result, 0) << dirtyring_error();
    EXPECT_THAT(lengths(p), ElementsAre(2 * page, 2 * page));
    const std::string data = land(p);
    EXPECT_EQ(memory_at(20 * page, 2 * page), data.substr(0, 2 * page));
    EXPECT_EQ(memory_at(40 * page, 2 * page), data.substr(2 * page));
    expect_unpin(p);
    for (std::uint64_t i = 16; i < 20; ++i)
        EXPECT_TRUE(is_dirty(i * page)) << i;
    expect_detach();
}

TEST_F(ClientPins, NeedNoAlignment)
{
    const Pin p = pin(17 * page + 100, page + 1);
    ASSERT_GE(p.result, 0) << dirtyring_error();
    EXPECT_THAT(lengths(p), ElementsAre(page - 100, 101u));
    const std::string data = land(p);
    EXPECT_EQ(memory_at(21 * page + 100, page - 100), data.substr(0, page - 100));
    EXPECT_EQ(memory_at(40 * page, 101), data.substr(page - 100));
    EXPECT_EQ(*memory.map.as<char>(40 * page + 101), 0);
    expect_unpin(p);
    EXPECT_TRUE(is_dirty(17 * page));
    EXPECT_TRUE(is_dirty(18 * page));

    const Pin last_byte = pin(20 * page - 1, 1);
    ASSERT_GE(last_byte.result, 0) << dirtyring_error();
    EXPECT_THAT(lengths(last_byte), ElementsAre(1u));
    expect_unpin(last_byte);
    EXPECT_TRUE(is_dirty(19 * page));
    EXPECT_FALSE(is_dirty(16 * page));
    expect_detach();
}

TEST_F(ClientPins, AreDirtyWhenGivenBackNotBefore)
{
    const Pin writes = pin(16 * page, page);
    const Pin reads = pin(18 * page, page, DIRTYRING_READ);
    land(writes);
    EXPECT_FALSE(is_dirty(16 * page));
    expect_unpin(writes);
    expect_unpin(reads);
    EXPECT_TRUE(is_dirty(16 * page));
    EXPECT_FALSE(is_dirty(18 * page)) << "it was read";
    expect_detach();
}

TEST_F(ClientPins, StandInTheSlotsOfTheirThread)
{
    dma = dirtyring_device_dma(device, 1);
    const Pin p = pin(16 * page + 7, 100);
    const Pin reads = pin(18 * page, page, DIRTYRING_READ);
    EXPECT_EQ(cell(0).pinned, 0u);
    EXPECT_EQ(cell(1).pinned, 2u);
    EXPECT_EQ(cell(1).count % 2, 0u) << "it is over its section";
    std::vector<std::uint64_t> held;
    for (std::uint32_t i = 0; i < threads * slots; ++i) {
        if (slot(i).count % 2 != 0) {
            EXPECT_GE(i, slots) << "a slot of thread 0";
            held.insert(held.end(), {slot(i).start, slot(i).last, slot(i).write});
        }
    }
    EXPECT_THAT(held, ElementsAre(16 * page + 7, 16 * page + 106, 1u, 18 * page, 19 * page - 1, 0u));
    expect_unpin(p);
    expect_unpin(reads);
    expect_nothing_held();
    expect_detach();
}

// The longest, from 2 MiB leaves: each of them is a piece here.
TEST_F(ClientPins, MayBeAsLongAsTheLimit)
{
    const Pin p = pin(large_iova, DIRTYRING_PIN_MAX);
    ASSERT_GE(p.result, 0) << dirtyring_error();
    EXPECT_THAT(lengths(p), ElementsAre(2u << 20, 2u << 20));
    expect_unpin(p);
    EXPECT_TRUE(iommu::AmdV1::dirty(entry(first, 1)));
    EXPECT_TRUE(iommu::AmdV1::dirty(entry(first, 2)));
    expect_detach();
}

// ---- what is refused, and then holds nothing

TEST_F(ClientPins, TellHowManyPiecesThereAre)
{
    // The pieces beyond the room are merged, too.
    for (const std::uint32_t room : {1u, 0u}) {
        const Pin p = pin(16 * page, 4 * page, DIRTYRING_WRITE, room);
        EXPECT_EQ(p.result, -EMSGSIZE);
        EXPECT_EQ(p.count, 2u);
        EXPECT_THAT(dirtyring_error(), HasSubstr("2 pieces"));
        expect_nothing_held();
    }
    for (std::uint64_t i = 16; i < 20; ++i)
        EXPECT_FALSE(is_dirty(i * page));
    const Pin p = pin(16 * page, 4 * page, DIRTYRING_WRITE, 2);
    EXPECT_GE(p.result, 0) << dirtyring_error();
    expect_unpin(p);
    expect_detach();
}

TEST_F(ClientPins, OfAThreadAreAsManyAsItAskedFor)
{
    std::vector<Pin> held;
    for (std::uint32_t i = 0; i < slots; ++i) {
        held.push_back(pin(16 * page, page));
        ASSERT_GE(held.back().result, 0) << dirtyring_error();
        for (std::uint32_t j = 0; j < i; ++j)
            EXPECT_NE(held[j].result, held[i].result);
    }
    EXPECT_EQ(pin(16 * page, page).result, -EAGAIN);
    EXPECT_THAT(dirtyring_error(), HasSubstr("all pins"));
    EXPECT_EQ(cell(0).pinned, slots);

    dirtyring_dma *const first_thread = std::exchange(dma, dirtyring_device_dma(device, 1));
    const Pin other = pin(16 * page, page);
    EXPECT_GE(other.result, 0) << "the other thread has slots of its own";
    expect_unpin(other);
    dma = first_thread;

    expect_unpin(held[1]);
    held[1] = pin(16 * page, page);
    EXPECT_GE(held[1].result, 0) << dirtyring_error();
    for (const Pin &p : held)
        expect_unpin(p);
    expect_nothing_held();
    expect_detach();
}

TEST_F(ClientPins, RefuseWhatMakesNoSense)
{
    EXPECT_EQ(pin(16 * page, 0).result, -EINVAL);
    EXPECT_EQ(pin(large_iova, DIRTYRING_PIN_MAX + 1).result, -EINVAL);
    EXPECT_EQ(pin(large_iova, UINT64_MAX).result, -EINVAL);
    for (const std::uint32_t direction :
         {0u, 0u | DIRTYRING_READ | DIRTYRING_WRITE, 0u | DIRTYRING_IDEMPOTENT, DIRTYRING_WRITE | 1u << 31})
        EXPECT_EQ(pin(16 * page, page, direction).result, -EINVAL) << direction;
    expect_nothing_held();
    EXPECT_EQ(cell(0).count, 0u) << "not even a section";
    expect_detach();
}

TEST_F(ClientPins, TellWhyTheyFault)
{
    translation.map.as<dr_shard_control>(geometry.shard_controls)->closed[0] = {1, {{18 * page, 19 * page - 1}}};
    entry(first, 3) = iommu::AmdV1::table(geometry.tables, 0);
    struct Case {
        std::uint64_t iova;
        std::uint64_t length;
        std::uint32_t direction;
        dirtyring_fault fault;
    };
    constexpr std::uint64_t end = 1ull << 30;
    const Case cases[] = {
        {20 * page, page, DIRTYRING_WRITE, {20 * page, DIRTYRING_FAULT_NOT_PRESENT, 1, 0}},
        {19 * page + 96, page, DIRTYRING_READ, {20 * page, DIRTYRING_FAULT_NOT_PRESENT, 0, page - 96}},
        {iova, 2 * page, DIRTYRING_WRITE, {iova + page, DIRTYRING_FAULT_WRITE, 1, page}},
        {24 * page, page, DIRTYRING_READ, {24 * page, DIRTYRING_FAULT_READ, 0, 0}},
        {iova + 2 * page, 1, DIRTYRING_WRITE, {iova + 2 * page, DIRTYRING_FAULT_MEMORY, 1, 0}},
        {6ull << 20, 1, DIRTYRING_READ, {6ull << 20, DIRTYRING_FAULT_TABLE, 0, 0}},
        {end, 1, DIRTYRING_WRITE, {end, DIRTYRING_FAULT_APERTURE, 1, 0}},
        {UINT64_MAX, 2, DIRTYRING_READ, {UINT64_MAX, DIRTYRING_FAULT_APERTURE, 0, 0}},
        {17 * page, page + 1, DIRTYRING_WRITE, {17 * page, DIRTYRING_FAULT_CLOSED, 1, 0}},
        {19 * page - 1, 1, DIRTYRING_READ, {19 * page - 1, DIRTYRING_FAULT_CLOSED, 0, 0}},
    };
    for (const Case &c : cases) {
        const Pin p = pin(c.iova, c.length, c.direction);
        EXPECT_EQ(p.result, -EFAULT) << std::hex << c.iova;
        EXPECT_EQ(p.fault.reason, c.fault.reason) << dirtyring_error();
        EXPECT_EQ(p.fault.iova, c.fault.iova) << dirtyring_error();
        EXPECT_EQ(p.fault.write, c.fault.write) << dirtyring_error();
        EXPECT_EQ(p.fault.done, c.fault.done) << dirtyring_error();
        expect_nothing_held();
    }
    EXPECT_STREQ(dirtyring_error(), "DMA read at iova 0x12fff: it is being unmapped");

    iovec piece{};
    std::uint32_t count = 1;
    EXPECT_EQ(dirtyring_dma_pin(dma, 0, 1, DIRTYRING_READ, &piece, &count, nullptr), -EFAULT);
    const Pin beside = pin(17 * page, page);
    EXPECT_GE(beside.result, 0) << "the closed range begins behind it";
    expect_unpin(beside);
    expect_detach();
}

// ---- giving back

TEST_F(ClientPins, GiveBackOnlyWhatIsHeld)
{
    for (const int nobodys : {0, 1, static_cast<int>(slots), INT_MAX, -1, INT_MIN}) {
        EXPECT_EQ(dirtyring_dma_unpin(dma, nobodys), -EINVAL);
        EXPECT_EQ(dirtyring_error(), "pin " + std::to_string(nobodys) + " is not held");
    }
    const Pin p = pin(16 * page, page);
    EXPECT_EQ(dirtyring_dma_unpin(dirtyring_device_dma(device, 1), p.result), -EINVAL) << "another thread's";
    expect_unpin(p);
    EXPECT_EQ(dirtyring_dma_unpin(dma, p.result), -EINVAL) << "twice";
    expect_nothing_held();
    expect_detach();
}

TEST_F(ClientPins, AreGoneAlsoWhenTheTablesAreDamaged)
{
    const Pin p = pin(16 * page, 2 * page);
    ++translation.map.as<std::uint64_t>(geometry.generations)[0]; // or the IOTLB knows them
    const std::uint64_t was = std::exchange(entry(first + 1, 17), 0);
    EXPECT_EQ(dirtyring_dma_unpin(dma, p.result), -EFAULT);
    EXPECT_STREQ(dirtyring_error(), "DMA write at iova 0x11000: no translation");
    EXPECT_TRUE(is_dirty(16 * page));
    expect_nothing_held();
    entry(first + 1, 17) = was;
    expect_detach();
}

TEST_F(ClientPins, RingAWalkerThatWaitsForThem)
{
    const auto bell = [this](std::uint64_t asleep, auto act) {
        control().asleep = asleep;
        act();
        control().asleep = DR_AWAKE;
        return take_event(doorbell);
    };
    Pin p{};
    EXPECT_FALSE(bell(DR_ASLEEP_PINS, [&] { p = pin(16 * page, page, DIRTYRING_READ); }));
    EXPECT_TRUE(bell(DR_ASLEEP_PINS, [&] { expect_unpin(p); }));
    p = pin(16 * page, page, DIRTYRING_READ);
    EXPECT_FALSE(bell(DR_ASLEEP, [&] { expect_unpin(p); })) << "nobody waits for pins";
    p = pin(16 * page, page);
    EXPECT_TRUE(bell(DR_ASLEEP, [&] { expect_unpin(p); })) << "it turned a table bit";
    // The walker may have seen one that came to nothing.
    EXPECT_TRUE(bell(DR_ASLEEP_PINS, [&] { pin(16 * page, 4 * page, DIRTYRING_READ, 1); }));
    EXPECT_TRUE(bell(DR_ASLEEP_PINS, [&] { pin(20 * page, page); }));
    expect_detach();
}

// ---- sections

TEST_F(ClientPins, InASectionOfTheCallers)
{
    dirtyring_dma_begin(dma);
    const Pin p = pin(16 * page, page);
    const Pin stays = pin(18 * page, page);
    land(p);
    expect_unpin(p);
    EXPECT_EQ(dirtyring_dma_write(dma, iova, "a", 1, nullptr), 0);
    EXPECT_EQ(cell(0).count, 1u) << "it is the caller's to end";
    EXPECT_EQ(cell(0).pinned, 1u);
    EXPECT_TRUE(is_dirty(16 * page));
    dirtyring_dma_end(dma);
    EXPECT_EQ(cell(0).count, 2u);
    EXPECT_EQ(cell(0).pinned, 1u) << "a pin outlives its section";
    expect_unpin(stays);
    EXPECT_EQ(cell(0).count, 4u) << "one of its own";
    expect_nothing_held();
    expect_detach();
}

// The bell of an unpin in a caller's section is rung when that ends.
TEST_F(ClientPins, RingAtTheEndOfTheSection)
{
    const Pin p = pin(16 * page, page, DIRTYRING_READ);
    control().asleep = DR_ASLEEP_PINS;
    dirtyring_dma_begin(dma);
    expect_unpin(p);
    EXPECT_FALSE(take_event(doorbell));
    dirtyring_dma_end(dma);
    EXPECT_TRUE(take_event(doorbell));
    expect_detach();
}

// ---- attach and detach

TEST_F(ClientPins, HeldKeepTheDeviceAttached)
{
    dma = dirtyring_device_dma(device, 1);
    const Pin p = pin(16 * page, page, DIRTYRING_READ);
    EXPECT_EQ(dirtyring_device_detach(device), -EBUSY);
    EXPECT_THAT(dirtyring_error(), HasSubstr("pin"));
    expect_unpin(p);
    expect_detach();
    service.hang_up();
    EXPECT_THAT(service.requests, ElementsAre(DR_HELLO, DR_DEVICE_ATTACH, DR_DEVICE_DETACH));
}

TEST(ClientAttach, RefusesTooManyPins)
{
    struct Case {
        std::uint32_t threads;
        std::uint32_t pins;
    };
    const std::uint8_t token[DR_TOKEN_BYTES] = {};
    for (const Case &c : {Case{1, DR_DEVICE_PINS_MAX + 1}, Case{0, DR_DEVICE_PINS_MAX + 1}, Case{64, 65},
                          Case{64, 1u << 26}, Case{2, 1u << 31}, Case{1, UINT32_MAX}}) {
        dirtyring_attach attach{};
        attach.token = token;
        attach.threads = c.threads;
        attach.pins = c.pins;
        dirtyring_device *device = reinterpret_cast<dirtyring_device *>(1);
        EXPECT_EQ(dirtyring_device_attach("/nonexistent/socket", &attach, &device), -EINVAL) << c.threads;
        EXPECT_EQ(device, nullptr);
        EXPECT_THAT(dirtyring_error(), HasSubstr("at most 4096 pins"));
        attach.pins = DR_DEVICE_PINS_MAX / std::max(1u, c.threads);
        EXPECT_EQ(dirtyring_device_attach("/nonexistent/socket", &attach, &device), -ENOENT) << "that many may be";
    }
}

TEST_F(ClientDevice, AsksForPins)
{
    dr_device_attach asked{};
    const auto reply = service.on[DR_DEVICE_ATTACH];
    service.on[DR_DEVICE_ATTACH] = [&](const std::string &payload) {
        std::memcpy(&asked, payload.data(), std::min(payload.size(), sizeof asked));
        return reply(payload);
    };
    const std::uint8_t token[DR_TOKEN_BYTES] = {};
    dirtyring_attach attach{};
    attach.token = token;
    attach.threads = 2;
    attach.pins = 1024; // that much stands not in our region
    EXPECT_EQ(dirtyring_device_attach(service.path.c_str(), &attach, &device), -EPROTO);
    EXPECT_THAT(dirtyring_error(), HasSubstr("region of cells and pins"));
    EXPECT_EQ(asked.threads, 2u);
    EXPECT_EQ(asked.pins, 1024u);
}

TEST_F(ClientDevice, WithoutPinsPinsNothing)
{
    attach();
    dirtyring_dma *dma = dirtyring_device_dma(device, 0);
    iovec piece{};
    std::uint32_t count = 1;
    EXPECT_EQ(dirtyring_dma_pin(dma, iova, page, DIRTYRING_WRITE, &piece, &count, nullptr), -EAGAIN);
    EXPECT_EQ(dirtyring_dma_unpin(dma, 0), -EINVAL);
    EXPECT_EQ(dirtyring_dma_write(dma, iova, "a", 1, nullptr), 0);
    EXPECT_EQ(dirtyring_device_detach(device), 0);
}

} // namespace
} // namespace dirtyring::test
