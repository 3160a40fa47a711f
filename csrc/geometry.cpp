// geometry: distance of the posteriors from the priors and from each other.   Mathematics: reference.geometry
//
//   Lambda = 1/2 sum( mean2^2 + var2 - ((mean2 - mu)^2 + var2) / tau^2 ) - R log tau
//   Delta  = 1/2 sum( mean1^2 + var1 - mean2^2 - var2 )
//   W2^2   = sum( (mean1 - mean2)^2 + (sd1 - sd2)^2 )
//   bound  = W2^2 / 2 + sqrt(sum( mean1^2 + var1 )) W2                                 of |Delta|
#include "posteriors.h"

namespace fvae {
namespace {

using Geometry = std::array<double, 4>;  // Lambda without R log tau; Delta; W2^2; bound of |Delta|

template <typename acc_t>
Geometry tile_geometry(
    const Tile& tile, const Posterior& q1, const Posterior& q2, Prior2<acc_t> p2, const Kept& kept) {
  const int64_t R = q1.mean.size(1);
  const acc_t *mean1 = q1.mean.const_data_ptr<acc_t>(), *mean2 = q2.mean.const_data_ptr<acc_t>();
  const acc_t *var1 = q1.variance.const_data_ptr<acc_t>(), *var2 = q2.variance.const_data_ptr<acc_t>();
  Geometry sums{};
  for (int64_t n = 0; n < tile.length; ++n) {
    if (!kept[tile.start + n]) continue;
    acc_t mismatch = 0, discrepancy = 0, distance = 0, norm1 = 0;
    for (int64_t i = n * R; i < (n + 1) * R; ++i) {
      const acc_t squares1 = mean1[i] * mean1[i] + var1[i], squares2 = mean2[i] * mean2[i] + var2[i];
      const acc_t from_prior2 = mean2[i] - p2.mean, apart = mean1[i] - mean2[i];
      const acc_t wider = std::sqrt(var1[i]) - std::sqrt(var2[i]);
      mismatch += squares2 - (from_prior2 * from_prior2 + var2[i]) * p2.precision;
      discrepancy += squares1 - squares2;
      distance += apart * apart + wider * wider;
      norm1 += squares1;
    }
    sums[0] += 0.5 * mismatch;
    sums[1] += 0.5 * discrepancy;
    sums[2] += distance;
    sums[3] += 0.5 * distance + std::sqrt(norm1) * std::sqrt(distance);
  }
  return sums;
}

}  // namespace

Tensor geometry_fwd(
    const Tensor& mean1,
    const Tensor& logvar1,
    const Tensor& mean2,
    const Tensor& logvar2,
    double prior2_mean,
    double prior2_std,
    const OptionalTensor& mask) {
  const PlainTensors guard;
  const Kept kept(mask, mean1.size(0));
  Geometry mean = token_means<Geometry>(
      {mean1, logvar1, mean2, logvar2}, prior2_mean, prior2_std, kept, [](auto&&... a) { return tile_geometry(a...); });
  mean[0] -= mean_log_scale(mean1, prior2_std, kept);
  Tensor result = at::empty({4}, mean1.options().dtype(at::kDouble));
  std::copy(mean.begin(), mean.end(), result.mutable_data_ptr<double>());
  return result.to(wide(mean1));
}

TORCH_LIBRARY_IMPL(fvae_cpp, CPU, m) {
  m.impl("geometry_fwd", &geometry_fwd);
}

}  // namespace fvae
