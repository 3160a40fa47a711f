// Dropout by position: whether an activation is kept follows from the seed, its layer, its token and its unit, so that
// backward makes the same decisions again and nothing of them is stored.
#pragma once

#include "common.h"

#include <cstdint>

namespace fvae {

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) of the counters
// (first + l, layer, 0), l = 0 ... blocks - 1. The 128 bits of a block decide for 8 units: the d-th 16 bits, low halves
// of words first, for unit d * blocks + l, which is kept (1, else 0) where they are below `threshold`.
FVAE_VECTORISED static void philox_keep(
    uint64_t seed, uint32_t layer, uint64_t first, int64_t blocks, uint32_t threshold, float* keep) {
#pragma GCC ivdep
  for (int64_t l = 0; l < blocks; ++l) {
    const uint64_t position = first + static_cast<uint64_t>(l);
    uint32_t c0 = static_cast<uint32_t>(position), c1 = static_cast<uint32_t>(position >> 32), c2 = layer, c3 = 0;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = uint64_t{0xD2511F53} * c0, p1 = uint64_t{0xCD9E8D57} * c2;
      c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
      c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
      c1 = static_cast<uint32_t>(p1);
      c3 = static_cast<uint32_t>(p0);
      k0 += 0x9E3779B9;
      k1 += 0xBB67AE85;
    }
    float* unit = keep + l;
    for (const uint32_t word : {c0, c1, c2, c3}) {
      unit[0] = (word & 0xFFFF) < threshold ? 1.0f : 0.0f;
      unit[blocks] = (word >> 16) < threshold ? 1.0f : 0.0f;
      unit += 2 * blocks;
    }
  }
}

struct Dropout {
  bool on;
  uint64_t seed = 0;
  uint32_t threshold = 0;  // an activation is kept with probability threshold / 2^16
  double scale = 1;        // exactly one over that probability, so that the mean stays what it is

  // No seed: nothing is dropped.
  Dropout(const OptionalTensor& given, double probability) : on(given.has_value()) {
    if (!on) return;
    seed = static_cast<uint64_t>(*given->const_data_ptr<int64_t>());
    threshold = static_cast<uint32_t>(std::clamp(std::round((1 - probability) * 65536), 1.0, 65536.0));
    scale = 65536.0 / threshold;
  }
  static int64_t blocks(int64_t width) {
    return at::divup(width, int64_t{8});
  }
  void keep(int64_t layer, int64_t token, int64_t width, float* flags) const {
    philox_keep(seed, static_cast<uint32_t>(layer), token * blocks(width), blocks(width), threshold, flags);
  }
};

template <typename acc_t>
FVAE_VECTORISED static void activate_row(acc_t* v, const acc_t* b, const float* keep, acc_t scale, int64_t width) {
  for (int64_t j = 0; j < width; ++j) {
    const acc_t sum = v[j] + b[j];
    v[j] = (sum < 0 ? acc_t(0) : sum) * (scale * keep[j]);
  }
}

template <typename acc_t>
FVAE_VECTORISED static void grad_activate_row(acc_t* grad, const acc_t* activated, acc_t scale, int64_t width) {
  for (int64_t j = 0; j < width; ++j) grad[j] = activated[j] <= 0 ? acc_t(0) : grad[j] * scale;
}

// v = dropout(relu(v + b)), in place; NaN stays NaN.
template <typename acc_t>
void activate(const Tensor& rows, const Tensor& bias, const Dropout& dropout, int64_t layer, const Tile& tile) {
  const int64_t width = rows.size(1), stride = rows.stride(0);
  acc_t* v = rows.mutable_data_ptr<acc_t>();
  std::vector<float> keep(8 * Dropout::blocks(width), 1.0f);
  for (int64_t n = 0; n < tile.length; ++n, v += stride) {
    if (dropout.on) dropout.keep(layer, tile.start + n, width, keep.data());
    activate_row<acc_t>(v, bias.const_data_ptr<acc_t>(), keep.data(), dropout.scale, width);
  }
}

// The gradient before relu and dropout, in place: what came out as 0 was cut by one or the other.
template <typename acc_t>
void grad_activate(const Tensor& grad, const Tensor& activated, const Dropout& dropout) {
  acc_t* g = grad.mutable_data_ptr<acc_t>();
  const acc_t* v = activated.const_data_ptr<acc_t>();
  for (int64_t n = 0; n < grad.size(0); ++n, g += grad.stride(0), v += activated.stride(0)) {
    grad_activate_row<acc_t>(g, v, dropout.scale, grad.size(1));
  }
}

}  // namespace fvae
