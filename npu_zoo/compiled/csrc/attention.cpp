// Attention of a step's rows over a cache of keys and values in strips, or of latents.
#include <cmath>
#include <vector>

#include "attend.h"
#include "latent_tiles.h"
#include "replay.h"

namespace {

using namespace zoo;

template <typename X>
struct Job {
  Shape shape;
  const Item* items;
  int64_t num_items;
  const int64_t *tables, *members;
  char *keys, *values;
  View<const X> query, query_rope, key, value;
  X* out;
  float* lse;
  float scale;

  int64_t token_of(const Item& item, int64_t i) const { return item.shared ? members[item.first + i] : item.first + i; }
  int64_t rows_of(const Item& item) const { return item.tokens * shape.group(); }

  // Whether a row's keys and values are written by the task that reads them: no other reads a block that is not full.
  bool writes_late(const Item& item) const {
    return query.values && item.tokens == 1 && item.keys % shape.block_size && shape.group() <= kTaskRows;
  }
};

// How items are cut into tasks, and where the parts of a result wait for each other: [part][head][row][width + 2].
// Threads take tasks in runs.
struct Plan {
  std::vector<Task> tasks;
  std::vector<int64_t> parts, places;
  int64_t room = 0, run = 1;

  // What a thread does after a task, as far as is known.
  const Task* after(int64_t number) const {
    const bool known = (number + 1) % run && number + 1 < static_cast<int64_t>(tasks.size());
    return known ? &tasks[number + 1] : nullptr;
  }
};

constexpr int64_t kLeastPart = 128;      // tokens
constexpr int64_t kTasksOfThread = 4;
constexpr int64_t kRunsOfThread = 8;     // that tasks are handed out in, if they are many

template <typename X>
void make_plan(const Job<X>& job, int64_t width, int threads, Plan& plan) {
  plan.tasks.clear();
  plan.parts.assign(job.num_items, 1);
  plan.places.assign(job.num_items, -1);
  plan.room = 0;
  int64_t cost = 0;
  for (int64_t i = 0; i < job.num_items; ++i)
    cost += job.items[i].keys * ceil_div(job.rows_of(job.items[i]), kTileRows) * job.shape.kv_heads;
  const int64_t share = std::max<int64_t>(1, threads > 1 ? ceil_div(cost, threads * kTasksOfThread) : cost);
  for (int64_t i = 0; i < job.num_items; ++i) {
    const Item& item = job.items[i];
    const int64_t rows = job.rows_of(item);
    if (!rows) continue;  // room for a prefix that no rows share in this step
    const int64_t tiles = ceil_div(std::min<int64_t>(rows, kTaskRows), kTileRows);
    const int64_t most = std::max<int64_t>(1, item.keys / kLeastPart);
    const int64_t parts = std::min(most, ceil_div(item.keys * tiles, share));
    const int64_t tokens = round_up(ceil_div(item.keys, parts), kStrip);
    plan.parts[i] = ceil_div(item.keys, tokens);
    if (plan.parts[i] > 1 || item.shared || item.prefix >= 0) {
      plan.places[i] = plan.room;
      plan.room += plan.parts[i] * job.shape.kv_heads * rows * (width + 2);
    }
    // Later rows of a prompt have more to see: they go first, so that no thread is left with a long one at the end. Where
    // every thread has several of each head, heads follow each other, for their keys and values then stay in its caches.
    const int64_t heads = job.shape.kv_heads, of_head = ceil_div(rows, kTaskRows);
    const bool by_head = of_head >= 2 * threads;
    for (int64_t number = 0; number < heads * of_head; ++number) {
      const int64_t head = by_head ? number / of_head : number % heads;
      const int64_t first = (of_head - 1 - (by_head ? number % of_head : number / heads)) * kTaskRows;
      for (int64_t part = 0; part < plan.parts[i]; ++part)
        plan.tasks.push_back({i, head, first, std::min<int64_t>(kTaskRows, rows - first), part * tokens,
                              std::min(item.keys, (part + 1) * tokens), part});
    }
  }
  plan.run = std::max<int64_t>(1, plan.tasks.size() / (threads * kRunsOfThread));
}

inline void put_operands(const bf16* from, int64_t width, bf16* to) { std::copy_n(from, width, to); }
inline void put_operands(const float* from, int64_t width, float* to) { std::copy_n(from, width, to); }
inline void put_operands(const bf16* from, int64_t width, float* to) {
  for (int64_t i = 0; i < width; ++i) to[i] = widen(from[i]);
}

template <typename X, class Kind>
void load_queries(const Job<X>& job, const Task& task, Widths w, Buffers<Kind>& b) {
  const Item& item = job.items[task.item];
  const int64_t group = job.shape.group();
  for (int64_t row = 0; row < task.rows; ++row) {
    const int64_t i = (task.first_row + row) / group, head = task.head * group + (task.first_row + row) % group;
    const int64_t token = job.token_of(item, i);
    auto* to = b.queries + row * w.key;
    put_operands(job.query.at(token, head), job.shape.key, to);
    if (job.shape.rope) put_operands(job.query_rope.at(token, head), job.shape.rope, to + job.shape.key);
    std::fill(to + job.shape.key_width(), to + w.key, typename Kind::Operand{});
    b.limits[row] = item.whole ? item.keys : item.keys - item.tokens + i + 1;
  }
  const int64_t filled = filled_rows<Kind>(task.rows);
  std::fill(b.queries + task.rows * w.key, b.queries + filled * w.key, typename Kind::Operand{});
}

template <typename X>
void put_result(const Job<X>& job, int64_t token, int64_t head, const float* sums, float largest, float total) {
  X* to = job.out + (token * job.shape.heads + head) * job.shape.value;
  const float inverse = 1.0f / total;
  for (int64_t i = 0; i < job.shape.value; i += kLanes)
    store_floats(to + i, load<Floats>(sums + i) * inverse, job.shape.value - i);
  if (job.lse) job.lse[token * job.shape.heads + head] = largest + std::log(total);
}

template <typename X, class Kind, class Source>
void run_task(const Job<X>& job, const Plan& plan, const Task& task, float* parts, Widths w, const Source& source) {
  static thread_local Workspace workspace;
  Buffers<Kind> b(workspace, w, Source::kPacks);
  const Item& item = job.items[task.item];
  const int64_t group = job.shape.group(), rows = job.rows_of(item);
  load_queries(job, task, w, b);
  attend(source, b, task.rows, task.begin, task.end, job.scale, w);
  for (int64_t row = 0; row < task.rows; ++row) {
    const int64_t at = task.first_row + row;
    const float* sums = b.sums + row * w.value;
    if (plan.places[task.item] < 0) {
      put_result(job, job.token_of(item, at / group), task.head * group + at % group, sums, b.state[row].largest,
                 b.state[row].total);
      continue;
    }
    float* to = parts + plan.places[task.item] +
                ((task.part * job.shape.kv_heads + task.head) * rows + at) * (w.value + 2);
    std::copy_n(sums, w.value, to);
    to[w.value] = b.state[row].largest;
    to[w.value + 1] = b.state[row].total;
  }
}

// Puts the parts of one query's result together, those of a prefix that it shares among them.
template <typename X>
void merge(const Job<X>& job, const Plan& plan, const float* parts, int64_t number, int64_t row, int64_t head, Widths w,
           float* sums) {
  const Item& item = job.items[number];
  const int64_t group = job.shape.group(), step = w.value + 2;
  float largest = -__builtin_inff(), total = 0;
  std::fill_n(sums, w.value, 0.0f);
  auto add = [&](int64_t from, int64_t at) {
    for (int64_t part = 0; part < plan.parts[from]; ++part) {
      const int64_t rows = job.rows_of(job.items[from]);
      const float* found = parts + plan.places[from] + ((part * job.shape.kv_heads + head) * rows + at) * step;
      const float found_total = found[w.value + 1];
      if (!(found_total > 0) && found_total == found_total) continue;
      const float most = std::max(largest, found[w.value]);
      const float old = std::exp(largest - most), fresh = std::exp(found[w.value] - most);
      for (int64_t i = 0; i < w.value; i += kLanes)
        store(sums + i, load<Floats>(sums + i) * old + load<Floats>(found + i) * fresh);
      total = total * old + found_total * fresh;
      largest = most;
    }
  };
  add(number, row);
  if (item.prefix >= 0) add(item.prefix, item.prefix_row * group + row);
  put_result(job, job.token_of(item, row / group), head * group + row % group, sums, largest, total);
}

template <typename X, class Kind, typename Write, typename Run>
void run(const Job<X>& job, Widths w, int threads, const Write& write, const Run& run_one) {
  static thread_local Plan plan;
  static thread_local Workspace workspace;
  make_plan(job, w.value, threads, plan);
  if (!job.query.values) plan.tasks.clear(), plan.room = 0;
  const Plan& made = plan;
  float* parts = made.room ? workspace.take<float>(made.room) : nullptr;
  const int64_t heads = job.shape.kv_heads, tasks = made.tasks.size();
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    if (job.key.values) {
#pragma omp for schedule(static)
      for (int64_t head = 0; head < heads; ++head) write(head);
    }
#pragma omp for schedule(dynamic, made.run)
    for (int64_t task = 0; task < tasks; ++task) run_one(made, task, parts);
    if (parts) {
      std::vector<float> sums(w.value);
#pragma omp for schedule(static)
      for (int64_t head = 0; head < heads; ++head)
        for (int64_t i = 0; i < job.num_items; ++i)
          if (!job.items[i].shared && made.places[i] >= 0)
            for (int64_t row = 0; row < job.rows_of(job.items[i]); ++row)
              merge(job, made, parts, i, row, head, w, sums.data());
    }
  }
}

