#include "client/check/played_service.hpp"

#include "client/migrate/failure.hpp"
#include "ring/socket.hpp"

#include <array>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>

namespace dirtyring::check {
namespace {

// What version 1 has of each request, and how many descriptors.
struct Shape {
    std::size_t size;
    std::size_t fds;
};
constexpr std::array<Shape, 11> shapes{{{0, 0},
                                        {sizeof(dr_hello), 0},
                                        {sizeof(dr_guest_create), 0},
                                        {sizeof(dr_memory_region), 1},
                                        {sizeof(dr_empty), 0},
                                        {sizeof(dr_hwpt_alloc), 0},
                                        {sizeof(dr_ring_get), 0},
                                        {sizeof(dr_object), 0},
                                        {sizeof(dr_device_attach), 0},
                                        {sizeof(dr_empty), 0},
                                        {sizeof(dr_empty), 0}}};

} // namespace

void must(int error, const char *what)
{
    if (error != 0)
        throw std::runtime_error(fmt::format("cannot make {}: {}", what, std::strerror(-error)));
}

Fd copy_of(const Fd &fd)
{
    return Fd(::fcntl(fd.get(), F_DUPFD_CLOEXEC, 0));
}

Fd read_only(const ring::Region &region)
{
    Fd fd;
    if (const int error = region.read_only(fd); error != 0)
        throw std::runtime_error(fmt::format("cannot reopen a region: {}", std::strerror(-error)));
    return fd;
}

Fd event()
{
    return Fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
}

void signal(const Fd &event)
{
    ::eventfd_write(event.get(), 1);
}

PlayedService::PlayedService(Stage &stage)
    : context_(stage), path_(fmt::format("{}/socket", directory_.path())),
      listener_(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0))
{
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    path_.copy(address.sun_path, sizeof address.sun_path - 1);
    if (::bind(listener_.get(), reinterpret_cast<const sockaddr *>(&address), sizeof address) != 0 ||
        ::listen(listener_.get(), 8) != 0)
        throw migrate::system_failure(fmt::format("cannot listen at {}", path_));
}

PlayedService::~PlayedService()
{
    if (subject.crashed())
        context_.expect(false, context_.crash, "the program", subject.state(), "it goes on, or ends by itself");
}

void PlayedService::start()
{
    placeholders.emplace_back("{socket}", path_);
    subject.start(context_.command, placeholders);
}

void PlayedService::serve()
{
    while (Fd socket{::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK)}) {
        came_ = true;
        connections_.emplace_back().socket = std::move(socket);
    }
    for (auto c = connections_.begin(); c != connections_.end();) {
        const auto here = c++;
        if (!receive(*here))
            connections_.erase(here);
    }
    work();
}

void PlayedService::serve_for(std::chrono::microseconds time)
{
    const auto until = Deadline::Clock::now() + time;
    do {
        serve();
        std::this_thread::sleep_for(std::min<std::chrono::microseconds>(200us, time));
    } while (Deadline::Clock::now() < until);
}

void PlayedService::need_running()
{
    if (subject.ended())
        throw Broken(fmt::format("the program ended in the middle: {}", subject.state()));
}

std::string PlayedService::last_request() const
{
    if (!came_)
        return "it did not connect";
    return last_ == 0 ? "it sent no request" : fmt::format("its last request was {}", request_name(last_));
}

// ---- messages -------------------------------------------------------------------------------------------------------

// Reads until the message has `upto` bytes, as far as they have come.
bool PlayedService::read(Connection &c, std::size_t upto)
{
    const std::size_t had = c.bytes.size();
    Bytes more(upto - had);
    iovec piece{more.data(), more.size()};
    msghdr message{};
    message.msg_iov = &piece;
    message.msg_iovlen = 1;
    ring::FdList list;
    list.prepare(message);
    const ssize_t n = ::recvmsg(c.socket.get(), &message, MSG_CMSG_CLOEXEC);
    if (n <= 0)
        return n < 0 && errno == EAGAIN;
    (void)list.take_from(message); // whatever comes is closed in the end
    for (unsigned i = 0; i < list.count(); ++i)
        c.request.fds.push_back(list.take(i));
    c.bytes.insert(c.bytes.end(), more.begin(), more.begin() + n);
    if (had == 0)
        c.fds_at_first = c.request.fds.size();
    return true;
}

bool PlayedService::receive(Connection &c)
{
    for (;;) {
        // The first byte alone: the descriptors are to come with it.
        std::size_t upto = c.bytes.empty() ? 1 : sizeof(dr_message_header);
        if (c.bytes.size() >= sizeof(dr_message_header)) {
            dr_message_header header{};
            std::memcpy(&header, c.bytes.data(), sizeof header);
            const bool sane = (header.flags & DR_MESSAGE_VERSION_MASK) == DR_PROTOCOL_VERSION &&
                              (header.flags & DR_MESSAGE_REPLY) == 0 && header.size >= sizeof(dr_empty) &&
                              header.size <= DR_MESSAGE_MAX;
            if (!sane) {
                check_message(c, header);
                return false;
            }
            upto = sizeof header + header.size;
        }
        const std::size_t had = c.bytes.size();
        if (had == upto) {
            if (!complete(c))
                return false;
            continue;
        }
        if (!read(c, upto))
            return false;
        if (c.bytes.size() == had)
            return true;
    }
}

