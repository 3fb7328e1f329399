#include "service/walkers/inbox.hpp"

#include <sys/eventfd.h>
#include <system_error>

namespace dirtyring::service {

Inbox::Inbox() : event_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK))
{
    if (!event_)
        throw std::system_error(errno, std::generic_category(), "eventfd");
}

void Inbox::post(Task &task)
{
    queue_.push(&task);
    posted_.fetch_add(1, std::memory_order_seq_cst);
    if (asleep_.load(std::memory_order_seq_cst))
        ::eventfd_write(event_.get(), 1);
}

bool Inbox::drain()
{
    bool any = false;
    for (Task *task = nullptr; queue_.pop(task); any = true) {
        ++drained_;
        task->run();
    }
    return any;
}

bool Inbox::prepare_sleep()
{
    asleep_.store(true, std::memory_order_seq_cst);
    return posted_.load(std::memory_order_seq_cst) == drained_;
}

void Inbox::wake()
{
    // Relaxed: a post that still sees it set rings once too often.
    asleep_.store(false, std::memory_order_relaxed);
}

} // namespace dirtyring::service
