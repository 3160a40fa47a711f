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
  const Inputs& in;
  std::vector<Tensor> all;

  // Rows `part` of `parts` of the sums over workers, for a parameter that is there and needed.
  void add(const Tensor& sums, bool needed, int64_t part = 0, int64_t parts = 1) {
    const at::TensorOptions options = in.B().options();
    if (!needed) return all.push_back(at::empty({0}, options));
    const bool whole = sums.size(0) == 1 && parts == 1;  // nothing to add, and memory that no other result shares
    all.push_back((whole ? sums[0] : block(sums, 1, part, parts).sum(0)).to(options.dtype()));
  }
  // Weight and bias of the linear layer with this number.
  void add(const LinearSums& sums, int64_t number, int64_t part = 0, int64_t parts = 1) {
    add(sums.w, sums.needed, part, parts);
    add(sums.b, sums.needed && in.parameters.get(2 * number + 1).has_value(), part, parts);
  }
  void add_encoder(const std::vector<LinearSums>& sums, int64_t which) {
    const int64_t hidden = in.encoder_hidden, first = in.encoder(which);
    for (int64_t i = 0; i < hidden; ++i) add(sums[i], first + i, which, 2);
    for (int64_t head = 0; head < 2; ++head) add(sums[hidden], first + hidden + head, 2 * which + head, 4);
  }
};

}  // namespace fvae
