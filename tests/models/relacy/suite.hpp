// What a suite says of itself, and how it is run.
#pragma once

#include "tests/models/relacy/shim.hpp"

#include "iommu/rules.hpp"

#include <cstdint>
#include <vector>

namespace dirtyring::model {

struct Mutation {
    const char *name;
    const char *edge;
    Rule rule = Rule::none;
    std::vector<Weakening> weakened{};
    std::optional<Delay> delayed{};
    const char *covered_by = nullptr; // why Relacy finds nothing, where it must not; else it must refute
};

struct Suite {
    const char *name;
    const char *edges;
    std::uint64_t iterations; // at random; DIRTYRING_FULL: 10 times as many
    unsigned switches;        // all executions with at most so many forced switches are tried too; 0: they are too many
    void (*simulate)(rl::test_params &);
    std::vector<Mutation> mutations;
};

template <class Execution> void simulate(rl::test_params &params)
{
    rl::simulate<Execution>(params);
}

// One execution: words, then whatever else it has. The derived class has prepare(), run(thread) and judge().
template <class Derived, int threads> class Execution : public rl::test_suite<Derived, threads>
{
  public:
    void before()
    {
        self().prepare();
        words.start();
    }
    void thread(unsigned index)
    {
        self().run(index);
        words.settle(here());
    }
    void after()
    {
        words.stop();
        self().judge();
    }

  protected:
    static Site here(Site site = {__builtin_FUNCTION(), __builtin_FILE(), static_cast<unsigned>(__builtin_LINE())})
    {
        return site;
    }
    // Who looks again sees newer values in the end.
    static void pause(Site site = here()) { rl::yield(1, site); }
    static void require(bool good, const char *what, Site site = here())
    {
        if (!good)
            rl::ctx().fail_test(what, rl::test_result_user_assert_failed, site);
    }

    Words words;

  private:
    Derived &self() { return *static_cast<Derived *>(this); }
};

} // namespace dirtyring::model
