// reconstruct: the decoder's output layer and its Gaussian likelihood, in nats.   Mathematics: reference.reconstruct
//
//   x_hat = g O^T + o,   q_d = mean over tokens of ((x_hat_d - x_d) / t_d)^2
//   nll   = sum over features of  q_d / 2 + log |t_d| + log(2 pi) / 2
//
// x_hat exists for one tile of tokens at a time, in a buffer that stays in cache; backward computes it again.
#include "common.h"

namespace fvae {
namespace {

constexpr double kHalfLog2Pi = 0.91893853320467274178;

// The output layer in the accumulation type, read by every tile.
struct OutputLayer {
  Tensor w, b, inverse_scale;  // [D, H], [D] or undefined, [D]
  Tensor scratch;              // [workers, length, D]

  OutputLayer(const Tensor& w_out, const OptionalTensor& b_out, const Tensor& scale, const Tiles& tiles)
      : w(w_out.to(wide(w_out)).contiguous()), inverse_scale(scale.to(wide(scale)).reciprocal().contiguous()) {
    if (b_out.has_value()) b = b_out->to(wide(w_out));
    scratch = at::empty({tiles.workers, tiles.length, w.size(0)}, w.options());
  }

  Tensor x_hat(const Tensor& g_rows, const Tile& tile) const {
    Tensor out = scratch.select(0, tile.worker).narrow(0, 0, tile.length);
    return b.defined() ? at::addmm_out(out, b, g_rows, w.t()) : at::mm_out(out, g_rows, w.t());
  }
};

}  // namespace

// nll, and d nll / d scale [D] = (1 - q) / t from the same sums.
std::tuple<Tensor, Tensor> reconstruct_fwd(
    const Tensor& x,
    const Tensor& g,
    const Tensor& w_out,
    const OptionalTensor& b_out,
    const Tensor& scale,
    const OptionalTensor& mask) {
  const PlainTensors guard;
  const int64_t N = x.size(0), D = x.size(1);
  const Kept kept(mask, N);
  const Tiles tiles(N, D);
  const OutputLayer layer(w_out, b_out, scale, tiles);
  const Tensor squares = at::zeros({tiles.count, D}, layer.w.options());

  FVAE_DISPATCH(x.scalar_type(), "reconstruct_fwd", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const acc_t* inverse = layer.inverse_scale.const_data_ptr<acc_t>();
    tiles.for_each([&](const Tile& tile) {
      const Tensor x_rows = tile.rows(x), x_hat = layer.x_hat(tile.rows(g, wide(g)), tile);
      const scalar_t* target = x_rows.const_data_ptr<scalar_t>();
      const acc_t* guess = x_hat.const_data_ptr<acc_t>();
      acc_t* sums = squares.mutable_data_ptr<acc_t>() + tile.index * D;
      for (int64_t n = 0; n < tile.length; ++n, target += D, guess += D) {
        if (!kept[tile.start + n]) continue;
        for (int64_t d = 0; d < D; ++d) {  // one sum per feature: the loop has no dependence and vectorises
          const acc_t deviation = (guess[d] - static_cast<acc_t>(target[d])) * inverse[d];
          sums[d] += deviation * deviation;
        }
      }
    });
  });

  const Tensor unit_grad_scale = at::zeros({D}, layer.w.options());
  if (kept.count == 0) return {at::zeros({}, layer.w.options()), unit_grad_scale};
  const Tensor q = squares.sum(0, /*keepdim=*/false, at::kDouble) / static_cast<double>(kept.count);
  const Tensor log_scale = scale.to(at::kDouble).abs().log();
  const Tensor nll = (q / 2 + log_scale + kHalfLog2Pi).sum().to(layer.w.scalar_type());
  unit_grad_scale.copy_((1 - q) / scale.to(at::kDouble));
  return {nll, unit_grad_scale};
}

// Gradients of x, g, w_out and b_out, from delta = d nll / d x_hat = (x_hat - x) / t^2 / kept tokens.
std::tuple<Tensor, Tensor, Tensor, Tensor> reconstruct_bwd(
    const Tensor& grad_nll,
    const Tensor& x,
    const Tensor& g,
    const Tensor& w_out,
    const OptionalTensor& b_out,
    const Tensor& scale,
    const OptionalTensor& mask,
    Needs needs) {
  const PlainTensors guard;
  const int64_t N = x.size(0), D = x.size(1), H = g.size(1);
  const Kept kept(mask, N);
  const Tiles tiles(N, D);
  const OutputLayer layer(w_out, b_out, scale, tiles);
  const auto [need_x, need_g, need_w, need_b] = needs;
  const Tensor grad_x = gradient(need_x, x.sizes(), x.options());
  const Tensor grad_g = gradient(need_g, g.sizes(), g.options());
  // Every worker or tile has its own sums; they are added in order at the end.
  const Tensor sums_w = at::zeros({need_w ? tiles.workers : 0, D, H}, layer.w.options());
  const Tensor sums_b = at::zeros({need_b ? tiles.count : 0, D}, layer.w.options());

  FVAE_DISPATCH(x.scalar_type(), "reconstruct_bwd", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const acc_t share = grad_nll.item<double>() / std::max<int64_t>(kept.count, 1);
    const Tensor factors = layer.inverse_scale.square() * share;
    const acc_t* factor = factors.const_data_ptr<acc_t>();
    tiles.for_each([&, need_x = need_x, need_g = need_g, need_w = need_w, need_b = need_b](const Tile& tile) {
      const Tensor x_rows = tile.rows(x), g_rows = tile.rows(g, wide(g)), delta = layer.x_hat(g_rows, tile);
      const scalar_t* target = x_rows.const_data_ptr<scalar_t>();
      acc_t* row = delta.mutable_data_ptr<acc_t>();
      for (int64_t n = 0; n < tile.length; ++n, target += D, row += D) {
        const bool keep = kept[tile.start + n];
        for (int64_t d = 0; d < D; ++d) {
          row[d] = keep ? (row[d] - static_cast<acc_t>(target[d])) * factor[d] : acc_t(0);
        }
      }
      if (need_x) grad_x.narrow(0, tile.start, tile.length).copy_(delta).neg_();
      if (need_g) grad_g.narrow(0, tile.start, tile.length).copy_(at::mm(delta, layer.w));
      if (need_w) sums_w.select(0, tile.worker).addmm_(delta.t(), g_rows);
      if (need_b) sums_b.select(0, tile.index).copy_(delta.sum(0));
    });
  });
  const auto total = [&](const Tensor& sums, bool needed) {
    return needed ? sums.sum(0).to(x.scalar_type()) : at::empty({0}, x.options());
  };
  return {grad_x, grad_g, total(sums_w, need_w), total(sums_b, need_b)};
}

TORCH_LIBRARY_IMPL(fvae_cpp, CPU, m) {
  m.impl("reconstruct_fwd", &reconstruct_fwd);
  m.impl("reconstruct_bwd", &reconstruct_bwd);
}

}  // namespace fvae
