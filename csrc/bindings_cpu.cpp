// The words of kernels/contracts.py for CPU tensors, through torch's stable ABI. Kernels themselves know nothing of torch.
#include <map>

#include "bindings_cpu.h"

namespace {

template <class T>
void gram_matvec_typed(const std::vector<sk::Matrix>& list, const T* v, const T* scale, const bool* skip, int64_t b,
                       bool with_stats, T* w, double* s, double* stats, T* y) {
  const int64_t b4 = multiple_of_4(b);
  std::vector<int64_t> sizes, at_n, at_m;
  int64_t n = 0, m = 0;
  for (const auto& a : list) {
    sizes.push_back(a.m * a.n);
    at_n.push_back(n);
    at_m.push_back(m);
    n += a.n;
    m += a.m;
  }
  schedule(sizes, [&](int64_t i, bool parallel) {
    const sk::Matrix& a = list[i];
    T* wi = w + at_n[i] * b;
    T* yi = y ? y + at_m[i] * b : nullptr;
    double* si = s + i * b * b;
    double* st = stats + i * 4;
    std::fill(st, st + 4, 0.0);
    if (skip && skip[i]) {
      std::fill(wi, wi + b * a.n, T(0));
      std::fill(si, si + b * b, 0.0);
      if (yi) std::fill(yi, yi + b * a.m, T(0));
      return;
    }
    const int64_t ldn = sk::padded(a.n);
    std::vector<T> vp(b4 * ldn, T(0)), wp(b4 * ldn);
    for (int64_t c = 0; c < b; ++c) std::copy_n(v + at_n[i] * b + c * a.n, a.n, vp.data() + c * ldn);
    sk::Read<T> read;
    sk::gram_read<T>(a, scale[i], b, b4, ldn, vp.data(), wp.data(), yi, with_stats, parallel, read);
    for (int64_t c = 0; c < b; ++c) {
      std::copy_n(wp.data() + c * ldn, a.n, wi + c * a.n);
      for (int64_t d = 0; d < b; ++d) si[c * b + d] = read.s[c * b4 + d];
    }
    if (with_stats) {
      st[0] = read.statistics.frob2;
      st[1] = read.statistics.amax / double(scale[i]);
      st[2] = read.statistics.nan;
      st[3] = std::isinf(read.statistics.amax);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gram_matvec(std::vector<Tensor> A, Tensor V, Tensor scale, std::optional<Tensor> skip,
                                                       int64_t b, bool with_stats, bool with_y) {
  const auto list = matrices(A);
  const int64_t N = int64_t(list.size());
  int64_t m = 0;
  for (const auto& a : list) m += a.m;
  const ScalarType acc = V.scalar_type();
  const Tensor v = torch::stable::contiguous(V), sc = torch::stable::contiguous(scale);
  Tensor W = like(V, {v.numel()}, acc), S = like(V, {N, b, b}, ScalarType::Double), stats = like(V, {N, 4}, ScalarType::Double);
  Tensor Y = like(V, {with_y ? m * b : 0}, acc);
  std::optional<Tensor> sk_skip;
  if (skip.has_value()) sk_skip = torch::stable::contiguous(*skip);
  const bool* mask = sk_skip ? static_cast<const bool*>(sk_skip->const_data_ptr()) : nullptr;
  auto call = [&](auto zero) {
    using T = decltype(zero);
    gram_matvec_typed<T>(list, static_cast<const T*>(v.const_data_ptr()), static_cast<const T*>(sc.const_data_ptr()), mask, b,
                         with_stats, static_cast<T*>(W.mutable_data_ptr()), static_cast<double*>(S.mutable_data_ptr()),
                         static_cast<double*>(stats.mutable_data_ptr()),
                         with_y ? static_cast<T*>(Y.mutable_data_ptr()) : nullptr);
  };
  acc == ScalarType::Double ? call(double()) : call(float());
  return {W, S, stats, Y};
}

template <class T>
void rayleigh_ritz_typed(const std::vector<int64_t>& n, T* q, T* v, double* t, double* info, const T* w, const double* s,
                         const T* scale, int64_t rows, int64_t b, int64_t columns, int64_t rank, double tol, int64_t min_reads) {
  const int64_t b4 = multiple_of_4(b), K = columns + b;
  std::vector<int64_t> sizes, at;
  int64_t total = 0;
  for (int64_t size : n) {
    sizes.push_back(size * K * b);
    at.push_back(total);
    total += size;
  }
  schedule(sizes, [&](int64_t i, bool) {
    double* row = info + i * sk::kInfoColumns;
    if (row[sk::kDone] != 0) return;
    const int64_t size = n[i], ldn = sk::padded(size);
    T* qi = q + at[i] * rows;
    T* vi = v + at[i] * b;
    double* ti = t + i * rows * rows;
    std::vector<T> basis((K + b + 4) * ldn, T(0)), block(b4 * ldn, T(0));
    for (int64_t r = 0; r < K; ++r) std::copy_n(qi + r * size, size, basis.data() + r * ldn);
    for (int64_t c = 0; c < b; ++c) std::copy_n(w + at[i] * b + c * size, size, block.data() + c * ldn);
    for (int64_t c = 0; c < b; ++c)
      for (int64_t d = 0; d < b; ++d)
        ti[(columns + c) * rows + columns + d] = 0.5 * (s[(i * b + c) * b + d] + s[(i * b + d) * b + c]);
    std::vector<int64_t> first(rows, 0);
    for (int64_t r = 0; r < K; ++r)
      while (first[r] < r && ti[r * rows + first[r]] == 0) ++first[r];
    std::vector<double> z;
    row[sk::kScale] = double(scale[i]);
    sk::Step<T> step{size, ldn, b, columns, rank, basis.data(), block.data(), ti, rows, first.data(), &z};
    const bool goes_on = sk::extend(step) && K < size;
    const bool met = sk::assess(step, tol, true, row);
    if (!goes_on || !(row[sk::kTheta] > 0) || (tol > 0 && met && sk::enough_reads(row, b, min_reads))) row[sk::kDone] = 1;
    for (int64_t c = 0; c < b; ++c) {
      std::copy_n(block.data() + c * ldn, size, qi + (K + c) * size);
      std::copy_n(block.data() + c * ldn, size, vi + c * size);
    }
  });
}

void rayleigh_ritz_(std::vector<int64_t> n, Tensor Q, Tensor V, Tensor T_, Tensor info, Tensor W, Tensor S, Tensor scale, int64_t b,
                    int64_t columns, int64_t rank, double tol, int64_t min_reads) {
  for (const Tensor* x : {&Q, &V, &T_, &info})
    if (!x->is_contiguous()) throw std::runtime_error("rayleigh_ritz_: Q, V, T and info must be contiguous");
  const Tensor w = torch::stable::contiguous(W), s = torch::stable::contiguous(S), sc = torch::stable::contiguous(scale);
  auto call = [&](auto zero) {
    using T = decltype(zero);
    rayleigh_ritz_typed<T>(n, static_cast<T*>(Q.mutable_data_ptr()), static_cast<T*>(V.mutable_data_ptr()),
                           static_cast<double*>(T_.mutable_data_ptr()), static_cast<double*>(info.mutable_data_ptr()),
                           static_cast<const T*>(w.const_data_ptr()), static_cast<const double*>(s.const_data_ptr()),
                           static_cast<const T*>(sc.const_data_ptr()), T_.size(1), b, columns, rank, tol, min_reads);
  };
  V.scalar_type() == ScalarType::Double ? call(double()) : call(float());
}

template <class T>
void block_krylov_typed(const std::vector<sk::Matrix>& list, const T* v0, int64_t b, int64_t steps, int64_t cap, int64_t rank,
                        double tol, int64_t min_reads, int64_t seed, int64_t vectors, double* info, T* x, double* t) {
  std::map<std::pair<int64_t, int64_t>, std::vector<T>> starts;  // one per shape: a matrix does not depend on its neighbours
  std::vector<int64_t> sizes, at;
  int64_t total = 0;
  for (const auto& a : list) {
    sizes.push_back(a.m * a.n);
    at.push_back(total);
    total += a.n;
    const bool draws = !v0 && a.m && a.n && !sk::is_dense(a, rank, tol, vectors, t != nullptr);
    if (draws && !starts.count({a.m, a.n})) starts[{a.m, a.n}] = sk::start_block<T>(a.m, a.n, b, seed, 0);
  }
  const int64_t order = steps * b + b;
  schedule(sizes, [&](int64_t i, bool parallel) {
    const sk::Matrix& a = list[i];
    std::vector<T> given;
    const T* start = nullptr;
    if (v0) {
      const int64_t ldn = sk::padded(a.n);
      given.assign(b * ldn, T(0));
      for (int64_t c = 0; c < b; ++c) std::copy_n(v0 + at[i] * b + c * a.n, a.n, given.data() + c * ldn);
      start = given.data();
    } else if (const auto drawn = starts.find({a.m, a.n}); drawn != starts.end()) {
      start = drawn->second.data();
    }
    sk::run_krylov<T>({a, start, b, steps, cap, rank, min_reads, vectors, tol, t != nullptr, parallel, info + i * sk::kInfoColumns,
                       x ? x + at[i] * vectors : nullptr, t ? t + i * order * order : nullptr});
  });
}

std::tuple<Tensor, Tensor, Tensor> block_krylov(std::vector<Tensor> A, std::optional<Tensor> V0, int64_t b, int64_t steps,
                                                int64_t cap, int64_t rank, double tol, int64_t min_reads, int64_t seed,
                                                int64_t vectors, bool with_t) {
  const auto list = matrices(A);
  const int64_t N = int64_t(list.size()), order = steps * b + b;
  int64_t n = 0;
  for (const auto& a : list) n += a.n;
  const ScalarType acc = A[0].scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor info = like(A[0], {N, sk::kInfoColumns}, ScalarType::Double), X = like(A[0], {n * vectors}, acc);
  Tensor T_ = with_t ? like(A[0], {N, order, order}, ScalarType::Double) : like(A[0], {0}, ScalarType::Double);
  if (with_t) torch::stable::zero_(T_);
  std::optional<Tensor> start;
  if (V0.has_value()) start = torch::stable::contiguous(*V0);
  auto call = [&](auto zero) {
    using T = decltype(zero);
    block_krylov_typed<T>(list, start ? static_cast<const T*>(start->const_data_ptr()) : nullptr, b, steps, cap, rank, tol,
                          min_reads, seed, vectors, static_cast<double*>(info.mutable_data_ptr()),
                          vectors ? static_cast<T*>(X.mutable_data_ptr()) : nullptr,
                          with_t ? static_cast<double*>(T_.mutable_data_ptr()) : nullptr);
  };
  acc == ScalarType::Double ? call(double()) : call(float());
  return {info, X, T_};
}

// krylov_norm: sigma_max of (m, n) or (k, m, n), negative where tol was not proved in the read budget
Tensor krylov_norm(Tensor A, int64_t b, int64_t steps, int64_t cap, double tol, int64_t min_reads, int64_t seed) {
  const bool stack = A.dim() == 3;
  const int64_t k = stack ? A.size(0) : 1, last = stack ? 2 : 1;
  const sk::Dtype dtype = dtype_of(A);
  const char* data = static_cast<const char*>(A.const_data_ptr());
  std::vector<sk::Matrix> list;
  list.reserve(k);
  for (int64_t i = 0; i < k; ++i)
    list.push_back(sk::oriented({data + (stack ? i * A.stride(0) * sk::entry_bytes(dtype) : 0), dtype, A.size(last - 1),
                                 A.size(last), A.stride(last - 1), A.stride(last)}));
  const bool wide = dtype == sk::Dtype::f64;
  std::vector<int64_t> shape;
  if (stack) shape.push_back(k);
  Tensor out = like(A, shape, wide ? ScalarType::Double : ScalarType::Float);
  std::vector<double> info(k * sk::kInfoColumns);
  auto call = [&](auto zero) {
    using T = decltype(zero);
    block_krylov_typed<T>(list, nullptr, b, steps, cap, 1, tol, min_reads, seed, 0, info.data(), nullptr, nullptr);
    T* value = static_cast<T*>(out.mutable_data_ptr());
    for (int64_t i = 0; i < k; ++i) {
      const double* row = info.data() + i * sk::kInfoColumns;
      value[i] = T(row[sk::kDone] != 0 ? row[sk::kSigma] : -row[sk::kSigma]);
    }
  };
  wide ? call(double()) : call(float());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spectral_kernels, CPU, m) {
  sk::set_parallel_for([](int64_t begin, int64_t end, int64_t grain, const std::function<void(int64_t, int64_t)>& f) {
    torch::stable::parallel_for(begin, end, grain, f);
  });
  m.impl("gram_matvec", TORCH_BOX(&gram_matvec));
  m.impl("rayleigh_ritz_", TORCH_BOX(&rayleigh_ritz_));
  m.impl("block_krylov", TORCH_BOX(&block_krylov));
  m.impl("krylov_norm", TORCH_BOX(&krylov_norm));
}
