// Calls whose arguments were written down: one word of eight bytes each.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace zoo {

template <typename T>
inline T from_word(int64_t word) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(word);
  } else if constexpr (std::is_floating_point_v<T>) {
    T value;
    std::memcpy(&value, &word, sizeof value);
    return value;
  } else {
    return static_cast<T>(word);
  }
}

template <typename... Arguments, size_t... kIndex>
inline void call(void (*function)(Arguments...), const int64_t* words, std::index_sequence<kIndex...>) {
  function(from_word<Arguments>(words[kIndex])...);
}

template <typename... Arguments>
inline void call(void (*function)(Arguments...), const int64_t* words) {
  call(function, words, std::index_sequence_for<Arguments...>{});
}

}  // namespace zoo

// Exports a function once more, as one that takes its arguments from words.
#define ZOO_REPLAYABLE(name) \
  extern "C" void name##_from(const int64_t* words) { zoo::call(name, words); }
