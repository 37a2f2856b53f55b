// Start blocks from a counter-based generator: kernels/random.py, whose words these are.
#pragma once

#include <cstdint>

namespace sk {

uint64_t draw_key(int64_t seed, int64_t m, int64_t n, int64_t step);

// Standard normals of the draw `key` as (b, ldn) rows of length n: entry (c, j) is number c * n + j of the draw.
template <class T>
void draw_rows(uint64_t key, int64_t b, int64_t n, T* v, int64_t ldn);

}  // namespace sk
