// What a step reads and writes: its rows, the blocks of their keys and values, and views of the step's tensors.
#pragma once

#include <type_traits>

#include "pack.h"

namespace zoo {

// What a cache holds, for activations of which dtype.
enum Kinds { kBf16 = 0, kFloat32 = 1, kInt8OfBf16 = 2, kInt8OfFloat32 = 3, kLatentBf16 = 4, kLatentFloat32 = 5 };

// Sizes of a cache.
struct Shape {
  int64_t kind, heads, kv_heads, key, rope, value, block_size;

  int64_t group() const { return heads / kv_heads; }
  int64_t key_width() const { return key + rope; }
};

// Queries over a run of blocks: a row of the step, whose queries are its last tokens, or many rows' shared prefix.
struct Item {
  int64_t first;       // of the step's tokens, or with `shared` of the list of members
  int64_t tokens;      // queries
  int64_t table;       // where its blocks begin in the tables
  int64_t keys;        // tokens to attend to, for the last query
  int64_t prefix;      // the item of the prefix that it shares, or -1
  int64_t prefix_row;  // of its first token in that item
  int64_t shared;      // whether it is such a prefix
  int64_t whole;       // whether all of its queries see all of its tokens
};

// [tokens][heads][width], values next to each other.
template <typename T>
struct View {
  T* values;
  int64_t token, head;

  T* at(int64_t t, int64_t h) const { return values + t * token + h * head; }
};

// Where a head's strips lie within a layer.
template <class Kind>
struct Strips {
  char *keys, *values;
  const int64_t* table;
  int64_t head, kv_heads, block_size;
  Widths widths;

