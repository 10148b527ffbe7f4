// Products of up to 32 rows with strips of pairs, in vectors.
#pragma once

#include "panel_vectors.h"
#include "row_pairs.h"

#if !defined(ZOO_TILES)
namespace zoo {

// Two panels of a strip's keys, while lines of what is read later are fetched, if it is given.
struct KeyPanels {
  static constexpr bool kFromMemory = false;
  PanelPair panels;
  const char *next, *values;

  PanelPair at(int64_t block) const {
    constexpr int kLines = 2 * kBlockValues * sizeof(bf16) / 64;
    for (int line = 0; next && line < kLines; ++line) {
      prefetch_far(next + (block * kLines + line) * 64);
      prefetch_far(values + (block * kLines + line) * 64);
    }
    return panels.from(block);
  }
};

// Panels of queries, while something is fetched, if that is given.
template <typename Fetch>
struct QueryPanels {
  static constexpr bool kFromMemory = false;
  PanelPair panels;
  const Fetch* fetch;

  PanelPair at(int64_t block) const {
    if (fetch) (*fetch)();
    return panels.from(block);
  }
};

// Columns of values, a block a strip.
struct ValueBlocks {
  static constexpr bool kFromMemory = false;
  const char* const* strips;
  int64_t column;

  PanelPair at(int64_t strip) const {
    const bf16* values = reinterpret_cast<const bf16*>(strips[strip]) + column * kBlockValues;
    return {values, values + kBlockValues};
  }
};

// Scores of a strip's tokens: q [rows][w.key], to out [rows][stride]; `next` and `values` are read later, if given.
inline void score_strip(const bf16* q, int rows, const char* strip, const char* next, const char* values, Widths w,
                        float* out, int64_t stride) {
  const bf16* keys = reinterpret_cast<const bf16*>(strip);
  auto panels_of = [&](int64_t group) {
    return KeyPanels{{keys, keys + w.key * kPanel}, group ? nullptr : next, values};
  };
  add_groups<true>({q, kBlock, w.key, out, stride, kPanel}, rows, w.key / kBlock, panels_of, true);
}

// Scores of a strip of rows by tokens, which are turned to rows by query: q as panels, to out [rows][stride]. Each block
// of 16 tokens begins with what `fetch` does.
template <typename Fetch>
inline void score_strip_of_rows(
    const bf16* q, int rows, const char* strip, Widths w, float* out, int64_t stride, const Fetch& fetch) {
  const bf16* tokens = reinterpret_cast<const bf16*>(strip);
  auto panels_of = [&](int64_t group) {
    return QueryPanels<Fetch>{{q, q + kPanel * w.key}, group ? nullptr : &fetch};
  };
  alignas(64) float scores[4][kTileValues];
  for (int half = 0; half < 2; ++half) {
    const RowGroup group{tokens + half * kPanel * w.key, kBlock, w.key, scores[half], kLanes, 2 * kTileValues};
    if (rows > kPanel) add_groups<true>(group, kPanel, w.key / kBlock, panels_of, true);
    else add_groups<false>(group, kPanel, w.key / kBlock, panels_of, true);
  }
  turn_scores(scores, rows, out, stride);
}

// Adds weighted values of all strips to one or two columns of 16 features: p [rows][p_stride], out [rows][w.value].
template <bool kTwoColumns>
inline void add_columns(const bf16* p, int64_t p_stride, int rows, const char* const* strips, int count, int64_t column,
                        Widths w, float* out) {
  auto panels_of = [&](int64_t) { return ValueBlocks{strips, column}; };
  add_groups<kTwoColumns>({p, kStrip, p_stride, out + column * kLanes, w.value, kLanes}, rows, count, panels_of, false);
}

}  // namespace zoo
#endif
