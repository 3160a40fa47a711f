"""The layer's forward and backward: allocations and launches.   Kernels: forward, tokens, features

Five launches: layer_fwd and layer_mean; layer_bwd, layer_grads and layer_reduce. Without a stream Triton
launches them; with a stream they go directly to the compiled kernels (see `launch`).
"""

from collections.abc import Sequence
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ops._host import empties, empties_like
from ...ops._layer_inputs import Arriving, Needs, Networks, Options, Tensors
from .arguments import Layer
from .launch import Fixed
from .objective import TermGrads
from .prepared import Case, Numbers, Prepared, numbers_of, prepared, zeros


class Given(NamedTuple):
    """Inputs of one step apart from the parameters. Contiguous, except that rows of x may lie apart."""

    x: Tensor
    noise1: Tensor | None
    noise2: Tensor | None
    mask: Tensor | None
    kept: Tensor | None  # number of tokens that the mask keeps
    seed: Tensor | None


class Weights(NamedTuple):
    """All parameters, contiguous, with zeros for a missing bias."""

    flat: Sequence[Tensor]  # in the order of `Networks.flat`
    networks: Fixed  # the same ones, named


def forward(
    shape: tuple[int, ...],
    base: Tensor | None,
    given: Given,
    weights: Weights,
    ready: Prepared,
    numbers: Numbers,
    stream: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y in this shape of N rows of M entries, the terms [4], and the state [N, state_width] for backward."""
    case, x, N, wide = ready.case, given.x, given.x.shape[0], ready.wide
    programs, dtype = -(-N // ready.fwd.constants["BLOCK_N"]), case.dtype if base is None else base.dtype
    of_tokens, of_sums = (dtype, shape, wide, (N, ready.state_width)), (wide, (4,), wide, (programs, 16))
    y, state, terms, statistics = empties(x, *of_tokens, *of_sums)
    if N == 0:
        return y, terms.zero_(), state
    key = x.dtype, None if base is None else base.dtype
    direct = stream is not None and ready.knows(key)
    layer, tables = _layer(given, weights.networks.form(direct), ready.no_flags), numbers.tables.form(direct)
    latents = numbers.scaling, numbers.prior2_mean, numbers.logvar1_low, numbers.logvar1_high
    tokens = layer, base, _row(base), y, state, statistics
    ready.fwd((programs, 1), (*tokens, *latents, N, case.D, case.M), key, stream)
    kept, scale = ready.no_flags if given.kept is None else given.kept, weights.networks.named.decoder.scale
    ready.mean((1, 1), (statistics, scale, *tables, kept, terms, programs, N, case.D, case.R), None, stream)
    return y, terms, state


def backward(
    shape: tuple[int, ...],
    arriving: Arriving,
    given: Given,
    weights: Weights,
    state: Tensor,
    needs: Needs,
    detach_target: bool,
    there: tuple[bool, ...],
    ready: Prepared,
    numbers: Numbers,
    stream: int | None = None,
) -> tuple[Tensor, Sequence[Tensor]]:
    """grad_x, and the gradients of those parameters that are there and needed; no two share memory.

    grad_x has this shape of N rows of D entries, or is empty if it is not needed.
    `there`: of each parameter, whether there is one, which a bias may not be.
    """
    case, x, N = ready.case, given.x, given.x.shape[0]
    plan = ready.backward(needs, detach_target, arriving.at_decoder, there)
    gradients = tuple(empties_like(list(compress(weights.flat, plan.flags))))
    shape = shape if needs.x else (0,)
    if N == 0 or not any(needs):
        return x.new_zeros(shape), [grad.zero_() for grad in gradients]

    grad_y, state = arriving.grad_y, packed(state)
    key = x.dtype, None if grad_y is None else grad_y.dtype
    direct = stream is not None and plan.knows(key)
    layer, tables = _layer(given, weights.networks.form(direct), ready.no_flags), numbers.tables.form(direct)
    chunks, scratch = plan.work(N)
    grad_x, memory = empties(x, x.dtype, shape, ready.wide, (scratch.entries,))
    grad_state, inputs, grad_hidden, parts = scratch.parts(memory, direct)
    term_grads = TermGrads(*[ready.no_gradient if grad is None else aligned(grad) for grad in arriving[1:]])
    arrives = layer, grad_y, _row(grad_y), term_grads
    scalars = numbers.recon_weight, numbers.scaling
    last = numbers.logvar1_low, numbers.logvar1_high, N, case.D, case.M
    if plan.latents or plan.inputs:
        programs = -(-N // plan.tokens.constants["BLOCK_N"])
        to = state, grad_state, inputs, grad_hidden
        plan.tokens((programs, 1), (*arrives, *tables, *to, *scalars, numbers.prior2_mean, *last), key, stream)

    tensors = state, grad_state, inputs, grad_hidden, grad_x if needs.x else None, parts
    places = plan.places.form(direct), plan.length
    plan.grads((plan.programs, chunks), (*arrives, *tensors, *places, *scalars, *last), key, stream)
    if plan.entries:
        sums = parts, gradients, plan.starts, plan.entries, chunks, plan.length
        plan.reduce((plan.reduce_programs, 1), sums, None, stream)
    return grad_x, gradients


def _layer(given: Given, networks: Any, nothing: Tensor) -> Layer:
    """What is missing is `nothing`, or x, and is not read."""
    x = given.x
    return Layer(
        x,
        _row(x),
        networks,
        x if given.noise1 is None else given.noise1,
        x if given.noise2 is None else given.noise2,
        nothing if given.mask is None else given.mask,
        nothing if given.kept is None else given.kept,
        nothing if given.seed is None else given.seed,
    )


def _row(t: Tensor | None) -> int:
    """Stride from row to row; that of a single row may be anything. 0 without a tensor."""
    return 0 if t is None else t.stride(0) if t.shape[0] > 1 else t.shape[1]


# Triton compiles another kernel, for seconds, where a pointer or a stride is divisible by 16 and was not before, or the
# other way round. So all inputs come in one form, and the few that do not have it are copied.


def aligned(t: Tensor) -> Tensor:
    """t, or a copy if it does not start at a multiple of 16 bytes."""
    return t if t.data_ptr() % 16 == 0 else t.clone()


def by_rows(t: Tensor) -> Tensor:
    """t [N, D] with contiguous rows, aligned, whose stride is D or divisible by 16 exactly if D is; else a copy."""
    if t.data_ptr() % 16 == 0:
        if t.is_contiguous():
            return t
        D, stride = t.shape[1], t.stride(0)
        if t.stride(1) == 1 and 1 not in (stride, D) and (stride % 16 == 0) == (D % 16 == 0):
            return t
    return t.clone(memory_format=torch.contiguous_format)


def packed(t: Tensor) -> Tensor:
    """t, contiguous and aligned; a copy if it is not."""
    return aligned(t.contiguous())


def given_of(
    x: Tensor, noise1: Tensor | None, noise2: Tensor | None, mask: Tensor | None, seed: Tensor | None
) -> Given:
    """The inputs in the layout that kernels read. x is [N, D]."""
    noise1, noise2, mask, seed = [None if t is None else packed(t) for t in (noise1, noise2, mask, seed)]
    return Given(by_rows(x), noise1, noise2, mask, None if mask is None else mask.sum(), seed)


def packed_weights(parameters: Sequence[Tensor | None], encoder_hidden: int) -> Weights:
    """The parameters in the layout that kernels read."""
    B = parameters[-1]
    assert B is not None
    units = max((weight.shape[0] for weight in parameters[:-2:2] if weight is not None), default=1)
    nothing = zeros(B.dtype, B.device, units)
    flat = [nothing if p is None else packed(p) for p in parameters]
    return Weights(flat, Fixed.of(Networks.of(flat, encoder_hidden)))


def _all_of(tensors: Tensors, options: Options) -> tuple[Given, Weights, Prepared, Numbers]:
    x, parameters, noise1, noise2, mask, seed = tensors
    weights, given = packed_weights(parameters, options.encoder_hidden), given_of(x, noise1, noise2, mask, seed)
    case = Case.of(weights.networks.named, options, noise1 is not None, mask is not None, seed is not None, x.shape[0])
    return given, weights, prepared(case), numbers_of(options)


def layer_fwd(base: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The raw operator."""
    count = len(Tensors._fields)
    given, weights, ready, numbers = _all_of(Tensors(*rest[:count]), _options(rest[count:]))
    shape = given.x.shape[0], ready.case.M
    return forward(shape, None if base is None else by_rows(base), given, weights, ready, numbers)


def layer_bwd(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
    """The raw operator; no two gradients share memory."""
    *arguments, state, detach_target, needs = arguments  # type: ignore[assignment]
    needs = Needs(*needs)
    first, count = len(Arriving._fields), len(Arriving._fields) + len(Tensors._fields)
    grad_y, *grad_terms = arguments[:first]
    tensors, options = Tensors(*arguments[first:count]), _options(arguments[count:])
    given, weights, ready, numbers = _all_of(tensors, options)
    arriving = Arriving(None if grad_y is None else by_rows(grad_y), *grad_terms)
    there = tuple(p is not None for p in tensors.parameters)
    rest = arriving, given, weights, state, needs, detach_target, there, ready, numbers
    grad_x, grads = backward(given.x.shape, *rest)
    left, flags = iter(grads), needs.flags(there, options.encoder_hidden)
    return grad_x, [next(left) if flag else weights.networks.named.B.new_empty(0) for flag in flags]


def _options(values: Sequence[Any]) -> Options:
    """The options of the raw operators, hashable."""
    options = Options(*values)
    return options._replace(objective=tuple(options.objective))
