// layer, forward: base + s B z1 and the terms of the objective, x read once.   Mathematics: reference.layer
//
//   mean_i, logvar_i = encoder_i(x),   z_i = mean_i + exp(logvar_i / 2) noise_i,   y = base + s z1 B^T
//   x_hat = decoder(z1, z2),   nll = sum over features of  q_d / 2 + log |t_d| + log(2 pi) / 2
//   term  = table[term] . statistics                  every objective is linear in a few means over tokens
//
// Decoder and x_hat exist only for one tile of tokens at a time; backward recomputes them.
#include "layer.h"

#include <limits>

namespace fvae {
namespace {

constexpr double kHalfLog2Pi = 0.91893853320467274178;
// Lanes of a sum of squares over features: sums stay short in the accumulation type, and vector units busy.
constexpr int64_t kLanes = 64;

template <typename acc_t>
FVAE_VECTORISED static double squares_of_row(
    const acc_t* x, const acc_t* residual, const acc_t* b, const acc_t* inverse, int64_t D) {
  acc_t lanes[kLanes] = {};
  int64_t first = 0;
  for (; first + kLanes <= D; first += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) {
      const int64_t d = first + l;
      const acc_t deviation = (residual[d] + b[d] - x[d]) * inverse[d];
      lanes[l] += deviation * deviation;
    }
  }
  for (int64_t d = first; d < D; ++d) {
    const acc_t deviation = (residual[d] + b[d] - x[d]) * inverse[d];
    lanes[d - first] += deviation * deviation;
  }
  double sum = 0;
  for (int64_t l = 0; l < kLanes; ++l) sum += lanes[l];
  return sum;
}

// Sum of the squares of (x_hat - x) / t over the tokens kept; the residual still lacks x and the bias.
template <typename acc_t>
double sum_of_squares(
    const Tensor& x, const Tensor& residual, const Decoder& decoder, const Kept& kept, const Tile& tile) {
  const int64_t D = x.size(1);
  const acc_t *target = x.const_data_ptr<acc_t>(), *rows = residual.const_data_ptr<acc_t>();
  const acc_t *b = decoder.layers.back().b.const_data_ptr<acc_t>();
  const acc_t* inverse = decoder.inverse_scale.const_data_ptr<acc_t>();
  double sum = 0;
  for (int64_t n = 0; n < tile.length; ++n) {
    if (kept[tile.start + n]) sum += squares_of_row<acc_t>(target + n * D, rows + n * D, b, inverse, D);
  }
  return sum;
}

using Statistics = std::array<double, kStatistics>;

// Adds the statistics of one posterior of a token to sums [5, R], in doubles: the terms are small differences of them.
template <typename acc_t>
FVAE_VECTORISED static void add_moments(
    double* sums, const acc_t* means, const acc_t* logvars, const acc_t* z, const acc_t* std, double mu, double center,
    const Bounds& bounds, int64_t R) {
  for (int64_t r = 0; r < R; ++r) {
    const double mean = means[r], sd = std[r], off_center = z[r] - center;
    sums[r] += mean * mean;
    sums[R + r] += (mean - mu) * (mean - mu);
    sums[2 * R + r] += sd * sd;
    sums[3 * R + r] += bounds.clamp(logvars[r]);
    sums[4 * R + r] += off_center * off_center;
  }
}

// Sums over the tokens kept.
template <typename acc_t>
Statistics latent_statistics(
    const Tensor& heads, const Sample& sample, double mu, const std::array<Bounds, 2>& bounds, const Kept& kept,
    const Tile& tile) {
  const int64_t R = sample.z.size(1) / 2;
  const acc_t* of_heads = heads.const_data_ptr<acc_t>();
  const acc_t *z = sample.z.const_data_ptr<acc_t>(), *std = sample.std.const_data_ptr<acc_t>();
  Statistics sums{};
  for (int64_t side = 0; side < 2; ++side) {
    std::vector<double> moments(5 * R);
    for (int64_t n = 0; n < tile.length; ++n) {
      if (!kept[tile.start + n]) continue;
      const acc_t* of_token = of_heads + n * heads.stride(0);
      const acc_t *mean = of_token + mean_place(side) * R, *logvar = of_token + logvar_place(side) * R;
      const int64_t first = (2 * n + side) * R;
      add_moments<acc_t>(moments.data(), mean, logvar, z + first, std + first, mu, side * mu, bounds[side], R);
    }
    double* to = sums.data() + (side == 0 ? kSquares1 : kSquares2);
    for (int64_t i = 0; i < 5 * R; ++i) to[i / R] += moments[i];
  }
  return sums;
}

double total(at::ArrayRef<double> table, Term term, const Statistics& means) {
  double value = 0;
  for (int i = 0; i < kStatistics; ++i) {  // a weight of 0 ignores NaN
    const double weight = table[int{term} * kStatistics + i];
    if (weight != 0) value += weight * means[i];
  }
  return value;
}

// Infinite if the type cannot hold the value, as in the reference.
template <typename T>
T rounded(double value) {
  using Limits = std::numeric_limits<T>;
  const bool fits = !(std::abs(value) > double{Limits::max()});  // NaN does
  return fits ? static_cast<T>(value) : std::copysign(Limits::infinity(), static_cast<T>(value > 0 ? 1 : -1));
}

// y = base + z1 up, rounded once.
void update(Tensor y, const Tensor& base, const Tensor& z1, const Tensor& up) {
  const auto type = z1.scalar_type();
  if (!base.defined()) {
    y.scalar_type() == type ? at::mm_out(y, z1, up) : y.copy_(at::mm(z1, up));
  } else {
    y.scalar_type() == type ? at::addmm_out(y, base, z1, up) : y.copy_(at::addmm(base.to(type), z1, up));
  }
}

template <typename acc_t>
Statistics forward_tile(
    const Layer& layer, const Tile& tile, const Tensor& base, const Tensor& y, const Tensor& state_rows) {
  const auto& [sample, outputs, residual] = layer.scratch[tile.worker].first(tile.length);
  const Tensor x_rows = tile.rows(layer.x, layer.type);
  const Tensor heads = layer.encoders.heads(state_rows);
  layer.encoders.forward<acc_t>(x_rows, state_rows, layer.dropout, tile, layer.bounds[0].low);
  sample.template draw<acc_t>(heads, layer.noise_rows(tile), layer.bounds);
  update(
      tile.of(y), base.defined() ? tile.of(base) : base, block(sample.z, 1, 0, 2), layer.up.t());
  layer.decoder.forward<acc_t>(sample, outputs, residual, layer.dropout, tile);
  Statistics sums = latent_statistics<acc_t>(heads, sample, layer.mu, layer.bounds, layer.kept, tile);
  sums[kNll] = sum_of_squares<acc_t>(x_rows, residual, layer.decoder, layer.kept, tile) / 2;
  return sums;
}

}  // namespace

