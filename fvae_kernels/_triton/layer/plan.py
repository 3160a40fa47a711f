"""The layer's steps for parameters that stay: what `steps` needs is made once, and launches go straight."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops._layer_inputs import Arriving, Needs, Networks, Options, Tensors
from .. import tables
from .._common import precision
from .launch import stream_of, why_general
from .prepared import Case, Prepared, numbers_of, prepared, zeros
from .steps import Given, backward, by_rows, forward


class TritonSteps:
    """Forward and backward for parameters whose shapes, strides and dtypes the plan watches. See ops._layer_plan."""

    def __init__(self, parameters: Sequence[Tensor | None], options: Options, detach_target: bool) -> None:
        self.options, self.detach_target, self.numbers = options, detach_target, numbers_of(options)
        self.there = tuple(p is not None for p in parameters)
        self.aligned = all(p is None or p.data_ptr() % 16 == 0 for p in parameters)
        B = parameters[-1]
        assert B is not None
        units = max(weight.shape[0] for weight in parameters[:-2:2] if weight is not None)
        self.nothing = zeros(B.dtype, B.device, units)
        self._of_case: dict[Any, Prepared] = {}

    def forward(self, base: Tensor | None, tensors: Tensors) -> tuple[Tensor, Tensor, Tensor]:
        """y [N, M], the terms [4], the state."""
        networks, base = self._networks(tensors), None if base is None else by_rows(base)
        given = _given(tensors)
        ready = self._ready(networks, tensors)
        return forward(base, given, networks, ready, self.numbers, self._stream(given.x, base))

    def backward(
        self, arriving: Arriving, tensors: Tensors, state: Tensor, needs: Needs
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """grad_x [N, D], and the gradients of parameters, one after the other in one piece of memory.

        The parameters are those of forward, or what hooks of autograd's have made of them meanwhile.
        """
        grad_y = None if arriving.grad_y is None else by_rows(arriving.grad_y)
        networks, given = self._networks(tensors), _given(tensors)
        ready = self._ready(networks, tensors)

        def together(plan: Any) -> Sequence[Tensor]:
            flat = state.new_empty(sum(plan.entries), dtype=networks.B.dtype)
            needed = [p for p, flag in zip(tensors.parameters, plan.flags, strict=True) if flag]
            return torch._C._nn.unflatten_dense_tensors(flat, needed)  # type: ignore[attr-defined,no-any-return]

        return backward(
            Arriving(grad_y, *arriving[1:]),
            given,
            networks,
            state,
            needs,
            self.detach_target,
            self.there,
            ready,
            self.numbers,
            together,
            self._stream(given.x, grad_y),
        )

    def _networks(self, tensors: Tensors) -> Networks:
        entries = [self.nothing if p is None else p for p in tensors.parameters]
        return Networks.of(entries, self.options.encoder_hidden)

    def _ready(self, networks: Networks, tensors: Tensors) -> Prepared:
        x, masked = tensors.x, tensors.mask is not None
        key = (
            masked,
            x.shape[0] >= tables.FEW_TOKENS,
            precision(networks.B.dtype, self.options.products),
            tables.changes(),
        )
        found = self._of_case.get(key)
        if found is None:
            case = Case.of(networks, self.options, False, masked, True, x.shape[0])
            found = self._of_case[key] = prepared(case, tables.changes())
        return found

    def _stream(self, x: Tensor, other: Tensor | None) -> int | None:
        """Where launches go straight; None where they take Triton's road, which looks at how data are aligned."""
        if not self.aligned or x.data_ptr() % 16 or (other is not None and other.data_ptr() % 16):
            return None
        return stream_of(x.device.index or 0) if why_general() is None else None


def _given(tensors: Tensors) -> Given:
    return Given(by_rows(tensors.x), None, None, tensors.mask, tensors.seed)