template <typename X, class Kind>
Strips<Kind> strips_of(const Job<X>& job, const Item& item, int64_t head, Widths w) {
  return {job.keys, job.values, job.tables + item.table, head, job.shape.kv_heads, job.shape.block_size, w};
}

// Where a task begins to read, if there is one.
template <typename X, class Kind>
const char* first_strip(const Job<X>& job, const Task* task, Widths w) {
  return task ? strips_of<X, Kind>(job, job.items[task->item], task->head, w).key_at(task->begin) : nullptr;
}

template <typename X, class Kind>
void attend_heads(const Job<X>& job, int threads) {
  const Widths w = Kind::widths(job.shape.key_width(), job.shape.value);
  auto write = [&](int64_t head) {
    for (int64_t i = 0; i < job.num_items; ++i)
      if (!job.items[i].shared && !job.writes_late(job.items[i]))
        write_item(job.items[i], job.shape, strips_of<X, Kind>(job, job.items[i], head, w), job.key, job.value);
  };
  run<X, Kind>(job, w, threads, write, [&](const Plan& plan, int64_t number, float* parts) {
    const Task& task = plan.tasks[number];
    const Item& item = job.items[task.item];
    const auto strips = strips_of<X, Kind>(job, item, task.head, w);
    if (job.key.values && !item.shared && job.writes_late(item) && task.end == item.keys)
      write_item(item, job.shape, strips, job.key, job.value);
    if constexpr (sizeof(typename Kind::Stored) == 1 && sizeof(X) == 2) {
      if (task.rows >= kFewRows) {
        const Widths pairs = Pairs::widths(job.shape.key, job.shape.value);
        if (pairs.value == w.value) return run_task<X, Pairs>(job, plan, task, parts, pairs, Restored{strips, pairs});
      }
    }
    run_task<X, Kind>(job, plan, task, parts, w, InPlace<Kind>{strips, first_strip<X, Kind>(job, plan.after(number), w)});
  });
}

