// The way to w + e and back on the CPU, for p = 2 and T = |w| + eta or 1, in float32: three loops over all tensors.
// Of torch, all that is included is how a tensor lies in memory, so that this compiles in two seconds. Tensors have
// T = |w| + eta where `adaptive`, else T = 1.

#include <c10/core/TensorImpl.h>
#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VECTORIZED __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VECTORIZED
#endif
using Tensor = c10::TensorImpl;
using Tensors = Tensor* const*;

namespace {
// Call f(start, size) for every CHUNK of n elements, from the last on where `backwards`, on so many threads.
template <class F>
void chunks(int64_t n, int threads, bool backwards, F f) {
  const int64_t count = (n + CHUNK - 1) / CHUNK;
  const auto call = [&](int64_t k) {
    const int64_t start = CHUNK * (backwards ? count - 1 - k : k);
    f(start, std::min<int64_t>(CHUNK, n - start));
  };
  if (count == 1 || threads == 1)  // without what it takes to ask OpenMP
    for (int64_t k = 0; k < count; ++k) call(k);
  else
#pragma omp parallel for num_threads(threads)
    for (int64_t k = 0; k < count; ++k) call(k);
}

// Squares of float32 numbers neither underflow nor overflow in float64.
VECTORIZED double squares(const float* w, const float* g, int64_t n, bool adaptive, float eta) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const float scaled = adaptive ? (std::fabs(w[i]) + eta) * g[i] : g[i];
    sum += double(scaled) * scaled;
  }
  return sum;
}

VECTORIZED void save_and_move(float* w, const float* g, float* saved, int64_t n, bool adaptive, float eta, float factor,
                              float sign) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float scale = adaptive ? (std::fabs(w[i]) + eta) * factor : factor;
    saved[i] = w[i];
    w[i] += sign * (g[i] * scale) * scale;
  }
}

float* memory(Tensor* tensor) { return static_cast<float*>(tensor->mutable_data()); }

// Where a tensor lies, how many dimensions it has, its shape and its strides.
using Place = std::array<int64_t, 2 + 2 * DIMENSIONS>;
Place place(Tensor* tensor) {
  Place result{reinterpret_cast<int64_t>(memory(tensor)), tensor->dim()};
  std::copy_n(tensor->sizes().data(), tensor->dim(), &result[2]);
  std::copy_n(tensor->strides().data(), tensor->dim(), &result[2 + DIMENSIONS]);
  return result;
}

// Whether a tensor is nothing but memory of float32, filled without a gap.
bool is_plain(Tensor* tensor) {
  try {
    return tensor->storage().data() && tensor->is_cpu() && tensor->dtype() == caffe2::TypeMeta::Make<float>() &&
           tensor->is_non_overlapping_and_dense() && !tensor->key_set().has(c10::DispatchKey::Negative) &&
           !tensor->is_inference() && tensor->dim() <= DIMENSIONS && place(tensor)[0];
  } catch (const std::exception&) {  // some of that may not be asked for
    return false;
  }
}
}  // namespace

extern "C" {
// Which pairs of a tensor and its gradient, of those that might, can go this way: both are plain, in the same order.
void fit(int64_t count, Tensors w, Tensors g, int8_t* fits) {
  for (int64_t t = 0; t < count; ++t)
    fits[t] = fits[t] && is_plain(w[t]) && is_plain(g[t]) && w[t]->sizes() == g[t]->sizes() &&
              (w[t]->strides() == g[t]->strides() || (w[t]->is_contiguous() && g[t]->is_contiguous()));
}

// Note where all lie, and return how many elements they have; 0 where what is moved is in the memory of another.
int64_t note(int64_t count, Tensors w, Tensors g, Place* places) {
  int64_t elements = 0;
  std::vector<std::tuple<float*, float*, bool>> spans;
  for (int64_t t = 0; t < count; ++t) {
    places[t] = place(w[t]);
    spans.emplace_back(memory(w[t]), memory(w[t]) + w[t]->numel(), true);
    spans.emplace_back(memory(g[t]), memory(g[t]) + g[t]->numel(), false);
    elements += w[t]->numel();
  }
  std::sort(spans.begin(), spans.end());
  float *end = nullptr, *moves_until = nullptr;  // of all that is before, and of what moves of that
  for (const auto& [from, to, moves] : spans) {
    if (from < (moves ? end : moves_until)) return 0;
    end = std::max(end, to);
    if (moves) moves_until = end;
  }
  return elements;
}

// The sum of (T g)^2.
double measure(int64_t count, Tensors w, Tensors g, const int8_t* adaptive, float eta, int threads) {
  double total = 0;
  std::vector<double> parts;
  for (int64_t t = 0; t < count; ++t) {
    parts.assign((w[t]->numel() + CHUNK - 1) / CHUNK, 0);
    chunks(w[t]->numel(), threads, false, [&](int64_t start, int64_t n) {
      parts[start / CHUNK] = squares(memory(w[t]) + start, memory(g[t]) + start, n, adaptive[t], eta);
    });
    for (double part : parts) total += part;  // in this order on any number of threads
  }
  return total;
}

// Save every tensor, laid end to end before `end`, and move it by sign T (factor^2 g) T. `away` is set before the first
// moves. From the last on, as what `measure` has read last is still in the cache.
void move(int64_t count, Tensors w, Tensors g, const int8_t* adaptive, float eta, int threads, float factor,
          float sign, float* end, int8_t* away) {
  *away = 1;
  for (int64_t t = count - 1; t >= 0; --t) {
    end -= w[t]->numel();
    chunks(w[t]->numel(), threads, true, [&](int64_t start, int64_t n) {
      save_and_move(memory(w[t]) + start, memory(g[t]) + start, end + start, n, adaptive[t], eta, factor, sign);
    });
    w[t]->bump_version();
  }
}

// Copy back what was saved, from the last on; 0, and nothing is copied, where any tensor lies elsewhere by now.
int put_back(int64_t count, Tensors w, const Place* places, int threads, const float* end) {
  for (int64_t t = 0; t < count; ++t)
    if (!is_plain(w[t]) || place(w[t]) != places[t]) return 0;
  for (int64_t t = count - 1; t >= 0; --t) {
    end -= w[t]->numel();
    const auto copy = [&](int64_t start, int64_t n) { std::copy_n(end + start, n, memory(w[t]) + start); };
    chunks(w[t]->numel(), threads, true, copy);
    w[t]->bump_version();
  }
  return 1;
}
}
