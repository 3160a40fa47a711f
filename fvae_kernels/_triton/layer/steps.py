"""The layer's forward and backward: allocations and launches.   Kernels: forward, tokens, features

Five launches: layer_fwd and layer_mean; layer_bwd, layer_grads and layer_reduce. Without a stream Triton
launches them; with a stream they go directly to the compiled kernels (see `launch`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ops._host import apart_like, empties, empties_like
from ...ops._layer_inputs import Arriving, Needs, Networks, Options, Tensors
from .arguments import Layer
from .launch import Fixed
from .objective import TermGrads
from .prepared import Case, Numbers, Prepared, numbers_of, prepared, zeros


class Weights(NamedTuple):
    """All parameters, contiguous, with zeros for a missing bias."""

    flat: Sequence[Tensor]  # in the order of `Networks.flat`
    networks: Fixed  # the same ones, named


def forward(
    shape: tuple[int, ...],
    base: Tensor | None,
    tensors: Tensors,
    weights: Weights,
    ready: Prepared,
    numbers: Numbers,
    stream: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y in this shape of N rows of M entries, the terms [4], and the state [N, state_width] for backward.

    Tensors are those of tokens [N], as `readable` gives them.
    """
    case, x, N, wide = ready.case, tensors.x, tensors.x.shape[0], ready.wide
    programs, dtype = -(-N // ready.fwd.constants["BLOCK_N"]), case.dtype if base is None else base.dtype
    of_tokens, of_sums = (dtype, shape, wide, (N, ready.state_width)), (wide, (4,), wide, (programs, 16))
    y, state, terms, statistics = empties(x, *of_tokens, *of_sums)
    if N == 0:
        return y, terms.zero_(), state
    key = x.dtype, None if base is None else base.dtype
    direct = stream is not None and key in ready.launched
    layer, tables = _layer(tensors, weights.networks.form(direct), ready.no_flags), numbers.tables.form(direct)
    latents = numbers.scaling, numbers.prior2_mean, numbers.logvar1_low, numbers.logvar1_high
    rows = layer, base, _row(base), y, state, statistics
    ready.fwd((programs, 1), (*rows, *latents, N, case.D, case.M), key, stream)
    scale = weights.networks.named.decoder.scale
    ready.mean((1, 1), (statistics, scale, *tables, layer.kept, terms, programs, N, case.D, case.R), None, stream)
    if stream is not None:
        ready.launched.add(key)
    return y, terms, state


def backward(
    shape: tuple[int, ...],
    arriving: Arriving,
    tensors: Tensors,
    weights: Weights,
    state: Tensor,
    needs: Needs,
    detach_target: bool,
    there: tuple[bool, ...],
    ready: Prepared,
    numbers: Numbers,
    stream: int | None = None,
) -> tuple[Tensor, Sequence[Tensor]]:
    """grad_x, and the gradients of those parameters that are there and needed. In a direct launch these may be parts of
    one piece of memory.

    grad_x has this shape of N rows of D entries, or is empty if it is not needed.
    `there`: of each parameter, whether there is one, which a bias may not be.
    """
    case, x, N = ready.case, tensors.x, tensors.x.shape[0]
    plan = ready.backward(needs, detach_target, arriving.at_decoder, there)
    shape = shape if needs.x else (0,)
    grad_y, state = arriving.grad_y, packed(state)
    key = x.dtype, None if grad_y is None else grad_y.dtype
    direct = stream is not None and key in plan.launched
    made = empties_like if direct else apart_like
    gradients = made(weights.flat, plan.flags)
    if N == 0 or not any(needs):
        return x.new_zeros(shape), [grad.zero_() for grad in gradients]

    layer = _layer(tensors, weights.networks.form(direct), ready.no_flags)
    objective, rest = numbers.tables.form(direct)
    tables = objective, rest if ready.wide == torch.float64 else None
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

    read = state, grad_state, inputs, grad_hidden, grad_x if needs.x else None, parts
    places = plan.places.form(direct), plan.length
    plan.grads((plan.programs, chunks), (*arrives, *read, *places, *scalars, *last), key, stream)
    if plan.entries:
        sums = parts, gradients, plan.starts, plan.entries, chunks, plan.length
        plan.reduce((plan.reduce_programs, 1), sums, None, stream)
    if stream is not None:
        plan.launched.add(key)
    return grad_x, gradients


def _layer(tensors: Tensors, networks: Any, nothing: Tensor) -> Layer:
    """What is missing is `nothing`, or x, and is not read."""
    x, mask = tensors.x, tensors.mask
    noise1 = x if tensors.noise1 is None else tensors.noise1
    noise2 = x if tensors.noise2 is None else tensors.noise2
    flags, kept = (nothing, nothing) if mask is None else (mask, mask.sum())
    return Layer(x, _row(x), networks, noise1, noise2, flags, kept, nothing if tensors.seed is None else tensors.seed)


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


def readable(tensors: Tensors) -> Tensors:
    """Those of tokens [N] in the layout that kernels read; the parameters as they are."""
    x, parameters, *others = tensors
    return Tensors(by_rows(x), parameters, *(None if t is None else packed(t) for t in others))


def packed_weights(parameters: Sequence[Tensor | None], encoder_hidden: int) -> Weights:
    """The parameters in the layout that kernels read."""
    B = parameters[-1]
    assert B is not None
    units = max((weight.shape[0] for weight in parameters[:-2:2] if weight is not None), default=1)
    nothing = zeros(B.dtype, B.device, units)
    flat = [nothing if p is None else packed(p) for p in parameters]
    return Weights(flat, Fixed.of(Networks.of(flat, encoder_hidden)))


def _all_of(tensors: Tensors, options: Options) -> tuple[Tensors, Weights, Prepared, Numbers]:
    weights, tensors = packed_weights(tensors.parameters, options.encoder_hidden), readable(tensors)
    noisy, masked, seeded = (t is not None for t in (tensors.noise1, tensors.mask, tensors.seed))
    case = Case.of(weights.networks.named, options, noisy, masked, seeded, tensors.x.shape[0])
    return tensors, weights, prepared(case), numbers_of(options)


def layer_fwd(base: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The raw operator."""
    count = len(Tensors._fields)
    tensors, weights, ready, numbers = _all_of(Tensors(*rest[:count]), _options(rest[count:]))
    shape = tensors.x.shape[0], ready.case.M
    return forward(shape, None if base is None else by_rows(base), tensors, weights, ready, numbers)


def layer_bwd(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
    """The raw operator; no two gradients share memory."""
    *arguments, state, detach_target, needs = arguments  # type: ignore[assignment]
    needs = Needs(*needs)
    first, count = len(Arriving._fields), len(Arriving._fields) + len(Tensors._fields)
    grad_y, *grad_terms = arguments[:first]
    options = _options(arguments[count:])
    tensors, weights, ready, numbers = _all_of(Tensors(*arguments[first:count]), options)
    arriving = Arriving(None if grad_y is None else by_rows(grad_y), *grad_terms)
    there = tuple(p is not None for p in tensors.parameters)
    rest = arriving, tensors, weights, state, needs, detach_target, there, ready, numbers
    grad_x, grads = backward(tensors.x.shape, *rest)
    left, flags = iter(grads), needs.flags(there, options.encoder_hidden)
    return grad_x, [next(left) if flag else weights.networks.named.B.new_empty(0) for flag in flags]


def _options(values: Sequence[Any]) -> Options:
    """The options of the raw operators, hashable."""
    options = Options(*values)
    return options._replace(objective=tuple(options.objective))
