#include "client/trace.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <string_view>
#include <utility>

namespace dirtyring {
namespace {

constexpr std::size_t line_max = 128; // five fields of at most 20 digits

// The fields of a line, one space between them.
struct Fields {
    std::array<std::string_view, 5> field;
    std::size_t count = 0; // one more than there is room for: too many
};

Fields split(std::string_view line)
{
    Fields fields;
    while (fields.count < fields.field.size()) {
        const std::size_t space = line.find(' ');
        fields.field[fields.count++] = line.substr(0, space);
        if (space == std::string_view::npos)
            return fields;
        line.remove_prefix(space + 1);
    }
    ++fields.count;
    return fields;
}

std::optional<std::uint64_t> number(std::string_view text, int base)
{
    std::uint64_t value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value, base);
    if (error != std::errc{} || end != text.data() + text.size())
        return std::nullopt;
    return value;
}

bool page_aligned(std::uint64_t value)
{
    return value % 4096 == 0;
}

// What was expected instead of a line.
tl::unexpected<const char *> instead(const char *what)
{
    return tl::unexpected(what);
}

// The event, or what was expected instead of `line`.
tl::expected<TraceEvent, const char *> parse(std::string_view line)
{
    const Fields fields = split(line);
    if (fields.count < 4)
        return instead("TIME, W, R, M or U, ADDRESS and LENGTH, and the OA of a map");
    const auto &[time, kind, address, length, oa] = fields.field;

    TraceEvent event{};
    if (kind.size() != 1 || !std::strchr("WRMU", kind[0]))
        return instead("W, R, M or U as the second field");
    event.kind = static_cast<TraceEvent::Kind>(kind[0]);
    const bool map = event.kind == TraceEvent::Kind::map;
    if (fields.count != (map ? 5u : 4u))
        return instead(map ? "five fields: TIME M IOVA SIZE OA" : "four fields: TIME, W, R or U, ADDRESS and LENGTH");

    const auto t = number(time, 10);
    const auto a = number(address, 16);
    const auto l = number(length, 10);
    const auto o = map ? number(oa, 16) : 0;
    if (!t)
        return instead("a decimal time in µs as the first field");
    if (!a || !o)
        return instead("hexadecimal addresses, without 0x");
    if (!l || *l == 0)
        return instead("a decimal length above 0");
    event.time_us = *t;
    event.address = *a;
    event.length = *l;
    event.oa = *o;

    const bool beyond = *l >= UINT64_MAX - *a;
    if (beyond && event.kind != TraceEvent::Kind::unmap)
        return instead("an address and a length that end within 64 bits");
    const bool pages = page_aligned(*a) && page_aligned(*o) && (beyond || page_aligned(*l));
    if (!event.is_access() && !pages)
        return instead("maps and unmaps of whole pages of 4096 bytes");
    return event;
}

} // namespace

tl::expected<TraceReader, std::string> TraceReader::open(const std::string &path)
{
    errno = 0;
    File file(gzopen(path.c_str(), "rbe"));
    if (!file)
        return tl::unexpected(
            fmt::format("{}: cannot be opened: {}", path, std::strerror(errno != 0 ? errno : ENOMEM)));
    gzbuffer(file.get(), 1 << 17);
    return TraceReader(path, std::move(file));
}

tl::expected<std::optional<TraceEvent>, std::string> TraceReader::next()
{
    std::array<char, line_max> buffer;
    const bool got = gzgets(file_.get(), buffer.data(), static_cast<int>(buffer.size())) != nullptr;
    int error = Z_OK;
    const char *reason = gzerror(file_.get(), &error);

    std::string_view line = got ? buffer.data() : "";
    const bool whole = line.ends_with('\n');
    if (!whole) {
        if (error == Z_BUF_ERROR)
            return tl::unexpected(
                fmt::format("{}: the gzip stream breaks off after line {}: the file is truncated", path_, line_));
        if (error == Z_ERRNO)
            return tl::unexpected(fmt::format("{}: cannot be read: {}", path_, std::strerror(errno)));
        if (error != Z_OK && error != Z_STREAM_END)
            return tl::unexpected(fmt::format("{}: damaged gzip stream after line {}: {}", path_, line_, reason));
        if (!got)
            return std::nullopt;
    }

    ++line_;
    if (!whole && line.size() < buffer.size() - 1)
        return tl::unexpected(fmt::format("{}:{}: the last line has no end: the file is truncated", path_, line_));
    line.remove_suffix(whole ? 1 : 0);
    auto event = parse(line);
    if (!event)
        return tl::unexpected(fmt::format("{}:{}: expected {}, found \"{}\"", path_, line_, event.error(),
                                          line.substr(0, std::min<std::size_t>(line.size(), 60))));
    if (event->time_us < time_us_)
        return tl::unexpected(fmt::format("{}:{}: expected a time of at least {} µs, that of the line before, found {}",
                                          path_, line_, time_us_, event->time_us));
    time_us_ = event->time_us;
    event->line = line_;
    return *event;
}

tl::expected<std::vector<TraceEvent>, std::string> load_trace(const std::string &path)
{
    auto reader = TraceReader::open(path);
    if (!reader)
        return tl::unexpected(reader.error());
    std::vector<TraceEvent> events;
    for (;;) {
        const auto event = reader->next();
        if (!event)
            return tl::unexpected(event.error());
        if (!*event)
            break;
        events.push_back(**event);
    }
    if (events.empty())
        return tl::unexpected(fmt::format("{}: expected a trace, found no event", path));
    return events;
}

} // namespace dirtyring
