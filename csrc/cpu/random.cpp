#include "random.h"

#include <algorithm>
#include <cmath>

namespace sk {

namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;

uint64_t mix(uint64_t z) {  // splitmix64's finalizer
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

}  // namespace

uint64_t draw_key(int64_t seed, int64_t m, int64_t n, int64_t step) {
  uint64_t z = mix(uint64_t(seed) * kGolden + 1);
  z = mix(z ^ uint64_t(std::max(m, n)));
  z = mix(z + uint64_t(std::min(m, n)) * kGolden);
  return mix(z + uint64_t(step));
}

template <class T>
void draw_rows(uint64_t key, int64_t b, int64_t n, T* v, int64_t ldn) {
  for (int64_t pair = 0; 2 * pair < b * n; ++pair) {
    const uint64_t z = mix(uint64_t(pair) * kGolden + key);
    const T u = (T(z >> 32) + T(0.5)) * T(0x1p-32), angle = (T(z & 0xffffffffu) + T(0.5)) * T(6.283185307179586 * 0x1p-32);
    const T radius = std::sqrt(T(-2) * std::log(std::min(u, T(1))));
    const T value[2] = {radius * std::cos(angle), radius * std::sin(angle)};
    for (int64_t i = 0; i < 2 && 2 * pair + i < b * n; ++i) {
      const int64_t index = 2 * pair + i;
      v[index / n * ldn + index % n] = value[i];
    }
  }
}

template void draw_rows<float>(uint64_t, int64_t, int64_t, float*, int64_t);
template void draw_rows<double>(uint64_t, int64_t, int64_t, double*, int64_t);

}  // namespace sk
