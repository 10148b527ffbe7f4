// Which experts tokens go to, and by which weights; in float32.
#include <algorithm>
#include <limits>
#include <vector>

#include "activation.h"
#include "replay.h"
#include "values.h"

namespace {

using namespace zoo;

struct Routing {
  int64_t experts, top_k;
  bool sigmoid;
  const float* bias;               // of each expert's choice, or null
  int64_t groups, reached;         // groups of neighbouring experts, and how many of them a token reaches
  int64_t best_of_group;           // experts whose scores add up to a group's
  bool renormalize;
  float factor;
};

constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr int64_t kFewTokens = 16;  // no more than a thread does while others wake up

// Not a number counts as the largest, as in torch, so that there is always a choice.
inline bool exceeds(float a, float b) { return a > b || (a != a && b == b); }

// A thread's room for one token.
struct Scratch {
  std::vector<float> scores, choice, of_groups;
  std::vector<char> taken;
  std::vector<int64_t> places;

  explicit Scratch(const Routing& routing)
      : scores(routing.experts), choice(routing.experts), of_groups(routing.groups), taken(routing.experts),
        places(routing.experts) {}
};

// Places of the `count` largest values, the best first and of equal ones the foremost.
void find_one_by_one(const float* values, int64_t size, int64_t count, char* taken, int64_t* places) {
  std::fill_n(taken, size, 0);
  for (int64_t n = 0; n < count; ++n) {
    int64_t best = -1;
    for (int64_t at = 0; at < size; ++at)
      if (!taken[at] && (best < 0 || exceeds(values[at], values[best]))) best = at;
    taken[best] = 1;
    places[n] = best;
  }
}

// As the other, of values that are all numbers and of which `count` are more than negative infinity; whether they are.
bool find_together(const float* values, int64_t size, int64_t count, int64_t* places) {
  constexpr int64_t kMost = 512;
  if (size > kMost) return false;
  const int64_t vectors = (size + kLanes - 1) / kLanes;
  alignas(64) float left[kMost];
  std::fill(std::copy_n(values, size, left), left + vectors * kLanes, kNever);
  Floats spoilt{};
  for (int64_t i = 0; i < vectors; ++i) {
    const Floats value = load<Floats>(left + i * kLanes);
    spoilt += value == value ? Floats{} : splat(1);
  }
  if (sum(spoilt) > 0) return false;
  for (int64_t n = 0; n < count; ++n) {
    Floats most = load<Floats>(left);
    for (int64_t i = 1; i < vectors; ++i) most = larger(most, load<Floats>(left + i * kLanes));
    const float best = largest(most);
    if (best == kNever) return false;
    places[n] = std::find(left, left + size, best) - left;
    left[places[n]] = kNever;
  }
  return true;
}

void find_largest(const float* values, int64_t size, int64_t count, char* taken, int64_t* places) {
  if (!find_together(values, size, count, places)) return find_one_by_one(values, size, count, taken, places);
  std::fill_n(taken, size, 0);
  for (int64_t n = 0; n < count; ++n) taken[places[n]] = 1;
}

void score(const float* logits, const Routing& routing, float* scores) {
  float largest = kNever, total = 0;
  for (int64_t at = 0; at < routing.experts; ++at) largest = std::max(largest, logits[at]);
  for (int64_t first = 0; first < routing.experts; first += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, routing.experts - first);
    float lanes[kLanes] = {};
    std::copy_n(logits + first, count, lanes);
    const Floats values = load<Floats>(lanes);
    store(lanes, routing.sigmoid ? sigmoid(values) : exponential(values - largest));
    std::copy_n(lanes, count, scores + first);
    for (int64_t lane = 0; lane < count; ++lane) total += lanes[lane];
  }
  if (routing.sigmoid) return;
  for (int64_t at = 0; at < routing.experts; ++at) scores[at] /= total;
}

// Takes the experts of groups that the token does not reach out of the choice.
void limit_groups(const Routing& routing, Scratch& scratch) {
  const int64_t size = routing.experts / routing.groups;
  for (int64_t group = 0; group < routing.groups; ++group) {
    const float* values = scratch.choice.data() + group * size;
    find_largest(values, size, routing.best_of_group, scratch.taken.data(), scratch.places.data());
    scratch.of_groups[group] = 0;
    for (int64_t n = 0; n < routing.best_of_group; ++n) scratch.of_groups[group] += values[scratch.places[n]];
  }
  find_largest(scratch.of_groups.data(), routing.groups, routing.reached, scratch.taken.data(), scratch.places.data());
  for (int64_t group = 0; group < routing.groups; ++group)
    if (!scratch.taken[group]) std::fill_n(scratch.choice.data() + group * size, size, kNever);
}

void route(const float* logits, const Routing& routing, Scratch& scratch, float* weights, int64_t* ids) {
  float* scores = scratch.scores.data();
  score(logits, routing, scores);
  for (int64_t at = 0; at < routing.experts; ++at)
    scratch.choice[at] = routing.bias ? scores[at] + routing.bias[at] : scores[at];
  if (routing.reached < routing.groups) limit_groups(routing, scratch);
  find_largest(scratch.choice.data(), routing.experts, routing.top_k, scratch.taken.data(), scratch.places.data());
  float total = 1e-20f;
  for (int64_t n = 0; n < routing.top_k; ++n) {
    ids[n] = scratch.places[n];
    weights[n] = scores[ids[n]];
    total += weights[n];
  }
  for (int64_t n = 0; n < routing.top_k; ++n) {
    if (routing.renormalize) weights[n] /= total;
    weights[n] *= routing.factor;
  }
}

}  // namespace

extern "C" {

// logits: [tokens, experts]; bias: [experts] or null; weights, ids: [tokens, top_k].
void zoo_route_tokens(const float* logits, const float* bias, int64_t tokens, int64_t experts, int64_t top_k,
                      int sigmoid, int64_t groups, int64_t reached, int64_t best_of_group, int renormalize,
                      float factor, float* weights, int64_t* ids, int threads) {
  const Routing routing{experts, top_k, sigmoid != 0, bias, groups, reached, best_of_group, renormalize != 0, factor};
#pragma omp parallel num_threads(threads) if (tokens > kFewTokens)
  {
    Scratch scratch(routing);
#pragma omp for
    for (int64_t token = 0; token < tokens; ++token)
      route(logits + token * experts, routing, scratch, weights + token * top_k, ids + token * top_k);
  }
}
}

ZOO_REPLAYABLE(zoo_route_tokens)
