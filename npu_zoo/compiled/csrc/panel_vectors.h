// Products of up to 32 rows with pairs of panels in vectors: the sums of some rows wait in registers while blocks pass by.
#pragma once

#include "panel_parts.h"

#if !defined(ZOO_TILES)
namespace zoo {

constexpr int kGroupRows = 8;    // rows whose sums with two panels stay in registers, with room for what is added
constexpr int kBlockLines = 16;  // of the cache

// Rows of inputs, and where their sums go: those with the second panel lie `second` behind those with the first.
struct RowGroup {
  const bf16* inputs;
  int64_t step, stride;  // values between blocks, between rows
  float* sums;
  int64_t sums_stride, second;

  RowGroup from(int64_t row) const {
    return {inputs + row * stride, step, stride, sums + row * sums_stride, sums_stride, second};
  }
};

// Blocks of a pair of panels that are in the caches, while others are fetched, if they are given.
struct NearPanels {
  static constexpr bool kFromMemory = false;
  PanelPair panels;
  Ahead ahead;

  PanelPair at(int64_t block) {
    ahead.read_some();
    return panels.from(block);
  }

  // The same for one of several groups of rows, which fetch about as much each.
  NearPanels of_group(int64_t group, int64_t groups, int64_t blocks) const {
    const int64_t lines = ceil_div(ahead.lines, groups), passed = group * blocks * lines;
    return {panels, ahead.after(passed, lines)};
  }
};

// Blocks that come from memory, `blocks` of them until `next` follows.
template <bool kTwoPanels>
struct ComingPanels {
  static constexpr bool kFromMemory = true;
  PanelPair panels, next;
  int64_t blocks;

  PanelPair at(int64_t block) const {
    const PanelPair found = panels.from(block);
    touch_page<kTwoPanels>(found, blocks - block, next);
    return found;
  }
};

// Adds to the sums of kRows rows, or to zeros if `fresh`, their products with `blocks` blocks of one or two panels.
template <int kRows, bool kTwoPanels, typename Panels>
inline void add_group(const RowGroup& group, int64_t blocks, Panels panels, bool fresh) {
  constexpr int kPanels = kTwoPanels ? 2 : 1;
  Floats sums[kRows][kPanels];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p)
      sums[row][p] = fresh ? Floats{} : load<Floats>(group.sums + row * group.sums_stride + p * group.second);
  for (int64_t block = 0; block < blocks; ++block) {
    const PanelPair at = panels.at(block);
    const bf16* weights[] = {at.first, at.second};
    const bf16* inputs = group.inputs + block * group.step;
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) prefetch(inputs + group.step + row * group.stride);
#pragma GCC unroll 1  // the sums of one pair keep the processor busy
    for (int pair = 0; pair < kBlock / 2; ++pair) {
#pragma GCC unroll 2
      for (int p = 0; Panels::kFromMemory && p < kPanels; ++p)
        prefetch(reinterpret_cast<const char*>(weights[p] + pair * 2 * kPanel) + 2 * kPrefetch);
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 2
        for (int p = 0; p < kPanels; ++p)
          sums[row][p] = add_pairs(sums[row][p], weights[p] + pair * 2 * kPanel, inputs + row * group.stride + 2 * pair);
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) store(group.sums + row * group.sums_stride + p * group.second, sums[row][p]);
}

template <bool kTwoPanels, typename Panels>
inline void add_rows(const RowGroup& group, int64_t rows, int64_t blocks, const Panels& panels, bool fresh) {
  switch (rows) {
    case 1: return add_group<1, kTwoPanels>(group, blocks, panels, fresh);
    case 2: return add_group<2, kTwoPanels>(group, blocks, panels, fresh);
    case 3: return add_group<3, kTwoPanels>(group, blocks, panels, fresh);
    case 4: return add_group<4, kTwoPanels>(group, blocks, panels, fresh);
    case 5: return add_group<5, kTwoPanels>(group, blocks, panels, fresh);
    case 6: return add_group<6, kTwoPanels>(group, blocks, panels, fresh);
    case 7: return add_group<7, kTwoPanels>(group, blocks, panels, fresh);
    default: return add_group<kGroupRows, kTwoPanels>(group, blocks, panels, fresh);
  }
}

