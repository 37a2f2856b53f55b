// What the words' bindings share: ragged lists as the kernels see them, and who works on which matrix.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/krylov.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline sk::Dtype dtype_of(const Tensor& a) {
  switch (a.scalar_type()) {
    case ScalarType::Float: return sk::Dtype::f32;
    case ScalarType::Double: return sk::Dtype::f64;
    case ScalarType::BFloat16: return sk::Dtype::bf16;
    case ScalarType::Half: return sk::Dtype::f16;
    default: throw std::runtime_error("spectral_kernels: float32, float64, bfloat16 or float16 matrices are served");
  }
}

// every matrix of a ragged list, in order; written: it will be changed in place
inline std::vector<sk::Matrix> matrices(const std::vector<Tensor>& A, bool written = false) {
  std::vector<sk::Matrix> out;
  for (const Tensor& a : A) {
    if (a.dim() != 3) throw std::runtime_error("spectral_kernels: a ragged list holds stacks (k, m, n)");
    const sk::Dtype dtype = dtype_of(a);
    const char* data = static_cast<const char*>(written ? a.mutable_data_ptr() : a.const_data_ptr());
    for (int64_t i = 0; i < a.size(0); ++i)
      out.push_back({data + i * a.stride(0) * sk::entry_bytes(dtype), dtype, a.size(1), a.size(2), a.stride(1), a.stride(2)});
  }
  return out;
}

inline Tensor like(const Tensor& t, std::vector<int64_t> shape, ScalarType dtype) {
  return torch::stable::empty(shape, dtype, std::nullopt, t.device());
}

// a small float or double tensor
inline std::vector<double> numbers(const Tensor& t) {
  const Tensor c = torch::stable::contiguous(t);
  std::vector<double> out(c.numel());
  for (int64_t i = 0; i < int64_t(out.size()); ++i)
    out[i] = c.scalar_type() == ScalarType::Double ? static_cast<const double*>(c.const_data_ptr())[i]
                                                   : double(static_cast<const float*>(c.const_data_ptr())[i]);
  return out;
}

inline int64_t multiple_of_4(int64_t b) { return (b + 3) / 4 * 4; }

// Runs work(i, parallel) for every task: tasks larger than a fair share one by one with all threads inside, the others
// dealt out, largest first; above `most` a task is never dealt out. Which thread does what never shows in the results.
template <class F>
void schedule(const std::vector<int64_t>& sizes, const F& work, int64_t most = std::numeric_limits<int64_t>::max()) {
  const int64_t count = int64_t(sizes.size()), threads = torch::stable::get_num_threads();
  int64_t total = 0;
  for (int64_t s : sizes) total += s;
  std::vector<int64_t> order(count);
  for (int64_t i = 0; i < count; ++i) order[i] = i;
  if (threads > 1)
    std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return sizes[x] > sizes[y]; });
  int64_t done = 0;
  constexpr int64_t kWorthThreads = 1 << 15;
  while (done < count && threads > 1 && sizes[order[done]] >= kWorthThreads &&
         (sizes[order[done]] > most || sizes[order[done]] * threads > total)) {
    total -= sizes[order[done]];
    work(order[done++], true);
  }
  if (threads == 1 || total < kWorthThreads || count - done < 2) {
    for (; done < count; ++done) work(order[done], false);
    return;
  }
  std::atomic<int64_t> next{done};
  sk::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) work(order[i], false);
  });
}

// A ragged list M and what goes with it: sizes, and where the blocks of every matrix start in flat tensors.
struct Ragged {
  std::vector<sk::Matrix> m, g;
  std::vector<int64_t> sizes, at;
  int64_t n = 0;

  Ragged(const std::vector<Tensor>& M, const std::vector<Tensor>& G, bool written) : m(matrices(M, written)), g(matrices(G)) {
    if (!G.empty()) check(g);
    for (const auto& a : m) {
      sizes.push_back(a.m * a.n);
      at.push_back(n);
      n += a.n;
    }
  }
  void check(const std::vector<sk::Matrix>& other) const {
    bool same = other.size() == m.size();
    for (size_t i = 0; same && i < m.size(); ++i) same = other[i].m == m[i].m && other[i].n == m[i].n;
    if (!same) throw std::runtime_error("spectral_kernels: the lists hold different shapes");
  }
  // Blocks (b, n) of all matrices, and numbers that there is one of per matrix
  void must_fit(const Tensor& V, int64_t b, std::initializer_list<const Tensor*> each) const {
    if (V.numel() != b * n)
      throw std::runtime_error("spectral_kernels: V holds " + std::to_string(V.numel()) + " numbers, blocks of " +
                               std::to_string(b) + " columns have " + std::to_string(b * n));
    for (const Tensor* x : each)
      if (x->size(0) != count())
        throw std::runtime_error("spectral_kernels: " + std::to_string(x->size(0)) + " numbers for " + std::to_string(count()) +
                                 " matrices");
  }
  int64_t count() const { return int64_t(m.size()); }
};

inline std::vector<char> flags(const std::optional<Tensor>& skip, int64_t count) {
  std::vector<char> out(count, 0);
  if (!skip.has_value()) return out;
  const Tensor c = torch::stable::contiguous(*skip);
  std::copy_n(static_cast<const bool*>(c.const_data_ptr()), count, out.begin());
  return out;
}

struct How {
  double beta, alpha;
  bool nesterov, update, propagate;
  template <class T>
  sk::Momentum<T> of(const sk::Matrix& g) const {
    return {g, T(beta), T(alpha), nesterov, update, propagate};
  }
};

// Entries of a matrix above which all threads work on it together: dealt out, as many as there are threads would push each
// other's momentum out of the last-level cache before it is applied.
inline int64_t together_above(int64_t entry) {
  constexpr int64_t kCache = int64_t(32) << 20;  // what systems report of it is often the whole host's
  return kCache / (entry * torch::stable::get_num_threads());
}
