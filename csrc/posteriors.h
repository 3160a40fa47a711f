// Shared by divergence and geometry: a posterior on a tile, and means over tokens.
#pragma once

#include "common.h"

namespace fvae {

template <typename acc_t>
struct Prior2 {
  acc_t mean, precision;
  Prior2(double mean, double std) : mean(mean), precision(1 / (std * std)) {}
};

// The rows of a posterior in a tile, in the accumulation type.
struct Posterior {
  Tensor mean, logvar, variance;
  Posterior(const Tile& tile, const Tensor& mean, const Tensor& logvar)
      : mean(tile.rows(mean, wide(mean))),
        logvar(tile.rows(logvar, wide(logvar)).clamp(-kLogvarLimit, kLogvarLimit)),
        variance(this->logvar.exp()) {}
};

// Means over the kept tokens, 0 if there are none. `tile_sums` gives the sums of a tile.
template <typename Sums, typename TileSums>
Sums token_means(
    const std::array<Tensor, 4>& q, double prior2_mean, double prior2_std, const Kept& kept, TileSums tile_sums) {
  const Tiles tiles(q[0].size(0), 4 * q[0].size(1));
  std::vector<Sums> partial(tiles.count);
  FVAE_DISPATCH(q[0].scalar_type(), "token_means", [&] {
    const Prior2<at::opmath_type<scalar_t>> p2(prior2_mean, prior2_std);
    tiles.for_each([&](const Tile& tile) {
      partial[tile.index] = tile_sums(tile, Posterior(tile, q[0], q[1]), Posterior(tile, q[2], q[3]), p2, kept);
    });
  });
  Sums mean{};
  for (const Sums& sums : partial) {
    for (size_t i = 0; i < mean.size(); ++i) mean[i] += sums[i] / std::max<int64_t>(kept.count, 1);
  }
  return mean;
}

// R log tau, or 0 if no token is kept.
inline double mean_log_scale(const Tensor& mean, double prior2_std, const Kept& kept) {
  return kept.count > 0 ? mean.size(1) * std::log(prior2_std) : 0;
}

}  // namespace fvae
