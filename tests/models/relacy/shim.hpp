// Runs the project's headers on Relacy. Include this before any of them: it gives std::atomic_ref another meaning.
//
// A suite registers the words that its threads share, by address. Each access by atomic_ref to such a word goes to the
// rl::atomic that stands for it; the word itself keeps the newest value, for the plain loads of a word's only writer.
// Relacy switches threads at these accesses only, so a plain store (memcpy, memset, a struct copied) is found by
// comparison at the thread's next one, and is made good there: as a relaxed store, which others may see late, or as a
// store to an rl::var, where Relacy reports races. Words not registered do not change while the threads run: a store to
// one fails the suite.
#pragma once

#include <relacy/relacy.hpp>

// What relacy.hpp redefines for code that is written for it.
#undef memory_order_relaxed
#undef memory_order_consume
#undef memory_order_acquire
#undef memory_order_release
#undef memory_order_acq_rel
#undef memory_order_seq_cst
#undef new
#undef delete
#undef malloc
#undef calloc
#undef realloc
#undef free
#undef assert
#undef errno
#undef $
#undef VAR
#include <cassert>
#include <cerrno>

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

namespace dirtyring::model {

enum class Access { load, store, rmw };

// One access of a mutation: done with `to` wherever the code says `from`.
struct Weakening {
    const void *word;
    Access access;
    std::memory_order to;
    std::memory_order from = std::memory_order_seq_cst;
    std::string_view in = {}; // our function; empty: any
    bool met = false;         // there was such an access
};
inline std::vector<Weakening> weakenings;

// A mutation of order: what a thread does to `word` happens only after its next access to `until`.
struct Delay {
    const void *word;
    const void *until;
    bool met = false;
};
inline std::optional<Delay> delay;

// Where in our code an access is: what Relacy prints in a history.
struct Site {
    const char *function;
    const char *file;
    unsigned line;
    operator rl::debug_info() const { return {function, file, line}; }
};

constexpr rl::memory_order translate(std::memory_order order)
{
    switch (order) {
    case std::memory_order::relaxed:
        return rl::mo_relaxed;
    case std::memory_order::consume:
        return rl::mo_consume;
    case std::memory_order::acquire:
        return rl::mo_acquire;
    case std::memory_order::release:
        return rl::mo_release;
    case std::memory_order::acq_rel:
        return rl::mo_acq_rel;
    case std::memory_order::seq_cst:
        break;
    }
    return rl::mo_seq_cst;
}

// Relacy's own heap looks for uses of freed memory, and makes each `delete` a choice of the search. The project's
// containers have no need of that.
struct OrdinaryHeap : rl::context {
    OrdinaryHeap() = delete;
    static void wanted(int more) { rl::ctx().*(&OrdinaryHeap::disable_alloc_) += more; }
};

// The words of one execution; the first thing it makes.
class Words
{
  public:
    using Value = std::uint64_t;

    Words()
    {
        OrdinaryHeap::wanted(1);
        current = this;
    }
    Words(const Words &) = delete;
    ~Words()
    {
        current = nullptr;
        OrdinaryHeap::wanted(-1);
    }
    static inline Words *current = nullptr;

    // In before(). Others may see it late.
    template <class T> void share(T &word) { make(word).atomic.emplace(static_cast<Value>(word)); }
    // In before(). Accesses that are not ordered are races.
    template <class T> void share_plain(T &word) { make(word).plain.emplace(static_cast<Value>(word)); }
    // In before(). Words of one thread, which the others never see: [first, end).
    void own(const void *first, const void *end) { owned_ = {first, end}; }
    // The threads run from here on; at the end of before().
    void start() { running_ = true; }
    // They are over.
    void stop() { running_ = false; }

    // A plain load.
    template <class T> T read(T &word, Site site)
    {
        Word *w = find(&word);
        if (w == nullptr)
            return word;
        settle(site);
        return static_cast<T>(w->plain ? (*w->plain)(site).load() : w->atomic->load(rl::mo_relaxed, site));
    }

    template <class T> T load(T &word, std::memory_order order, Site site)
    {
        Word *w = find(&word);
        if (w == nullptr)
            return word;
        settle(site);
        const T value = static_cast<T>(w->atomic->load(weakened(word, Access::load, order, site), site));
        catch_up(&word);
        return value;
    }

    template <class T> void store(T &word, T value, std::memory_order order, Site site)
    {
        if (is_late(&word)) {
            late_.emplace(rl::thread_index(), [=, this, &word] { store(word, value, order, site); });
            return;
        }
        Word *w = find_to_change(&word, site);
        if (w != nullptr) {
            settle(site);
            w->atomic->store(value, weakened(word, Access::store, order, site), site);
        }
        keep(w, word, value);
        catch_up(&word);
    }

    // operation(rl::atomic, order): what it makes of the word, and returns the value before. new_value(old): the same
    // of a plain word.
    template <class T, class Operation, class NewValue>
    T modify(T &word, std::memory_order order, Site site, Operation operation, NewValue new_value)
    {
        if (is_late(&word)) {
            late_.emplace(rl::thread_index(), [=, this, &word] { modify(word, order, site, operation, new_value); });
            return word; // of what is delayed nobody looks at the value
        }
        Word *w = find_to_change(&word, site);
        T before = word;
        if (w != nullptr) {
            settle(site);
            before = static_cast<T>(operation(*w->atomic, weakened(word, Access::rmw, order, site)));
        }
        keep(w, word, new_value(before));
        catch_up(&word);
        return before;
    }

