#include "orthogonal.h"

#include "gram_matvec.h"

#define SK_KERNEL "orthogonal.inc"
#include "foreach_isa.h"

namespace sk {

SK_DISPATCH(row_norm_f32, RowNorm<float>)
SK_DISPATCH(row_norm_f64, RowNorm<double>)
SK_DISPATCH(project_f32, Project<float>)
SK_DISPATCH(project_f64, Project<double>)
SK_DISPATCH(block_qr_f32, BlockQr<float>)
SK_DISPATCH(block_qr_f64, BlockQr<double>)
SK_DISPATCH(combine_f32, Combine<float>)
SK_DISPATCH(combine_f64, Combine<double>)
SK_DISPATCH(block_gram_f32, BlockGram<float>)
SK_DISPATCH(block_gram_f64, BlockGram<double>)

}  // namespace sk
