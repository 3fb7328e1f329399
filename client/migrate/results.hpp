// How the migration went: judged, summed up, written down.
#pragma once

#include "client/migrate/journal.hpp"
#include "client/migrate/shared.hpp"

#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>

namespace dirtyring::migrate {

// The two judges; neither knows of the other, nor of the rings.
struct Judgement {
    std::uint64_t differing_pages; // between the two memories, byte for byte
    Journal::Verdict journal;

    [[nodiscard]] bool passed() const { return differing_pages == 0 && journal.unreported == 0; }
};

// When all parts have ended.
Judgement judge(const Shared &shared);

void print_summary(const Shared &shared, const Judgement &judgement);

// Where the results go; opened before the migration so that it is not done in vain.
class Outputs
{
  public:
    // Throws BadInput where something cannot be written.
    explicit Outputs(const Options &options);

    void write(const Shared &shared, const Judgement &judgement);

  private:
    struct File {
        explicit File(const std::string &path); // empty: none
        void write(const void *data, std::size_t size);
        void close();

        struct Close {
            void operator()(std::FILE *file) const { std::fclose(file); }
        };
        std::string path;
        std::unique_ptr<std::FILE, Close> file;
    };

    File json_;
    File source_;
    File destination_;
};

} // namespace dirtyring::migrate
