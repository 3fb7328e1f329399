#include "service/control/control.hpp"

#include "service/keeper/listener.hpp"

#include <spdlog/spdlog.h>

#include <cerrno>
#include <csignal>
#include <cstring>
#include <fcntl.h>
#include <poll.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <system_error>

namespace dirtyring::service {

namespace {

constexpr std::size_t connections_max = 512;
constexpr __kernel_timespec accept_pause{0, 100'000'000}; // after EMFILE

} // namespace

// Goes to a walker and comes back.
struct Control::Errand final : Task {
    void run() override
    {
        if (!std::exchange(done, true)) {
            work();
            back->post(*this);
            return;
        }
        const std::unique_ptr<Errand> self(this);
        if (--*left == 0)
            (*then)();
    }

    std::function<void()> work;
    std::shared_ptr<Then> then;
    std::shared_ptr<std::size_t> left;
    Inbox *back = nullptr;
    bool done = false;
};

// Comes from a walker.
struct Control::Word final : Task {
    explicit Word(Then then) : what(std::move(then)) {}
    void run() override
    {
        const std::unique_ptr<Word> self(this);
        what();
    }

    Then what;
};

Control::Control(std::vector<Walker *> walkers, ring::Fd socket, FdStore &store)
    : walkers_(std::move(walkers)), store_(store), socket_(std::move(socket))
{
    sigset_t ends;
    sigemptyset(&ends);
    sigaddset(&ends, SIGTERM);
    sigaddset(&ends, SIGINT);
    signals_ = ring::Fd(::signalfd(-1, &ends, SFD_CLOEXEC | SFD_NONBLOCK));
    if (!signals_)
        throw std::system_error(errno, std::generic_category(), "signalfd");
    uring_.poll(signals_.get(), tag(signalled));
    uring_.poll(inbox_.fd(), tag(task));
}

Control::~Control() = default;

void Control::run(const std::function<void()> &ready)
{
    while (running_) {
        if (socket_ && taken_up_ == 0) {
            if (is_listening(socket_.get())) {
                listener_ = std::move(socket_);
                ::fcntl(listener_.get(), F_SETFL, ::fcntl(listener_.get(), F_GETFL) | O_NONBLOCK);
                accept_next();
            } else {
                adopt(std::move(socket_));
            }
            ready();
        }
        if (!to_make_large_.empty())
            make_large_page();
        else if (inbox_.prepare_sleep())
            uring_.submit_and_wait(0, UINT64_MAX);
        inbox_.wake();
        inbox_.drain();
        uring_.reap(
            [this](std::uint64_t user_data, int result, unsigned flags) { on_completion(user_data, result, flags); });
        uring_.submit();
    }
}

void Control::on_completion(std::uint64_t user_data, int result, unsigned flags)
{
    const std::uint64_t id = user_data & (tag(acceptable) - 1);
    const bool ended = (flags & IORING_CQE_F_MORE) == 0;
    switch (user_data >> 56) {
    case acceptable:
        on_acceptable();
        break;
    case pause_over:
        accept_next();
        break;
    case signalled:
        on_signalled();
        if (ended)
            uring_.poll(signals_.get(), tag(signalled));
        break;
    case task:
        if (ended)
            uring_.poll(inbox_.fd(), tag(task));
        break;
    case received:
        if (Connection *c = find(id))
            on_received(*c, result);
        break;
    case sent:
        if (Connection *c = find(id))
            on_sent(*c, result);
        break;
    case gone:
        if (result >= 0)
            on_process_gone(id);
        else
            poll_process(id); // the kernel had no memory for it; one that is not watched any more is not found
        break;
    case linger_over:
        on_linger_over(id);
        break;
    default:
        break;
    }
}

// Only a signal that was read ends the service: a poll may complete for other reasons.
void Control::on_signalled()
{
    signalfd_siginfo signal{};
    if (::read(signals_.get(), &signal, sizeof signal) != sizeof signal)
        return;
    spdlog::info("asked to end by SIG{} of process {}", ::sigabbrev_np(static_cast<int>(signal.ssi_signo)),
                 signal.ssi_pid);
    running_ = false;
}

// ---- connections ----------------------------------------------------------------------------------------------------

// Not an accept in io_uring: that waits exclusively, and the one of a dead predecessor, until the kernel has taken its
// io_uring apart, is then the only one that is woken.
void Control::accept_next()
{
    io_uring_sqe *entry = uring_.sqe(0);
    io_uring_prep_poll_add(entry, listener_.get(), POLLIN);
    entry->user_data = tag(acceptable);
}

void Control::on_acceptable()
{
    if (ring::Fd socket{::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC)}) {
        adopt(std::move(socket));
    } else if (errno != EAGAIN && errno != EINTR) {
        spdlog::warn("cannot accept a connection: {}", std::strerror(errno));
        io_uring_sqe *entry = uring_.sqe(0);
        io_uring_prep_timeout(entry, const_cast<__kernel_timespec *>(&accept_pause), 0, 0);
        entry->user_data = tag(pause_over);
        return;
    }
    accept_next();
}

