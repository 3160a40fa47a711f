// divergence: KL(q_1 || p_1) and Gamma = E log p_2(z_2) - E log p_1(z_1), in nats.   Mathematics: reference.divergence
//
//   kl    = 1/2 sum( mean1^2 + var1 - 1 - logvar1 )
//   gamma = 1/2 sum( mean1^2 + var1 - ((mean2 - mu)^2 + var2) / tau^2 ) - R log tau
#include "posteriors.h"

namespace fvae {
namespace {

using Divergence = std::array<double, 2>;  // KL, and Gamma without R log tau

template <typename acc_t>
Divergence tile_divergence(const Tile& tile, const Posterior& q1, const Posterior& q2, Prior2<acc_t> p2, const Kept& kept) {
  const int64_t R = q1.mean.size(1);
  const acc_t *mean1 = q1.mean.const_data_ptr<acc_t>(), *mean2 = q2.mean.const_data_ptr<acc_t>();
  const acc_t *var1 = q1.variance.const_data_ptr<acc_t>(), *var2 = q2.variance.const_data_ptr<acc_t>();
  const acc_t* logvar1 = q1.logvar.const_data_ptr<acc_t>();
  Divergence sums{};
  for (int64_t n = 0; n < tile.length; ++n) {
    if (!kept[tile.start + n]) continue;
    acc_t kl = 0, gamma = 0;
    for (int64_t i = n * R; i < (n + 1) * R; ++i) {
      const acc_t squares1 = mean1[i] * mean1[i] + var1[i], from_prior2 = mean2[i] - p2.mean;
      kl += squares1 - 1 - logvar1[i];
      gamma += squares1 - (from_prior2 * from_prior2 + var2[i]) * p2.precision;
    }
    sums[0] += 0.5 * kl;
    sums[1] += 0.5 * gamma;
  }
  return sums;
}

}  // namespace

std::tuple<Tensor, Tensor> divergence_fwd(
    const Tensor& mean1,
    const Tensor& logvar1,
    const Tensor& mean2,
    const Tensor& logvar2,
    double prior2_mean,
    double prior2_std,
    const OptionalTensor& mask) {
  const PlainTensors guard;
  const Kept kept(mask, mean1.size(0));
  Divergence mean = token_means<Divergence>(
      {mean1, logvar1, mean2, logvar2}, prior2_mean, prior2_std, kept, [](auto&&... a) { return tile_divergence(a...); });
  mean[1] -= mean_log_scale(mean1, prior2_std, kept);
  const auto options = mean1.options().dtype(wide(mean1));
  return {at::full({}, mean[0], options), at::full({}, mean[1], options)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> divergence_bwd(
    const OptionalTensor& grad_kl,
    const OptionalTensor& grad_gamma,
    const Tensor& mean1,
    const Tensor& logvar1,
    const Tensor& mean2,
    const Tensor& logvar2,
    double prior2_mean,
    double prior2_std,
    const OptionalTensor& mask,
    Needs needs) {
  const PlainTensors guard;
  const int64_t N = mean1.size(0), R = mean1.size(1);
  const Kept kept(mask, N);
  std::array<Tensor, 4> grads;
  for (size_t i = 0; i < grads.size(); ++i) grads[i] = gradient(needs[i], {N, R}, mean1.options());

  FVAE_DISPATCH(mean1.scalar_type(), "divergence_bwd", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const Prior2<acc_t> p2(prior2_mean, prior2_std);
    const double share = 1.0 / std::max<int64_t>(kept.count, 1);  // of one token
    const acc_t kl = grad_kl.has_value() ? grad_kl->item<double>() * share : 0;
    const acc_t gamma = grad_gamma.has_value() ? grad_gamma->item<double>() * share : 0;
    const auto fill = [&](int which, const Tensor& input, bool is_logvar, const auto& derivative) {
      if (!needs[which]) return;
      scalar_t* to = grads[which].template mutable_data_ptr<scalar_t>();
      Tiles(N, 2 * R).for_each([&](const Tile& tile) {
        const Tensor rows = tile.rows(input, wide(input)), variances = is_logvar ? clamped_exp(rows) : rows;
        const acc_t *from = rows.template const_data_ptr<acc_t>(), *var = variances.template const_data_ptr<acc_t>();
        for (int64_t n = 0, i = 0, out = tile.start * R; n < tile.length; ++n) {
          for (int64_t r = 0; r < R; ++r, ++i, ++out) {
            const bool counts = kept[tile.start + n] && (!is_logvar || clamp_passes(from[i]));
            to[out] = counts ? derivative(is_logvar ? var[i] : from[i]) : acc_t(0);
          }
        }
      });
    };
    fill(0, mean1, false, [=](acc_t mean) { return (kl + gamma) * mean; });
    fill(1, logvar1, true, [=](acc_t var) { return ((kl + gamma) * var - kl) / 2; });
    fill(2, mean2, false, [=](acc_t mean) { return -gamma * (mean - p2.mean) * p2.precision; });
    fill(3, logvar2, true, [=](acc_t var) { return -gamma * var * p2.precision / 2; });
  });
  return {grads[0], grads[1], grads[2], grads[3]};
}

TORCH_LIBRARY_IMPL(fvae_cpp, CPU, m) {
  m.impl("divergence_fwd", &divergence_fwd);
  m.impl("divergence_bwd", &divergence_bwd);
}

}  // namespace fvae
