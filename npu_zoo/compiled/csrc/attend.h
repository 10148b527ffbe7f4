// One task of attention: some rows of queries of one key-value head over a stretch of its tokens.
#pragma once

#include <type_traits>

#include "softmax.h"
#include "sources.h"
#include "strip_tiles.h"
#include "strip_vectors.h"
#include "workspace.h"

namespace zoo {

constexpr int kTaskRows = 128, kTileRows = 32;
constexpr int kChunk = 256;                 // tokens whose scores are held at once
constexpr int kScoreStride = kChunk + 16;   // else rows would fall into few sets of the cache
constexpr int64_t kTwoTiles = 2 * kBlockValues * sizeof(bf16);
constexpr int kFewRows = 4;                 // fewer are multiplied one by one

// The first `rows` of [first_row, ...) of an item, tokens [begin, end), rows counted by query token, then head.
struct Task {
  int64_t item, head, first_row, rows, begin, end, part;
};

// A task's buffers.
template <class Kind>
struct Buffers {
  using Operand = typename Kind::Operand;
  static constexpr bool kByRows = std::is_same_v<Kind, RowPairs>;
  Operand *queries, *panels, *weights;
  float *scores, *sums;
  char* packed;
  RowState state[kTaskRows];
  int64_t limits[kTaskRows];