  char* key_at(int64_t token) const { return keys + place(token) * Kind::key_bytes(widths); }
  char* value_at(int64_t token) const { return values + place(token) * Kind::value_bytes(widths); }
  int64_t place(int64_t token) const {
    return (table[token / block_size] * kv_heads + head) * (block_size / kStrip) + token % block_size / kStrip;
  }
};

inline void write_key(Pairs, const bf16* key, int64_t width, char* strip, Widths w, int token) {
  bf16* column = reinterpret_cast<bf16*>(strip) + token / kPanel * w.key * kPanel + token % kPanel * 2;
  const int64_t whole = width / 2;
  for (int64_t pair = 0; pair < whole; ++pair) store(column + pair * 2 * kPanel, load<uint32_t>(key + 2 * pair));
  for (int64_t pair = whole; pair < w.key / 2; ++pair)
    store<uint32_t>(column + pair * 2 * kPanel, 2 * pair < width ? key[2 * pair] : 0);
}

// The values of a token, whose neighbour in the pair is left alone where it comes before and zero where it comes after.
inline void write_value(Pairs, const bf16* value, int64_t width, char* strip, Widths w, int token) {
  for (int64_t tile = 0; tile < w.value / kLanes; ++tile) {
    bf16* pair = reinterpret_cast<bf16*>(strip) + tile * kBlockValues + token / 2 * 2 * kPanel;
    Words words = widen(load_halves(value + tile * kLanes, width - tile * kLanes));
    if (token % 2) words = words << 16 | (load<Words>(pair) & 0xffff);
    store(pair, words);
  }
}

// Codes of a vector, max|x| / 127 apart. What has no largest value has no finite scale.
inline float quantize(const Floats* values, int64_t count, Floats* codes) {
  Floats most{}, spoilt{};
  for (int64_t i = 0; i < count; ++i) {
    const Floats size = values[i] < 0.0f ? -values[i] : values[i];
    most = larger(most, size);
    spoilt += values[i] * 0.0f;
  }
  const float scale = largest(most) / 127 + sum(spoilt);
  const float divisor = scale > 0 ? scale : 1.0f;
  constexpr float kRound = 12582912.0f;
  for (int64_t i = 0; i < count; ++i) {
    Floats code = (values[i] / divisor + kRound) - kRound;
    code = code > 127.0f ? splat(127.0f) : code;
    code = code < -127.0f ? splat(-127.0f) : code;
    codes[i] = code == code ? code : Floats{};
  }
  return scale;
}

// A token's values, filled up with zeros.
template <typename T>
inline void load_row(const T* from, int64_t width, int64_t padded, Floats* row) {
  for (int64_t i = 0; i < ceil_div(padded, kLanes); ++i)
    row[i] = width > i * kLanes ? load_floats(from + i * kLanes, width - i * kLanes) : Floats{};
}

constexpr int64_t kMaxWidth = 1024;

template <typename T, typename X>
inline void write_key(Plain<T>, const X* key, int64_t width, char* strip, Widths w, int token) {
  Floats row[kMaxWidth / kLanes];
  load_row(key, width, w.key, row);
  if (Plain<T>::kScaled) Plain<T>::key_scales(strip, w)[token] = quantize(row, ceil_div(w.key, kLanes), row);
  T* column = reinterpret_cast<T*>(strip) + token / kPanel * w.key * kPanel + token % kPanel;
  const float* values = reinterpret_cast<const float*>(row);
  for (int64_t i = 0; i < w.key; ++i) column[i * kPanel] = static_cast<T>(values[i]);
}

template <typename T, typename X>
inline void write_value(Plain<T>, const X* value, int64_t width, char* strip, Widths w, int token) {
  Floats row[kMaxWidth / kLanes];
  load_row(value, width, w.value, row);
  if (Plain<T>::kScaled) Plain<T>::value_scales(strip, w)[token] = quantize(row, w.value / kLanes, row);
  T* to = reinterpret_cast<T*>(strip) + token * w.value;
  const float* values = reinterpret_cast<const float*>(row);
  for (int64_t i = 0; i < w.value; ++i) to[i] = static_cast<T>(values[i]);
}

// A whole strip at once, of heads whose keys are whole blocks.
inline void write_strip(View<const bf16> key, View<const bf16> value, int64_t first, int64_t head, const Shape& shape,
                        char* key_strip, char* value_strip, Widths w) {
  const bf16* rows[kStrip];
  for (int i = 0; i < kStrip; ++i) rows[i] = key.at(first + i, head);
  for (int half = 0; half < kStrip; half += kPanel)
    for (int64_t d = 0; d < w.key; d += kBlock)
      pack_pairs(rows + half, d, reinterpret_cast<bf16*>(key_strip) + half * w.key + d * kPanel);
  for (int i = 0; i < kStrip; i += 2)
    pack_value_pair(value.at(first + i, head), value.at(first + i + 1, head), shape.value, w,
                    reinterpret_cast<bf16*>(value_strip) + i * kPanel);
}

// Writes an item's new tokens, in their order: the first of a strip clears it. Of values this removes what an earlier
// sequence left; of keys it takes up memory: pages that are read before they are written are the system's page of zeros,
// and to exchange that for one of their own later interrupts all threads.
template <class Kind, typename X>
void write_item(
    const Item& item, const Shape& shape, const Strips<Kind>& strips, View<const X> key, View<const X> value) {
  const int64_t start = item.keys - item.tokens;
  for (int64_t i = 0; i < item.tokens; ++i) {
    const int64_t at = start + i;
    char* values = strips.value_at(at);
    if constexpr (std::is_same_v<Kind, Pairs>) {
      if (at % kStrip == 0 && i + kStrip <= item.tokens && shape.key == strips.widths.key) {
        write_strip(key, value, item.first + i, strips.head, shape, strips.key_at(at), values, strips.widths);
        i += kStrip - 1;
        continue;
      }
    }
    if (at % kStrip == 0) {
      std::memset(strips.key_at(at), 0, Kind::key_bytes(strips.widths));
      std::memset(values, 0, Kind::value_bytes(strips.widths));
    }
    write_key(Kind{}, key.at(item.first + i, strips.head), shape.key, strips.key_at(at), strips.widths, at % kStrip);
    write_value(Kind{}, value.at(item.first + i, strips.head), shape.value, values, strips.widths, at % kStrip);
  }
}

}  // namespace zoo