void Control::adopt(ring::Fd socket)
{
    if (connections_.size() == connections_max) {
        spdlog::warn("refused a connection: {} are open already", connections_max);
        return;
    }
    auto c = std::make_unique<Connection>();
    c->id = next_id_++;
    c->socket = std::move(socket);
    spdlog::debug("connection {} opened", c->id);
    receive(*connections_.emplace(c->id, std::move(c)).first->second);
}

Control::Connection *Control::find(std::uint64_t id)
{
    const auto it = connections_.find(id);
    return it == connections_.end() ? nullptr : it->second.get();
}

void Control::close(Connection &c)
{
    spdlog::debug("connection {} closed", c.id);
    discard(c.fds);
    c.fds.add(std::move(c.socket)); // with descriptors, perhaps, in messages that nobody will read
    discard(c.fds);
    if (c.guest)
        leave(c.guest);
    const bool last = !listener_;
    connections_.erase(c.id);
    if (last)
        running_ = false; // started with --fd for this one
}

// ---- messages -------------------------------------------------------------------------------------------------------

void Control::receive(Connection &c)
{
    const bool in_header = c.got < sizeof c.header;
    if (in_header)
        c.vector = {reinterpret_cast<std::byte *>(&c.header) + c.got, sizeof c.header - c.got};
    else
        c.vector = {c.payload.data() + (c.got - sizeof c.header), c.payload.size() - (c.got - sizeof c.header)};
    c.message = {};
    c.message.msg_iov = &c.vector;
    c.message.msg_iovlen = 1;
    c.fds.prepare(c.message);
    io_uring_sqe *entry = uring_.sqe(0);
    io_uring_prep_recvmsg(entry, c.socket.get(), &c.message, MSG_CMSG_CLOEXEC);
    entry->user_data = tag(received, c.id);
}

void Control::on_received(Connection &c, int result)
{
    if (result <= 0)
        return close(c);
    if (!c.fds.take_from(c.message)) {
        c.fds_fit = false;
        discard(c.fds);
    }
    c.got += static_cast<std::size_t>(result);
    if (c.got < sizeof c.header)
        return receive(c);
    if (c.got == sizeof c.header) {
        const dr_message_header &h = c.header;
        if ((h.flags & DR_MESSAGE_VERSION_MASK) != DR_PROTOCOL_VERSION || (h.flags & DR_MESSAGE_REPLY) != 0 ||
            h.size < sizeof(dr_empty) || h.size > DR_MESSAGE_MAX) {
            spdlog::warn(
                "connection {}: flags {:#x} and size {} do not begin a request (version {}, size {} to {}); closed",
                c.id, h.flags, h.size, DR_PROTOCOL_VERSION, sizeof(dr_empty), DR_MESSAGE_MAX);
            return close(c);
        }
        c.payload.assign(h.size, std::byte{});
    }
    if (c.got < sizeof c.header + c.payload.size())
        return receive(c);
    c.got = 0;
    const std::uint64_t id = c.id;
    if (!std::exchange(c.fds_fit, true))
        refuse(id, {EINVAL, "too many descriptors"});
    else
        handle(c);
    if (Connection *still = find(id))
        discard(still->fds);
}

