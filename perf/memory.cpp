// What tracking takes for a TiB mapped in 4 KiB leaves, besides the tables and rings: summary, generations, the record
// that a restart reads, and the owner's own index.
#include "perf/bench_hwpt.hpp"
#include "perf/figures.hpp"

#include <fmt/format.h>

#include <malloc.h>

namespace {

using namespace dirtyring::perf;

std::size_t heap()
{
    const struct mallinfo2 info = ::mallinfo2();
    return info.uordblks + info.hblkhd;
}

void measure_memory(Session &session)
{
    const unsigned memory_lg2 = session.pick(30u, 40u, 40u);
    const std::size_t before = heap();
    const BenchHwpt hwpt(memory_lg2);
    // Of it, the device's IOTLB is not ours.
    const std::size_t in_heap = heap() - before - sizeof(dirtyring::iommu::DmaThread<dirtyring::iommu::AmdV1>);
    const double tib = static_cast<double>(1ull << memory_lg2) / static_cast<double>(1ull << 40);
    const double mib = static_cast<double>(hwpt.tracking_bytes() + in_heap) / (1 << 20);
    const double bitmap_mib = static_cast<double>(hwpt.pages() / 8) / (1 << 20);
    session.add(Figure{.name = "memory of tracking, a TiB mapped",
                       .unit = "MiB",
                       .ours = {mib / tib},
                       .peer = Other{"a bitmap", {bitmap_mib / tib}},
                       .ratio = Ratio::ours_to_peer,
                       .goal = Goal::at_most(5)});
}

} // namespace

int main(int argc, char **argv)
{
    return run(argc, argv, measure_memory);
}
