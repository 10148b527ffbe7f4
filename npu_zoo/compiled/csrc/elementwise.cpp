// Norms, rotations and activations: float32 inside, rounded where the reference rounds.
#include <algorithm>
#include <cmath>
#include <vector>

#include "exponential.h"
#include "replay.h"
#include "values.h"

namespace {

using namespace zoo;

constexpr int64_t kForkedValues = 1 << 15;  // fewer take less time than a second thread's start

int forked(int64_t values, int threads) { return values < kForkedValues ? 1 : threads; }

// Rounds to what a T holds.
template <typename T>
inline Floats rounded(Floats value) {
  T lanes[kLanes];
  store_floats(lanes, value);
  return load_floats(lanes);
}
template <>
inline Floats rounded<float>(Floats value) {
  return value;
}

// A thread's way to rows of results. Those that no cache keeps until they are read are put together in a row of its own
// and go past the caches: else their memory would be fetched only to be overwritten.
template <typename T>
class ResultRows {
 public:
  ResultRows(T* values, int64_t rows, int64_t width) : values_(values), width_(width) {
    const int64_t bytes = width * sizeof(T);
    const bool by_lines = bytes % 64 == 0 && reinterpret_cast<uintptr_t>(values) % 64 == 0;
    if (by_lines && outgrows_caches(rows * bytes)) row_.resize(width);
  }
  ~ResultRows() { settle_stores(); }

  bool past_caches() const { return !row_.empty(); }
  T* begin(int64_t row) { return row_.empty() ? values_ + row * width_ : row_.data(); }

  void end(int64_t row) const {
    if (!row_.empty()) copy_lines(values_ + row * width_, row_.data(), width_ * sizeof(T));
  }

 private:
  T* values_;
  int64_t width_;
  std::vector<T> row_;
};

template <typename T>
void norm_row(const T* x, const T* weight, int64_t width, float eps, T* out) {
  Floats squares{};
  for (int64_t i = 0; i < width; i += kLanes) {
    const Floats value = load_floats(x + i, width - i);
    squares += value * value;
  }
  const float inverse = 1.0f / std::sqrt(sum(squares) / static_cast<float>(width) + eps);
  for (int64_t i = 0; i < width; i += kLanes) {
    const Floats value = rounded<T>(load_floats(x + i, width - i) * inverse);
    store_floats(out + i, value * load_floats(weight + i, width - i), width - i);
  }
}

template <typename T>
void norm(const T* x, int64_t stride, const T* weight, int64_t rows, int64_t width, float eps, T* out, int threads) {
#pragma omp parallel num_threads(forked(rows * width, threads))
  {
    ResultRows<T> results(out, rows, width);
#pragma omp for
    for (int64_t row = 0; row < rows; ++row) {
      norm_row(x + row * stride, weight, width, eps, results.begin(row));
      results.end(row);
    }
  }
}

template <typename T>
void add_norm(const T* x, const T* residual, const T* weight, int64_t rows, int64_t width, float eps, T* out, T* total,
              int threads) {
#pragma omp parallel num_threads(forked(rows * width, threads))
  {
    ResultRows<T> results(out, rows, width), totals(total, rows, width);
#pragma omp for
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t at = row * width;
      T* sums = totals.begin(row);
      for (int64_t i = 0; i < width; i += kLanes) {
        const int64_t left = width - i;
        store_floats(sums + i, load_floats(x + at + i, left) + load_floats(residual + at + i, left), left);
      }
      norm_row(sums, weight, width, eps, results.begin(row));
      results.end(row);
      totals.end(row);
    }
  }
}

template <typename T>
void silu_and_mul(const T* x, int64_t rows, int64_t width, T* out, int threads) {
#pragma omp parallel for num_threads(forked(rows * width, threads))
  for (int64_t row = 0; row < rows; ++row) {
    const T *gate = x + row * 2 * width, *up = gate + width;
    for (int64_t i = 0; i < width; i += kLanes) {
      const Floats value = load_floats(gate + i, width - i);
      const Floats activated = value / (1.0f + exponential(-value));
      store_floats(out + row * width + i, rounded<T>(activated) * load_floats(up + i, width - i), width - i);
    }
  }
}

// Heads [rows][heads][2 * half] of any strides, first half against second half.
template <typename T>
struct Heads {
  const T* values;
  int64_t row, head, count;
  T* out;
};

template <typename T>
void turn(const T* first, const T* second, const T* cos, const T* sin, int64_t half, T* out) {
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t left = half - i;
    const Floats a = load_floats(first + i, left), b = load_floats(second + i, left);
    const Floats c = load_floats(cos + i, left), s = load_floats(sin + i, left);
    store_floats(out + i, a * c - b * s, left);
    store_floats(out + half + i, b * c + a * s, left);
  }
}

// A row of heads that is soon read; those of long steps lie too far apart for the processor to see it by itself.
template <typename T>
void fetch_heads(const Heads<T>& heads, int64_t row, int64_t width) {
  for (int64_t head = 0; head < heads.count; ++head)
    for (int64_t at = 0; at < width; at += 64 / static_cast<int64_t>(sizeof(T)))
      prefetch_far(heads.values + row * heads.row + head * heads.head + at);
}

