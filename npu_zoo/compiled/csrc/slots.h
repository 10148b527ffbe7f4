// Which tokens go to which experts: slots, a token's place with one of its experts, sorted by expert.
#pragma once

#include <algorithm>
#include <vector>

#include "workspace.h"

namespace zoo {

// An expert's slots; of the shared experts, `expert` is the number of routed ones.
struct Slots {
  int64_t expert, rows, first;
};

class SlotTable {
 public:
  // ids, scales: [tokens, top_k]. Tokens of an expert keep their order; experts of other ranks, whose ids are too large,
  // are left out. With `shared` every token goes to the shared experts too, with weight one.
  void sort(const int64_t* ids, const float* scales, int64_t tokens, int64_t top_k, int64_t experts, bool shared) {
    const int64_t room = tokens * (top_k + (shared ? 1 : 0));
    tokens_ = token_memory_.take<int64_t>(room), scales_ = scale_memory_.take<float>(room);
    next_.assign(experts, 0);
    for (int64_t at = 0; at < tokens * top_k; ++at)
      if (ids[at] < experts) ++next_[ids[at]];
    groups_.clear(), size_ = 0;
    for (int64_t expert = 0; expert < experts; ++expert) next_[expert] = add(expert, next_[expert]);
    for (int64_t at = 0; at < tokens * top_k; ++at)
      if (ids[at] < experts) put(next_[ids[at]]++, at / top_k, scales[at]);
    if (!shared) return;
    const int64_t first = add(experts, tokens);
    for (int64_t token = 0; token < tokens; ++token) put(first + token, token, 1.0f);
  }

  const std::vector<Slots>& groups() const { return groups_; }
  int64_t size() const { return size_; }
  const int64_t* tokens() const { return tokens_; }
  const float* scales() const { return scales_; }

  // Each token's slots, `most` places a token, of which those that it does not need hold -1.
  const int64_t* by_token(int64_t tokens, int64_t most) {
    int64_t* places = place_memory_.take<int64_t>(tokens * most);
    std::fill_n(places, tokens * most, -1);
    next_.assign(tokens, 0);
    for (int64_t slot = 0; slot < size_; ++slot) places[tokens_[slot] * most + next_[tokens_[slot]]++] = slot;
    return places;
  }

 private:
  int64_t add(int64_t expert, int64_t rows) {
    const int64_t first = size_;
    if (rows) groups_.push_back({expert, rows, first});
    size_ += rows;
    return first;
  }

  void put(int64_t slot, int64_t token, float scale) { tokens_[slot] = token, scales_[slot] = scale; }

  Workspace token_memory_, scale_memory_, place_memory_;
  std::vector<Slots> groups_;
  std::vector<int64_t> next_;
  int64_t size_ = 0, *tokens_ = nullptr;
  float* scales_ = nullptr;
};

}  // namespace zoo