    template <class T> bool compare_exchange(T &word, T &expected, T desired, std::memory_order order, Site site)
    {
        Word *w = find_to_change(&word, site);
        if (w != nullptr) {
            settle(site);
            Value seen = expected;
            const bool done = w->atomic->compare_exchange(rl::bool_t<false>(), seen, desired,
                                                          weakened(word, Access::rmw, order, site), site);
            expected = static_cast<T>(seen);
            if (!done)
                return false;
        } else if (word != expected) {
            expected = word;
            return false;
        }
        keep(w, word, desired);
        return true;
    }

    // Plain stores since the thread's last access become visible, as far as they do. Also at a thread's end.
    void settle(Site site)
    {
        std::array<std::pair<Word *, Value>, words_max> changed;
        unsigned count = 0;
        for (unsigned i = 0; i < count_; ++i) {
            Word &w = words_[i];
            if (const Value now = w.now(); now != w.newest) {
                changed[count++] = {&w, now};
                w.newest = now; // before Relacy lets others run
            }
        }
        for (unsigned i = 0; i < count; ++i) {
            auto [w, value] = changed[i];
            if (w->plain)
                (*w->plain)(site).store(value);
            else
                w->atomic->store(value, rl::mo_relaxed, site);
        }
    }

  private:
    struct Word {
        const void *at = nullptr;
        unsigned size = 0;
        Value newest = 0;
        std::optional<rl::atomic<Value>> atomic;
        std::optional<rl::var<Value>> plain;

        [[nodiscard]] Value now() const
        {
            return size == 8 ? *static_cast<const std::uint64_t *>(at) : *static_cast<const std::uint32_t *>(at);
        }
    };
    static constexpr unsigned words_max = 48;

    template <class T> Word &make(T &word)
    {
        assert(find(&word) == nullptr && count_ < words_max);
        Word &w = words_[count_++];
        w.at = &word;
        w.size = sizeof word;
        w.newest = word;
        return w;
    }

    Word *find(const void *at)
    {
        for (unsigned i = 0; i < count_; ++i) {
            if (words_[i].at == at)
                return &words_[i];
        }
        return nullptr;
    }

    Word *find_to_change(const void *at, Site site)
    {
        Word *w = find(at);
        if (w == nullptr && running_ && !(at >= owned_.first && at < owned_.second))
            rl::ctx().fail_test("a store to a word that is not registered", rl::test_result_inconsistent_test_suite,
                                site);
        return w;
    }

    template <class T> static void keep(Word *w, T &word, T value)
    {
        word = value;
        if (w != nullptr)
            w->newest = value;
    }

    static rl::memory_order weakened(const auto &word, Access access, std::memory_order order, Site site)
    {
        for (Weakening &m : weakenings) {
            if (m.word == &word && m.access == access && m.from == order &&
                std::string_view(site.function).starts_with(m.in)) {
                m.met = true;
                return translate(m.to);
            }
        }
        return translate(order);
    }

    bool is_late(const void *word) const { return running_ && delay && delay->word == word && !catching_up_; }
    void catch_up(const void *word)
    {
        if (!late_ || !delay || delay->until != word || late_->first != rl::thread_index())
            return;
        delay->met = true;
        catching_up_ = true;
        std::exchange(late_, std::nullopt)->second();
        catching_up_ = false;
    }

    std::array<Word, words_max> words_;
    std::pair<const void *, const void *> owned_{};
    std::optional<std::pair<unsigned, std::function<void()>>> late_; // a thread's, and what it has still to do
    bool catching_up_ = false;
    unsigned count_ = 0;
    bool running_ = false;
};

} // namespace dirtyring::model

#define DR_SITE \
    ::dirtyring::model::Site site = {__builtin_FUNCTION(), __builtin_FILE(), static_cast<unsigned>(__builtin_LINE())}

namespace std {

// What the project uses of std::atomic_ref.
template <class T> class relacy_atomic_ref
{
    using Words = ::dirtyring::model::Words;
    using Order = memory_order;

  public:
    explicit relacy_atomic_ref(T &word) : word_(word) {}

    T load(Order order, DR_SITE) const { return words().load(word_, order, site); }
    void store(T value, Order order, DR_SITE) const { words().store(word_, value, order, site); }

    T exchange(T value, Order order, DR_SITE) const
    {
        return words().modify(
            word_, order, site, [=](auto &a, auto mo) { return a.exchange(value, mo, site); },
            [=](T) { return value; });
    }
    T fetch_add(T value, Order order, DR_SITE) const
    {
        return words().modify(
            word_, order, site, [=](auto &a, auto mo) { return a.fetch_add(value, mo, site); },
            [=](T old) { return old + value; });
    }
    T fetch_or(T value, Order order, DR_SITE) const
    {
        return words().modify(
            word_, order, site, [=](auto &a, auto mo) { return a.fetch_or(value, mo, site); },
            [=](T old) { return old | value; });
    }
    T fetch_and(T value, Order order, DR_SITE) const
    {
        return words().modify(
            word_, order, site, [=](auto &a, auto mo) { return a.fetch_and(value, mo, site); },
            [=](T old) { return old & value; });
    }
    bool compare_exchange_strong(T &expected, T desired, Order order, DR_SITE) const
    {
        return words().compare_exchange(word_, expected, desired, order, site);
    }
    bool compare_exchange_weak(T &expected, T desired, Order order, DR_SITE) const
    {
        return words().compare_exchange(word_, expected, desired, order, site);
    }

  private:
    static Words &words() { return *Words::current; }
    T &word_;
};

} // namespace std

#define atomic_ref relacy_atomic_ref
