// Keys and values that were expanded from latents, brought into strips.
#include <vector>

#include "cache.h"

namespace {

using namespace zoo;

inline void put_features(const bf16* first, const bf16* second, int64_t left, bf16* to) {
  const Words high = second ? widen(load_halves(second, left)) : Words{};
  store(to, widen(load_halves(first, left)) | high << 16);
}

// Strips of bfloat16 of a stretch of tokens, from features [width] that lie token after token, and values by token, those
// of two tokens `step` apart.
void pack_strip(Pairs, const bf16* const* features, int64_t width, const bf16* values, int64_t value_width,
                int64_t step, int64_t token, int64_t count, Widths w, char* key_strip, char* value_strip) {
  bf16 *keys = reinterpret_cast<bf16*>(key_strip), *to = reinterpret_cast<bf16*>(value_strip);
  for (int64_t half = 0; half < kStrip; half += kPanel)
    for (int64_t d = 0; d < w.key; d += 2, keys += 2 * kPanel) {
      if (d >= width) store(keys, Words{});
      else
        put_features(features[d] + token + half, d + 1 < width ? features[d + 1] + token + half : nullptr, count - half,
                     keys);
    }
  for (int64_t i = 0; i < kStrip; i += 2) {
    const bf16 *first = values + (token + i) * step, *second = first + step;
    const int64_t seen = i < count ? value_width : 0, seen_next = i + 1 < count ? value_width : 0;
    for (int64_t d = 0; d < w.value; d += kLanes)
      put_features(first + d, seen_next ? second + d : nullptr, seen - d, to + d * kStrip + i * kPanel);
  }
}

void pack_strip(Plain<float>, const float* const* features, int64_t width, const float* values, int64_t value_width,
                int64_t step, int64_t token, int64_t count, Widths w, char* key_strip, char* value_strip) {
  float *keys = reinterpret_cast<float*>(key_strip), *to = reinterpret_cast<float*>(value_strip);
  for (int64_t half = 0; half < kStrip; half += kPanel)
    for (int64_t d = 0; d < w.key; ++d, keys += kPanel)
      store(keys, d < width && half < count ? load_floats(features[d] + token + half, count - half) : Floats{});
  for (int64_t i = 0; i < kStrip; ++i)
    for (int64_t d = 0; d < w.value; ++d)
      to[i * w.value + d] = i < count && d < value_width ? values[(token + i) * step + d] : 0;
}

// Where a stretch of expanded tokens goes: its first token, how many there are, and the first of its strips.
struct Stretch {
  int64_t token, count, strip;
};

template <typename X, class Kind>
void pack_expanded(const Shape& shape, const Stretch* stretches, int64_t count, int64_t tokens, const X* keys,
                   const X* rope, const X* values, char* key_strips, char* value_strips, int threads) {
  const Widths w = Kind::widths(shape.key_width(), shape.value);
#pragma omp parallel for num_threads(threads)
  for (int64_t head = 0; head < shape.kv_heads; ++head) {
    std::vector<const X*> features(shape.key_width());
    for (int64_t d = 0; d < shape.key_width(); ++d)
      features[d] = d < shape.key ? keys + (head * shape.key + d) * tokens : rope + (d - shape.key) * tokens;
    for (int64_t i = 0; i < count; ++i) {
      const Stretch& stretch = stretches[i];
      for (int64_t at = 0; at < stretch.count; at += kStrip) {
        const int64_t place = (stretch.strip + at / kStrip) * shape.kv_heads + head;
        pack_strip(Kind{}, features.data(), shape.key_width(), values + head * shape.value, shape.value,
                   shape.kv_heads * shape.value, stretch.token + at, std::min<int64_t>(kStrip, stretch.count - at), w,
                   key_strips + place * Kind::key_bytes(w), value_strips + place * Kind::value_bytes(w));
      }
    }
  }
}

}  // namespace

extern "C" {

// Packs expanded keys into blocks of one strip.
//
// keys: [heads][key][tokens]; rope: [rope][tokens], which all heads share; values: [tokens][heads][value].
void zoo_pack_expanded(const Shape* shape, const Stretch* stretches, int64_t count, int64_t tokens, const void* keys,
                       const void* rope, const void* values, char* key_strips, char* value_strips, int threads) {
  auto pack = [&](auto kind, auto zero) {
    using X = decltype(zero);
    pack_expanded<X, decltype(kind)>(*shape, stretches, count, tokens, static_cast<const X*>(keys),
                                     static_cast<const X*>(rope), static_cast<const X*>(values), key_strips,
                                     value_strips, threads);
  };
  if (shape->kind == kBf16) return pack(Pairs{}, bf16{});
  pack(Plain<float>{}, float{});
}
}
