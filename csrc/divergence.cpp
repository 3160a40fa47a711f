// divergence: KL(q_1 || p_1) and Gamma = E log p_2(z_2) - E log p_1(z_1), in nats.   Mathematics: reference.divergence
//
//   kl    = 1/2 sum( mean1^2 + var1 - 1 - logvar1 )
//   gamma = 1/2 sum( mean1^2 + var1 - ((mean2 - mu)^2 + var2) / tau^2 ) - R log tau
#include "common.h"

namespace fvae {
namespace {

struct Sums {
  double kl = 0, gamma = 0;
};

template <typename acc_t>
struct Prior2 {
  acc_t mean, precision;
  Prior2(double mean, double std) : mean(mean), precision(1 / (std * std)) {}
};

template <typename scalar_t, typename acc_t>
Sums token_sums(
    const scalar_t* mean1, const scalar_t* logvar1, const scalar_t* mean2, const scalar_t* logvar2, int64_t R,
    Prior2<acc_t> p2) {
  acc_t kl = 0, gamma = 0;
  for (int64_t r = 0; r < R; ++r) {
    const acc_t m1 = mean1[r], v1 = clamp_logvar<acc_t>(logvar1[r]);
    const acc_t m2 = mean2[r] - p2.mean, v2 = clamp_logvar<acc_t>(logvar2[r]);
    const acc_t squares1 = m1 * m1 + std::exp(v1);
    kl += squares1 - 1 - v1;
    gamma += squares1 - (m2 * m2 + std::exp(v2)) * p2.precision;
  }
  return {0.5 * kl, 0.5 * gamma};
}

template <typename scalar_t>
const scalar_t* data(const Tensor& t) {
  return t.const_data_ptr<scalar_t>();
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
  const int64_t N = mean1.size(0), R = mean1.size(1);
  const Tensor m1 = mean1.contiguous(), v1 = logvar1.contiguous(), m2 = mean2.contiguous(), v2 = logvar2.contiguous();
  const Kept kept(mask, N);
  const Tiles tiles(N, 4 * R);
  std::vector<Sums> partial(tiles.count);

  FVAE_DISPATCH(mean1.scalar_type(), "divergence_fwd", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const Prior2<acc_t> p2(prior2_mean, prior2_std);
    tiles.for_each([&](const Tile& tile) {
      Sums tile_sums;
      for (int64_t n = tile.start; n < tile.start + tile.length; ++n) {
        if (!kept[n]) continue;
        const int64_t i = n * R;
        const Sums token = token_sums<scalar_t, acc_t>(
            data<scalar_t>(m1) + i, data<scalar_t>(v1) + i, data<scalar_t>(m2) + i, data<scalar_t>(v2) + i, R, p2);
        tile_sums.kl += token.kl;
        tile_sums.gamma += token.gamma;
      }
      partial[tile.index] = tile_sums;
    });
  });

  Sums mean;
  for (const Sums& sums : partial) {
    mean.kl += sums.kl / kept.count;
    mean.gamma += sums.gamma / kept.count;
  }
  if (kept.count == 0) {
    mean = Sums();
  } else {
    mean.gamma -= R * std::log(prior2_std);
  }
  const auto options = mean1.options().dtype(wide(mean1));
  return {at::full({}, mean.kl, options), at::full({}, mean.gamma, options)};
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
  const Tensor m1 = mean1.contiguous(), v1 = logvar1.contiguous(), m2 = mean2.contiguous(), v2 = logvar2.contiguous();
  const Kept kept(mask, N);
  std::array<Tensor, 4> grads;
  for (size_t i = 0; i < grads.size(); ++i) grads[i] = gradient(needs[i], {N, R}, mean1.options());

  FVAE_DISPATCH(mean1.scalar_type(), "divergence_bwd", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const Prior2<acc_t> p2(prior2_mean, prior2_std);
    const double share = 1.0 / std::max<int64_t>(kept.count, 1);  // of one token in the mean
    const acc_t kl = grad_kl.has_value() ? grad_kl->item<double>() * share : 0;
    const acc_t gamma = grad_gamma.has_value() ? grad_gamma->item<double>() * share : 0;
    const auto fill = [&](int which, const Tensor& input, const auto& derivative) {
      if (!needs[which]) return;
      const scalar_t* from = data<scalar_t>(input);
      scalar_t* to = grads[which].template mutable_data_ptr<scalar_t>();
      Tiles(N, R).for_each([&](const Tile& tile) {
        for (int64_t n = tile.start; n < tile.start + tile.length; ++n) {
          for (int64_t i = n * R; i < (n + 1) * R; ++i) {
            to[i] = kept[n] ? derivative(static_cast<acc_t>(from[i])) : acc_t(0);
          }
        }
      });
    };
    fill(0, m1, [=](acc_t m) { return (kl + gamma) * m; });
    fill(1, v1, [=](acc_t v) { return clamp_passes(v) ? ((kl + gamma) * std::exp(v) - kl) / 2 : acc_t(0); });
    fill(2, m2, [=](acc_t m) { return -gamma * (m - p2.mean) * p2.precision; });
    fill(3, v2, [=](acc_t v) { return clamp_passes(v) ? -gamma * std::exp(v) * p2.precision / 2 : acc_t(0); });
  });
  return {grads[0], grads[1], grads[2], grads[3]};
}

TORCH_LIBRARY_IMPL(fvae_cpp, CPU, m) {
  m.impl("divergence_fwd", &divergence_fwd);
  m.impl("divergence_bwd", &divergence_bwd);
}

}  // namespace fvae
