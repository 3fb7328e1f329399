// dirtyring_log against dirtyringd: what iommufd's bitmap call promises, and what its own tests look at.
#include "client/dirtyring.h"
#include "tests/service/service_peers.hpp"

#include <array>
#include <memory>

namespace dirtyring::test {
namespace {

constexpr std::uint64_t MiB = 1ull << 20;

class ServiceLog : public testing::Test
{
  protected:
    // Memory from `oa` on, mapped at the same IOVAs.
    void open(dirtyring_hwpt attributes = {}, std::uint64_t start = 0, std::uint64_t length = 4 * MiB)
    {
        dirtyring_vm *raw = nullptr;
        ASSERT_EQ(dirtyring_connect(daemon_.socket().c_str(), &raw), 0) << dirtyring_error();
        vm_.reset(raw);
        memory_ = memory_file(length);
        std::uint32_t ioas = 0;
        ASSERT_EQ(dirtyring_memory_add(raw, start, length, memory_.get(), 0), 0) << dirtyring_error();
        ASSERT_EQ(dirtyring_ioas_alloc(raw, &ioas), 0);
        ASSERT_EQ(dirtyring_hwpt_alloc(raw, ioas, &attributes, &hwpt_), 0) << dirtyring_error();
        ASSERT_EQ(dirtyring_map(raw, ioas, start, length, start, DIRTYRING_READ | DIRTYRING_WRITE), 0)
            << dirtyring_error();
        ASSERT_EQ(dirtyring_enable(raw, hwpt_), 0);
        dirtyring_log *log = nullptr;
        ASSERT_EQ(dirtyring_log_open(raw, hwpt_, &log), 0) << dirtyring_error();
        log_.reset(log);
        device_ = attach(daemon_.socket(), dirtyring_token(raw), hwpt_);
    }

    void write(std::uint64_t iova) { dma_write(device_, iova); }

    // The bits that are set, read into a bitmap that is aligned to nothing.
    std::vector<std::uint64_t> read(std::uint64_t address, std::uint64_t length, std::uint32_t page_lg2 = 12,
                                    std::uint32_t flags = 0)
    {
        const std::uint64_t units = ((address + (length - 1)) >> page_lg2) - (address >> page_lg2) + 1;
        std::vector<unsigned char> bytes(units / 8 + 3, 0);
        bytes.back() = 0xa5;
        EXPECT_EQ(dirtyring_log_read(log_.get(), address, length, page_lg2, bytes.data() + 1, flags), 0)
            << dirtyring_error();
        EXPECT_EQ(bytes.front(), 0);
        EXPECT_EQ(bytes.back(), 0xa5);
        std::vector<std::uint64_t> bits;
        for (std::uint64_t i = 0; i < (bytes.size() - 2) * 8; ++i) {
            if ((bytes[1 + i / 8] >> (i % 8) & 1) != 0)
                bits.push_back(i);
        }
        return bits;
    }
    int error(std::uint64_t address, std::uint64_t length, std::uint32_t page_lg2, std::uint32_t flags = 0)
    {
        std::uint64_t word = 0;
        return dirtyring_log_read(log_.get(), address, length, page_lg2, &word, flags);
    }

    Daemon daemon_;
    std::unique_ptr<dirtyring_vm, decltype(&dirtyring_close)> vm_{nullptr, dirtyring_close};
    std::unique_ptr<dirtyring_log, decltype(&dirtyring_log_close)> log_{nullptr, dirtyring_log_close};
    Device device_;
    std::uint32_t hwpt_ = 0;
    Fd memory_;
};

using Bits = std::vector<std::uint64_t>;

TEST_F(ServiceLog, ReadsAndClears)
{
    open();
    write(3 * page);
    write(40 * page);
    EXPECT_EQ(read(0, 4 * MiB, 12, DIRTYRING_LOG_KEEP), (Bits{3, 40}));
    EXPECT_EQ(read(0, 4 * MiB), (Bits{3, 40}));
    EXPECT_EQ(read(0, 4 * MiB), Bits{});
    write(3 * page);
    EXPECT_EQ(read(2 * page, 8 * page), Bits{1});
}

TEST_F(ServiceLog, ClearsNothingThatItDoesNotReport)
{
    dirtyring_hwpt large{};
    large.leaf_lg2_max = 21;
    open(large);
    write(2 * MiB + 5 * page); // the leaf is dirty as a whole
    EXPECT_EQ(read(2 * MiB + 3 * page, 2 * page), (Bits{0, 1}));
    EXPECT_EQ(read(2 * MiB, 2 * MiB).size(), 510u);
    EXPECT_EQ(read(2 * MiB, 2 * MiB), Bits{});
}

TEST_F(ServiceLog, TakesAnyPageSizeAndAnyRange)
{
    open();
    write(0);
    write(17 * page);
    write(4 * MiB - page);
    EXPECT_EQ(read(0, 4 * MiB, 16, DIRTYRING_LOG_KEEP), (Bits{0, 1, 63}));
    EXPECT_EQ(read(17 * page + 7, 1, 13, DIRTYRING_LOG_KEEP), Bits{0});
    EXPECT_EQ(read(0, UINT64_MAX, 63, DIRTYRING_LOG_KEEP), Bits{0});
    EXPECT_EQ(read(16 * page, 2 * page, 21), Bits{0});
    EXPECT_EQ(read(0, 4 * MiB, 16), (Bits{0, 63})) << "page 17 was read with the range that holds it";
}

TEST_F(ServiceLog, ReadsTheLastPageOfTheSpace)
{
    dirtyring_hwpt small{};
    small.aperture_lg2 = 30;
    open(small, (1ull << 30) - 2 * MiB, 2 * MiB);
    write((1ull << 30) - page);
    EXPECT_EQ(read((1ull << 30) - page, page), Bits{0});
    EXPECT_EQ(read(0, 1ull << 30), Bits{});
}

TEST_F(ServiceLog, RefusesWhatMakesNoSense)
{
    open();
    write(0);
    EXPECT_EQ(error(0, 0, 12), -EINVAL);
    EXPECT_EQ(error(page, UINT64_MAX, 12), -EINVAL);
    EXPECT_EQ(error(0, page, 11), -EINVAL);
    EXPECT_EQ(error(0, page, 64), -EINVAL);
    EXPECT_EQ(error(0, page, 12, 2), -EINVAL);
    EXPECT_EQ(read(0, page), Bits{0});
}

} // namespace
} // namespace dirtyring::test
