"""The layer's steps as a plan runs them: what `steps` needs is prepared once, and launches go direct."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...ops._layer_inputs import Arriving, Needs, Options, Tensors
from .. import tables
from .._common import precision
from .launch import stream_of, why_general
from .prepared import Case, Prepared, numbers_of, prepared, zeros
from .steps import Given, Weights, backward, by_rows, forward


class TritonSteps:
    """Forward and backward for parameters whose shapes, strides and dtypes the plan checks. See ops._layer_plan."""

    def __init__(self, parameters: Sequence[Tensor | None], options: Options, detach_target: bool) -> None:
        self.options, self.detach_target, self.numbers = options, detach_target, numbers_of(options)
        self.there = tuple(p is not None for p in parameters)
        B = parameters[-1]
        assert B is not None
        units = max(weight.shape[0] for weight in parameters[:-2:2] if weight is not None)
        self.nothing = zeros(B.dtype, B.device, units)  # in place of a missing bias
        self.parameters = parameters
        self._note(self._addresses(parameters))
        self._of_case: dict[Any, Prepared] = {}

    def forward(self, base: Tensor | None, tensors: Tensors) -> tuple[Tensor, Tensor, Tensor, Any]:
        """y [N, M], the terms [4], the state, and what backward reuses."""
        given, base = _given(tensors), None if base is None else by_rows(base)
        addresses = self._addresses(self.parameters)
        if addresses != self.addresses:
            self._note(addresses)
        ready = self._ready(tensors)
        return *forward(base, given, self.weights, ready, self.numbers, self._stream(given.x, base)), ready

    def backward(
        self, arriving: Arriving, tensors: Tensors, state: Tensor, needs: Needs, kept: Prepared
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """grad_x [N, D], and the gradients of the parameters that exist and need one.

        The parameters are those of forward, or as autograd's saved-tensor hooks returned them.
        """
        grad_y = None if arriving.grad_y is None else by_rows(arriving.grad_y)
        given, known = _given(tensors), self._addresses(tensors.parameters) == self.addresses
        return backward(
            Arriving(grad_y, *arriving[1:]),
            given,
            self.weights if known else Weights.of(self._filled(tensors.parameters), self.options.encoder_hidden),
            state,
            needs,
            self.detach_target,
            self.there,
            kept,
            self.numbers,
            self._stream(given.x, grad_y) if known else None,
        )

    def _filled(self, parameters: Sequence[Tensor | None]) -> list[Tensor]:
        return [self.nothing if p is None else p for p in parameters]

    def _addresses(self, parameters: Sequence[Tensor | None]) -> list[int]:
        return list(map(Tensor.data_ptr, self._filled(parameters)))

    def _note(self, addresses: list[int]) -> None:
        """Prepare what kernels take; again when the parameters have moved in memory."""
        self.addresses, self.aligned = addresses, all(address % 16 == 0 for address in addresses)
        self.weights = Weights.of(self._filled(self.parameters), self.options.encoder_hidden, addresses)

    def _ready(self, tensors: Tensors) -> Prepared:
        x, masked, networks = tensors.x, tensors.mask is not None, self.weights.tensors
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
        """The stream for direct launches; None where Triton must launch, because of how data are aligned."""
        if not self.aligned or x.data_ptr() % 16 or (other is not None and other.data_ptr() % 16):
            return None
        return stream_of(x.device.index or 0) if why_general() is None else None


def _given(tensors: Tensors) -> Given:
    return Given(by_rows(tensors.x), None, None, tensors.mask, tensors.seed)
