// Products of up to 32 rows with pairs of panels in a matrix unit: its tiles hold inputs, blocks and their sums.
#pragma once

#include "panel_parts.h"

#if defined(ZOO_TILES)
namespace zoo {

struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3 are sums [rows][16 channels], 4 and 5 inputs [rows][`depth` words], 6 and 7 blocks of weights.
inline void shape_tiles(int first_rows, int second_rows, int depth = 16) {
  TileShapes shapes;
  for (int tile = 0; tile < 8; ++tile) {
    shapes.bytes[tile] = tile == 4 || tile == 5 ? 4 * depth : 64;
    shapes.rows[tile] = tile >= 6 ? depth : (tile == 2 || tile == 3 || tile == 5) ? second_rows : first_rows;
  }
  settle_memory();
  _tile_loadconfig(&shapes);
}

inline void prefetch_block(const bf16* block) {
  for (int line = 0; line < 16; ++line) prefetch(block + line * kBlock);
}

inline void clear_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Tiles 0 to 3 from and to [4][16][16].
inline void load_sums(const float* sums) {
  _tile_loadd(0, sums, 64);
  _tile_loadd(1, sums + kTileValues, 64);
  _tile_loadd(2, sums + 2 * kTileValues, 64);
  _tile_loadd(3, sums + 3 * kTileValues, 64);
}

inline void store_sums(float* sums) {
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + kTileValues, 64);
  _tile_stored(2, sums + 2 * kTileValues, 64);
  _tile_stored(3, sums + 3 * kTileValues, 64);
}

// Adds the products of up to 32 rows with one or two panels over blocks [begin, end) to tiles 0 to 3, which must have
// been shaped for these rows. Panels that stay in the first cache while rows pass by are there already, and inputs then
// leave that cache alone; a block of others is asked for at once, for a tile's load waits for one row after the other.
template <bool kTwoGroups, bool kTwoPanels, bool kStays>
inline void multiply_blocks(
    const Rows& x, int64_t row, int64_t begin, int64_t end, const PanelPair& panels, Ahead ahead) {
  const bf16 *upper = x.at(row), *lower = upper + x.group;
  const int x_bytes = x.stride * sizeof(bf16);
  for (int64_t block = begin; block < end; ++block) {
    const PanelPair at = panels.from(block);
    if (!kStays) touch_page<kTwoPanels>(at, end - block, ahead.panels);
    if (!kStays) prefetch_block(at.first);
    _tile_loadd(6, at.first, 64);
    if (kStays) _tile_stream_loadd(4, upper + block * x.step, x_bytes);
    else _tile_loadd(4, upper + block * x.step, x_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (kTwoPanels) {
      if (!kStays) prefetch_block(at.second);
      _tile_loadd(7, at.second, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (kTwoGroups) {
      if (kStays) _tile_stream_loadd(5, lower + block * x.step, x_bytes);
      else _tile_loadd(5, lower + block * x.step, x_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if (kTwoPanels) _tile_dpbf16ps(3, 5, 7);
    }
    if (kStays) ahead.read_some();
  }
}

template <bool kStays>
inline auto multiply_blocks_of(bool two_groups, bool two_panels) {
  if (two_groups) return two_panels ? multiply_blocks<true, true, kStays> : multiply_blocks<true, false, kStays>;
  return two_panels ? multiply_blocks<false, true, kStays> : multiply_blocks<false, false, kStays>;
}

// What multiplies rows with pairs of panels; panel_vectors.h has the one of processors without tiles.
class Unit {
 public:
  explicit Unit(int64_t rows = kStepRows) { shape(rows); }
  Unit(const Unit&) = delete;
  Unit& operator=(const Unit&) = delete;
  ~Unit() { _tile_release(); }

  // What `add` may read of a step's rows: as many as there are, or all where they are filled up.
  void shape(int64_t rows) {
    if (rows == shaped_) return;
    const int upper = std::min<int64_t>(rows, kPanel);
    shape_tiles(upper, std::max<int>(rows - upper, 1));
    shaped_ = rows;
  }

  // Adds to sums [4][16][16] what `rows` rows come to with panels over blocks [begin, end), to zeros if `fresh`. With
  // `kStays` panels are in the first cache while other rows pass by; else they come from memory.
  template <bool kStays>
  void add(const Rows& x, int64_t row, int64_t rows, int64_t begin, int64_t end, const PanelPair& panels,
           const Ahead& ahead, bool fresh, float* sums) const {
    if (fresh) clear_sums();
    else load_sums(sums);
    multiply_blocks_of<kStays>(rows > kPanel, panels.second)(x, row, begin, end, panels, ahead);
    store_sums(sums);
  }

 private:
  int64_t shaped_ = 0;
};

}  // namespace zoo
#endif
