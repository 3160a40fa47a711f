"""For tests and benchmarks: seeded inputs of every op, their gradients, and comparisons.

Inputs are dicts from argument name to value, for ``op(**inputs)``. `encode_inputs` and its siblings create them for any
size, dtype and device from a seed.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import reference
from .ops._backend import interpreting

Inputs = dict[str, Any]
Results = dict[str, Tensor]

STRIDES = ("contiguous", "transposed", "sliced", "offset")


def device_of(backend: str | None) -> str:
    """The device on which a backend is tested and timed: for Triton the GPU, unless there is none or it interprets."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() and not interpreting() else "cpu"


class Random:
    """Seeded, scaled normal numbers of one dtype on one device: the same numbers for every dtype and device."""

    def __init__(self, seed: int, dtype: torch.dtype, device: str | torch.device) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.device = dtype, device

    def __call__(self, *shape: int, scale: float = 1.0, shift: float = 0.0, grad: bool = True) -> Tensor:
        numbers = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale + shift
        return numbers.to(self.device, self.dtype).requires_grad_(grad)

    def mask(self, *shape: int) -> Tensor:
        return (torch.rand(shape, generator=self.generator) < 0.6).to(self.device)


def encode_inputs(
    lead: tuple[int, ...] = (5,),
    D: int = 7,
    R: int = 3,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Inputs:
    """Arguments of `encode` for x [*lead, D] and R latent entries."""
    random = Random(seed, dtype, device)
    return {
        "x": random(*lead, D),
        "w_mean": random(R, D, scale=max(D, 1) ** -0.5),
        "b_mean": random(R) if bias else None,
        "w_logvar": random(R, D, scale=max(D, 1) ** -0.5),
        "b_logvar": random(R) if bias else None,
        "noise": random(*lead, R, grad=False),
    }


def divergence_inputs(
    lead: tuple[int, ...] = (5,),
    R: int = 3,
    mask: bool = False,
    dtype: torch.dtype = torch.float64,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Inputs:
    """Arguments of `divergence` for posteriors of R entries."""
    random = Random(seed, dtype, device)
    names = ("mean1", "logvar1", "mean2", "logvar2")
    inputs: Inputs = {name: random(*lead, R) for name in names}
    return inputs | {"prior2_mean": 1.5, "prior2_std": 0.8, "mask": random.mask(*lead) if mask else None}


def geometry_inputs(
    lead: tuple[int, ...] = (5,),
    R: int = 3,
    mask: bool = False,
    dtype: torch.dtype = torch.float64,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Inputs:
    """Arguments of `geometry`: those of `divergence`, without gradients, which its kernels do not have."""
    inputs = divergence_inputs(lead, R, mask, dtype, device, seed)
    return {name: value.detach() if isinstance(value, Tensor) else value for name, value in inputs.items()}


def reconstruct_inputs(
    lead: tuple[int, ...] = (5,),
    D: int = 7,
    latent: int = 4,
    hidden: tuple[int, ...] = (6,),
    bias: bool = True,
    mask: bool = False,
    dtype: torch.dtype = torch.float64,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Inputs:
    """Arguments of `reconstruct` for x [*lead, D]; `hidden` are the sizes of the decoder's hidden layers."""
    random = Random(seed, dtype, device)
    sizes = (latent, *hidden, D)
    weights = [
        (random(n_out, n_in, scale=max(n_in, 1) ** -0.5), random(n_out) if bias else None)
        for n_in, n_out in itertools.pairwise(sizes)
    ]
    return {
        "x": random(*lead, D),
        "latent": random(*lead, latent),
        "hidden": tuple(weights[:-1]),
        "w_out": weights[-1][0],
        "b_out": weights[-1][1],
        "scale": random(D, scale=0.1, shift=1.0),
        "mask": random.mask(*lead) if mask else None,
    }


INPUTS: dict[str, Callable[..., Inputs]] = {
    "encode": encode_inputs,
    "divergence": divergence_inputs,
    "geometry": geometry_inputs,
    "reconstruct": reconstruct_inputs,
}


def leaves(inputs: Mapping[str, Any]) -> Results:
    """The tensors of `inputs` that require grad; those in ``hidden`` have names such as ``hidden[0][1]``."""
    found: Results = {}
    for name, value in inputs.items():
        if isinstance(value, (tuple, list)):
            found |= leaves({f"{name}[{i}]": entry for i, entry in enumerate(value)})
        elif isinstance(value, Tensor) and value.requires_grad:
            found[name] = value
    return found


def convert(inputs: Mapping[str, Any], dtype: torch.dtype) -> Inputs:
    """`inputs` in another dtype, as new leaves. Masks are not changed."""

    def of(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(of(entry) for entry in value)
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().to(dtype).clone().requires_grad_(value.requires_grad)
        return value

    return {name: of(value) for name, value in inputs.items()}


def restride(inputs: Mapping[str, Any], kind: str) -> Inputs:
    """The same numbers with other strides, as new leaves; `kind` is one of `STRIDES`. Masks are not changed."""

    def of(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(of(entry) for entry in value)
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() == 0:
            return value
        t = value.detach()
        if kind == "transposed" and t.dim() > 1:
            t = t.transpose(0, -1).contiguous().transpose(0, -1)
        elif kind == "sliced":  # every second entry of each row
            t = t.repeat_interleave(2, -1)[..., ::2]
        elif kind == "offset":  # the end of longer rows
            t = torch.cat((t, t), -1)[..., t.shape[-1] :]
        return t.requires_grad_(value.requires_grad)

    return {name: of(value) for name, value in inputs.items()}


def run(function: Callable[..., Any], inputs: Mapping[str, Any], seed: int = 1, **options: Any) -> Results:
    """Outputs of `function` as ``out0``, ..., and gradients of their sum with random weights as ``grad_<name>``."""
    result = function(**inputs, **options)
    outputs = result if isinstance(result, tuple) else (result,)
    results = {f"out{i}": out.detach() for i, out in enumerate(outputs)}
    asked = leaves(inputs)
    if asked:
        weights = [Random(seed + i, out.dtype, out.device)(*out.shape, grad=False) for i, out in enumerate(outputs)]
        grads = torch.autograd.grad(outputs, list(asked.values()), weights, allow_unused=True, materialize_grads=True)
        results |= {f"grad_{name}": grad for name, grad in zip(asked, grads, strict=True)}
    return results


def assert_same(actual: Results, expected: Results, rtol: float = 1e-10) -> None:
    """Errors are at most rtol of the largest expected entry; dtype, shape, NaN and Inf must agree."""
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        finite = wanted[wanted.isfinite()].abs()
        atol = rtol * max(finite.max().item() if finite.numel() else 0.0, 1e-6)
        said = (name + ": {}").format
        torch.testing.assert_close(actual[name], wanted, rtol=rtol, atol=atol, equal_nan=True, msg=said)


def assert_no_worse(actual: Results, same_dtype: Results, exact: Results, factor: float = 2.0) -> None:
    """Low precision: each error against `exact` (float64) is at most `factor` times that of the same-dtype reference.

    A quarter of a rounding step of the largest entry is always allowed, because a reference may be exact by chance.
    """
    assert actual.keys() == same_dtype.keys() == exact.keys()
    for name, truth in exact.items():
        assert actual[name].dtype == same_dtype[name].dtype, f"{name} is {actual[name].dtype}"
        if truth.numel() == 0:
            continue
        ours, baseline = (_error(results[name], truth) for results in (actual, same_dtype))
        floor = 0.25 * torch.finfo(actual[name].dtype).eps * truth.abs().max().item()
        assert ours <= factor * baseline + floor, f"{name}: error {ours:.2e}, same-dtype reference {baseline:.2e}"


def _error(result: Tensor, truth: Tensor) -> float:
    """Root mean square, so that one unlucky rounding does not decide."""
    return (result.double() - truth).square().mean().sqrt().item()


def exact_and_rounded(op: str, inputs: Mapping[str, Any], **options: Any) -> tuple[Results, Results]:
    """Results of the reference in the dtype of `inputs`, and in float64 on the same numbers."""
    function = getattr(reference, op)
    return run(function, inputs, **options), run(function, convert(inputs, torch.float64), **options)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Uninitialised memory holds NaN, in Python and in C++, so that a kernel that reads it is seen."""
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]


class Calls(TorchDispatchMode):
    """Records all operators that run in the block: `names`, such as "aten.mm", and `arguments`."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.arguments: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func.overloadpacket))
        self.arguments.append(args)
        return func(*args, **(kwargs or {}))

    def count(self, *endings: str) -> int:
        """Number of recorded names that end with one of these."""
        return sum(name.endswith(endings) for name in self.names)
