// One task of attention over latents: rows of all heads' queries meet tokens that they share.
//
// A chunk of tokens comes from memory once: scores read its rows as they are, and 32 features at a time are turned to
// pairs of tokens in the first cache, where their weighted sums are taken. The next chunk is fetched meanwhile.
#pragma once

#include "attend.h"

namespace zoo {

// A chunk's tokens, filled up with zeros to whole strips, and its strips' keys as rows.
struct LatentChunk {
  const bf16* rows[kChunk];
  const char* keys[kChunk / kStrip];
  int64_t begin, end;
  int strips;
};

// Tokens that are read later, fetched line by line all along, so that memory is never idle.
class LatentsAhead {
 public:
  LatentsAhead(const Latents<bf16>* source, int64_t begin, int64_t end)
      : source_(source), token_(begin), end_(source ? std::min<int64_t>(end, begin + kChunk) : begin) {}

  void fetch(int lines) {
    for (; lines > 0; --lines, at_ += 64) {
      if (at_ >= last_ && !next_strip()) return;
      prefetch_far(at_);
    }
  }

 private:
  bool next_strip() {
    if (token_ >= end_) return false;
    at_ = reinterpret_cast<const char*>(source_->at(token_));
    last_ = at_ + std::min<int64_t>(kStrip, end_ - token_) * source_->width * sizeof(bf16);
    token_ += kStrip;
    return true;
  }