  Buffers(Workspace& workspace, Widths w, bool packs) {
    const int64_t strips = kChunk / kStrip;
    const int64_t sizes[] = {
        kTaskRows * w.key * static_cast<int64_t>(sizeof(Operand)),
        (kByRows ? kTaskRows : kTileRows) * kScoreStride * static_cast<int64_t>(sizeof(Operand)),
        kTileRows * kScoreStride * 4,
        kTaskRows * w.value * 4,
        packs ? strips * (Kind::key_bytes(w) + (kByRows ? kTwoTiles : Kind::value_bytes(w))) : 0,
        kByRows ? kTaskRows * w.key * static_cast<int64_t>(sizeof(Operand)) : 0,
    };
    int64_t offsets[7] = {};
    for (int i = 0; i < 6; ++i) offsets[i + 1] = offsets[i] + round_up(sizes[i], 64);
    char* memory = workspace.take<char>(offsets[6]);
    queries = reinterpret_cast<Operand*>(memory);
    weights = reinterpret_cast<Operand*>(memory + offsets[1]);
    scores = reinterpret_cast<float*>(memory + offsets[2]);
    sums = reinterpret_cast<float*>(memory + offsets[3]);
    packed = memory + offsets[4];
    panels = reinterpret_cast<Operand*>(memory + offsets[5]);
  }
};

// A chunk's strips, and behind them what is read next.
struct Chunk {
  const char* keys[kChunk / kStrip + 1];
  const char* values[kChunk / kStrip + 1];
  int strips;
  int64_t begin, end;
};

template <int kRows, class Kind>
void attend_rows_to_strips(
    Buffers<Kind>& b, const Chunk& chunk, int row, bool values, int strips, Widths w, float* sums) {
  const typename Kind::Operand *queries[kRows], *weights[kRows];
  float *scores[kRows], *to[kRows];
  for (int strip = 0; strip < strips; ++strip) {
    for (int r = 0; r < kRows; ++r) {
      weights[r] = b.weights + (row + r) * kScoreStride + strip * kStrip;
      scores[r] = b.scores + (row + r) * kScoreStride + strip * kStrip;
      to[r] = sums + (row + r) * w.value;
      queries[r] = b.queries + (&to[r][0] - b.sums) / w.value * w.key;
    }
    if (values) Kind::template add<kRows>(weights, chunk.values[strip], chunk.values[strip + 1], w, to);
    else Kind::template score<kRows>(queries, chunk.keys[strip], chunk.keys[strip + 1], w, scores);
  }
}

template <class Kind>
void multiply_few(Buffers<Kind>& b, const Chunk& chunk, int rows, bool values, int strips, Widths w, float* sums) {
  int row = 0;
  for (; row + 4 <= rows; row += 4) attend_rows_to_strips<4>(b, chunk, row, values, strips, w, sums);
  for (; row + 2 <= rows; row += 2) attend_rows_to_strips<2>(b, chunk, row, values, strips, w, sums);
  for (; row < rows; ++row) attend_rows_to_strips<1>(b, chunk, row, values, strips, w, sums);
}

template <class Kind>
constexpr bool kByStrips = std::is_base_of_v<Pairs, Kind>;

// Whether all rows are multiplied with a strip at once.
template <class Kind>
bool goes_by_strips(int rows) {
  return kByStrips<Kind> && (rows >= kFewRows || std::is_same_v<Kind, RowPairs>);
}

// Rows with those of zeros that products need behind them.
template <class Kind>
int64_t filled_rows(int64_t rows) {
  return goes_by_strips<Kind>(rows) ? round_up(rows, kPanel) : rows;
}

// Adds weighted values of all strips: p [rows][p_stride], out [rows][w.value].
inline void add_strips(
    const bf16* p, int64_t p_stride, int rows, const char* const* strips, int count, Widths w, float* out) {
  const int64_t columns = w.value / kLanes;
  int64_t column = 0;
  for (; column + 2 <= columns; column += 2) add_columns<true>(p, p_stride, rows, strips, count, column, w, out);
  if (column < columns) add_columns<false>(p, p_stride, rows, strips, count, column, w, out);
}

// The keys that are read next: values are on their way by then.
inline const char* after_keys(const Chunk& chunk, int strip) {
  return strip + 1 < chunk.strips ? chunk.keys[strip + 1] : chunk.values[chunk.strips];
}

template <class Kind>
void multiply_tile(Buffers<Kind>& b, const Chunk& chunk, int first, int rows, bool values, int strips, Widths w) {
  float* sums = b.sums + first * w.value;
  if constexpr (kByStrips<Kind>) {
    if (goes_by_strips<Kind>(rows)) {
      if (values) return add_strips(b.weights, kScoreStride, rows, chunk.values, strips, w, sums);
      for (int strip = 0; strip < strips; ++strip)
        score_strip(b.queries + first * w.key, rows, chunk.keys[strip], first ? nullptr : after_keys(chunk, strip),
                    chunk.values[strip], w, b.scores + strip * kStrip, kScoreStride);
      return;
    }
  }
  multiply_few(b, chunk, rows, values, strips, w, sums);
}

// Turns up to 32 rows' scores to weights, with rows of zeros behind them where products need those.
template <class Kind, typename Scales>
void weigh_rows(Buffers<Kind>& b, int64_t begin, int64_t seen, int strips, int first, int rows, float scale, Widths w,
                typename Kind::Operand* weights, Scales weight_scales) {
  for (int row = 0; row < rows; ++row) {
    const int64_t visible = std::min(seen, b.limits[first + row] - begin);
    weigh(b.scores + row * kScoreStride, strips * kStrip, visible, scale, b.state[first + row],
          b.sums + (first + row) * w.value, w.value, weights + row * kScoreStride, weight_scales);
  }
  for (int64_t row = rows; row < filled_rows<Kind>(rows); ++row)
    std::memset(weights + row * kScoreStride, 0, strips * kStrip * sizeof(typename Kind::Operand));
}

// Attends from up to 32 rows to a chunk.
template <class Kind>
void attend_tile(Buffers<Kind>& b, const Chunk& chunk, int first, int rows, float scale, Widths w) {
  const int64_t seen = std::min(chunk.end, b.limits[first + rows - 1]) - chunk.begin;
  if (seen <= 0) return;
  const int strips = ceil_div(seen, kStrip);
  multiply_tile(b, chunk, first, rows, false, strips, w);
  weigh_rows(b, chunk.begin, seen, strips, first, rows, scale, w, b.weights,
             [&](int64_t i) { return Kind::value_scales(chunk.values[i / kStrip], w, i % kStrip / kLanes); });
  multiply_tile(b, chunk, first, rows, true, strips, w);
}

template <class Source, class Kind>
Chunk take_chunk(const Source& source, Buffers<Kind>& b, int64_t begin, int64_t end, int64_t last, Widths w) {
  Chunk chunk;
  chunk.begin = begin, chunk.end = end, chunk.strips = ceil_div(end - begin, kStrip);
  const int64_t key_bytes = Kind::key_bytes(w), value_bytes = Kind::value_bytes(w);
  for (int strip = 0; strip < chunk.strips; ++strip) {
    const int64_t token = begin + strip * kStrip;
    if (Source::kPacks) {
      char *keys = b.packed + strip * key_bytes, *values = b.packed + chunk.strips * key_bytes + strip * value_bytes;
      const int64_t count = std::min<int64_t>(kStrip, end - token);
      chunk.keys[strip] = keys, chunk.values[strip] = values;
      source.pack(token, count, keys, values);
    } else {
      chunk.keys[strip] = source.keys(token), chunk.values[strip] = source.values(token);
    }
  }
  if (Source::kPacks) settle_memory();
  chunk.keys[chunk.strips] = chunk.values[0];
  const char* next = chunk.values[0];
  if constexpr (!Source::kPacks) next = end < last ? source.keys(end) : source.next ? source.next : next;
  chunk.values[chunk.strips] = next;
  return chunk;
}

template <class Kind>
void pack_queries(Buffers<Kind>& b, int rows, Widths w) {
  for (int64_t first = 0; first < rows; first += kPanel) {
    const bf16* group[kPanel];
    for (int row = 0; row < kPanel; ++row) group[row] = b.queries + (first + row) * w.key;
    for (int64_t d = 0; d < w.key; d += kBlock) pack_pairs(group, d, b.panels + first * w.key + d * kPanel);
  }
}

// Attends from a task's rows, whose queries and limits are in the buffers, to tokens [begin, end).
template <class Source, class Kind>
void attend(const Source& source, Buffers<Kind>& b, int rows, int64_t begin, int64_t end, float scale, Widths w) {
  end = std::min(end, b.limits[rows - 1]);
  std::fill_n(b.state, rows, RowState{});
  std::fill_n(b.sums, filled_rows<Kind>(rows) * w.value, 0.0f);
  [[maybe_unused]] const std::conditional_t<kByStrips<Kind>, Unit, char> unit{};
  for (int64_t at = begin; at < end; at += kChunk) {
    const Chunk chunk = take_chunk(source, b, at, std::min<int64_t>(end, at + kChunk), end, w);
    for (int first = 0; first < rows; first += kTileRows)
      attend_tile(b, chunk, first, std::min(kTileRows, rows - first), scale, w);
  }
}

}  // namespace zoo
