// broken_peer consumer SOCKET FAULT; broken_peer device SOCKET TOKEN HWPT FAULT
#include "tests/kit/broken_peer.hpp"

#include "ring/producer.hpp"

#include <cstdio>
#include <cstdlib>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

namespace dirtyring::test {
namespace {

using check::Fd;
using check::Mapping;
using check::page;
using check::word;

constexpr std::uint64_t pages = 256; // mapped; behind them one more, to which the last is moved
constexpr std::uint64_t runs_before_move = 2000;
constexpr std::uint64_t runs_before_sync = 4000;

class Vmm : public check::Guest
{
  public:
    Vmm(check::Context &context, std::string_view fault) : Guest(context), fault_(fault)
    {
        add_memory();
        ioas_ = get<dr_object>(DR_IOAS_ALLOC, dr_empty{}).id;
        dr_hwpt_alloc request = hwpt_request(ioas_);
        request.ring_entries = capacity;
        if (fault == "oa_without_feature")
            request.space = DR_SPACE_OA;
        hwpt_ = get<dr_hwpt>(DR_HWPT_ALLOC, request).id;
        execute(check::map_command(ioas_, 0, last_page, 0));
        execute(check::map_command(ioas_, last_page, page, last_page));
        execute(check::command(DR_OP_ENABLE, hwpt_));
        std::vector<Fd> fds;
        get<dr_ring>(DR_RING_GET, dr_ring_get{0, hwpt_, 0}, {}, &fds, 4);
        producer_.map(fds[0].get(), ring::producer_region_size(capacity, 8), PROT_READ);
        consumer_.map(fds[1].get(), DR_PAGE, PROT_READ | PROT_WRITE);
        call_ = std::move(fds[2]);
        kick_ = std::move(fds[3]);
        const dr_ring_header &h = theirs().header;
        const bool known = h.magic == DR_RING_MAGIC && h.version == DR_RING_VERSION && h.kind == DR_RING_DIRTY &&
                           h.capacity == capacity && h.entry_size == 8;
        if (!known && fault != "any_header")
            throw check::Broken("not a ring of ours");
    }

    // Until the end of the ring, or of a sync.
    void consume()
    {
        while (!over_) {
            const std::uint64_t head = word(theirs().head).load(std::memory_order_acquire);
            if (head - tail_ > capacity && fault_ != "any_head")
                return wait_for_the_end();
            for (std::uint64_t i = tail_; i != head && !over_ && head - tail_ <= capacity; ++i)
                take(reinterpret_cast<const std::uint64_t *>(&theirs() + 1)[i & (capacity - 1)]);
            if (head != tail_)
                release(head);
            else
                sleep();
        }
    }

  private:
    static constexpr std::uint32_t capacity = 64;
    static constexpr std::uint64_t last_page = (pages - 1) * page; // its IOVA, and its OA until it is moved

    [[nodiscard]] dr_ring_producer &theirs() const { return *producer_.as<dr_ring_producer>(); }
    [[nodiscard]] dr_ring_consumer &mine() const { return *consumer_.as<dr_ring_consumer>(); }

    void add_memory()
    {
        constexpr std::uint64_t size = (pages + 1) * page;
        memory_ = check::memory_file(size);
        memory_map_.map(memory_.get(), size, PROT_READ);
        if (fault_ != "late_descriptors")
            return Guest::add_memory(0, size, memory_);
        const check::Bytes all = message(DR_MEMORY_ADD, check::payload_of(dr_memory_region{0, 0, 0, size, 0}), 1);
        send({all.begin(), all.begin() + 1});
        send({all.begin() + 1, all.end()}, {memory_.get()});
        (void)receive(DR_MEMORY_ADD, 1, sizeof(dr_empty), 0);
    }

    // Submits and waits. Returns the epoch.
    std::uint64_t execute(dr_command command)
    {
        if (fault_ == "reserved")
            command.reserved = 1;
        submit_one(command);
        for (std::uint64_t tail = word(completion_consumer().tail).load();
             word(completion_region().head).load() == tail;) {
            if (command.opcode == DR_OP_ENABLE && fault_ == "copies_before_enable")
                copy(early_++ % pages * page, page);
            else
                ::usleep(100);
        }
        const auto *completions = reinterpret_cast<const dr_completion *>(&completion_region() + 1);
        const std::uint64_t at = word(completion_consumer().tail).load() & (completion_region().header.capacity - 1);
        const std::uint64_t epoch = completions[at].epoch;
        word(completion_consumer().tail).fetch_add(1);
        if (word(completion_region().want_kick).load() != 0 && fault_ != "no_command_kick")
            kick();
        return epoch;
    }

    void submit_one(const dr_command &command)
    {
        dr_ring_producer &ring = submission_region();
        const std::uint64_t head = ring.head;
        reinterpret_cast<dr_command *>(&ring + 1)[head & (ring.header.capacity - 1)] = command;
        word(ring.head).store(head + 1);
        if (word(submission_consumer().armed).load() == head + 1 && fault_ != "no_command_kick")
            kick();
    }

