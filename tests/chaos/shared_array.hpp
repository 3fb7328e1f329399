// Zeroed memory that children share with their parent, without a file.
#pragma once

#include "client/migrate/failure.hpp"

#include <cstddef>
#include <sys/mman.h>
#include <utility>

namespace dirtyring::chaos {

template <class T> class SharedArray
{
  public:
    explicit SharedArray(std::size_t size)
        : data_(static_cast<T *>(
              ::mmap(nullptr, size * sizeof(T), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0))),
          size_(size)
    {
        if (data_ == MAP_FAILED)
            throw migrate::system_failure("mmap");
    }
    SharedArray(SharedArray &&other) noexcept
        : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0))
    {
    }
    SharedArray &operator=(SharedArray &&) = delete;
    ~SharedArray()
    {
        if (data_ != nullptr)
            ::munmap(data_, size_ * sizeof(T));
    }

    [[nodiscard]] std::size_t size() const { return size_; }
    [[nodiscard]] T *data() const { return data_; }
    [[nodiscard]] T &operator[](std::size_t i) const { return data_[i]; }

  private:
    T *data_;
    std::size_t size_;
};

} // namespace dirtyring::chaos
