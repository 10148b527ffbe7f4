// A matrix unit in plain C++, so that what is written for one is tested on any processor. It is as strict as the real one:
// tiles that are not shaped, or whose shapes do not fit each other, end the process.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace emulated {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

struct Shapes {
  uint8_t palette, start, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

struct Unit {
  Shapes shapes;
  bool shaped = false;
  uint8_t tiles[kTiles][kRows][kRowBytes];

  int rows(int tile) const { return shapes.rows[tile]; }
  int words(int tile) const { return shapes.bytes[tile] / 4; }

  void require(bool condition) const {
    if (!condition) __builtin_trap();
  }

  void require_shaped(int tile) const {
    require(shaped && rows(tile) >= 1 && rows(tile) <= kRows && words(tile) >= 1 && shapes.bytes[tile] <= kRowBytes);
  }

  void configure(const void* from) {
    std::memcpy(&shapes, from, sizeof shapes);
    std::memset(tiles, 0, sizeof tiles);
    shaped = true;
  }

  void zero(int tile) {
    require_shaped(tile);
    std::memset(tiles[tile], 0, sizeof tiles[tile]);
  }

  void load(int tile, const void* from, int64_t stride) {
    zero(tile);
    for (int row = 0; row < rows(tile); ++row)
      std::memcpy(tiles[tile][row], static_cast<const char*>(from) + row * stride, shapes.bytes[tile]);
  }

  void store(int tile, void* to, int64_t stride) const {
    require_shaped(tile);
    for (int row = 0; row < rows(tile); ++row)
      std::memcpy(static_cast<char*>(to) + row * stride, tiles[tile][row], shapes.bytes[tile]);
  }

  // Calls `add` with every sum's place and each word of both operands that it is made of.
  template <typename Sum, typename Add>
  void multiply(int sums, int left, int right, const Add& add) {
    for (int tile : {sums, left, right}) require_shaped(tile);
    require(rows(sums) == rows(left) && words(sums) == words(right) && words(left) == rows(right));
    for (int row = 0; row < rows(sums); ++row)
      for (int word = 0; word < words(left); ++word)
        for (int column = 0; column < words(sums); ++column)
          add(reinterpret_cast<Sum*>(tiles[sums][row])[column], tiles[left][row] + 4 * word,
              tiles[right][word] + 4 * column);
  }
};

inline thread_local Unit unit;

inline float widen(const uint8_t* from) {
  const uint32_t bits = static_cast<uint32_t>(from[0] | from[1] << 8) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void multiply_bf16(int sums, int left, int right) {
  unit.multiply<float>(sums, left, right, [](float& sum, const uint8_t* x, const uint8_t* w) {
    sum += widen(x) * widen(w);
    sum += widen(x + 2) * widen(w + 2);
  });
}

inline void multiply_signed_unsigned(int sums, int left, int right) {
  unit.multiply<int32_t>(sums, left, right, [](int32_t& sum, const uint8_t* x, const uint8_t* w) {
    for (int i = 0; i < 4; ++i) sum += static_cast<int8_t>(x[i]) * static_cast<int32_t>(w[i]);
  });
}

}  // namespace emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbsud
#define _tile_loadconfig(from) emulated::unit.configure(from)
#define _tile_release() (emulated::unit.shaped = false)
#define _tile_zero(tile) emulated::unit.zero(tile)
#define _tile_loadd(tile, from, stride) emulated::unit.load(tile, from, stride)
#define _tile_stream_loadd(tile, from, stride) emulated::unit.load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated::unit.store(tile, to, stride)
#define _tile_dpbf16ps(sums, left, right) emulated::multiply_bf16(sums, left, right)
#define _tile_dpbsud(sums, left, right) emulated::multiply_signed_unsigned(sums, left, right)
