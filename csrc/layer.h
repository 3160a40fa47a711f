// Parts of an adapted layer that forward and backward share. Each works on a tile of tokens in the accumulation type.
// Mathematics: reference.layer
#pragma once

#include "common.h"
#include "philox.h"

namespace fvae {

using Parameters = c10::List<std::optional<Tensor>>;  // weight, bias or none, weight, ...; at the end scale and B

// Bounds of a log-variance, clamped wherever it becomes a Gaussian. Equal bounds pass no gradient.
struct Bounds {
  double low = -kLogvarLimit, high = kLogvarLimit;

  template <typename T>
  T clamp(T logvar) const {  // NaN stays NaN
    return logvar < T(low) ? T(low) : logvar > T(high) ? T(high) : logvar;
  }
  template <typename T>
  bool passes(T logvar) const {
    return !held() && logvar >= T(low) && logvar <= T(high);
  }
  bool held() const {
    return low >= high;
  }
};

// Inputs of both directions of the layer, as fvae_kernels/ops/_layer_inputs.py declares them.
struct Inputs {
  const Tensor& x;               // [N, D]
  const Parameters& parameters;  // encoder 1, encoder 2 (hidden layers, mean, logvar), decoder (hidden layers, output)
  const OptionalTensor &noise1, &noise2, &mask, &seed;
  int64_t encoder_hidden;
  double dropout;
  bool average;
  double scaling, prior2_mean, logvar1_low, logvar1_high;
  at::ArrayRef<double> objective;  // [kTerms, kStatistics]
  std::optional<at::ScalarType> products;

  Tensor parameter(int64_t i) const {
    return *parameters.get(i);
  }
  Tensor scale() const {
    return parameter(static_cast<int64_t>(parameters.size()) - 2);
  }
  Bounds bounds1() const {
    return {logvar1_low, logvar1_high};
  }
  Tensor B() const {
    return parameter(static_cast<int64_t>(parameters.size()) - 1);
  }
  // Numbers of the linear layers: encoder i = 0, 1 starts here (hidden layers, mean, logvar); the decoder follows.
  int64_t encoder(int64_t i) const {
    return i * (encoder_hidden + 2);
  }
  int64_t decoder() const {
    return encoder(2);
  }
  int64_t layers() const {
    return static_cast<int64_t>(parameters.size()) / 2 - 1;
  }
};

// Means over tokens; every objective is a linear function of them. mu is the mean of prior 2.
enum Statistic {
  kOne, kNll,
  kSquares1, kFromMu1, kVar1, kLogvar1, kSampled1,  // sums of mean1^2, (mean1 - mu)^2, var1, logvar1, z1^2
  kSquares2, kFromMu2, kVar2, kLogvar2, kSampled2,  // the same for posterior 2, with (z2 - mu)^2
  kStatistics
};
enum Term { kLoss, kKl, kGamma, kTerms };  // rows of the table [kTerms, kStatistics] that defines an objective

// Floats in a tile's rows of x, and the least number of its tokens. Measured: shorter tiles have slower products.
constexpr int64_t kLayerTile = 1 << 18, kTokens = 128;
constexpr int64_t kWork = 64;  // work of a token for each entry of x, relative to a simple loop

// to = alpha a b + beta to. MKL makes a pass over `to` of its own unless beta is 1.
inline void multiply(Tensor to, const Tensor& a, const Tensor& b, double beta, double alpha = 1) {
  to.addmm_(a, b, beta, alpha);
}

// The i-th of equal parts of t along dim.
inline Tensor block(const Tensor& t, int64_t dim, int64_t i, int64_t blocks) {
  if (blocks == 1) return t;
  const int64_t size = t.size(dim) / blocks;
  return t.narrow(dim, i * size, size);
}

// out = in w^T (+ b, which the next loop over `out` adds). With two blocks, each half of the outputs reads only its own
// half of the inputs: two encoders side by side.
struct Linear {
  Tensor w, b;  // [out, in / blocks], [out]
  int64_t blocks = 1;

