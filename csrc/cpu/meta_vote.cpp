#include "mvp/ops.h"
namespace mvp::MVP_ISA {
void meta_vote_cpu(const TensorView&, const TensorView&, const TensorView&, const std::vector<int64_t>&,
                   const std::vector<int64_t>&, std::optional<double>, int64_t, const TensorView&, const TensorView&,
                   const TensorView&, int) {}
}
