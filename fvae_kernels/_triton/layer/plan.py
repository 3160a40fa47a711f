"""The layer's steps as a plan runs them: what `steps` needs is prepared once, and launches go direct."""

from collections.abc import Sequence
from itertools import compress
from typing import Any

from torch import Tensor

from ...ops._checks import rows
from ...ops._host import addresses_of, lie_at
from ...ops._layer_inputs import Arriving, Needs, Options, Tensors
from .. import tables
from .._common import precision
from .launch import stream_of, why_general
from .prepared import Case, Prepared, numbers_of, prepared
from .steps import backward, by_rows, forward, packed, packed_weights


class TritonSteps:
    """Forward and backward for parameters whose shapes, strides and dtypes the plan checks. See ops._layer_plan."""

    def __init__(self, parameters: Sequence[Tensor | None], options: Options, detach_target: bool) -> None:
        self.options, self.detach_target, self.numbers = options, detach_target, numbers_of(options)
        self.there = tuple(p is not None for p in parameters)
        self.parameters, self._present = parameters, [p for p in parameters if p is not None]
        self._note()
        self._of_case: dict[Any, Prepared] = {}

    def forward(self, base: Tensor, tensors: Tensors) -> tuple[Tensor, Tensor, Tensor, Any]:
        """y in the shape of `base`, the terms [4], the state, and what backward reuses."""
        if not lie_at(self._present, self.addresses):
            self._note()
        tensors, ready = _readable(tensors), self._ready(tensors)
        stream = _stream(tensors.x)
        return *forward(base.shape, by_rows(rows(base)), tensors, self.weights, ready, self.numbers, stream), ready

    def backward(
        self, arriving: Arriving, tensors: Tensors, state: Tensor, needs: Needs, kept: Prepared
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """grad_x in the shape of x, and the gradients of the parameters that exist and need one.

        The parameters are those of forward, or as autograd's saved-tensor hooks returned them.
        """
        x = tensors.x
        present = list(compress(tensors.parameters, self.there))
        known = lie_at(present, self.addresses)  # type: ignore[arg-type]
        weights = self.weights if known else packed_weights(tensors.parameters, self.options.encoder_hidden)
        tensors = _readable(tensors)
        return backward(
            x.shape,
            _readable_grads(arriving),
            tensors,
            weights,
            state,
            needs,
            self.detach_target,
            self.there,
            kept,
            self.numbers,
            _stream(tensors.x),
        )

    def _note(self) -> None:
        """Prepare what kernels take; again when the parameters have moved in memory."""
        self.weights = packed_weights(self.parameters, self.options.encoder_hidden)
        aligned = all(p.data_ptr() % 16 == 0 for p in self._present)  # else kernels read copies, new ones in each step
        self.addresses = addresses_of(self._present if aligned else [])

    def _ready(self, tensors: Tensors) -> Prepared:
        x, masked, networks = tensors.x, tensors.mask is not None, self.weights.networks.named
        N = x.shape[:-1].numel()
        key = (
            masked,
            N >= tables.FEW_TOKENS,
            precision(networks.B.dtype, self.options.products),
            tables.changes(),
        )
        found = self._of_case.get(key)
        if found is None:
            case = Case.of(networks, self.options, False, masked, True, N)
            found = self._of_case[key] = prepared(case)
        return found


def _stream(x: Tensor) -> int | None:
    """The stream for direct launches; None where Triton must launch."""
    return stream_of(x.device.index or 0) if why_general() is None else None


def _readable(tensors: Tensors) -> Tensors:
    """As `steps.readable`, for tokens [...] without noise and with a seed of our own."""
    x, mask = by_rows(rows(tensors.x)), tensors.mask
    if x is tensors.x and mask is None:
        return tensors
    return tensors._replace(x=x, mask=None if mask is None else packed(mask))


def _readable_grads(arriving: Arriving) -> Arriving:
    """The same with grad_y for tokens [N] in the layout that kernels read."""
    given = arriving.grad_y
    grad_y = None if given is None else by_rows(rows(given))
    return arriving if grad_y is given else arriving._replace(grad_y=grad_y)