template <typename X, class Kind>
void attend_latents(const Job<X>& job, int threads) {
  const Shape& shape = job.shape;
  const Widths w = Kind::widths(shape.key_width(), shape.value);
  X* pool = reinterpret_cast<X*>(job.keys);
  auto latents = [&](const Item& item) {
    return Latents<X>{pool, job.tables + item.table, shape.value, shape.key_width(), shape.block_size, w};
  };
  auto write = [&](int64_t) {
    for (int64_t i = 0; i < job.num_items; ++i) {
      const Item& item = job.items[i];
      if (item.shared) continue;
      const Latents<X> into = latents(item);
      for (int64_t token = 0; token < item.tokens; ++token) {
        const int64_t at = item.keys - item.tokens + token;
        X* to = const_cast<X*>(into.at(at));
        // As strips of keys are, and for their reason.
        if (at % kStrip == 0 && item.tokens - token < kStrip && into.lies_together(at))
          std::fill_n(to, kStrip * into.width, X{});
        std::copy_n(job.key.at(item.first + token, 0), shape.key, to);
        std::copy_n(job.value.at(item.first + token, 0), shape.rope, to + shape.key);
      }
    }
  };
  run<X, Kind>(job, w, threads, write, [&](const Plan& plan, int64_t number, float* parts) {
    const Task& task = plan.tasks[number];
    Latents<X> source = latents(job.items[task.item]), after;
    if constexpr (kByStrips<Kind>) {
      if (const Task* next = plan.after(number)) {
        after = latents(job.items[next->item]);
        source.next = &after, source.next_begin = next->begin, source.next_end = next->end;
      }
      if (task.rows >= kFewRows) return run_task<X, RowPairs>(job, plan, task, parts, w, source);
    }
    run_task<X, Kind>(job, plan, task, parts, w, source);
  });
}

}  // namespace

