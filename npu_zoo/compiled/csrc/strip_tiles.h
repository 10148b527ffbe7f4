// Products of 16 or 32 rows with strips of pairs, in a matrix unit.
#pragma once

#include "panel_tiles.h"
#include "row_pairs.h"

#if defined(ZOO_TILES)
namespace zoo {

// Scores of a strip's tokens: q [rows][w.key], to out [rows][stride]; `next` and `values` are read later, if given.
template <bool kTwoGroups>
inline void score_groups(const bf16* q, const char* strip, const char* next, const char* values, Widths w, float* out,
                         int64_t stride) {
  const bf16 *first = reinterpret_cast<const bf16*>(strip), *second = first + w.key * kPanel;
  const int bytes = w.key * sizeof(bf16);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t block = 0; block < w.key / kBlock; ++block) {
    for (int line = 0; next && line < 32; ++line) {
      prefetch_far(next + (block * 32 + line) * 64);
      prefetch_far(values + (block * 32 + line) * 64);
    }
    _tile_loadd(4, q + block * kBlock, bytes);
    _tile_loadd(6, first + block * kBlockValues, 64);
    _tile_loadd(7, second + block * kBlockValues, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (kTwoGroups) {
      _tile_loadd(5, q + kPanel * w.key + block * kBlock, bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out, stride * sizeof(float));
  _tile_stored(1, out + kPanel, stride * sizeof(float));
  if (kTwoGroups) {
    _tile_stored(2, out + kPanel * stride, stride * sizeof(float));
    _tile_stored(3, out + kPanel * stride + kPanel, stride * sizeof(float));
  }
}

// Scores of a strip of rows by tokens, which are turned to rows by query: q as panels, to out [rows][stride]. Each block
// begins with what `fetch` does.
template <bool kTwoGroups, typename Fetch>
inline void score_groups_of_rows(
    const bf16* q, const char* strip, Widths w, float* out, int64_t stride, const Fetch& fetch) {
  const bf16 *first = reinterpret_cast<const bf16*>(strip), *second = first + w.key * kPanel;
  const int bytes = w.key * sizeof(bf16);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t block = 0; block < w.key / kBlock; ++block) {
    fetch();
    _tile_stream_loadd(4, first + block * kBlock, bytes);
    _tile_stream_loadd(5, second + block * kBlock, bytes);
    _tile_loadd(6, q + block * kBlockValues, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    if (kTwoGroups) {
      _tile_loadd(7, q + kPanel * w.key + block * kBlockValues, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  alignas(64) float scores[4][kPanel * kLanes];
  _tile_stored(0, scores[0], 64);
  _tile_stored(1, scores[1], 64);
  if (kTwoGroups) {
    _tile_stored(2, scores[2], 64);
    _tile_stored(3, scores[3], 64);
  }
  turn_scores(scores, kTwoGroups ? kStepRows : kPanel, out, stride);
}

// Adds weighted values of all strips to two columns of 16 features: p [rows][p_stride], out [rows][w.value].
template <bool kTwoGroups, bool kTwoColumns>
inline void add_tile_columns(
    const bf16* p, int64_t p_stride, const char* const* strips, int count, int64_t column, Widths w, float* out) {
  const int p_bytes = p_stride * sizeof(bf16), out_bytes = w.value * sizeof(float);
  float *upper = out + column * kLanes, *lower = upper + kPanel * w.value;
  _tile_loadd(0, upper, out_bytes);
  if (kTwoColumns) _tile_loadd(1, upper + kLanes, out_bytes);
  if (kTwoGroups) _tile_loadd(2, lower, out_bytes);
  if (kTwoGroups && kTwoColumns) _tile_loadd(3, lower + kLanes, out_bytes);
  for (int strip = 0; strip < count; ++strip) {
    const bf16* values = reinterpret_cast<const bf16*>(strips[strip]) + column * kBlockValues;
    _tile_loadd(4, p + strip * kStrip, p_bytes);
    _tile_loadd(6, values, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (kTwoColumns) {
      _tile_loadd(7, values + kBlockValues, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (kTwoGroups) {
      _tile_loadd(5, p + kPanel * p_stride + strip * kStrip, p_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if (kTwoColumns) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, upper, out_bytes);
  if (kTwoColumns) _tile_stored(1, upper + kLanes, out_bytes);
  if (kTwoGroups) _tile_stored(2, lower, out_bytes);
  if (kTwoGroups && kTwoColumns) _tile_stored(3, lower + kLanes, out_bytes);
}

// As the same of strip_vectors.h, of rows that are filled up to 16 or 32.
inline void score_strip(const bf16* q, int rows, const char* strip, const char* next, const char* values, Widths w,
                        float* out, int64_t stride) {
  (rows > kPanel ? score_groups<true> : score_groups<false>)(q, strip, next, values, w, out, stride);
}

template <typename Fetch>
inline void score_strip_of_rows(
    const bf16* q, int rows, const char* strip, Widths w, float* out, int64_t stride, const Fetch& fetch) {
  auto score = rows > kPanel ? score_groups_of_rows<true, Fetch> : score_groups_of_rows<false, Fetch>;
  score(q, strip, w, out, stride, fetch);
}

template <bool kTwoColumns>
inline void add_columns(const bf16* p, int64_t p_stride, int rows, const char* const* strips, int count, int64_t column,
                        Widths w, float* out) {
  auto add = rows > kPanel ? add_tile_columns<true, kTwoColumns> : add_tile_columns<false, kTwoColumns>;
  add(p, p_stride, strips, count, column, w, out);
}

}  // namespace zoo
#endif
