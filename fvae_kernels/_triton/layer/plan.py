"""The layer's steps as a plan runs them: what `steps` needs is prepared once, and launches go direct."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops._layer_inputs import Arriving, Needs, Networks, Options, Tensors
from .. import tables
from .._common import precision
from .launch import stream_of, why_general
from .prepared import Case, Prepared, numbers_of, prepared
from .steps import Given, backward, by_rows, forward, named, packed, packed_networks

OFF_16 = (15).__and__  # of an address: bytes after the last multiple of 16


class TritonSteps:
    """Forward and backward for parameters whose shapes, strides and dtypes the plan checks. See ops._layer_plan."""

    def __init__(self, parameters: Sequence[Tensor | None], options: Options, detach_target: bool) -> None:
        self.options, self.detach_target, self.numbers = options, detach_target, numbers_of(options)
        self.there = tuple(p is not None for p in parameters)
        self.given = [p for p in parameters if p is not None]
        self.parameters = parameters
        self.networks = named(parameters, options.encoder_hidden)
        self._of_case: dict[Any, Prepared] = {}

    def forward(self, base: Tensor | None, tensors: Tensors) -> tuple[Tensor, Tensor, Tensor, Any]:
        """y [N, M], the terms [4], the state, and what backward reuses."""
        given, base = _given(tensors), None if base is None else by_rows(base)
        ready, networks = self._ready(tensors), self._networks(tensors.parameters)
        return *forward(base, given, networks, ready, self.numbers, self._stream(given.x, networks)), ready

    def backward(
        self, arriving: Arriving, tensors: Tensors, state: Tensor, needs: Needs, kept: Prepared
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """grad_x [N, D], and the gradients of the parameters, one after the other in one buffer.

        The parameters are those of forward, or as autograd's saved-tensor hooks returned them.
        """
        grad_y = None if arriving.grad_y is None else by_rows(arriving.grad_y)
        given, networks = _given(tensors), self._networks(tensors.parameters)

        def together(plan: Any) -> Sequence[Tensor]:
            flat = state.new_empty(sum(plan.entries), dtype=networks.B.dtype)
            pairs = zip(tensors.parameters, plan.flags, strict=True)
            needed = [p for p, flag in pairs if flag and p is not None]
            return torch._C._nn.unflatten_dense_tensors(flat, needed)

        return backward(
            Arriving(grad_y, *arriving[1:]),
            given,
            networks,
            state,
            needs,
            self.detach_target,
            self.there,
            kept,
            self.numbers,
            together,
            self._stream(given.x, networks),
        )

    def _networks(self, parameters: Sequence[Tensor | None]) -> Networks:
        """The plan's own parameters, or others; as copies where their data no longer start at multiples of 16 bytes."""
        own = all(map(operator.is_, parameters, self.parameters))
        if own and not any(map(OFF_16, map(Tensor.data_ptr, self.given))):
            return self.networks
        return packed_networks(parameters, self.options.encoder_hidden)

    def _ready(self, tensors: Tensors) -> Prepared:
        x, masked, networks = tensors.x, tensors.mask is not None, self.networks
        key = (
            masked,
            x.shape[0] >= tables.FEW_TOKENS,
            precision(networks.B.dtype, self.options.products),
            tables.changes(),
        )
        found = self._of_case.get(key)
        if found is None:
            case = Case.of(networks, self.options, False, masked, True, x.shape[0])
            found = self._of_case[key] = prepared(case)
        return found

    def _stream(self, x: Tensor, networks: Networks) -> int | None:
        """The stream for direct launches; None where Triton must launch."""
        return stream_of(x.device.index or 0) if networks is self.networks and why_general() is None else None


def _given(tensors: Tensors) -> Given:
    return Given(by_rows(tensors.x), None, None, None if tensors.mask is None else packed(tensors.mask), tensors.seed)