extern "C" {

// Bytes of 32 tokens' keys (or with `values` their values) of one head.
int64_t zoo_strip_bytes(int64_t kind, int64_t width, int values) {
  auto bytes = [&](auto layout) {
    using Kind = decltype(layout);
    const Widths w = Kind::widths(width, width);
    return values ? Kind::value_bytes(w) : Kind::key_bytes(w);
  };
  if (kind == kBf16) return bytes(Pairs{});
  return kind == kFloat32 ? bytes(Plain<float>{}) : bytes(Plain<int8_t>{});
}

// Writes a step's keys and values where `key` is given, then attends where `query` is.
//
// query, key, value: addresses, strides of tokens and of heads; of latents, the second query is rotated and the value
// is the rotated key. out: [tokens][heads][value]; lse: [tokens][heads] or nothing.
void zoo_attend(const Shape* shape, const Item* items, int64_t num_items, const int64_t* tables, const int64_t* members,
                char* keys, char* values, const void* query, int64_t query_token, int64_t query_head, const void* rope,
                int64_t rope_token, int64_t rope_head, const void* key, int64_t key_token, int64_t key_head,
                const void* value, int64_t value_token, int64_t value_head, void* out, float* lse, float scale,
                int threads) {
  auto job = [&](auto zero) {
    using X = decltype(zero);
    auto view = [](const void* at, int64_t token, int64_t head) {
      return View<const X>{static_cast<const X*>(at), token, head};
    };
    return Job<X>{*shape, items, num_items, tables, members, keys, values, view(query, query_token, query_head),
                  view(rope, rope_token, rope_head), view(key, key_token, key_head),
                  view(value, value_token, value_head), static_cast<X*>(out), lse, scale};
  };
  switch (shape->kind) {
    case kBf16: return attend_heads<bf16, Pairs>(job(bf16{}), threads);
    case kFloat32: return attend_heads<float, Plain<float>>(job(float{}), threads);
    case kInt8OfBf16: return attend_heads<bf16, Plain<int8_t>>(job(bf16{}), threads);
    case kInt8OfFloat32: return attend_heads<float, Plain<int8_t>>(job(float{}), threads);
    case kLatentBf16: return attend_latents<bf16, Pairs>(job(bf16{}), threads);
    case kLatentFloat32: return attend_latents<float, Plain<float>>(job(float{}), threads);
  }
}
}

ZOO_REPLAYABLE(zoo_attend)