template <typename T>
void rotate(const Heads<T>* parts, int64_t rows, const T* cos, const T* sin, int64_t half, int threads) {
  constexpr int64_t kAhead = 2;
#pragma omp parallel num_threads(forked(rows * (parts[0].count + parts[1].count) * half * 2, threads))
  {
    ResultRows<T> queries(parts[0].out, rows, parts[0].count * 2 * half);
    ResultRows<T> keys(parts[1].out, rows, parts[1].count * 2 * half);
#pragma omp for
    for (int64_t row = 0; row < rows; ++row) {
      for (int part = 0; part < 2; ++part) {
        const Heads<T>& heads = parts[part];
        ResultRows<T>& results = part ? keys : queries;
        if (results.past_caches() && row + kAhead < rows) fetch_heads(heads, row + kAhead, 2 * half);
        T* to = results.begin(row);
        for (int64_t head = 0; head < heads.count; ++head, to += 2 * half) {
          const T* from = heads.values + row * heads.row + head * heads.head;
          turn(from, from + half, cos + row * half, sin + row * half, half, to);
        }
        results.end(row);
      }
    }
  }
}

template <typename T>
void rotate_interleaved(const Heads<T>& heads, int64_t rows, const T* cos, const T* sin, int64_t half, int threads) {
#pragma omp parallel for num_threads(forked(rows * heads.count * half * 2, threads))
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t head = 0; head < heads.count; ++head) {
      const T* from = heads.values + row * heads.row + head * heads.head;
      T* to = heads.out + (row * heads.count + head) * 2 * half;
      for (int64_t i = 0; i < half; i += kLanes) {
        const int64_t count = std::min<int64_t>(kLanes, half - i);
        T first[kLanes] = {}, second[kLanes] = {}, turned[2 * kLanes];
        for (int64_t lane = 0; lane < count; ++lane) {
          first[lane] = from[2 * (i + lane)];
          second[lane] = from[2 * (i + lane) + 1];
        }
        const Floats a = load_floats(first), b = load_floats(second);
        const Floats c = load_floats(cos + row * half + i, count), s = load_floats(sin + row * half + i, count);
        store_floats(turned, a * c - b * s);
        store_floats(turned + kLanes, b * c + a * s);
        std::copy_n(turned, count, to + i);
        std::copy_n(turned + kLanes, count, to + half + i);
      }
    }
  }
}

}  // namespace

// One function of the ABI for each of the dtypes; tensors are contiguous but for what has strides, counted in values.
#define ZOO_ELEMENTWISE(T, NAME)                                                                                       \
  void zoo_rms_norm_##NAME(const T* x, int64_t stride, const T* weight, int64_t rows, int64_t width, float eps,        \
                           T* out, int threads) {                                                                      \
    norm(x, stride, weight, rows, width, eps, out, threads);                                                           \
  }                                                                                                                    \
  void zoo_add_rms_norm_##NAME(const T* x, const T* residual, const T* weight, int64_t rows, int64_t width, float eps, \
                               T* out, T* total, int threads) {                                                        \
    add_norm(x, residual, weight, rows, width, eps, out, total, threads);                                              \
  }                                                                                                                    \
  void zoo_silu_and_mul_##NAME(const T* x, int64_t rows, int64_t width, T* out, int threads) {                         \
    silu_and_mul(x, rows, width, out, threads);                                                                        \
  }                                                                                                                    \
  void zoo_rotary_##NAME(const T* query, int64_t query_row, int64_t query_head, int64_t query_heads, const T* key,     \
                         int64_t key_row, int64_t key_head, int64_t key_heads, const T* cos, const T* sin,             \
                         int64_t rows, int64_t half, T* query_out, T* key_out, int threads) {                          \
    const Heads<T> parts[] = {{query, query_row, query_head, query_heads, query_out},                                  \
                              {key, key_row, key_head, key_heads, key_out}};                                           \
    rotate(parts, rows, cos, sin, half, threads);                                                                      \
  }                                                                                                                    \
  void zoo_interleaved_rotary_##NAME(const T* x, int64_t row, int64_t head, int64_t heads, const T* cos, const T* sin, \
                                     int64_t rows, int64_t half, T* out, int threads) {                                \
    rotate_interleaved(Heads<T>{x, row, head, heads, out}, rows, cos, sin, half, threads);                             \
  }

extern "C" {
ZOO_ELEMENTWISE(uint16_t, bfloat16)
ZOO_ELEMENTWISE(float, float32)
}

ZOO_REPLAYABLE(zoo_rms_norm_bfloat16)
ZOO_REPLAYABLE(zoo_add_rms_norm_bfloat16)
ZOO_REPLAYABLE(zoo_silu_and_mul_bfloat16)
ZOO_REPLAYABLE(zoo_rotary_bfloat16)
ZOO_REPLAYABLE(zoo_interleaved_rotary_bfloat16)
ZOO_REPLAYABLE(zoo_rms_norm_float32)
ZOO_REPLAYABLE(zoo_add_rms_norm_float32)
ZOO_REPLAYABLE(zoo_silu_and_mul_float32)
ZOO_REPLAYABLE(zoo_rotary_float32)
ZOO_REPLAYABLE(zoo_interleaved_rotary_float32)
