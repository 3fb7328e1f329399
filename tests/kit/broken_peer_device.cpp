// A device without an engine: walks by hand, marks each page anew when its generation has changed.
#include "tests/kit/broken_peer.hpp"

#include "iommu/dma.hpp"
#include "iommu/format_amdv1.hpp"

#include <cstdlib>
#include <cstring>
#include <map>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>

namespace dirtyring::test {
namespace {

using check::Fd;
using check::Mapping;
using check::page;
using check::word;
using iommu::AmdV1;

constexpr std::uint32_t slots = 4;
constexpr std::chrono::microseconds window{1000}; // in which a fault shows

class Device : public check::Peer
{
  public:
    Device(check::Context &context, const std::string &token, std::uint32_t hwpt, std::string_view fault)
        : Peer(context), fault_(fault), pins_(fault.starts_with("pin"))
    {
        hello();
        std::uint8_t bytes[DR_TOKEN_BYTES];
        for (std::size_t i = 0; i < sizeof bytes; ++i)
            bytes[i] = static_cast<std::uint8_t>(std::stoul(token.substr(2 * i, 2), nullptr, 16));
        dr_device_attach request = check::new_device(hwpt, bytes);
        request.pins = pins_ ? slots : 0;
        std::vector<Fd> fds;
        const auto info = get<dr_device>(DR_DEVICE_ATTACH, request, {}, &fds, 3 + 2 + 1);
        map(fds[0], tables_map_, PROT_READ | PROT_WRITE);
        map(fds[1], translation_, PROT_READ);
        map(fds[2], cells_, PROT_READ | PROT_WRITE);
        map(fds[5], memory_, PROT_READ | PROT_WRITE);
        bell_ = std::move(fds[3]);
        oa_ = info.region[0].oa;
        h_ = *translation_.as<dr_translation_header>();
        const bool known =
            h_.magic == DR_TRANSLATION_MAGIC && h_.version == DR_TRANSLATION_VERSION && h_.format == DR_FORMAT_AMDV1;
        if (!known && fault != "any_header")
            throw check::Broken("not a translation region of ours");
        tables_ = iommu::Tables(tables_map_.data(), h_);
        tracked_at_first_ = AmdV1::tracks(control().context);
    }

    // Pages of four regions, downwards, again and again.
    void run()
    {
        const unsigned times = pins_ ? 150 : 400;
        for (unsigned i = 0; i < times || fault_ == "stays_inside"; ++i) {
            const std::uint64_t iova = (15 - i % 8 * 2) * 1024 * page + (i / 8 % 4) * page;
            if (pins_ ? !pin(iova) : !write(iova))
                break;
            spin(window);
        }
        get<dr_empty>(DR_DEVICE_DETACH, dr_empty{});
        if (fault_ == "after_detach") {
            spin(std::chrono::milliseconds(5));
            std::memset(memory_.data(), 1, page);
        }
    }

  private:
    struct Leaf {
        std::uint64_t *entry;
        std::uint64_t seen;
        std::byte *host;
        std::uint64_t word;
        unsigned index;
        bool writable;
    };

    static void map(const Fd &fd, Mapping &to, int protection)
    {
        struct stat status {
        };
        ::fstat(fd.get(), &status);
        to.map(fd.get(), static_cast<std::size_t>(status.st_size), protection);
    }

    [[nodiscard]] dr_shard_control &control() const { return *translation_.as<dr_shard_control>(h_.shard_controls); }
    [[nodiscard]] std::uint64_t generation(std::uint64_t iova) const
    {
        return word(translation_.as<std::uint64_t>(h_.generations)[iova >> DR_REGION_LG2]).load();
    }
    [[nodiscard]] dr_cell &cell() const { return *cells_.as<dr_cell>(); }
    [[nodiscard]] dr_pin &slot() const { return *cells_.as<dr_pin>(sizeof(dr_cell)); }

    void enter() const
    {
        if (fault_ != "no_section" && (cell().count & 1) == 0)
            word(cell().count).store(cell().count + 1);
    }
    void leave()
    {
        if (fault_ == "no_section" || fault_ == "stays_inside")
            return;
        word(cell().count).store(cell().count + 1);
        const std::uint64_t asleep = word(control().asleep).load();
        const bool owed = (turned_ && asleep != DR_AWAKE && fault_ != "no_bell") ||
                          (gave_back_ && asleep == DR_ASLEEP_PINS && fault_ != "pin_no_bell");
        turned_ = gave_back_ = false;
        if (owed)
            ::eventfd_write(bell_.get(), 1);
    }

