// The way to w + e and back on the CPU, for p = 2 and T = |w| + eta or 1, in float32: three loops over all tensors.
//
// Nothing here includes torch, so that it compiles in a second: tensors are pointers, each without gaps. The first
// `adaptive` of them have T = |w| + eta, the others T = 1.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <utility>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VECTORIZED __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VECTORIZED
#endif

namespace {

// Call f(i, start, size) for the i-th CHUNK of n elements, from the last on where `backwards`, on so many threads.
template <class F>
void chunks(int64_t n, int threads, bool backwards, F f) {
  const int64_t count = (n + CHUNK - 1) / CHUNK;
  const auto call = [&](int64_t k) {
    const int64_t i = backwards ? count - 1 - k : k;
    f(i, i * CHUNK, std::min<int64_t>(CHUNK, n - i * CHUNK));
  };
  if (count == 1 || threads == 1) {  // without what it takes to ask OpenMP
    for (int64_t k = 0; k < count; ++k) call(k);
    return;
  }
#pragma omp parallel for num_threads(threads)
  for (int64_t k = 0; k < count; ++k) call(k);
}

// Squares of float32 numbers neither underflow nor overflow in float64.
VECTORIZED double adaptive_squares(const float* w, const float* g, int64_t n, float eta) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const float scaled = (std::fabs(w[i]) + eta) * g[i];
    sum += double(scaled) * scaled;
  }
  return sum;
}

VECTORIZED double plain_squares(const float* g, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += double(g[i]) * g[i];
  return sum;
}

VECTORIZED void adaptive_move(float* w, const float* g, float* saved, int64_t n, float eta, float factor, float sign) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float scale = (std::fabs(w[i]) + eta) * factor;
    saved[i] = w[i];
    w[i] += sign * (g[i] * scale) * scale;
  }
}

VECTORIZED void plain_move(float* w, const float* g, float* saved, int64_t n, float factor, float sign) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    saved[i] = w[i];
    w[i] += sign * (g[i] * factor) * factor;
  }
}

int64_t elements(int64_t count, const int64_t* sizes) { return std::accumulate(sizes, sizes + count, int64_t(0)); }

}  // namespace

extern "C" {

// Whether any two tensors share memory.
int overlap(int64_t count, const int64_t* sizes, float* const* w) {
  std::vector<std::pair<const float*, const float*>> spans;
  for (int64_t t = 0; t < count; ++t) spans.emplace_back(w[t], w[t] + sizes[t]);
  std::sort(spans.begin(), spans.end());
  for (int64_t t = 1; t < count; ++t)
    if (spans[t].first < spans[t - 1].second) return 1;
  return 0;
}

// The root of the mean of (T g)^2, at least the smallest normal number, and ||T g||_2 in units of it.
void measure(int64_t count, const int64_t* sizes, float* const* w, const float* const* g, int64_t adaptive, float eta,
             int threads, float* result) {
  double total = 0;
  std::vector<double> parts;
  for (int64_t t = 0; t < count; ++t) {
    parts.assign((sizes[t] + CHUNK - 1) / CHUNK, 0);
    chunks(sizes[t], threads, false, [&](int64_t i, int64_t start, int64_t n) {
      parts[i] = t < adaptive ? adaptive_squares(w[t] + start, g[t] + start, n, eta) : plain_squares(g[t] + start, n);
    });
    for (double part : parts) total += part;  // in this order on any number of threads
  }
  const double mean = std::sqrt(total / elements(count, sizes));
  const double unit = mean < FLT_MIN ? FLT_MIN : mean;  // nan stays nan
  result[0] = float(unit);
  result[1] = float(std::sqrt(total) / unit);
}

// Save every tensor, laid end to end, and move it by sign T (factor^2 g) T. `away` is set before the first moves. From
// the last on, as what `measure` has read last is still in the cache.
void move(int64_t count, const int64_t* sizes, float* const* w, const float* const* g, int64_t adaptive, float eta,
          int threads, float factor, float sign, float* saved, int32_t* away) {
  *away = 1;
  saved += elements(count, sizes);
  for (int64_t t = count - 1; t >= 0; --t) {
    saved -= sizes[t];
    chunks(sizes[t], threads, true, [&](int64_t, int64_t start, int64_t n) {
      if (t < adaptive)
        adaptive_move(w[t] + start, g[t] + start, saved + start, n, eta, factor, sign);
      else
        plain_move(w[t] + start, g[t] + start, saved + start, n, factor, sign);
    });
  }
}

// Copy back what was saved, from the last on.
void put_back(int64_t count, const int64_t* sizes, float* const* w, int threads, const float* saved) {
  saved += elements(count, sizes);
  for (int64_t t = count - 1; t >= 0; --t) {
    saved -= sizes[t];
    chunks(sizes[t], threads, true,
           [&](int64_t, int64_t start, int64_t n) { std::memcpy(w[t] + start, saved + start, n * sizeof(float)); });
  }
}
}