// As `add_rows`, of any number of rows: groups of about the same size, each with panels of its own by its number from `first`.
template <bool kTwoPanels, typename PanelsOf>
inline void add_groups(
    const RowGroup& all, int64_t rows, int64_t blocks, const PanelsOf& panels_of, bool fresh, int64_t first = 0) {
  const int64_t groups = ceil_div(rows, kGroupRows);
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t begin = rows * group / groups, end = rows * (group + 1) / groups;
    add_rows<kTwoPanels>(all.from(begin), end - begin, blocks, panels_of(first + group), fresh);
  }
}

// What multiplies rows with pairs of panels; panel_tiles.h has the one of processors with a matrix unit.
class Unit {
 public:
  explicit Unit(int64_t = kStepRows) {}
  void shape(int64_t) {}

  // Adds to sums [4][16][16] what `rows` rows come to with panels over blocks [begin, end), to zeros if `fresh`. With
  // `kStays` panels are in the first cache while other rows pass by; else they come from memory.
  template <bool kStays>
  void add(const Rows& x, int64_t row, int64_t rows, int64_t begin, int64_t end, const PanelPair& panels,
           const Ahead& ahead, bool fresh, float* sums) const {
    const Step step{x, row, rows, begin, end, fresh, sums};
    if (panels.second) add_step<true, kStays>(step, panels, ahead);
    else add_step<false, kStays>(step, panels, ahead);
  }

 private:
  // Blocks [begin, end) of some rows, and their sums.
  struct Step {
    const Rows& x;
    int64_t row, rows, begin, end;
    bool fresh;
    float* sums;

    int64_t blocks() const { return end - begin; }
    RowGroup half(int64_t first) const {
      return {x.at(row + first) + begin * x.step, x.step, x.stride, sums + first / kPanel * 2 * kTileValues, kLanes,
              kTileValues};
    }
  };

  template <bool kTwoPanels, bool kStays>
  static void add_step(Step step, const PanelPair& panels, const Ahead& ahead) {
    if (kStays) return add_near<kTwoPanels>(step, {panels.from(step.begin), ahead});
    const PanelPair next = ahead.panels;
    if (step.rows <= kGroupRows) {
      const ComingPanels<kTwoPanels> coming{panels.from(step.begin), next, step.blocks()};
      return add_rows<kTwoPanels>(step.half(0), step.rows, step.blocks(), coming, step.fresh);
    }
    const int64_t end = step.end;
    for (step.end = step.begin; step.end < end; step.begin = step.end, step.fresh = false) {
      step.end = std::min(end, step.begin + kNearBlocks);
      const PanelPair following = step.end < end ? panels.from(step.end) : next;
      add_near<kTwoPanels>(step, {panels.from(step.begin), {following, kBlockLines}});
    }
  }

  template <bool kTwoPanels>
  static void add_near(const Step& step, const NearPanels& panels) {
    const int64_t groups = ceil_div(std::min<int64_t>(step.rows, kPanel), kGroupRows);
    const int64_t more = ceil_div(std::max<int64_t>(step.rows - kPanel, 0), kGroupRows);
    auto panels_of = [&](int64_t group) { return panels.of_group(group, groups + more, step.blocks()); };
    add_groups<kTwoPanels>(step.half(0), std::min<int64_t>(step.rows, kPanel), step.blocks(), panels_of, step.fresh);
    if (more) add_groups<kTwoPanels>(step.half(kPanel), step.rows - kPanel, step.blocks(), panels_of, step.fresh, groups);
  }
};

}  // namespace zoo
#endif
