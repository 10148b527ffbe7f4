// Where a task's strips come from: the cache as it is, or packed out of it as they are needed.
#pragma once

#include "cache.h"

namespace zoo {

template <class Kind>
struct InPlace {
  static constexpr bool kPacks = false;
  Strips<Kind> strips;
  const char* next;  // what is read behind it, if anything

  const char* keys(int64_t token) const { return strips.key_at(token); }
  const char* values(int64_t token) const { return strips.value_at(token); }
  void pack(int64_t, int64_t, char*, char*) const {}
};

// Latents with their rotated keys, [block][token][value + rope], which every head shares.
template <typename T>
struct Latents {
  const T* pool;
  const int64_t* table;
  int64_t value, width, block_size;
  Widths widths;
  // What is read behind a task's own, if anything.
  const Latents* next = nullptr;
  int64_t next_begin = 0, next_end = 0;

  static constexpr bool kPacks = true;
  const char* keys(int64_t) const { return nullptr; }
  const char* values(int64_t) const { return nullptr; }
  const T* at(int64_t token) const {
    return pool + (table[token / block_size] * block_size + token % block_size) * width;
  }

  // Whether the strip that begins with a token lies in one block.
  bool lies_together(int64_t token) const { return token % block_size + kStrip <= block_size; }

  // Packs the strip that begins with a token, of which `count` tokens are there and the others zero.
  void pack(int64_t token, int64_t count, char* keys, char* values) const { pack(token, count, (T*)keys, (T*)values); }

  void pack(int64_t token, int64_t count, bf16* keys, bf16* values) const {
    bf16 ends[kStrip][kBlock];
    const bf16* rows[kStrip];
    find_rows(token, count, rows);
    const int64_t whole = width / kBlock * kBlock;
    if (whole < width) {
      std::memset(ends, 0, sizeof ends);
      for (int i = 0; i < count; ++i) std::copy_n(rows[i] + whole, width - whole, ends[i]);
    }
    for (int half = 0; half < 2; ++half) {
      bf16* panel = keys + half * widths.key * kPanel;
      for (int64_t first = 0; first < whole; first += kBlock)
        pack_pairs(rows + half * kPanel, first, panel + first * kPanel);
      if (whole == width) continue;
      const bf16* last[kPanel];
      for (int i = 0; i < kPanel; ++i) last[i] = ends[half * kPanel + i];
      pack_pairs(last, 0, panel + whole * kPanel);
    }
    // Features in the outer loop, for stores a tile apart would fall into few sets of the cache.
    for (int64_t d = 0; d < widths.value; d += kLanes, values += kBlockValues)
      for (int i = 0; i < kStrip; i += 2)
        pack_value_pair(rows[i] + d, rows[i + 1] + d, std::min<int64_t>(kLanes, value - d), {0, kLanes},
                        values + i * kPanel);
  }

  // Finds a strip's rows, and its keys as rows of whole blocks: those of the pool, or copies where these do not do.
  const char* key_rows(int64_t token, int64_t count, const bf16** rows, bf16* copies) const {
    const bool together = find_rows(token, count, rows);
    if (together && width == widths.key) return reinterpret_cast<const char*>(rows[0]);
    for (int i = 0; i < kStrip; ++i, copies += widths.key)
      std::fill(std::copy_n(rows[i], width, copies), copies + widths.key, bf16{});
    return reinterpret_cast<const char*>(copies - kStrip * widths.key);
  }

  // A strip's rows, of which those behind `count` are zeros; whether all 32 lie one after the other.
  bool find_rows(int64_t token, int64_t count, const bf16** rows) const {
    constexpr int64_t kRoom = 2048;
    static const bf16 zeros[kRoom] = {};
    const bool together = lies_together(token);
    const bf16* first = at(token);
    for (int i = 0; i < kStrip; ++i) rows[i] = i >= count ? zeros : together ? first + i * width : at(token + i);
    return together;
  }

  void pack(int64_t token, int64_t count, float* keys, float* values) const {
    for (int i = 0; i < kStrip; ++i) {
      const float* row = i < count ? at(token + i) : nullptr;
      float* column = keys + i / kPanel * widths.key * kPanel + i % kPanel;
      for (int64_t d = 0; d < widths.key; ++d) column[d * kPanel] = row && d < width ? row[d] : 0;
      for (int64_t d = 0; d < widths.value; ++d) values[i * widths.value + d] = row && d < value ? row[d] : 0;
    }
  }
};

// Strips of codes, restored to pairs of bfloat16.
struct Restored {
  Strips<Plain<int8_t>> strips;
  Widths widths;

  static constexpr bool kPacks = true;
  const char* keys(int64_t) const { return nullptr; }
  const char* values(int64_t) const { return nullptr; }

  void pack(int64_t token, int64_t count, char* key_strip, char* value_strip) const {
    using Codes = Plain<int8_t>;
    const Widths from = strips.widths;
    char *keys = strips.key_at(token), *values = strips.value_at(token);
    bf16* to = reinterpret_cast<bf16*>(key_strip);
    for (int half = 0; half < 2; ++half) {
      const Floats scales = load<Floats>(Codes::key_scales(keys, from) + half * kPanel);
      const int8_t* panel = reinterpret_cast<const int8_t*>(keys) + half * from.key * kPanel;
      for (int64_t d = 0; d < widths.key; d += 2, to += 2 * kPanel) {
        const Floats even = d < from.key ? load_floats(panel + d * kPanel) * scales : Floats{};
        store_pairs(to, even, d + 1 < from.key ? load_floats(panel + (d + 1) * kPanel) * scales : Floats{});
      }
    }
    const float* scales = Codes::value_scales(values, from);
    const int8_t* codes = reinterpret_cast<const int8_t*>(values);
    to = reinterpret_cast<bf16*>(value_strip);
    for (int i = 0; i < kStrip; i += 2) {
      // Scales of tokens that are not there are whatever was in memory.
      const float first = i < count ? scales[i] : 0, second = i + 1 < count ? scales[i + 1] : 0;
      for (int64_t d = 0; d < widths.value; d += kLanes) {
        const int8_t* at = codes + i * from.value + d;
        store_pairs(to + d / kLanes * kBlockValues + i * kPanel, load_floats(at) * first,
                    load_floats(at + from.value) * second);
      }
    }
  }
};

}  // namespace zoo