  const Latents<bf16>* source_;
  int64_t token_, end_;
  const char *at_ = nullptr, *last_ = nullptr;
};

// Lines that are fetched with a block of keys and with two tokens' values: together somewhat more than these have.
constexpr int kLinesOfKeys = 4, kLinesOfValues = 2;

// The lower halves of two lines' quarters, value by value in turn: what processors interleave in one instruction.
using Line = uint16_t __attribute__((vector_size(64)));
constexpr Line kLowHalves = {0,  32, 1,  33, 2,  34, 3,  35, 8,  40, 9,  41, 10, 42, 11, 43,
                             16, 48, 17, 49, 18, 50, 19, 51, 24, 56, 25, 57, 26, 58, 27, 59};

// 32 features of a strip's tokens as two tiles of pairs; `natural_order` tells which feature a column is.
inline void pack_two_tiles(const bf16* const* rows, int64_t feature, bf16* tiles, LatentsAhead& ahead) {
  for (int i = 0; i < kStrip; i += 2) {
    ahead.fetch(kLinesOfValues);
    const Line even = load<Line>(rows[i] + feature), odd = load<Line>(rows[i + 1] + feature);
    store(tiles + i * kPanel, __builtin_shuffle(even, odd, kLowHalves));
    store(tiles + kBlockValues + i * kPanel, __builtin_shuffle(even, odd, kLowHalves + 4));
  }
}

// Sums over `pack_two_tiles`' columns in the order of the features.
inline void natural_order(float* sums) {
  constexpr int kLow = kLanes;
  const Words low = load<Words>(sums), high = load<Words>(sums + kLow);
  const Words first = {0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23};
  store(sums, __builtin_shuffle(low, high, first));
  store(sums + kLow, __builtin_shuffle(low, high, first + 8));
}

inline LatentChunk take_latents(const Latents<bf16>& source, int64_t begin, int64_t end, Widths w, char* copies) {
  LatentChunk chunk;
  chunk.begin = begin, chunk.end = end, chunk.strips = ceil_div(end - begin, kStrip);
  for (int strip = 0; strip < chunk.strips; ++strip) {
    const int64_t token = begin + strip * kStrip, count = std::min<int64_t>(kStrip, end - token);
    bf16* room = reinterpret_cast<bf16*>(copies + strip * RowPairs::key_bytes(w));
    chunk.keys[strip] = source.key_rows(token, count, chunk.rows + strip * kStrip, room);
  }
  return chunk;
}

// Scores and weights of up to 32 rows; how many strips they see.
inline int weigh_latents(
    Buffers<RowPairs>& b, const LatentChunk& chunk, LatentsAhead& ahead, int first, int rows, float scale, Widths w) {
  const int64_t seen = std::min(chunk.end, b.limits[first + rows - 1]) - chunk.begin;
  if (seen <= 0) return 0;
  const int strips = ceil_div(seen, kStrip);
  auto fetch = [&] { ahead.fetch(kLinesOfKeys); };
  for (int strip = 0; strip < strips; ++strip)
    score_strip_of_rows(b.panels + first * w.key, rows, chunk.keys[strip], w, b.scores + strip * kStrip, kScoreStride, fetch);
  weigh_rows(b, chunk.begin, seen, strips, first, rows, scale, w, b.weights + first * kScoreStride,
             [](int64_t) { return splat(1.0f); });
  return strips;
}

// Adds weighted values of one or two columns of 16 features, whose tiles are packed.
template <bool kTwoColumns>
void add_latents(Buffers<RowPairs>& b, const bf16* tiles, const int* seen, int rows, int64_t column, Widths w) {
  const char* strips[kChunk / kStrip];
  for (int strip = 0; strip < kChunk / kStrip; ++strip)
    strips[strip] = reinterpret_cast<const char*>(tiles + strip * 2 * kBlockValues);
  settle_memory();
  for (int first = 0; first < rows; first += kTileRows)
    if (const int count = seen[first / kTileRows])
      add_columns<kTwoColumns>(b.weights + first * kScoreStride, kScoreStride, std::min(kTileRows, rows - first), strips,
                               count, 0, w, b.sums + first * w.value + column * kLanes);
}

inline int64_t whole_pairs(int64_t value) { return value / (2 * kLanes) * 2; }

inline void attend_chunk(
    Buffers<RowPairs>& b, const LatentChunk& chunk, LatentsAhead ahead, int64_t value, int rows, float scale,
    Widths w) {
  int seen[kTaskRows / kTileRows];
  for (int first = 0; first < rows; first += kTileRows)
    seen[first / kTileRows] = weigh_latents(b, chunk, ahead, first, std::min(kTileRows, rows - first), scale, w);
  bf16* tiles = reinterpret_cast<bf16*>(b.packed + kChunk / kStrip * RowPairs::key_bytes(w));
  int64_t column = 0;
  for (; column < whole_pairs(value); column += 2) {
    for (int strip = 0; strip < chunk.strips; ++strip)
      pack_two_tiles(chunk.rows + strip * kStrip, column * kLanes, tiles + strip * 2 * kBlockValues, ahead);
    add_latents<true>(b, tiles, seen, rows, column, w);
  }
  for (; column < w.value / kLanes; ++column) {
    for (int64_t i = 0; i < chunk.strips * kStrip; i += 2)
      pack_value_pair(chunk.rows[i] + column * kLanes, chunk.rows[i + 1] + column * kLanes,
                      std::min<int64_t>(kLanes, value - column * kLanes), {0, kLanes},
                      tiles + i / kStrip * 2 * kBlockValues + i % kStrip * kPanel);
    add_latents<false>(b, tiles, seen, rows, column, w);
  }
}

// As the other `attend`; what the source says comes next is fetched in time.
inline void attend(
    const Latents<bf16>& source, Buffers<RowPairs>& b, int rows, int64_t begin, int64_t end, float scale, Widths w) {
  end = std::min(end, b.limits[rows - 1]);
  std::fill_n(b.state, rows, RowState{});
  std::fill_n(b.sums, round_up(rows, kPanel) * w.value, 0.0f);
  pack_queries(b, rows, w);
  const Unit unit;
  for (int64_t at = begin; at < end; at += kChunk) {
    const int64_t last = std::min<int64_t>(end, at + kChunk);
    const LatentsAhead ahead =
        last < end ? LatentsAhead(&source, last, end) : LatentsAhead(source.next, source.next_begin, source.next_end);
    attend_chunk(b, take_latents(source, at, last, w, b.packed), ahead, source.value, rows, scale, w);
  }
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < whole_pairs(source.value); column += 2)
      natural_order(b.sums + row * w.value + column * kLanes);
}

}  // namespace zoo