    bool walk(std::uint64_t iova, Leaf &leaf) const
    {
        std::uint64_t table = h_.root;
        bool writable = true;
        for (unsigned level = h_.root_level;; --level) {
            std::uint64_t *entry = tables_.entries(table) + iommu::entry_index(iova, level);
            const std::uint64_t seen = word(*entry).load();
            const iommu::Entry e = AmdV1::decode(seen, level);
            writable = writable && e.rights.write;
            const std::uint64_t oa = e.address + (iova & ((1ull << iommu::entry_lg2(level)) - 1)) - oa_;
            const bool inside = e.kind == iommu::EntryKind::table ? e.address < h_.tables : oa <= memory_.size() - page;
            if (e.kind == iommu::EntryKind::none || (!inside && fault_ != "no_check"))
                return false;
            if (e.kind == iommu::EntryKind::leaf) {
                leaf = {entry, seen, memory_.data() + oa, table, iommu::entry_index(iova, level), writable};
                if (table < h_.top_tables)
                    leaf.word = iommu::first_table(h_, 0);
                return true;
            }
            table = e.address;
        }
    }

    // Sets D and the summary, unless this page has been marked since its generation was last advanced.
    bool mark(std::uint64_t iova, const Leaf &leaf)
    {
        const std::uint64_t key = fault_ == "spans_regions" ? reinterpret_cast<std::uint64_t>(leaf.entry) : iova / page;
        const auto known = marked_.find(key);
        const bool stale = fault_ == "stale_iotlb" && known != marked_.end();
        if (stale || (known != marked_.end() && known->second == generation(iova)))
            return true;
        const bool tracked =
            fault_ == "tracking_once" ? tracked_at_first_ : AmdV1::tracks(word(control().context).load());
        std::uint64_t now = leaf.seen;
        if (!tracked && fault_ != "marks_untracked") {
            // neither A nor D
        } else if (fault_ == "plain_store") {
            spin(std::chrono::milliseconds(2));
            word(*leaf.entry).store(AmdV1::accessed(now, tracked));
        } else if (fault_ != "no_dirty") {
            while (!word(*leaf.entry).compare_exchange_weak(now, AmdV1::accessed(now, tracked))) {
                if (!AmdV1::same_translation(now, leaf.seen))
                    return false;
            }
        }
        marked_[key] = generation(iova);
        if (!tracked || fault_ == "no_dirty" || fault_ == "no_summary")
            return true;
        iommu::test_and_set(tables_.line_word(leaf.word), 1ull << (leaf.index / iommu::line_entries));
        if (fault_ != "no_table_bit")
            turned_ = iommu::test_and_set(tables_.table_bits(leaf.word / 64), 1ull << (leaf.word % 64)) || turned_;
        return true;
    }

    void put(std::byte *host) { std::memset(host, static_cast<int>(++value_), page); }

    bool write(std::uint64_t iova)
    {
        enter();
        Leaf leaf{};
        const bool there = walk(iova, leaf) && (leaf.writable || fault_ == "read_only");
        if (there && mark(iova, leaf))
            put(leaf.host);
        leave();
        return there;
    }

    bool pin(std::uint64_t iova)
    {
        enter();
        dr_pin &p = slot();
        if (fault_ == "pin_odd_first") {
            word(p.count).store(p.count + 1);
            spin(window);
        }
        p.start = iova;
        p.last = iova + page - 1;
        p.write = 1;
        word(cell().pinned).store(1);
        if (fault_ != "pin_odd_first")
            word(p.count).store(p.count + 1);
        const auto version = word(control().closing).load();
        const dr_closed &closed = control().closed[version & 1];
        Leaf leaf{};
        const bool open = closed.count == 0 || fault_ == "pin_ignores_closed";
        const bool there = open && walk(iova, leaf) && leaf.writable;
        if (!there)
            give_back();
        if (there && (fault_ == "pin_marks_early" || fault_ == "pin_gives_back_early"))
            mark(iova, leaf);
        if (there && fault_ == "pin_gives_back_early")
            give_back();
        leave();
        if (!there)
            return false;
        if (fault_ == "pin_gives_back_early") {
            for (int i = 0; i < 50; ++i) { // while data still lands, for much longer than anybody looks
                spin(2 * window);
                std::memset(leaf.host + i, static_cast<int>(++value_), 1);
            }
            spin(window);
            return true;
        }
        spin(window);
        put(leaf.host);
        spin(window);
        enter();
        marked_.clear();
        if (fault_ != "pin_marks_early" && walk(iova, leaf))
            mark(iova, leaf);
        give_back();
        leave();
        return true;
    }

    void give_back()
    {
        word(slot().count).store(slot().count + 1);
        word(cell().pinned).store(0);
        gave_back_ = true;
    }

    std::string_view fault_;
    bool pins_;
    Mapping tables_map_;
    Mapping translation_;
    Mapping cells_;
    Mapping memory_;
    Fd bell_;
    std::uint64_t oa_ = 0;
    dr_translation_header h_{};
    iommu::Tables tables_;
    std::map<std::uint64_t, std::uint64_t> marked_; // page: generation
    bool tracked_at_first_ = false;
    bool turned_ = false;
    bool gave_back_ = false;
    unsigned value_ = 0;
};

} // namespace

int be_a_device(const std::string &socket, const std::string &token, std::uint32_t hwpt, std::string_view fault)
{
    Silence silence(socket);
    Device device(silence.context, token, hwpt, fault);
    device.run();
    return EXIT_SUCCESS;
}

} // namespace dirtyring::test
