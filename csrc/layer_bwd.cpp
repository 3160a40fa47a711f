// layer, backward: one pass over tiles of tokens computes every gradient.   Mathematics: reference.layer
//
//   c = grad_loss table[loss] + grad_nll [nll] + grad_kl table[kl] + grad_gamma table[gamma]     one small vector
//   grad_z1     = s grad_y B + decoder + 2 c z1 ...       grad_mean   = grad_z + 2 c mean ...
//   grad_logvar = grad_z noise std / 2 + c var + c            inside of the clamp, 0 outside
//   grad_x      = (x - x_hat) c / t^2 + gradient through the encoders        written once
#include "layer_sums.h"

namespace fvae {
namespace {

enum Need { kX, kEncoders, kDecoder, kScale, kB, kNeeds };

using Coefficients = std::array<double, kStatistics>;

constexpr int64_t kRun = 16;  // tokens whose slack is summed in the accumulation type before it goes to doubles

template <typename acc_t>
FVAE_VECTORISED static void finish_row(
    acc_t* r, acc_t* slack, const acc_t* x, const acc_t* b, const acc_t* inverse, const acc_t* factor, int64_t D) {
  for (int64_t d = 0; d < D; ++d) {
    const acc_t deviation = (x[d] - b[d] - r[d]) * inverse[d];
    r[d] = deviation * factor[d];
    slack[d] += 1 - deviation * deviation;
  }
}

// residual = (x - x_hat) / t factor for the tokens kept: the gradient of x as the target, and minus that of x_hat. At
// entry it is x_hat without the bias. slack [D] += 1 - ((x - x_hat) / t)^2; the gradient of t comes from it.
template <typename acc_t>
void finish_residual(
    const Tensor& residual, double* slack, const Tensor& x, const Decoder& decoder, const Tensor& factor,
    const Kept& kept, const Tile& tile) {
  const int64_t D = x.size(1);
  acc_t* rows = residual.mutable_data_ptr<acc_t>();
  const acc_t *target = x.const_data_ptr<acc_t>(), *b = decoder.layers.back().b.const_data_ptr<acc_t>();
  const acc_t *inverse = decoder.inverse_scale.const_data_ptr<acc_t>(), *f = factor.const_data_ptr<acc_t>();
  std::vector<acc_t> run(D);
  for (int64_t start = 0; start < tile.length; start += kRun) {
    std::fill(run.begin(), run.end(), acc_t(0));
    for (int64_t n = start; n < std::min(start + kRun, tile.length); ++n) {
      if (kept[tile.start + n]) {
        finish_row<acc_t>(rows + n * D, run.data(), target + n * D, b, inverse, f, D);
      } else {
        std::fill_n(rows + n * D, D, acc_t(0));
      }
    }
    for (int64_t d = 0; d < D; ++d) slack[d] += run[d];
  }
}

// Contribution of the terms that are linear in a latent's statistics: slope * value + offset.
template <typename acc_t>
struct Slopes {
  acc_t mean, mean_offset, var, logvar, z, z_offset;
  Slopes(const Coefficients& c, int side, double mu) {
    const double* own = c.data() + (side == 0 ? kSquares1 : kSquares2);
    const double sampled = 2 * own[4];
    mean = 2 * (own[0] + own[1]), mean_offset = -2 * own[1] * mu;
    var = own[2], logvar = own[3];
    z = sampled, z_offset = side == 0 ? 0 : -sampled * mu;
  }
};

// What the gradients of one posterior of a token are made of, and where they go; [R] each.
template <typename acc_t>
struct LatentRow {
  const acc_t *mean, *logvar, *z, *std, *noise, *through_decoder, *through_y;  // through_y: only z1 has it
  acc_t *grad_mean, *grad_logvar;
};

template <typename acc_t>
FVAE_VECTORISED static void grad_row(
    const LatentRow<acc_t>& row, const Slopes<acc_t>& slopes, const Bounds& bounds, acc_t share, bool keep, int64_t R) {
  acc_t *__restrict__ grad_mean = row.grad_mean, *__restrict__ grad_logvar = row.grad_logvar;
  for (int64_t r = 0; r < R; ++r) {
    acc_t grad_z = share * row.through_decoder[r] + (row.through_y ? row.through_y[r] : acc_t(0));
    acc_t of_mean = 0, of_logvar = 0;
    if (keep) {
      grad_z += slopes.z * row.z[r] + slopes.z_offset;
      of_mean = slopes.mean * row.mean[r] + slopes.mean_offset;
      of_logvar = slopes.var * row.std[r] * row.std[r] + slopes.logvar;
    }
    grad_mean[r] = grad_z + of_mean;
    const acc_t through_std = grad_z * row.noise[r] * row.std[r] / 2 + of_logvar;
    grad_logvar[r] = bounds.passes(row.logvar[r]) ? through_std : acc_t(0);
  }
}

// grad_heads [T, 4R], from the gradient of z1 through y [T, R] and of the decoder's input [T, 2R] or [T, R].
template <typename acc_t>
void grad_latents(
    const Tensor& grad_heads, const Tensor& heads, const Sample& sample, const std::array<Tensor, 2>& noise,
    const Tensor& grad_z1, const Tensor& grad_latent, bool average, const Coefficients& c, double mu,
    const std::array<Bounds, 2>& bounds, const Kept& kept, const Tile& tile) {
  const int64_t R = sample.z.size(1) / 2, L = grad_latent.size(1);
  acc_t* to = grad_heads.mutable_data_ptr<acc_t>();
  const acc_t *of_heads = heads.const_data_ptr<acc_t>(), *through_y = grad_z1.const_data_ptr<acc_t>();
  const acc_t *z = sample.z.const_data_ptr<acc_t>(), *std = sample.std.const_data_ptr<acc_t>();
  for (int64_t side = 0; side < 2; ++side) {
    const Slopes<acc_t> slopes(c, side, mu);
    const acc_t* eps = noise[side].const_data_ptr<acc_t>();
    const acc_t* through_decoder = grad_latent.const_data_ptr<acc_t>() + (average ? 0 : R * side);
    for (int64_t n = 0; n < tile.length; ++n) {
      const acc_t* of_token = of_heads + n * heads.stride(0);
      acc_t* to_token = to + 4 * n * R;
      const int64_t first = (2 * n + side) * R, mean = mean_place(side) * R, logvar = logvar_place(side) * R;
      const LatentRow<acc_t> row{
          of_token + mean, of_token + logvar, z + first, std + first, eps + n * R, through_decoder + n * L,
          side == 0 ? through_y + n * R : nullptr, to_token + mean, to_token + logvar};
      grad_row<acc_t>(row, slopes, bounds[side], average ? 0.5 : 1, kept[tile.start + n], R);
    }
  }
}

// What the pass over tiles reads and fills.
struct Backward {
  const Layer& layer;
  Tensor grad_y, state;  // grad_y may be undefined
  Coefficients c;            // gradients of a token's statistics, the division by tokens included
  std::array<bool, kNeeds> needs;
  bool through_target, decode;  // x gets a gradient as the target; a gradient comes through nll
  Tensor factor;                // [D]: 1 / t times the gradient of nll for each token
  Tensor slack;                 // [workers, D] in doubles
  Tensor grad_x;                // [N, D]
  std::vector<Tensor> sums_B;   // [M, R] of each worker
  NetworkSums encoder_sums, decoder_sums;

