#include "dense_norm.h"

#include <algorithm>

#include "small_eig.h"

#define SK_KERNEL "dense_norm.inc"
#include "foreach_isa.h"

namespace sk {

SK_DISPATCH(dense_norm_f32, DenseNorm<float>)
SK_DISPATCH(dense_norm_f64, DenseNorm<double>)

}  // namespace sk