  void product(const Tensor& out, const Tensor& in) const {
    for (int64_t i = 0; i < blocks; ++i) {
      multiply(block(out, 1, i, blocks), block(in, 1, i, blocks), block(w, 0, i, blocks).t(), 0);
    }
  }
  // grad_in = beta * grad_in + sign * grad_out w
  void grad_input(const Tensor& grad_in, const Tensor& grad_out, double beta = 0, double sign = 1) const {
    for (int64_t i = 0; i < blocks; ++i) {
      multiply(block(grad_in, 1, i, blocks), block(grad_out, 1, i, blocks), block(w, 0, i, blocks), beta, sign);
    }
  }
  // grad_w = beta * grad_w + sign * grad_out^T in
  void grad_weight(const Tensor& grad_w, const Tensor& grad_out, const Tensor& in, double beta, double sign) const {
    for (int64_t i = 0; i < blocks; ++i) {
      multiply(block(grad_w, 0, i, blocks), block(grad_out, 1, i, blocks).t(), block(in, 1, i, blocks), beta, sign);
    }
  }
};

// Linear layers stacked by rows.
inline Linear stacked(
    const Parameters& parameters, const std::vector<int64_t>& numbers, at::ScalarType type, int64_t blocks) {
  std::vector<Tensor> w, b;
  w.reserve(numbers.size()), b.reserve(numbers.size());
  for (const int64_t i : numbers) {
    const Tensor weight = *parameters.get(2 * i);
    const std::optional<Tensor> bias = parameters.get(2 * i + 1);
    w.push_back(weight);
    b.push_back(bias.has_value() ? *bias : at::zeros({weight.size(0)}, weight.options()));
  }
  const auto one = [&](const std::vector<Tensor>& all) {
    return (all.size() == 1 ? all[0] : at::cat(all)).to(type).contiguous();
  };
  return {one(w), one(b), blocks};
}

// Places of the heads in their columns [4R]: logvar1 | mean1 | mean2 | logvar2. Side is 0 for encoder 1, 1 for encoder 2.
constexpr int64_t mean_place(int64_t side) {
  return 1 + side;
}
constexpr int64_t logvar_place(int64_t side) {
  return 3 * side;
}

// Both encoders. Forward saves their state [N, width] for backward: the output of every hidden layer, encoder 1 |
// encoder 2, then the heads.
struct Encoders {
  std::vector<Linear> layers;         // hidden layers, heads last
  std::vector<int64_t> first_column;  // first column of each layer in the state
  int64_t width = 0, R;
  // A held logvar1 depends on nothing. If the heads read x, their layer is then mean1 | mean2 | logvar2 alone.
  bool without_logvar1;

  Encoders(const Inputs& in, at::ScalarType type)
      : R(in.B().size(1)), without_logvar1(in.encoder_hidden == 0 && in.bounds1().held()) {
    const int64_t hidden = in.encoder_hidden, first = in.encoder(0), second = in.encoder(1);
    for (int64_t i = 0; i < hidden; ++i) {  // the first layers of both encoders read x
      add(stacked(in.parameters, {first + i, second + i}, type, i == 0 ? 1 : 2));
    }
    const int64_t mean = hidden, logvar = hidden + 1;
    std::vector<int64_t> heads{first + logvar, first + mean, second + mean, second + logvar};
    if (without_logvar1) heads.erase(heads.begin()), width += R;
    add(stacked(in.parameters, heads, type, hidden ? 2 : 1));
  }
  void add(Linear layer) {
    first_column.push_back(width);
    width += layer.w.size(0);
    layers.push_back(std::move(layer));
  }
  int64_t hidden() const {
    return static_cast<int64_t>(layers.size()) - 1;
  }
  Tensor output(const Tensor& state, int64_t i) const {
    return state.narrow(1, first_column[i], layers[i].w.size(0));
  }

  // All heads [T, 4R].
  Tensor heads(const Tensor& state) const {
    return state.narrow(1, width - 4 * R, 4 * R);
  }
  // The columns of the heads that the last layer makes.
  Tensor made(const Tensor& heads) const {
    return without_logvar1 ? heads.narrow(1, R, 3 * R) : heads;
  }

  template <typename acc_t>
  void forward(
      const Tensor& x, const Tensor& state, const Dropout& dropout, const Tile& tile, double held_logvar1) const {
    if (without_logvar1) heads(state).narrow(1, 0, R).fill_(held_logvar1);
    for (int64_t i = 0; i <= hidden(); ++i) {
      const Tensor out = output(state, i);
      layers[i].product(out, i == 0 ? x : output(state, i - 1));
      i < hidden() ? activate<acc_t>(out, layers[i].b, dropout, i, tile) : void(Tensor(out).add_(layers[i].b));
    }
  }
};

template <typename acc_t>
FVAE_VECTORISED static void half_of_row(acc_t* half, const acc_t* logvar, const Bounds& bounds, int64_t R) {
  for (int64_t r = 0; r < R; ++r) half[r] = bounds.clamp(logvar[r]) / 2;
}

template <typename acc_t>
FVAE_VECTORISED static void sample_row(
    acc_t* z, const acc_t* mean, const acc_t* std, const acc_t* noise, int64_t R) {
  for (int64_t r = 0; r < R; ++r) z[r] = mean[r] + std[r] * noise[r];
}

// z = [z1 | z2] from the heads of a tile, and its standard deviations.
struct Sample {
  Tensor z, std;  // [T, 2R]