void Control::discard(ring::FdList &fds)
{
    for (unsigned i = 0; i < fds.count(); ++i) {
        if (ring::Fd fd = fds.take(i)) {
            io_uring_sqe *entry = uring_.sqe(0);
            io_uring_prep_close(entry, fd.release());
            entry->flags |= IOSQE_ASYNC;
            entry->user_data = tag(ignored);
        }
    }
    fds.close_all();
}

void Control::reply(std::uint64_t id, const void *payload, std::size_t size, Fds fds)
{
    Connection *c = find(id);
    if (c == nullptr)
        return;
    dr_message_header h = c->header;
    h.flags = DR_PROTOCOL_VERSION | DR_MESSAGE_REPLY;
    h.size = static_cast<std::uint32_t>(size);
    c->out.resize(sizeof h + size);
    std::memcpy(c->out.data(), &h, sizeof h);
    std::memcpy(c->out.data() + sizeof h, payload, size);
    c->sent = 0;
    for (ring::Fd &fd : fds)
        c->out_fds.add(std::move(fd));
    send(*c);
}

void Control::refuse(std::uint64_t id, const Refusal &refusal)
{
    Connection *c = find(id);
    if (c == nullptr)
        return;
    spdlog::debug("connection {}: request {} refused: {}", id, c->header.request, refusal.sentence);
    dr_refusal r{};
    r.size = sizeof r;
    r.error = refusal.error;
    refusal.sentence.copy(r.sentence, sizeof r.sentence - 1);
    reply(id, &r, sizeof r);
    dr_message_header h;
    std::memcpy(&h, c->out.data(), sizeof h);
    h.flags |= DR_MESSAGE_REFUSAL;
    std::memcpy(c->out.data(), &h, sizeof h);
}

void Control::send(Connection &c)
{
    c.vector = {c.out.data() + c.sent, c.out.size() - c.sent};
    c.message = {};
    c.message.msg_iov = &c.vector;
    c.message.msg_iovlen = 1;
    c.out_fds.attach_to(c.message);
    io_uring_sqe *entry = uring_.sqe(0);
    io_uring_prep_sendmsg(entry, c.socket.get(), &c.message, MSG_NOSIGNAL);
    entry->user_data = tag(sent, c.id);
}

void Control::on_sent(Connection &c, int result)
{
    c.out_fds.close_all();
    if (result <= 0)
        return close(c);
    c.sent += static_cast<std::size_t>(result);
    if (c.sent < c.out.size())
        send(c);
    else
        receive(c);
}

// ---- errands --------------------------------------------------------------------------------------------------------

void Control::ask(std::vector<Work> works, Then then)
{
    if (works.empty())
        return then();
    const auto shared_then = std::make_shared<Then>(std::move(then));
    const auto left = std::make_shared<std::size_t>(works.size());
    for (auto &[walker, work] : works) {
        auto errand = std::make_unique<Errand>();
        errand->work = std::move(work);
        errand->then = shared_then;
        errand->left = left;
        errand->back = &inbox_;
        walker->inbox().post(*errand.release());
    }
}

void Control::change(const std::shared_ptr<Guest> &guest, std::vector<Work> works, Then then)
{
    ++guest->changes;
    ask(std::move(works), [guest, then = std::move(then)] {
        then(); // which may go on with another change
        if (--guest->changes > 0)
            return;
        for (const Then &waiting : std::exchange(guest->after_changes, {}))
            waiting();
    });
}

void Control::tell(Then what)
{
    auto word = std::make_unique<Word>(std::move(what));
    inbox_.post(*word.release());
}

} // namespace dirtyring::service
