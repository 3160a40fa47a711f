"""Costs that do not depend on the machine: operators, bytes and FLOPs of a call, and bytes saved for backward."""

import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from .flops import FORMULAS

FREE = (  # they run no kernel, though they are not marked as views
    *("aten::detach", "aten::_unsafe_view", "aten::lift_fresh", "prim::device"),
    *("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"),
)
PACKAGES = ("torch", "peft", "transformers", "triton")


@dataclass(frozen=True)
class Launch:
    """One operator or kernel: bytes of its inputs and outputs, its FLOPs, and the dtype of these."""

    name: str
    bytes: int
    flops: int
    dtype: torch.dtype = torch.float32


class Cost(TorchDispatchMode):
    """Counts in a block the operators that run a kernel: their number, bytes in and out, FLOPs.

    Views are free. A tensor changed in place counts once. FLOPs are those of matrix products, as counted by
    `torch.utils.flop_counter` and `flops`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Launch] = []

    @property
    def launches(self) -> int:
        """Number of operators."""
        return len(self.operators)

    @property
    def bytes(self) -> int:
        """Of all of them."""
        return sum(operator.bytes for operator in self.operators)

    @property
    def flops(self) -> int:
        """Of all of them."""
        return sum(operator.flops for operator in self.operators)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        name = packet._qualified_op_name
        if func.is_view or name in FREE:
            return out
        touched = {id(t): t for t in tree_iter((args, kwargs, out)) if isinstance(t, Tensor)}
        flops = 0
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        elif name.startswith("fvae_"):
            flops = FORMULAS.get(name, FORMULAS[name.partition("::")[2]])(*args)
        dtype = next((t.dtype for t in touched.values() if t.is_floating_point()), torch.float32)
        self.operators.append(Launch(name, sum(map(nbytes, touched.values())), flops, dtype))
        return out


def nbytes(t: Tensor) -> int:
    """Bytes of the entries of t."""
    return t.numel() * t.element_size()


class Saved:
    """Bytes that autograd saves for backward in a block. Each storage counts once; `known` tensors do not count.

    Saved tensors stay alive until the end of the block, so that no address is counted twice or missed.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        self._skip = {t.untyped_storage().data_ptr() for t in known}
        self._storages: dict[int, int] = {}
        self._alive: list[Tensor] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)

    def __enter__(self) -> "Saved":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
        self._alive.clear()

    def _pack(self, t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        self._alive.append(t.detach())
        if storage.data_ptr() not in self._skip:
            self._storages[storage.data_ptr()] = storage.nbytes()
        return t

    @property
    def bytes(self) -> int:
        """The sum over storages."""
        return sum(self._storages.values())


def count(run: Callable[[], object], known: Iterable[Tensor] = ()) -> dict[str, Any]:
    """Operators, bytes, FLOPs and saved bytes of one call, by name; `known` as for `Saved`."""
    with Cost() as cost, Saved(known) as saved:
        run()
    return {"launches": cost.launches, "bytes": cost.bytes, "flops": cost.flops, "saved_bytes": saved.bytes}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages whose code is timed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
