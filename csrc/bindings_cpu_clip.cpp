// The words of a clipped step for CPU tensors: see bindings_cpu.cpp and kernels/contracts.py.
#include "bindings_cpu.h"
#include "cpu/clipped_step.h"

namespace {

template <class T>
T* changed(const Tensor& t) {
  if (!t.is_contiguous()) throw std::runtime_error("spectral_kernels: V, L, R, info and before must be contiguous");
  return static_cast<T*>(t.mutable_data_ptr());
}

void clip_(std::vector<int64_t> m, std::vector<int64_t> n, Tensor V, Tensor L, Tensor R, Tensor info, Tensor W, Tensor S, Tensor Y,
           Tensor scale, Tensor rank, std::optional<Tensor> limit, Tensor before, Tensor step, int64_t b, int64_t r, int64_t fresh,
           double tol, int64_t seed) {
  if (r > b) throw std::runtime_error("clip_: the correction has at most the rank of the block");
  const int64_t N = int64_t(n.size());
  const Tensor w = torch::stable::contiguous(W), y = torch::stable::contiguous(Y), s = torch::stable::contiguous(S);
  const Tensor ranks = torch::stable::contiguous(rank), steps = torch::stable::contiguous(step);
  const std::vector<double> at = numbers(scale), limits = limit.has_value() ? numbers(*limit) : std::vector<double>(N, 0.0);
  std::vector<int64_t> sizes, rows, columns;
  int64_t left = 0, right = 0;
  for (int64_t i = 0; i < N; ++i) {
    sizes.push_back((m[i] + n[i]) * b * b);
    rows.push_back(left);
    columns.push_back(right);
    left += m[i];
    right += n[i];
  }
  auto call = [&](auto zero) {
    using T = decltype(zero);
    T *v = changed<T>(V), *l = changed<T>(L), *rr = changed<T>(R);
    double *row = changed<double>(info), *missed = changed<double>(before);
    const T *ws = static_cast<const T*>(w.const_data_ptr()), *ys = static_cast<const T*>(y.const_data_ptr());
    const double* ss = static_cast<const double*>(s.const_data_ptr());
    schedule(sizes, [&](int64_t i, bool) {
      sk::clip<T>({m[i], n[i], b, r, fresh, seed, static_cast<const int64_t*>(steps.const_data_ptr())[i],
                   static_cast<const int64_t*>(ranks.const_data_ptr())[i], limit.has_value(), limits[i] * at[i], tol,
                   v + columns[i] * b, l + rows[i] * r, rr + columns[i] * r, ws + columns[i] * b, ys + rows[i] * b,
                   ss + i * b * b, row + i * sk::kInfoColumns, missed + i * 2});
    });
  };
  V.scalar_type() == ScalarType::Double ? call(double()) : call(float());
}

Tensor clipped_step_(std::vector<Tensor> P, std::vector<Tensor> M, std::vector<Tensor> G, Tensor V, Tensor scale, Tensor before,
                     Tensor step, Tensor size, Tensor decay, Tensor rank, std::optional<Tensor> limit, std::optional<Tensor> skip,
                     double beta, double alpha, bool nesterov, bool propagate, int64_t b, int64_t r, int64_t fresh, int64_t reads,
                     double tol, int64_t seed) {
  if (r > b) throw std::runtime_error("clipped_step_: the correction has at most the rank of the block");
  const Ragged list(M, G, true);
  list.check(list.g);
  const auto parameters = matrices(P, true);
  list.check(parameters);
  list.must_fit(V, b, {&scale, &before, &step, &size, &decay, &rank});
  const int64_t N = list.count();
  Tensor info = like(V, {N, sk::kInfoColumns}, ScalarType::Double);
  double *rows = static_cast<double*>(info.mutable_data_ptr()), *missed = changed<double>(before);
  const std::vector<double> at = numbers(scale), sizes = numbers(size), shrink = numbers(decay);
  const std::vector<double> limits = limit.has_value() ? numbers(*limit) : std::vector<double>(N, 0.0);
  const std::vector<char> gone = flags(skip, N);
  const Tensor ranks = torch::stable::contiguous(rank), steps = torch::stable::contiguous(step);
  const int64_t* clipped = static_cast<const int64_t*>(ranks.const_data_ptr());
  const int64_t* when = static_cast<const int64_t*>(steps.const_data_ptr());
  const How how{beta, alpha, nesterov, true, propagate};
  auto call = [&](auto zero) {
    using T = decltype(zero);
    T *v = changed<T>(V), *scales = static_cast<T*>(scale.mutable_data_ptr());
    const int64_t stride = scale.stride(0);
    schedule(list.sizes, [&](int64_t i, bool parallel) {
      sk::ClippedStep<T> task{parameters[i], list.m[i], how.of<T>(list.g[i]), v + list.at[i] * b, at[i], sizes[i], shrink[i],
                              gone[i] != 0, limit.has_value(), limits[i], missed + 2 * i, clipped[i], when[i], b, r, fresh, reads,
                              seed, tol, parallel, rows + i * sk::kInfoColumns};
      scales[i * stride] = T(sk::clipped_step<T>(task));
    }, together_above(list.m.empty() ? 4 : sk::entry_bytes(list.m[0].dtype)));
  };
  V.scalar_type() == ScalarType::Double ? call(double()) : call(float());
  return info;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spectral_kernels, CPU, m) {
  m.impl("clip_", TORCH_BOX(&clip_));
  m.impl("clipped_step_", TORCH_BOX(&clipped_step_));
}
