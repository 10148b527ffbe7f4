// Vectors of 16 floats and what converts to them; on GCC's vector extensions, so that any processor can run them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define ZOO_BF16_DOT 1
#endif
#if defined(ZOO_BF16_DOT) && defined(__AMX_BF16__) && defined(__AMX_TILE__)
#define ZOO_TILES 1
#endif

namespace zoo {

using bf16 = uint16_t;
using Floats = float __attribute__((vector_size(64)));
using Words = uint32_t __attribute__((vector_size(64)));
using Ints = int32_t __attribute__((vector_size(64)));
using Halves = uint16_t __attribute__((vector_size(32)));

constexpr int kLanes = 16;

template <typename T>
inline T load(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

template <typename T>
inline void store(void* to, T value) {
  std::memcpy(to, &value, sizeof(T));
}

inline Floats splat(float value) { return Floats{} + value; }

inline float widen(bf16 value) {
  uint32_t bits = static_cast<uint32_t>(value) << 16;
  return load<float>(&bits);
}

// 16 halves in words of their own; GCC makes two of the conversion where the processor has one.
inline Words widen(Halves halves) {
#if defined(__AVX512F__)
  __m512i words = _mm512_cvtepu16_epi32(load<__m256i>(&halves));
  return load<Words>(&words);
#else
  return __builtin_convertvector(halves, Words);
#endif
}

inline Floats load_bf16(const bf16* from) {
  Words bits = widen(load<Halves>(from)) << 16;
  return load<Floats>(&bits);
}

// Rounds to nearest, ties to even; NaN stays NaN.
inline Halves round_to_bf16(Floats value) {
  Words bits = load<Words>(&value);
  Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  Words number = load<Words>(&(const Ints&)(value == value));
  return __builtin_convertvector((rounded & number) | (0x7fc0 & ~number), Halves);
}

inline void store_bf16(bf16* to, Floats value) {
#if defined(ZOO_BF16_DOT)
  __m256bh rounded = _mm512_cvtneps_pbh(load<__m512>(&value));
  std::memcpy(to, &rounded, sizeof rounded);
#else
  store(to, round_to_bf16(value));
#endif
}

// Rounds 32 values and stores them side by side, past the caches if `past` and the processor can; `to` is then the
// beginning of a line, and `settle_stores` comes before another thread reads it.
inline void store_bf16_line(bf16* to, Floats first, Floats second, bool past) {
#if defined(ZOO_BF16_DOT)
  const __m512i line = (__m512i)_mm512_cvtne2ps_pbh(load<__m512>(&second), load<__m512>(&first));
  if (past) _mm512_stream_si512(reinterpret_cast<__m512i*>(to), line);
  else _mm512_storeu_si512(to, line);
#else
  store_bf16(to, first);
  store_bf16(to + kLanes, second);
#endif
}

// Rounds two values for each of 16 lanes, the one behind the other: [16][2].
inline void store_pairs(bf16* to, Floats even, Floats odd) {
#if defined(ZOO_BF16_DOT)
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(load<__m512>(&odd), load<__m512>(&even));
  alignas(64) static constexpr uint16_t kOrder[2 * kLanes] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                              21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                              11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both));
#else
  store(to, widen(round_to_bf16(even)) | widen(round_to_bf16(odd)) << 16);
#endif
}

// Copies lines, to where a line begins, past the caches if the processor can.
inline void copy_lines(void* to, const void* from, int64_t bytes) {
#if defined(ZOO_BF16_DOT)
  for (int64_t at = 0; at < bytes; at += 64)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(static_cast<char*>(to) + at),
                        _mm512_loadu_si512(static_cast<const char*>(from) + at));
#else
  std::memcpy(to, from, bytes);
#endif
}

// Whether results are more than caches keep until they are read.
inline bool outgrows_caches(int64_t bytes) { return bytes > 1 << 20; }

inline void settle_stores() {
#if defined(ZOO_BF16_DOT)
  _mm_sfence();
#endif
}

inline bf16 narrow(float value) {
  bf16 lanes[kLanes];
  store_bf16(lanes, splat(value));
  return lanes[0];
}

inline float sum(Floats value) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(load<__m512>(&value));
#else
  float lanes[kLanes], total = 0;
  store(lanes, value);
  for (float lane : lanes) total += lane;
  return total;
#endif
}

// GCC takes functions that only prefetch for ones without effect and drops calls of them, but no volatile statement.
#if defined(__x86_64__)
#define ZOO_PREFETCH(INSTRUCTION, WRITE, LOCALITY) \
  asm volatile(INSTRUCTION " %0" : : "m"(*static_cast<const char*>(address)))
#else
#define ZOO_PREFETCH(INSTRUCTION, WRITE, LOCALITY) __builtin_prefetch(address, WRITE, LOCALITY)
#endif

inline void prefetch(const void* address) { ZOO_PREFETCH("prefetcht0", 0, 3); }
inline void prefetch_to_write(const void* address) { ZOO_PREFETCH("prefetchw", 1, 3); }
// To the second cache alone, which has room for more reads under way than the first.
inline void prefetch_far(const void* address) { ZOO_PREFETCH("prefetcht1", 0, 2); }

}  // namespace zoo