void PlayedService::check_message(const Connection &c, const dr_message_header &h)
{
    const std::string where = request_name(h.request);
    constexpr std::uint32_t known = DR_MESSAGE_VERSION_MASK | DR_MESSAGE_REPLY | DR_MESSAGE_REFUSAL;
    context_.expect((h.flags & DR_MESSAGE_VERSION_MASK) == DR_PROTOCOL_VERSION && (h.flags & ~known) == 0, "F-1", where,
                    fmt::format("flags {:#x}", h.flags),
                    fmt::format("version {} and nothing above bit 3", DR_PROTOCOL_VERSION));
    std::uint32_t stated = 0;
    if (c.bytes.size() >= sizeof h + sizeof stated)
        std::memcpy(&stated, c.bytes.data() + sizeof h, sizeof stated);
    const std::size_t least = h.request < shapes.size() ? shapes[h.request].size : sizeof(dr_empty);
    context_.expect(stated == h.size && h.size >= least && h.size <= DR_MESSAGE_MAX, "F-2", where,
                    fmt::format("size {} and a payload that begins with {}", h.size, stated),
                    fmt::format("twice its size, {} or more", least));
    if (!c.request.fds.empty())
        context_.expect(c.request.fds.size() == c.fds_at_first, "F-3", where,
                        fmt::format("{} descriptors behind its first byte", c.request.fds.size() - c.fds_at_first),
                        "all with its first byte");
}

bool PlayedService::complete(Connection &c)
{
    dr_message_header header{};
    std::memcpy(&header, c.bytes.data(), sizeof header);
    last_ = header.request;
    check_message(c, header);
    c.request.number = header.request;
    c.request.payload.assign(c.bytes.begin() + sizeof header, c.bytes.end());
    if (!std::exchange(c.spoke, true)) {
        const std::uint32_t version = header.request == DR_HELLO ? c.request.as<dr_hello>().version : 0;
        context_.expect(version >= DR_PROTOCOL_VERSION, "H-1", "the first request of a connection",
                        fmt::format("{}, version {}", request_name(header.request), version),
                        fmt::format("HELLO, version {} or newer", DR_PROTOCOL_VERSION));
    }
    kind = c.kind;
    Answer answer;
    try {
        answer = dispatch(c.request);
    } catch (const Refuse &refuse) {
        dr_refusal refusal{};
        refusal.error = refuse.error;
        std::strncpy(refusal.sentence, refuse.sentence, sizeof refusal.sentence - 1);
        answer = answer_of(refusal);
        header.flags |= DR_MESSAGE_REFUSAL;
    }
    c.kind = kind;
    c.bytes.clear();
    c.request = {};
    return reply(c, header, std::move(answer));
}

Answer PlayedService::dispatch(Request &request)
{
    const Shape shape = request.number < shapes.size() ? shapes[request.number] : Shape{};
    if (shape.size == 0)
        throw Refuse{EOPNOTSUPP, "unknown request"};
    if (request.payload.size() < shape.size || request.as<dr_empty>().size != request.payload.size() ||
        request.fds.size() != shape.fds)
        throw Refuse{EINVAL, "expected another size or another number of descriptors"};
    if (request.number != DR_HELLO) {
        if (kind == Kind::stranger)
            throw Refuse{EPROTO, "expected HELLO first"};
        return answer(request);
    }
    if (kind != Kind::stranger)
        throw Refuse{EPROTO, "a second HELLO"};
    const auto hello = request.as<dr_hello>();
    if (hello.version < DR_PROTOCOL_VERSION)
        throw Refuse{EPROTONOSUPPORT, "expected version 1 or newer"};
    kind = Kind::greeted;
    greeted_ = true;
    return answer_of(dr_hello{0, DR_PROTOCOL_VERSION, hello.features & features});
}

bool PlayedService::reply(Connection &c, dr_message_header header, Answer answer) const
{
    if (says_more) {
        answer.payload.resize(answer.payload.size() + 16, std::byte{0xa5});
        const auto size = static_cast<std::uint32_t>(answer.payload.size());
        std::memcpy(answer.payload.data(), &size, sizeof size);
    }
    header.flags |= DR_MESSAGE_REPLY;
    Bytes bytes = Peer::message(header.request, answer.payload, header.sequence);
    std::memcpy(bytes.data() + offsetof(dr_message_header, flags), &header.flags, sizeof header.flags);
    ring::FdList fds;
    for (Fd &fd : answer.fds)
        fds.add(std::move(fd));
    iovec piece{bytes.data(), bytes.size()};
    msghdr message{};
    message.msg_iov = &piece;
    message.msg_iovlen = 1;
    fds.attach_to(message);
    // It fits: one reply at a time is under way.
    return ::sendmsg(c.socket.get(), &message, MSG_NOSIGNAL) == static_cast<ssize_t>(bytes.size());
}

// ---- situations -----------------------------------------------------------------------------------------------------

void play(const Situation &situation, Verdicts &verdicts, const std::string &command,
          std::chrono::milliseconds patience)
{
    Stage stage{{verdicts, {}, situation.name, Deadline(patience)}, command, situation.rules.front()};
    std::string why;
    try {
        situation.play(stage);
    } catch (const Broken &e) {
        why = fmt::format("\"{}\" ended early: {}", situation.name, e.what());
    }
    for (const Rule rule : situation.rules)
        verdicts.skip(rule, why);
}

Verdicts check_program(Role role, const std::string &command, std::chrono::milliseconds patience)
{
    Verdicts verdicts(role);
    (role == Role::consumer ? check_consumer : check_device)(verdicts, command, patience);
    return verdicts;
}

} // namespace dirtyring::check
