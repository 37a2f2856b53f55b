// The words of an optimizer's step for CPU tensors: see bindings_cpu.cpp and kernels/contracts.py.
#include "bindings_cpu.h"
#include "cpu/tracked_step.h"

namespace {

bool is_wide(const std::vector<Tensor>& M) { return !M.empty() && M[0].scalar_type() == ScalarType::Double; }

void must_be_contiguous(const char* word, const Tensor& V) {
  if (!V.is_contiguous()) throw std::runtime_error(std::string(word) + ": V must be contiguous");
}

template <class T>
void momentum_gram_matvec_typed(const Ragged& list, const T* v, const std::vector<double>& scale, const std::vector<char>& skip,
                                const How& how, int64_t b, T* w, double* s, double* stats, T* y) {
  const int64_t b4 = multiple_of_4(b);
  std::vector<int64_t> rows;
  for (int64_t total = 0; const sk::Matrix& a : list.m) {
    rows.push_back(total);
    total += a.m;
  }
  schedule(list.sizes, [&](int64_t i, bool parallel) {
    const sk::Matrix& a = list.m[i];
    T *wi = w + list.at[i] * b, *yi = y ? y + rows[i] * b : nullptr;
    double *si = s + i * b * b, *st = stats + i * 4;
    if (skip[i]) {
      std::fill(wi, wi + b * a.n, T(0));
      std::fill(si, si + b * b, 0.0);
      std::fill(st, st + 4, 0.0);
      if (yi) std::fill(yi, yi + b * a.m, T(0));
      return;
    }
    const int64_t ldn = sk::padded(a.n);
    std::vector<T> vp(b4 * ldn, T(0)), wp(b4 * ldn);
    for (int64_t c = 0; c < b; ++c) std::copy_n(v + list.at[i] * b + c * a.n, a.n, vp.data() + c * ldn);
    const sk::Momentum<T> move = how.of<T>(list.g[i]);
    sk::Read<T> read;
    sk::gram_read<T>(a, T(scale[i]), b, b4, ldn, vp.data(), wp.data(), yi, true, parallel, read, &move);
    for (int64_t c = 0; c < b; ++c) {
      std::copy_n(wp.data() + c * ldn, a.n, wi + c * a.n);
      for (int64_t d = 0; d < b; ++d) si[c * b + d] = read.s[c * b4 + d];
    }
    st[0] = read.statistics.frob2;
    st[1] = read.statistics.amax;
    st[2] = read.statistics.nan;
    st[3] = read.statistics.inf;
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> momentum_gram_matvec_(std::vector<Tensor> M, std::vector<Tensor> G, Tensor V,
                                                                 Tensor scale, std::optional<Tensor> skip, double beta,
                                                                 double alpha, bool nesterov, bool update, bool propagate,
                                                                 int64_t b, bool with_y) {
  const Ragged list(M, G, update);
  list.check(list.g);
  list.must_fit(V, b, {&scale});
  const int64_t N = list.count();
  const Tensor v = torch::stable::contiguous(V);
  Tensor W = like(V, {v.numel()}, V.scalar_type()), S = like(V, {N, b, b}, ScalarType::Double);
  int64_t total = 0;
  for (const sk::Matrix& a : list.m) total += a.m;
  Tensor stats = like(V, {N, 4}, ScalarType::Double), Y = like(V, {with_y ? total * b : 0}, V.scalar_type());
  const How how{beta, alpha, nesterov, update, propagate};
  auto call = [&](auto zero) {
    using T = decltype(zero);
    momentum_gram_matvec_typed<T>(list, static_cast<const T*>(v.const_data_ptr()), numbers(scale), flags(skip, N), how, b,
                                  static_cast<T*>(W.mutable_data_ptr()), static_cast<double*>(S.mutable_data_ptr()),
                                  static_cast<double*>(stats.mutable_data_ptr()),
                                  with_y ? static_cast<T*>(Y.mutable_data_ptr()) : nullptr);
  };
  V.scalar_type() == ScalarType::Double ? call(double()) : call(float());
  return {W, S, stats, Y};
}

Tensor momentum_norms_(std::vector<Tensor> M, std::vector<Tensor> G, Tensor scale, std::optional<Tensor> skip, double beta,
                       double alpha, bool nesterov, bool update, bool propagate) {
  const Ragged list(M, G, update);
  list.check(list.g);
  const int64_t N = list.count();
  Tensor norms = like(scale, {N, 5}, ScalarType::Double);
  double* out = static_cast<double*>(norms.mutable_data_ptr());
  const std::vector<double> at = numbers(scale);
  const std::vector<char> gone = flags(skip, N);
  const How how{beta, alpha, nesterov, update, propagate};
  auto call = [&](auto zero) {
    using T = decltype(zero);
    schedule(list.sizes, [&](int64_t i, bool parallel) {
      if (gone[i])
        std::fill(out + i * 5, out + i * 5 + 5, 0.0);
      else
        sk::momentum_norms<T>(list.m[i], T(at[i]), how.of<T>(list.g[i]), parallel, out + i * 5);
    });
  };
  is_wide(M) ? call(double()) : call(float());
  return norms;
}

// numbers [at, at + count) of a flat float or double tensor as T, converted into `wide` where they are not
template <class T>
const T* block_as(const Tensor& flat, int64_t at, int64_t count, std::vector<T>& wide) {
  const bool is_double = flat.scalar_type() == ScalarType::Double;
  if (is_double == (sizeof(T) == 8)) return static_cast<const T*>(flat.const_data_ptr()) + at;
  wide.resize(count);
  for (int64_t i = 0; i < count; ++i)
    wide[i] = is_double ? T(static_cast<const double*>(flat.const_data_ptr())[at + i])
                        : T(static_cast<const float*>(flat.const_data_ptr())[at + i]);
  return wide.data();
}

void apply_update_(std::vector<Tensor> P, std::vector<Tensor> M, std::vector<Tensor> G, Tensor size, Tensor scale, Tensor decay,
                   std::optional<Tensor> skip, double beta, double alpha, std::optional<Tensor> L, std::optional<Tensor> R,
                   int64_t r) {
  const Ragged list(M, G, false);
  const auto parameters = matrices(P, true);
  list.check(parameters);
  const std::vector<double> ratio = numbers(size), at = numbers(scale), shrink = numbers(decay);
  const std::vector<char> gone = flags(skip, list.count());
  if (r > 0 && !(L.has_value() && R.has_value())) throw std::runtime_error("apply_update_: a correction needs L and R");
  std::optional<Tensor> left, right;
  std::vector<int64_t> rows;
  if (r > 0) {
    left = torch::stable::contiguous(*L);
    right = torch::stable::contiguous(*R);
    for (int64_t total = 0; const sk::Matrix& a : list.m) {
      rows.push_back(total);
      total += a.m;
    }
  }
  schedule(list.sizes, [&](int64_t i, bool parallel) {
    if (gone[i]) return;
    const sk::Matrix &p = parameters[i], &m = list.m[i];
    const sk::Matrix g = G.empty() ? sk::Matrix{nullptr, m.dtype, m.m, m.n, m.sm, m.sn} : list.g[i];
    auto call = [&](auto zero) {
      using T = decltype(zero);
      sk::Update<T> u{p, m, g, T(beta), T(alpha), T(ratio[i]), T(at[i]), T(1 - shrink[i])};
      std::vector<T> wide[2];
      if (r > 0) {
        const T* l = block_as(*left, rows[i] * r, m.m * r, wide[0]);
        u.less = {l, block_as(*right, list.at[i] * r, m.n * r, wide[1]), r, m.m, m.n};
      }
      sk::apply_update<T>(u, parallel, false);
    };
    p.dtype == sk::Dtype::f64 || m.dtype == sk::Dtype::f64 ? call(double()) : call(float());
  });
}

template <class T>
void next_block_typed(const std::vector<int64_t>& m, const std::vector<int64_t>& n, const T* q, const double* t, const double* info,
                      T* v, const int64_t* step, int64_t rows, int64_t b, int64_t fresh, int64_t seed, double* upper) {
  std::vector<int64_t> sizes, at;
  int64_t total = 0;
  for (int64_t size : n) {
    sizes.push_back(size * rows * b);
    at.push_back(total);
    total += size;
  }
  schedule(sizes, [&](int64_t i, bool) {
    const int64_t size = n[i], ldn = sk::padded(size);
    const double* row = info + i * sk::kInfoColumns;
    const int64_t order = std::clamp<int64_t>(int64_t(row[sk::kColumns]) + b, 0, rows);
    std::vector<T> basis(order * ldn, T(0));
    for (int64_t r = 0; r < order; ++r) std::copy_n(q + at[i] * rows + r * size, size, basis.data() + r * ldn);
    upper[i] = sk::next_block<T>(
        {m[i], size, ldn, b, fresh, seed, step[i], basis.data(), t + i * rows * rows, rows, row, v + at[i] * b});
  });
}

Tensor next_block_(std::vector<int64_t> m, std::vector<int64_t> n, Tensor Q, Tensor T_, Tensor info, Tensor V, Tensor step,
                   int64_t b, int64_t fresh, int64_t seed) {
  must_be_contiguous("next_block_", V);
  const Tensor q = torch::stable::contiguous(Q), t = torch::stable::contiguous(T_), row = torch::stable::contiguous(info);
  const Tensor at = torch::stable::contiguous(step);
  Tensor upper = like(V, {int64_t(n.size())}, ScalarType::Double);
  auto call = [&](auto zero) {
    using T = decltype(zero);
    next_block_typed<T>(m, n, static_cast<const T*>(q.const_data_ptr()), static_cast<const double*>(t.const_data_ptr()),
                        static_cast<const double*>(row.const_data_ptr()), static_cast<T*>(V.mutable_data_ptr()),
                        static_cast<const int64_t*>(at.const_data_ptr()), T_.size(1), b, fresh, seed,
                        static_cast<double*>(upper.mutable_data_ptr()));
  };
  V.scalar_type() == ScalarType::Double ? call(double()) : call(float());
  return upper;
}

std::tuple<Tensor, Tensor> tracked_step_(std::vector<Tensor> P, std::vector<Tensor> M, std::vector<Tensor> G, Tensor V,
                                         Tensor scale, Tensor step, Tensor size, Tensor decay, std::optional<Tensor> skip,
                                         double beta, double alpha, bool nesterov, bool propagate, bool upper, int64_t b,
                                         int64_t fresh, int64_t reads, double tol, int64_t min_reads, int64_t seed) {
  must_be_contiguous("tracked_step_", V);
  const Ragged list(M, G, true);
  list.check(list.g);
  const auto parameters = matrices(P, true);
  list.check(parameters);
  list.must_fit(V, b, {&scale, &step, &size, &decay});
  const int64_t N = list.count();
  Tensor info = like(V, {N, sk::kInfoColumns}, ScalarType::Double), bound = like(V, {N}, ScalarType::Double);
  double* rows = static_cast<double*>(info.mutable_data_ptr());
  double* bounds = static_cast<double*>(bound.mutable_data_ptr());
  const std::vector<double> at = numbers(scale), sizes = numbers(size), shrink = numbers(decay);
  const std::vector<char> gone = flags(skip, N);
  const Tensor steps = torch::stable::contiguous(step);
  const int64_t* when = static_cast<const int64_t*>(steps.const_data_ptr());
  const How how{beta, alpha, nesterov, true, propagate};
  auto call = [&](auto zero) {
    using T = decltype(zero);
    T* v = static_cast<T*>(V.mutable_data_ptr());
    T* scales = static_cast<T*>(scale.mutable_data_ptr());
    const int64_t stride = scale.stride(0);
    schedule(list.sizes, [&](int64_t i, bool parallel) {
      sk::TrackedStep<T> task{parameters[i], list.m[i], how.of<T>(list.g[i]), v + list.at[i] * b, at[i], sizes[i], shrink[i],
                              gone[i] != 0, upper, when[i], b, fresh, reads, min_reads, seed, tol, parallel,
                              rows + i * sk::kInfoColumns};
      const sk::Tracked done = sk::tracked_step<T>(task);
      scales[i * stride] = T(done.scale);
      bounds[i] = done.bound;
    }, together_above(list.m.empty() ? 4 : sk::entry_bytes(list.m[0].dtype)));
  };
  V.scalar_type() == ScalarType::Double ? call(double()) : call(float());
  return {info, bound};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spectral_kernels, CPU, m) {
  m.impl("momentum_gram_matvec_", TORCH_BOX(&momentum_gram_matvec_));
  m.impl("momentum_norms_", TORCH_BOX(&momentum_norms_));
  m.impl("apply_update_", TORCH_BOX(&apply_update_));
  m.impl("next_block_", TORCH_BOX(&next_block_));
  m.impl("tracked_step_", TORCH_BOX(&tracked_step_));
}