  template <typename acc_t>
  void draw(const Tensor& heads, const std::array<Tensor, 2>& noise, const std::array<Bounds, 2>& bounds) const {
    const int64_t R = z.size(1) / 2;
    const acc_t* of_heads = heads.const_data_ptr<acc_t>();
    acc_t *to = z.mutable_data_ptr<acc_t>(), *sd = std.mutable_data_ptr<acc_t>();
    const auto each_row = [&](const auto& body) {
      for (int64_t n = 0; n < z.size(0); ++n) {
        for (int64_t side = 0; side < 2; ++side) body(side, (2 * n + side) * R, n * heads.stride(0), n * R);
      }
    };
    each_row([&](int64_t side, int64_t first, int64_t head, int64_t) {
      half_of_row(sd + first, of_heads + head + logvar_place(side) * R, bounds[side], R);
    });
    Tensor(std).exp_();  // ATen's exp uses the vector instructions of the machine that runs it
    const std::array<const acc_t*, 2> eps{noise[0].const_data_ptr<acc_t>(), noise[1].const_data_ptr<acc_t>()};
    each_row([&](int64_t side, int64_t first, int64_t head, int64_t of_noise) {
      sample_row(to + first, of_heads + head + mean_place(side) * R, sd + first, eps[side] + of_noise, R);
    });
  }
};

struct Decoder {
  std::vector<Linear> layers;  // hidden layers, output layer last
  Tensor inverse_scale;        // [D]
  bool average;
  int64_t first_dropout;  // number of its first layer for dropout; the encoders come first

  explicit Decoder(const Inputs& in) : average(in.average), first_dropout(in.encoder_hidden) {
    const auto type = wide(in.scale());
    for (int64_t i = in.decoder(); i < in.layers(); ++i) layers.push_back(stacked(in.parameters, {i}, type, 1));
    inverse_scale = in.scale().to(type).reciprocal().contiguous();
  }
  int64_t hidden() const {
    return static_cast<int64_t>(layers.size()) - 1;
  }

  // Writes x_hat without the bias to `residual`, and the latent and every hidden layer's output to `outputs`.
  template <typename acc_t>
  void forward(
      const Sample& sample, const std::vector<Tensor>& outputs, const Tensor& residual, const Dropout& dropout,
      const Tile& tile) const {
    if (average) {
      Tensor latent = outputs[0];
      at::add_out(latent, block(sample.z, 1, 0, 2), block(sample.z, 1, 1, 2)).mul_(0.5);
    }
    for (int64_t i = 0; i < hidden(); ++i) {
      layers[i].product(outputs[i + 1], outputs[i]);
      activate<acc_t>(outputs[i + 1], layers[i].b, dropout, first_dropout + i, tile);
    }
    layers.back().product(residual, outputs.back());
  }
};

// A worker's memory for a tile, in both directions.
struct Scratch {
  Sample sample;
  std::vector<Tensor> outputs;  // the decoder's input and the outputs of its hidden layers
  Tensor residual;              // [T, D]

  Scratch(const Encoders& encoders, const Decoder& decoder, int64_t length) {
    const auto make = [&](int64_t width) { return at::empty({length, width}, decoder.inverse_scale.options()); };
    sample = {make(2 * encoders.R), make(2 * encoders.R)};
    outputs.push_back(decoder.average ? make(encoders.R) : sample.z);
    for (int64_t i = 0; i < decoder.hidden(); ++i) outputs.push_back(make(decoder.layers[i].w.size(0)));
    residual = make(decoder.inverse_scale.size(0));
  }
  // The first rows, for a tile with fewer tokens.
  Scratch first(int64_t length) const {
    Scratch tile(*this);
    if (length == residual.size(0)) return tile;
    for (Tensor* t : {&tile.sample.z, &tile.sample.std, &tile.residual}) *t = t->narrow(0, 0, length);
    for (Tensor& t : tile.outputs) t = t.narrow(0, 0, length);
    return tile;
  }
};

// One adapted layer and its tokens, as forward and backward see them.
struct Layer {
  Tensor x;
  std::array<Tensor, 2> noise;
  at::ScalarType type;  // of sums and of everything inside
  Kept kept;
  Dropout dropout;
  Encoders encoders;
  Decoder decoder;
  Tensor up;  // s B [M, R]
  double mu;
  std::array<Bounds, 2> bounds;
  Tiles tiles;
  std::vector<Scratch> scratch;

  explicit Layer(const Inputs& in)
      : x(in.x), noise{given(in.noise1), given(in.noise2)}, type(wide(in.B())), kept(in.mask, x.size(0)),
        dropout(in.seed, in.dropout), encoders(in, type), decoder(in), up(in.B().to(type).mul(in.scaling)),
        mu(in.prior2_mean), bounds{in.bounds1(), Bounds{}},
        tiles(x.size(0), x.size(1), std::max(kLayerTile, kTokens * x.size(1)), kWork * x.size(1)) {
    TORCH_CHECK(
        !in.products.has_value(), "layer: the C++ kernel multiplies in the dtype of its parameters, and got products=",
        *in.products, "; expected none");
    for (int64_t i = 0; i < tiles.workers; ++i) scratch.emplace_back(encoders, this->decoder, tiles.length);
  }
  static Tensor given(const OptionalTensor& noise) {
    TORCH_CHECK(noise.has_value(), "layer: the C++ kernel takes its noise as tensors, and got none");
    return *noise;
  }
  std::array<Tensor, 2> noise_rows(const Tile& tile) const {
    return {tile.rows(noise[0], type), tile.rows(noise[1], type)};
  }
};

}  // namespace fvae
