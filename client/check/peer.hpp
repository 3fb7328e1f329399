// One connection to a service, which may say whatever it likes. What comes back is held to the rules of messages.
#pragma once

#include "client/check/context.hpp"
#include "ring/control.h"
#include "ring/region.hpp"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <random>
#include <vector>

namespace dirtyring::check {

using ring::Fd;
using ring::Mapping;
using Bytes = std::vector<std::byte>;

constexpr std::uint64_t page = DR_PAGE;

struct Reply {
    dr_message_header header{};
    Bytes payload;
    std::vector<Fd> fds;

    // What is missing is zero.
    template <class T> [[nodiscard]] T as() const
    {
        T value{};
        std::memcpy(&value, payload.data(), std::min(payload.size(), sizeof value));
        return value;
    }
    [[nodiscard]] bool refused() const { return (header.flags & DR_MESSAGE_REFUSAL) != 0; }
    // 0: it was done.
    [[nodiscard]] int error() const { return refused() ? as<dr_refusal>().error : 0; }
    // What it says, for whoever reads the report.
    [[nodiscard]] std::string outcome() const;
};

template <class T> Bytes payload_of(T value)
{
    value.size = sizeof value;
    const auto *first = reinterpret_cast<const std::byte *>(&value);
    return {first, first + sizeof value};
}

// A request for a guest of its own.
inline dr_guest_create new_guest(std::uint32_t entries)
{
    std::random_device random;
    dr_guest_create request{};
    request.command_entries = entries;
    for (std::uint8_t &byte : request.secret)
        byte = static_cast<std::uint8_t>(random());
    return request;
}

// Of a device that no other is.
inline std::uint64_t new_key()
{
    std::random_device random;
    return std::uint64_t{random()} << 32 | random() | 1;
}

// A request of a device that can do everything.
inline dr_device_attach new_device(std::uint32_t hwpt, const std::uint8_t *token)
{
    dr_device_attach request{};
    request.hwpt = hwpt;
    request.flags = DR_DEVICE_CAN_TRACK | DR_DEVICE_COHERENT;
    request.threads = 1;
    std::memcpy(request.token, token, sizeof request.token);
    request.formats = UINT32_MAX;
    request.key = new_key();
    std::strcpy(request.name, "the kit's");
    return request;
}

const char *request_name(std::uint32_t request);
std::string error_name(int error);

class Peer
{
  public:
    explicit Peer(Context &context);

    // ---- bytes ----

    // False: the service has hung up.
    bool send(const Bytes &bytes, const std::vector<int> &fds = {}) const;
    static Bytes message(std::uint32_t request, const Bytes &payload, std::uint32_t sequence);
    // The reply to a request that was sent. `descriptors`: as many are to come if it is done, if that is known.
    Reply receive(std::uint32_t request, std::uint32_t sequence, std::size_t required,
                  std::optional<unsigned> descriptors);
    // Until then the service may send.
    [[nodiscard]] bool hangs_up() const;
    void close() { socket_ = Fd(); }
    [[nodiscard]] int socket() const { return socket_.get(); }

    // ---- requests ----

    Reply call_bytes(std::uint32_t request, const Bytes &payload, const std::vector<int> &fds = {});

    template <class In> Reply call(dr_request request, const In &in, const std::vector<int> &fds = {})
    {
        return call_bytes(request, payload_of(in), fds);
    }

    // Must be done, or the check ends. `required`: bytes of Out that a service of version 1 sends.
    template <class Out, class In>
    Out get(dr_request request, const In &in, const std::vector<int> &fds = {}, std::vector<Fd> *got = nullptr,
            unsigned descriptors = 0)
    {
        const std::uint32_t sequence = ++sequence_;
        send(message(request, payload_of(in), sequence), fds);
        Reply reply = receive(request, sequence, sizeof(Out), descriptors);
        context_.need(!reply.refused(), "F-17", request_name(request), reply.outcome(), "it done");
        if (got != nullptr)
            *got = std::move(reply.fds);
        return reply.template as<Out>();
    }

    // Must be refused with this errno by `rule`. `what` is wrong with it.
    void refused(Rule rule, const Reply &reply, int error, const std::string &what) const;
    template <class In>
    void refused(Rule rule, dr_request request, const In &in, int error, const std::string &what,
                 const std::vector<int> &fds = {})
    {
        refused(rule, call(request, in, fds), error, fmt::format("{}: {}", request_name(request), what));
    }

    Peer &hello(std::uint64_t features = DR_FEATURES_ALL);

  protected:
    Context &context_;

  private:
    // Bytes of the reply; the descriptors that come with them are counted to where they came.
    void read(void *to, std::size_t size, std::vector<Fd> &fds, std::uint32_t request) const;
    void check_header(const dr_message_header &header, std::uint32_t request, std::uint32_t sequence) const;
    void check_payload(const Reply &reply, std::size_t required) const;

    Fd socket_;
    std::uint32_t sequence_ = 1000;
};

} // namespace dirtyring::check
