// Gradients of a layer's parameters: sums of each worker while tiles pass, and what a backward returns in the end.
#pragma once

#include "layer.h"

namespace fvae {

// Sums over a worker's tokens of the gradients of one Linear, [workers, ...].
struct LinearSums {
  bool needed;
  Tensor w, b;
  LinearSums(const Linear& layer, bool needed, int64_t workers)
      : needed(needed),
        w(at::zeros({needed ? workers : 0, layer.w.size(0), layer.w.size(1)}, layer.w.options())),
        b(at::zeros({needed ? workers : 0, layer.b.size(0)}, layer.w.options())) {}
  void add(const Linear& layer, const Tensor& grad_out, const Tensor& in, int64_t worker) const {
    layer.add_grads(w.select(0, worker), b.select(0, worker), grad_out, in);
  }
};

inline std::vector<LinearSums> sums_of(const std::vector<Linear>& layers, bool needed, int64_t workers) {
  std::vector<LinearSums> sums;
  for (const Linear& layer : layers) sums.emplace_back(layer, needed, workers);
  return sums;
}

// Gradients in the order and with the shapes of the parameters, in their dtype.
struct Gradients {
  at::TensorOptions options;
  std::vector<Tensor> all;

  // Rows `part` of `parts` of the sums over workers, for a parameter that is there and needed.
  void add(const Tensor& sums, bool needed, int64_t part = 0, int64_t parts = 1) {
    if (!needed) return all.push_back(at::empty({0}, options));
    const bool whole = sums.size(0) == 1 && parts == 1;  // nothing to add, and memory that no other result shares
    all.push_back((whole ? sums[0] : block(sums, 1, part, parts).sum(0)).to(options.dtype()));
  }
  // The i-th weight and bias of `parameters`.
  void add(const LinearSums& sums, const Parameters& parameters, int64_t i, int64_t part = 0, int64_t parts = 1) {
    add(sums.w, sums.needed, part, parts);
    add(sums.b, sums.needed && parameters.get(2 * i + 1).has_value(), part, parts);
  }
  void add_encoder(const std::vector<LinearSums>& sums, const Parameters& parameters, int64_t which) {
    const int64_t hidden = static_cast<int64_t>(sums.size()) - 1;
    for (int64_t i = 0; i < hidden; ++i) add(sums[i], parameters, i, which, 2);
    for (int64_t head = 0; head < 2; ++head) add(sums[hidden], parameters, hidden + head, 2 * which + head, 4);
  }
};

}  // namespace fvae
