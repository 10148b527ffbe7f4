// Memory that calls of one thread use again and again: the first touch of fresh memory costs more than its use.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace zoo {

template <typename T>
class Workspace {
 public:
  T* values(int64_t count) {
    if (count > size_) {
      values_.reset(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64)));
      size_ = count;
    }
    return values_.get();
  }

 private:
  struct Free {
    void operator()(T* values) const { std::free(values); }
  };
  std::unique_ptr<T, Free> values_;
  int64_t size_ = 0;
};

}  // namespace zoo