    void take(std::uint64_t entry)
    {
        if (!dr_is_marker(entry)) {
            if (fault_ != "copies_once" || !copied_)
                copy(dr_run_address(entry), dr_run_length(entry));
            if (++runs_ == runs_before_move)
                move_last_page();
            if (runs_ == runs_before_sync)
                submit_one(check::sync_command(hwpt_, 77));
            return;
        }
        const std::uint32_t kind = dr_marker_kind(entry);
        if (kind == DR_MARKER_END)
            over_ = fault_ != "ignores_end";
        else if (kind == DR_MARKER_EPOCH)
            passed_epoch_ = dr_marker_payload(entry);
        else if (kind == DR_MARKER_SYNC)
            over_ = runs_ >= runs_before_sync && (dr_marker_payload(entry) == 77 || fault_ == "any_sync");
        else if (kind == DR_MARKER_ALL_DIRTY ? fault_ != "ignores_all_dirty" : kind >= 128 && fault_ != "ignores_128")
            copy_all();
        else if (kind < 128 && kind > DR_MARKER_END && fault_ == "stops_at_unknown")
            wait_for_the_end();
    }

    void copy_all()
    {
        copy(0, pages * page);
        copied_ = true;
    }

    void copy(std::uint64_t at, std::uint64_t length)
    {
        for (std::uint64_t iova = at; iova < at + length; iova += page)
            sum_ = sum_ + std::to_integer<unsigned>(memory_map_.data()[translate(iova)]);
    }

    void move_last_page()
    {
        epoch_ = execute(check::unmap_command(ioas_, last_page, page));
        execute(check::map_command(ioas_, last_page, page, last_page + page));
    }

    [[nodiscard]] std::uint64_t translate(std::uint64_t iova) const
    {
        const bool moved = epoch_ != 0 && (passed_epoch_ == epoch_ || fault_ == "forgets_old_map");
        return iova == last_page && moved ? iova + page : iova;
    }

    void release(std::uint64_t head)
    {
        tail_ = head;
        std::uint64_t stored = head;
        if (fault_ == "beyond_head")
            stored += 3;
        if (fault_ == "tail_back" && head > 5)
            stored = 1;
        word(mine().tail).store(stored, std::memory_order_seq_cst);
        if (word(theirs().want_kick).load(std::memory_order_seq_cst) != 0 && fault_ != "no_kick")
            ::eventfd_write(kick_.get(), 1);
    }

    void sleep()
    {
        if (fault_ == "no_look")
            spin(std::chrono::milliseconds(10));
        word(mine().armed).store(tail_ + 1, std::memory_order_seq_cst);
        if (fault_ != "no_look" && word(theirs().head).load(std::memory_order_seq_cst) != tail_)
            return;
        pollfd fds[] = {{call_.get(), POLLIN, 0}, {socket(), POLLRDHUP, 0}};
        ::poll(fds, 2, -1);
        over_ = over_ || fds[1].revents != 0;
        (void)check::take_signal(call_);
    }

    void wait_for_the_end()
    {
        (void)check::take_signal(call_);
        pollfd gone{socket(), POLLRDHUP, 0};
        ::poll(&gone, 1, -1);
        over_ = true;
    }

    std::string_view fault_;
    Fd memory_;
    Mapping memory_map_;
    std::uint32_t ioas_ = 0;
    std::uint32_t hwpt_ = 0;
    Mapping producer_;
    Mapping consumer_;
    Fd call_;
    Fd kick_;
    std::uint64_t tail_ = 0;
    std::uint64_t runs_ = 0;
    std::uint64_t epoch_ = 0; // of the unmap, if there was one
    std::uint64_t passed_epoch_ = 0;
    std::uint64_t early_ = 0; // pages copied before tracking was on
    volatile unsigned sum_ = 0;
    bool copied_ = false; // all of it
    bool over_ = false;
};

// What is said on a connection of its own, before the program does its work.
bool say_first(check::Context &context, std::string_view fault)
{
    check::Peer peer(context);
    check::Bytes hello =
        check::Peer::message(DR_HELLO, check::payload_of(dr_hello{0, DR_PROTOCOL_VERSION, DR_FEATURES_ALL}), 1);
    if (fault == "before_hello")
        (void)peer.call(DR_IOAS_ALLOC, dr_empty{});
    else if (fault == "flags")
        hello[offsetof(dr_message_header, flags)] |= std::byte{1 << 5};
    else if (fault == "size")
        hello[sizeof(dr_message_header)] = std::byte{99};
    peer.send(hello);
    const check::Reply reply = peer.receive(DR_HELLO, 1, sizeof(dr_hello), 0);
    return fault != "exact_size" || reply.payload.size() == sizeof(dr_hello);
}

} // namespace

int consume(const std::string &socket, std::string_view fault)
{
    Silence silence(socket);
    if (!say_first(silence.context, fault))
        return EXIT_FAILURE;
    Vmm vmm(silence.context, fault);
    vmm.consume();
    return EXIT_SUCCESS;
}

} // namespace dirtyring::test

int main(int argc, char **argv)
{
    using namespace dirtyring::test;
    try {
        const std::string role = argc > 1 ? argv[1] : "";
        if (role == "consumer" && argc == 4)
            return consume(argv[2], argv[3]);
        if (role == "device" && argc == 6)
            return be_a_device(argv[2], argv[3], static_cast<std::uint32_t>(std::stoul(argv[4])), argv[5]);
    } catch (const std::exception &e) {
        std::fprintf(stderr, "broken_peer: %s\n", e.what());
        return EXIT_FAILURE;
    }
    std::fprintf(stderr, "usage: broken_peer consumer SOCKET FAULT | device SOCKET TOKEN HWPT FAULT\n");
    return 2;
}
