// Memory that calls of one thread use again and again, for the first touch of fresh memory costs more than its use.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace zoo {

class Workspace {
 public:
  // Room for `count` values, whose content is lost with the next call.
  template <typename T>
  T* take(int64_t count) {
    const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    if (bytes > size_) {
      memory_.reset(static_cast<char*>(std::aligned_alloc(64, bytes)));
      size_ = bytes;
    }
    return reinterpret_cast<T*>(memory_.get());
  }

 private:
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  std::unique_ptr<char, Free> memory_;
  int64_t size_ = 0;
};

}  // namespace zoo