// y, the terms [4] (loss, nll, kl, gamma), and the encoders' state.
std::tuple<Tensor, Tensor, Tensor> layer_fwd(
    const OptionalTensor& base, const Tensor& x, const Parameters& parameters, const OptionalTensor& noise1,
    const OptionalTensor& noise2, const OptionalTensor& mask, const OptionalTensor& seed, int64_t encoder_hidden,
    double dropout, bool average, double scaling, double prior2_mean, double logvar1_low, double logvar1_high,
    at::ArrayRef<double> objective, std::optional<at::ScalarType> products) {
  const PlainTensors guard;
  const Inputs inputs{x,       parameters, noise1,      noise2,      mask,         seed,      encoder_hidden, dropout,
                      average, scaling,    prior2_mean, logvar1_low, logvar1_high, objective, products};
  const Layer layer(inputs);
  const int64_t N = x.size(0);
  const auto options = x.options().dtype(layer.type);
  const Tensor from = base.value_or(Tensor()), state = at::empty({N, layer.encoders.width}, options);
  const Tensor y = at::empty({N, layer.up.size(0)}, (base.has_value() ? from : inputs.B()).options());
  std::vector<Statistics> partial(layer.tiles.count);

  AT_DISPATCH_FLOATING_TYPES(layer.type, "layer_fwd", [&] {
    layer.tiles.for_each([&](const Tile& tile) {
      partial[tile.index] = forward_tile<scalar_t>(layer, tile, from, y, tile.of(state));
    });
  });

  const Kept& kept = layer.kept;
  const Tensor terms = at::zeros({4}, options);
  if (kept.count == 0) return {y, terms, state};
  Statistics means{};
  for (const Statistics& sums : partial) {
    for (int i = 0; i < kStatistics; ++i) means[i] += sums[i] / kept.count;
  }
  means[kOne] = 1;
  means[kNll] += (inputs.scale().to(at::kDouble).abs().log() + kHalfLog2Pi).sum().item<double>();
  AT_DISPATCH_FLOATING_TYPES(layer.type, "layer_fwd", [&] {
    scalar_t* to = terms.mutable_data_ptr<scalar_t>();
    const auto term = [&](Term which) { return rounded<scalar_t>(total(objective, which, means)); };
    to[0] = term(kLoss), to[1] = rounded<scalar_t>(means[kNll]), to[2] = term(kKl), to[3] = term(kGamma);
  });
  return {y, terms, state};
}

TORCH_LIBRARY_IMPL(fvae_cpp, CPU, m) {
  m.impl("layer_fwd", &layer_fwd);
}

}  // namespace fvae
