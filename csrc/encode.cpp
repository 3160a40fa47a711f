// encode: mean = x Wm^T + bm,  logvar = x Wv^T + bv,  z = mean + exp(logvar / 2) noise.   Mathematics: reference.encode
#include "common.h"

namespace fvae {
namespace {

// Both heads as one product: weights [2R, D], bias [2R].
Tensor both_biases(const OptionalTensor& b_mean, const OptionalTensor& b_logvar, const Tensor& w) {
  const auto of = [&](const OptionalTensor& b) { return b.has_value() ? *b : at::zeros({w.size(0)}, w.options()); };
  return at::cat({of(b_mean), of(b_logvar)});
}

template <typename scalar_t, typename acc_t>
void reparameterise(
    const acc_t* heads, const acc_t* std, const scalar_t* noise, int64_t tokens, int64_t R, scalar_t* mean,
    scalar_t* logvar, scalar_t* z) {
  for (int64_t n = 0; n < tokens; ++n, heads += 2 * R, std += R, noise += R, mean += R, logvar += R, z += R) {
    for (int64_t r = 0; r < R; ++r) {
      mean[r] = heads[r];
      logvar[r] = heads[R + r];
      z[r] = heads[r] + std[r] * static_cast<acc_t>(noise[r]);
    }
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> encode_fwd(
    const Tensor& x,
    const Tensor& w_mean,
    const OptionalTensor& b_mean,
    const Tensor& w_logvar,
    const OptionalTensor& b_logvar,
    const Tensor& noise) {
  const PlainTensors guard;
  const int64_t N = x.size(0), D = x.size(1), R = w_mean.size(0);
  const auto type = wide(x);
  const Tensor w = at::cat({w_mean, w_logvar}).to(type).t().contiguous();  // [D, 2R], the layout that is fastest in the product
  const Tensor b = both_biases(b_mean, b_logvar, w_mean).to(type);
  const Tensor mean = at::empty({N, R}, x.options()), logvar = at::empty_like(mean), z = at::empty_like(mean);

  FVAE_DISPATCH(x.scalar_type(), "encode_fwd", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    Tiles(N, D).for_each([&](const Tile& tile) {
      const Tensor heads = at::addmm(b, tile.rows(x, type), w), noise_rows = tile.rows(noise);
      const Tensor std = clamped_exp(heads.narrow(1, R, R).contiguous(), 0.5);
      const int64_t first = tile.start * R;
      reparameterise(
          heads.const_data_ptr<acc_t>(), std.const_data_ptr<acc_t>(), noise_rows.const_data_ptr<scalar_t>(),
          tile.length, R, mean.mutable_data_ptr<scalar_t>() + first, logvar.mutable_data_ptr<scalar_t>() + first,
          z.mutable_data_ptr<scalar_t>() + first);
    });
  });
  return {mean, logvar, z};
}

// Gradients of both heads [N, 2R], side by side: those of the outputs mean and logvar, and those through z.
Tensor encode_bwd(
    const OptionalTensor& grad_mean,
    const OptionalTensor& grad_logvar,
    const OptionalTensor& grad_z,
    const Tensor& logvar,
    const Tensor& noise) {
  const PlainTensors guard;
  const int64_t N = logvar.size(0), R = logvar.size(1);
  const Tensor grad_heads = at::empty({N, 2 * R}, logvar.options());

  FVAE_DISPATCH(logvar.scalar_type(), "encode_bwd", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    Tiles(N, 4 * R).for_each([&](const Tile& tile) {
      const auto rows = [&](const OptionalTensor& grad) { return grad.has_value() ? tile.rows(*grad) : Tensor(); };
      const Tensor gm = rows(grad_mean), gv = rows(grad_logvar), gz = rows(grad_z);
      const Tensor logvar_rows = tile.rows(logvar, wide(logvar)), noise_rows = tile.rows(noise);
      const Tensor std_rows = clamped_exp(logvar_rows, 0.5);
      const auto* v = logvar_rows.const_data_ptr<acc_t>();
      const auto* std = std_rows.const_data_ptr<acc_t>();
      const auto* e = noise_rows.const_data_ptr<scalar_t>();
      const auto at = [](const Tensor& grad, int64_t i) {
        return grad.defined() ? static_cast<acc_t>(grad.const_data_ptr<scalar_t>()[i]) : acc_t(0);
      };
      auto* out = grad_heads.mutable_data_ptr<scalar_t>() + tile.start * 2 * R;
      for (int64_t n = 0, i = 0; n < tile.length; ++n, out += 2 * R) {
        for (int64_t r = 0; r < R; ++r, ++i) {
          const acc_t through_z = at(gz, i);
          const bool reaches_logvar = gz.defined() && clamp_passes(v[i]);
          out[r] = at(gm, i) + through_z;
          out[R + r] = at(gv, i) + (reaches_logvar ? through_z * static_cast<acc_t>(e[i]) * std[i] / 2 : acc_t(0));
        }
      }
    });
  });
  return grad_heads;
}

TORCH_LIBRARY_IMPL(fvae_cpp, CPU, m) {
  m.impl("encode_fwd", &encode_fwd);
  m.impl("encode_bwd", &encode_bwd);
}

}  // namespace fvae
