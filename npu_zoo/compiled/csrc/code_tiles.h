// Products with weights of 8 or 4 bits by a matrix unit; codes.h has the layouts.
#pragma once

#include "codes.h"
#include "panel_tiles.h"

#if defined(ZOO_TILES)
namespace zoo {

// Up to 16 rows of integers with two panels. Tiles 0 to 3 are the sums of upper and lower halves by panel, 4 and 5 the
// inputs' halves, 6 and 7 codes; the panels' sums wait in memory for the scales of their groups.
class IntegerTiles {
 public:
  IntegerTiles(const Integers& x, int64_t row, int rows)
      : x_(x), row_(row), rows_(rows), blocks_(std::min<int64_t>(x.blocks_of_group, kTileBlocks)) {
    shape_tiles(rows, rows, blocks_ * kCodeBlock / 4);
  }

  // Blocks in whole tiles.
  int64_t filled(int64_t blocks) const { return (blocks + blocks_ - 1) & -blocks_; }

  // Adds blocks [begin, end), which are the inputs' group `part`.
  void multiply(int64_t part, int64_t begin, int64_t end, const uint8_t* first, const uint8_t* second) {
    clear();
    const int64_t bytes = blocks_ * kPanel * kCodeBlock;
    for (int64_t block = begin; block < end; block += blocks_, first += bytes, second += bytes) {
      const int64_t at = row_ * x_.stride + block * kCodeBlock;
      _tile_loadd(4, x_.upper + at, x_.stride);
      _tile_loadd(5, x_.lower + at, x_.stride);
      _tile_loadd(6, first, 64);
      _tile_dpbsud(0, 4, 6);
      _tile_dpbsud(1, 5, 6);
      if (second_) {
        _tile_loadd(7, second, 64);
        _tile_dpbsud(2, 4, 7);
        _tile_dpbsud(3, 5, 7);
      }
    }
    alignas(64) int32_t sums[4][kPanel * kLanes];
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    if (second_) {
      _tile_stored(2, sums[2], 64);
      _tile_stored(3, sums[3], 64);
    }
    for (int r = 0; r < rows_; ++r) {
      const int64_t at = (row_ + r) * x_.groups + part;
      for (int panel = 0; panel < 1 + second_; ++panel) {
        const Ints upper = load<Ints>(sums[2 * panel] + r * kLanes), lower = load<Ints>(sums[2 * panel + 1] + r * kLanes);
        group_[panel][r] += to_floats(upper, lower + x_.offsets[at]) * x_.scales[at];
      }
    }
  }

  void start(bool second) {
    second_ = second;
    std::fill_n(&totals_[0][0], 2 * kPanel, Floats{});
    std::fill_n(&group_[0][0], 2 * kPanel, Floats{});
  }

  void scale(const float* first, const float* second) {
    for (int panel = 0; panel < 1 + second_; ++panel) {
      const Floats scale = load<Floats>(panel ? second : first);
      for (int r = 0; r < rows_; ++r) {
        totals_[panel][r] += group_[panel][r] * scale;
        group_[panel][r] = Floats{};
      }
    }
  }

  void put(const Output& out, int64_t number) const {
    for (int panel = 0; panel < 1 + second_; ++panel)
      for (int r = 0; r < rows_; ++r) out.put(row_ + r, number + panel, totals_[panel][r]);
  }

 private:
  static void clear() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }

  const Integers& x_;
  int64_t row_;
  int rows_;
  int64_t blocks_;  // of a tile
  bool second_ = false;
  Floats totals_[2][kPanel], group_[2][kPanel];
};

// The bytes of `blocks` blocks of codes: themselves, or what halves of bytes are unpacked to.
template <int kBits>
inline const uint8_t* as_bytes(const uint8_t* codes, int64_t blocks, uint8_t* bytes) {
  if constexpr (kBits == 8) {
    for (int64_t i = 0; i < blocks * Codes<8>::kBytes; i += 64) prefetch(codes + i + 2 * kPrefetch);
    return codes;
  }
  for (int64_t i = 0; i < blocks * Codes<4>::kBytes; i += 64) {
    prefetch(codes + i + kPrefetch);
    const Words bits = load<Words>(codes + i);
    store(bytes + 2 * i, Codes<4>::plane(bits, 0));
    store(bytes + 2 * i + 64, Codes<4>::plane(bits, 1));
  }
  settle_memory();
  return bytes;
}

// Panels [first, last) with at most 16 rows.
template <int kBits>
inline void multiply_codes_by_tiles(
    const Integers& x, int64_t row, int rows, const CodeWeight& weight, int64_t first, int64_t last, const Output& out) {
  alignas(64) uint8_t unpacked[2][kWidestGroup * kPanel * kCodeBlock];
  IntegerTiles tiles(x, row, rows);
  for (int64_t panel = first; panel < last; panel += 2) {
    const bool two = panel + 1 < last;
    const CodePanel one = weight.panel(panel), other = weight.panel(two ? panel + 1 : panel);
    tiles.start(two);
    int64_t part = 0;
    for (int64_t group = 0; group < weight.groups; ++group) {
      const int64_t stop = std::min(weight.blocks, (group + 1) * weight.blocks_of_group);
      for (int64_t begin = group * weight.blocks_of_group; begin < stop; begin += x.blocks_of_group, ++part) {
        const int64_t end = std::min(stop, begin + x.blocks_of_group), at = begin * Codes<kBits>::kBytes;
        const int64_t blocks = tiles.filled(end - begin);
        const uint8_t* upper = as_bytes<kBits>(one.codes + at, blocks, unpacked[0]);
        tiles.multiply(part, begin, end, upper, two ? as_bytes<kBits>(other.codes + at, blocks, unpacked[1]) : upper);
      }
      tiles.scale(one.scales + group * kPanel, other.scales + group * kPanel);
    }
    tiles.put(out, panel);
  }
  _tile_release();
}

}  // namespace zoo
#endif
