// Shared by the kernels: the accumulation type, and the loop over tiles of tokens.
#pragma once

// ATen/ATen.h instead would take half of the time of a compilation.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/add.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

// Compiles a function for newer vector units as well; the loader picks the best version.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define FVAE_VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FVAE_VECTORISED
#endif

namespace fvae {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Needs = std::array<bool, 4>;  // the gradients that a backward computes; the others are returned empty

#define FVAE_DISPATCH(type, name, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, type, name, __VA_ARGS__)

// log-variances are clamped to [-20, 20] wherever a Gaussian is made of them.
constexpr double kLogvarLimit = 20.0;

// exp of clamped log-variances, in fresh memory; NaN stays NaN. ATen's clamp and exp use the vector instructions of the
// machine they run on; the loops here are compiled for any machine.
inline Tensor clamped_exp(const Tensor& logvar, double factor = 1) {
  return logvar.clamp(-kLogvarLimit, kLogvarLimit).mul_(factor).exp_();
}

template <typename T>
bool clamp_passes(T logvar) {
  return logvar >= -kLogvarLimit && logvar <= kLogvarLimit;
}

// Sums are taken in float32 at least.
inline at::ScalarType wide(const Tensor& t) {
  return at::toOpMathType(t.scalar_type());
}

// Turns off autograd and autocast inside a kernel. Worker threads need a guard of their own: they do not inherit the
// state of the calling thread.
struct PlainTensors {
  at::AutoDispatchBelowADInplaceOrView autograd;
  c10::impl::ExcludeDispatchKeyGuard autocast{c10::autocast_dispatch_keyset};
};

// Memory for a gradient [shape]; empty if it is not needed.
inline Tensor gradient(bool needed, at::IntArrayRef shape, const at::TensorOptions& options) {
  return needed ? at::empty(shape, options) : at::empty({0}, options);
}

struct Tile {
  int64_t index, start, length;  // tokens start ... start + length - 1
  int64_t worker;
  bool first;  // of its worker

  // These tokens of t [N, ...].
  Tensor of(const Tensor& t) const {
    return length == t.size(0) ? t : t.narrow(0, start, length);
  }
  // The same, contiguous and in the given type; a copy only if they are not.
  Tensor rows(const Tensor& t, at::ScalarType type) const {
    return of(t).to(type).contiguous();
  }
  Tensor rows(const Tensor& t) const {
    return of(t).contiguous();
  }
};

// N tokens, cut into tiles. A tile holds at most `floats` entries in rows of `width`: 256 KB by default, a part of a
// core's L2. Every thread gets the same number of tiles, but a tile is never so short that starting a thread costs more
// than it saves; `work` is the cost of a token, in elements of a simple loop. Each worker takes consecutive tiles. Tiles
// and workers depend on sizes and on the number of threads only, and partial results are added in order, so the same
// inputs give the same bits.
struct Tiles {
  int64_t tokens, length, count, workers;

  Tiles(int64_t tokens, int64_t width) : Tiles(tokens, width, 1 << 16, width) {}
  Tiles(int64_t tokens, int64_t width, int64_t floats, int64_t work) : tokens(tokens) {
    const int64_t threads = at::get_num_threads(), fits = std::max<int64_t>(floats / std::max<int64_t>(width, 1), 16);
    const int64_t worthwhile = at::divup(at::internal::GRAIN_SIZE, std::max<int64_t>(work, 1));
    const int64_t wanted = threads * std::max<int64_t>(at::divup(tokens, threads * fits), 1);
    length = std::max(at::divup(tokens, wanted), worthwhile);
    count = at::divup(tokens, length);
    workers = std::min(count, threads);
  }

  template <typename Body>
  void for_each(const Body& body) const {
    at::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
      const PlainTensors guard;
      for (int64_t worker = first; worker < last; ++worker) {
        const int64_t start = worker * count / workers;
        for (int64_t i = start; i < (worker + 1) * count / workers; ++i) {
          body(Tile{i, i * length, std::min(length, tokens - i * length), worker, i == start});
        }
      }
    });
  }
};

// The tokens that a mask [N] keeps; all of them if there is no mask.
struct Kept {
  Tensor mask;
  const bool* flags = nullptr;
  int64_t count;

  Kept(const OptionalTensor& given, int64_t tokens) : count(tokens) {
    if (given.has_value()) {
      mask = given->contiguous();
      flags = mask.const_data_ptr<bool>();
      count = std::count(flags, flags + tokens, true);
    }
  }
  bool operator[](int64_t token) const {
    return flags == nullptr || flags[token];
  }
};

}  // namespace fvae