  template <typename acc_t>
  void tile(const Tile& tile) const;
  template <typename acc_t>
  Tensor through_decoder(const Tile& tile, const Tensor& x_rows, const Scratch& memory) const;
  Tensor through_y(const Tile& tile, const Sample& sample) const;
  template <typename acc_t>
  void through_encoders(
      const Tile& tile, Tensor grad, const Tensor& x_rows, const Tensor& state_rows, const Tensor& to) const;

  bool latents() const {
    return needs[kX] || needs[kEncoders];
  }
};

// Gradient of z1 [T, R].
Tensor Backward::through_y(const Tile& tile, const Sample& sample) const {
  if (!grad_y.defined()) return at::zeros({tile.length, layer.encoders.R}, layer.up.options());
  const Tensor grad = tile.rows(grad_y, layer.type);
  if (needs[kB]) multiply(sums_B[tile.worker], grad.t(), block(sample.z, 1, 0, 2), tile.first ? 0 : 1);
  return latents() ? at::mm(grad, layer.up) : Tensor();
}

// Gradient of the decoder's input [T, 2R] or [T, R]. Minus the gradient of x_hat stays in `memory.residual`.
template <typename acc_t>
Tensor Backward::through_decoder(const Tile& tile, const Tensor& x_rows, const Scratch& memory) const {
  const auto& layers = layer.decoder.layers;
  if (!decode) return at::zeros_like(memory.outputs[0]);
  layer.decoder.forward<acc_t>(memory.sample, memory.outputs, memory.residual, layer.dropout, tile);
  double* to_slack = slack.mutable_data_ptr<double>() + tile.worker * slack.size(1);
  finish_residual<acc_t>(memory.residual, to_slack, x_rows, layer.decoder, factor, layer.kept, tile);
  if (!latents() && !needs[kDecoder]) return Tensor();
  Tensor grad = memory.residual;
  for (int64_t i = layer.decoder.hidden(), last = i; i >= 0; --i) {
    const double sign = i == last ? -1 : 1;
    if (needs[kDecoder]) decoder_sums[i][tile.worker].add<acc_t>(layers[i], grad, memory.outputs[i], tile.first, sign);
    if (i == 0 && !latents()) return Tensor();
    const Tensor grad_in = at::empty(memory.outputs[i].sizes(), grad.options());
    layers[i].grad_input(grad_in, grad, 0, sign);
    if (i > 0) grad_activate<acc_t>(grad_in, memory.outputs[i], layer.dropout);
    grad = grad_in;
  }
  return grad;
}

// Gradients of the encoders' weights and of x. At entry `to` holds the gradient of x as the target.
template <typename acc_t>
void Backward::through_encoders(
    const Tile& tile, Tensor grad, const Tensor& x_rows, const Tensor& state_rows, const Tensor& to) const {
  const Encoders& encoders = layer.encoders;
  for (int64_t i = encoders.hidden(); i >= 0; --i) {
    const Tensor in = i == 0 ? x_rows : encoders.output(state_rows, i - 1);
    if (needs[kEncoders]) encoder_sums[i][tile.worker].add<acc_t>(encoders.layers[i], grad, in, tile.first);
    if (i == 0) break;
    const Tensor grad_in = at::empty(in.sizes(), grad.options());
    encoders.layers[i].grad_input(grad_in, grad);
    grad_activate<acc_t>(grad_in, in, layer.dropout);
    grad = grad_in;
  }
  if (needs[kX]) encoders.layers[0].grad_input(to, grad, decode && through_target ? 1 : 0);
}

template <typename acc_t>
void Backward::tile(const Tile& tile) const {
  Scratch memory = layer.scratch[tile.worker].first(tile.length);
  const Tensor x_rows = tile.rows(layer.x, layer.type), state_rows = tile.of(state);
  const Tensor heads = layer.encoders.heads(state_rows);
  const auto noise = layer.noise_rows(tile);
  Tensor grad_x_rows = needs[kX] ? tile.of(grad_x) : Tensor();
  const bool in_place = needs[kX] && grad_x.scalar_type() == layer.type;  // grad_x is the residual's memory
  if (in_place) memory.residual = grad_x_rows;
  memory.sample.draw<acc_t>(heads, noise, layer.bounds);
  const Tensor grad_z1 = through_y(tile, memory.sample);
  if (!latents() && !needs[kDecoder] && !needs[kScale]) return;
  const Tensor grad_latent = through_decoder<acc_t>(tile, x_rows, memory);
  if (!latents()) return;
  const Tensor grad_heads = at::empty({tile.length, 4 * layer.encoders.R}, layer.up.options());
  grad_latents<acc_t>(
      grad_heads, heads, memory.sample, noise, grad_z1, grad_latent, layer.decoder.average, c, layer.mu, layer.bounds,
      layer.kept, tile);
  through_encoders<acc_t>(tile, layer.encoders.made(grad_heads), x_rows, state_rows, memory.residual);
  if (needs[kX] && !in_place) grad_x_rows.copy_(memory.residual);
}

// Gradients of a token's statistics, from the gradients of the terms.
Coefficients combine(
    at::ArrayRef<double> objective, const OptionalTensor& grad_loss, const OptionalTensor& grad_nll,
    const OptionalTensor& grad_kl, const OptionalTensor& grad_gamma, int64_t tokens) {
  const auto value = [](const OptionalTensor& grad) { return grad.has_value() ? grad->item<double>() : 0.0; };
  const double loss = value(grad_loss), kl = value(grad_kl), gamma = value(grad_gamma);
  const double share = 1.0 / std::max<int64_t>(tokens, 1);
  Coefficients c;
  for (int i = 0; i < kStatistics; ++i) {
    const auto weight = [&](Term term) { return objective[int{term} * kStatistics + i]; };
    c[i] = share * (loss * weight(kLoss) + kl * weight(kKl) + gamma * weight(kGamma));
  }
  c[kNll] += share * value(grad_nll);
  return c;
}

}  // namespace

// grad_x [N, D], and the gradients of the parameters in their order.
std::tuple<Tensor, std::vector<Tensor>> layer_bwd(
    const OptionalTensor& grad_y, const OptionalTensor& grad_loss, const OptionalTensor& grad_nll,
    const OptionalTensor& grad_kl, const OptionalTensor& grad_gamma, const Tensor& x, const Parameters& parameters,
    const OptionalTensor& noise1, const OptionalTensor& noise2, const OptionalTensor& mask, const OptionalTensor& seed,
    int64_t encoder_hidden, double dropout, bool average, double scaling, double prior2_mean, double logvar1_low,
    double logvar1_high, at::ArrayRef<double> objective, std::optional<at::ScalarType> products, const Tensor& state,
    bool detach_target, std::array<bool, kNeeds> needs) {
  const PlainTensors guard;
  const Inputs inputs{x,       parameters, noise1,      noise2,      mask,         seed,      encoder_hidden, dropout,
                      average, scaling,    prior2_mean, logvar1_low, logvar1_high, objective, products};
  const Layer layer(inputs);
  const int64_t workers = std::max<int64_t>(layer.tiles.workers, 1);
  const bool any = layer.tiles.count > 0;
  const Coefficients c = combine(objective, grad_loss, grad_nll, grad_kl, grad_gamma, layer.kept.count);
  const bool decode = grad_loss.has_value() || grad_nll.has_value();
  const Backward backward{
      layer, grad_y.value_or(Tensor()), state, c, needs, !detach_target, decode,
      layer.decoder.inverse_scale * c[kNll], at::zeros({workers, x.size(1)}, layer.up.options().dtype(at::kDouble)),
      gradient(needs[kX], x.sizes(), x.options()),
      sums_like(layer.up, needs[kB] ? workers : 0, any && grad_y.has_value()),
      sums_of(layer.encoders.layers, needs[kEncoders], workers, any),
      sums_of(layer.decoder.layers, needs[kDecoder], workers, any && decode)};

  if (std::any_of(needs.begin(), needs.end(), [](bool need) { return need; })) {
    AT_DISPATCH_FLOATING_TYPES(layer.type, "layer_bwd", [&] {
      layer.tiles.for_each([&](const Tile& tile) { backward.tile<scalar_t>(tile); });
    });
  }

  Gradients gradients{inputs, {}};
  gradients.add_encoders(backward.encoder_sums, layer.encoders.without_logvar1);
  for (size_t i = 0; i < backward.decoder_sums.size(); ++i) gradients.add(backward.decoder_sums[i], inputs.decoder() + i);
  gradients.add(needs[kScale] ? backward.slack.sum(0) * backward.factor : Tensor(), bool{needs[kScale]});
  for (int64_t i = 1; needs[kB] && i < workers; ++i) backward.sums_B[0].add_(backward.sums_B[i]);
  gradients.add(needs[kB] ? backward.sums_B[0].mul_(scaling) : Tensor(), bool{needs[kB]});
  return {backward.grad_x, gradients.all};
}

TORCH_LIBRARY_IMPL(fvae_cpp, CPU, m) {
  m.impl("layer_bwd", &layer_bwd);
}

}  // namespace fvae
