// Gradients of a layer's parameters: each worker sums its tiles; in the end the sums of all workers are added.
#pragma once

#include "layer.h"

namespace fvae {

// sums += sign * the sums of the columns of `rows`, 16 rows at a time, so that small numbers do not drown in a large sum.
template <typename acc_t>
FVAE_VECTORISED static void add_columns(
    acc_t* sums, const acc_t* rows, int64_t stride, int64_t length, int64_t width, acc_t sign) {
  constexpr int64_t kRows = 16, kColumns = 64;
  for (int64_t first = 0; first < width; first += kColumns) {
    const int64_t columns = std::min(kColumns, width - first);
    for (int64_t start = 0; start < length; start += kRows) {
      acc_t run[kColumns] = {};
      for (int64_t n = start; n < std::min(start + kRows, length); ++n) {
        const acc_t* row = rows + n * stride + first;
        for (int64_t j = 0; j < columns; ++j) run[j] += row[j];
      }
      for (int64_t j = 0; j < columns; ++j) sums[first + j] += sign * run[j];
    }
  }
}

// Memory for a worker's sum of a gradient like t. Its first tile overwrites it; zero if the worker has no tile. The longer
// dimension comes last: measured, a product [768, 32] takes 1.2 times as long as its transpose.
inline Tensor sum_like(const Tensor& t, bool started) {
  const bool turned = t.size(0) > t.size(1);
  const auto shape = turned ? t.t().sizes().vec() : t.sizes().vec();
  const Tensor made = started ? at::empty(shape, t.options()) : at::zeros(shape, t.options());
  return turned ? made.t() : made;
}

inline std::vector<Tensor> sums_like(const Tensor& t, int64_t workers, bool started) {
  std::vector<Tensor> sums;
  for (int64_t worker = 0; worker < workers; ++worker) sums.push_back(sum_like(t, started));
  return sums;
}

// A worker's sums of the gradients of one Linear.
struct LinearSums {
  Tensor w, b;
  LinearSums(const Linear& layer, bool started) : w(sum_like(layer.w, started)), b(at::zeros_like(layer.b)) {}

  template <typename acc_t>
  void add(const Linear& layer, const Tensor& grad_out, const Tensor& in, bool first, double sign = 1) const {
    layer.grad_weight(w, grad_out, in, first ? 0 : 1, sign);
    add_columns<acc_t>(
        b.mutable_data_ptr<acc_t>(), grad_out.const_data_ptr<acc_t>(), grad_out.stride(0), grad_out.size(0),
        grad_out.size(1), sign);
  }
};

// Sums of all layers of a network and of every worker, [layers][workers]; empty if not needed.
using NetworkSums = std::vector<std::vector<LinearSums>>;

inline NetworkSums sums_of(const std::vector<Linear>& layers, bool needed, int64_t workers, bool started) {
  NetworkSums sums(layers.size());
  for (size_t i = 0; needed && i < layers.size(); ++i) {
    for (int64_t worker = 0; worker < workers; ++worker) sums[i].emplace_back(layers[i], started);
  }
  return sums;
}

// Gradients in the order and with the shapes of the parameters, in their dtype.
struct Gradients {
  const Inputs& in;
  std::vector<Tensor> all;

  void add(const Tensor& gradient, bool needed) {
    const auto options = in.B().options();
    all.push_back(needed ? gradient.to(options.dtype()).contiguous() : at::empty({0}, options));
  }
  // Weight and bias of the linear layer with this number: part `part` of `parts` equal parts of the summed rows. No two
  // results share memory.
  void add(const std::vector<LinearSums>& sums, int64_t number, int64_t part = 0, int64_t parts = 1) {
    for (const auto of : {&LinearSums::w, &LinearSums::b}) {
      const bool there = of == &LinearSums::w || in.parameters.get(2 * number + 1).has_value();
      all.push_back(there && !sums.empty() ? total(sums, of, part, parts) : at::empty({0}, in.B().options()));
    }
  }
  // Those of a held logvar1, which no layer makes, are zero.
  void add_encoders(const NetworkSums& sums, bool without_logvar1) {
    const int64_t hidden = in.encoder_hidden, left_out = without_logvar1;
    for (int64_t side = 0; side < 2; ++side) {
      const int64_t first = in.encoder(side), mean = first + hidden, logvar = mean + 1;
      for (int64_t i = 0; i < hidden; ++i) add(sums[i], first + i, side, 2);
      add(sums[hidden], mean, mean_place(side) - left_out, 4 - left_out);
      if (side == 0 && without_logvar1) {
        add_zeros(logvar, !sums[hidden].empty());
      } else {
        add(sums[hidden], logvar, logvar_place(side) - left_out, 4 - left_out);
      }
    }
  }

 private:
  void add_zeros(int64_t number, bool needed) {
    for (const int64_t i : {2 * number, 2 * number + 1}) {
      const std::optional<Tensor> parameter = in.parameters.get(i);
      const bool there = needed && parameter.has_value();
      all.push_back(there ? at::zeros_like(*parameter) : at::empty({0}, in.B().options()));
    }
  }
  Tensor total(const std::vector<LinearSums>& sums, Tensor LinearSums::* of, int64_t part, int64_t parts) const {
    Tensor total = block(sums[0].*of, 0, part, parts);
    for (size_t i = 1; i < sums.size(); ++i) total.add_(block(sums[i].*of, 0, part, parts));
    const Tensor result = total.to(in.B().scalar_type());
    return result.is_contiguous() && parts == 1 ? result : at::empty(result.sizes(), result.options()).copy_(result);
  }
};

}  // namespace fvae
