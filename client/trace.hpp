// DMA traces, plain or gzip: one event a line.
//
//   TIME W ADDRESS LENGTH        the device wrote; TIME in µs, addresses in hex, lengths in decimal
//   TIME R ADDRESS LENGTH        the device read
//   TIME M IOVA SIZE OA          the guest mapped; mapping again what is mapped to the same OA changes nothing
//   TIME U IOVA SIZE             the guest unmapped; a very large size means the whole rest of the space
#pragma once

#include <tl/expected.hpp>
#include <zlib.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace dirtyring {

struct TraceEvent {
    enum class Kind : char { write = 'W', read = 'R', map = 'M', unmap = 'U' };

    std::uint64_t time_us;
    std::uint64_t address; // guest-physical where a trace has no maps, else an IOVA
    std::uint64_t length;
    std::uint64_t oa; // maps only
    std::uint32_t line;
    Kind kind;

    [[nodiscard]] bool is_access() const { return kind == Kind::write || kind == Kind::read; }
};

// Reads event by event. Errors are sentences that name the file, the line, and what was expected there.
class TraceReader
{
  public:
    static tl::expected<TraceReader, std::string> open(const std::string &path);

    // nullopt: the end.
    tl::expected<std::optional<TraceEvent>, std::string> next();

  private:
    struct Close {
        void operator()(gzFile file) const { gzclose(file); }
    };
    using File = std::unique_ptr<gzFile_s, Close>;

    TraceReader(std::string path, File file) : path_(std::move(path)), file_(std::move(file)) {}

    std::string path_;
    File file_;
    std::uint64_t time_us_ = 0; // of the line before
    std::uint32_t line_ = 0;
};

// The whole trace; one without an event is an error.
tl::expected<std::vector<TraceEvent>, std::string> load_trace(const std::string &path);

} // namespace dirtyring
