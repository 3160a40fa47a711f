"""One pass over calibration data: the sums that fits and truncations need, for every adapted layer."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.adapter import FVAEAdapter
from ..reference import mlp
from ..training.hooks import masks_noted
from .factors import wide
from .layers import AdaptedLayer, check_served, evaluating

KEPT_ASIDE = 8  # one example of so many is kept aside, to measure what a fit loses
ASIDE_TOKENS = 2048  # of each layer, at most; they wait on the CPU


class Statistics:
    """Sums over the tokens of one layer, in float64, with x ``[n, D]`` its input and m ``[n, R]`` the latent mean_1.

    Attributes:
        tokens: n, number of tokens in the sums.
        inputs: ``[D + 1, D + 1]``, sum of ``[x, 1] [x, 1]^T``; None unless it was asked for.
        products: ``[D + 1, R]``, sum of ``[x, 1] m^T``; None unless it was asked for.
        latents: ``[R, R]``, sum of ``m m^T``.
        latents2: ``[R]`` and ``[R]``, sums of mean_2 and of its squares; None unless it was asked for.
        fired: for each hidden layer of encoder 1, the number of all tokens for which each unit is above zero.
    """

    def __init__(self, adapter: FVAEAdapter, inputs: bool = False, second: bool = False) -> None:
        self.adapter, self.examples, self.tokens = adapter, 0, 0
        R, D = adapter.config.rank, adapter.in_features
        self.device = wide(adapter.B.detach()[:0]).device

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=self.device)

        self.latents, self.latent_sum = zeros(R, R), zeros(R)
        self.inputs = zeros(D + 1, D + 1) if inputs else None
        self.products = zeros(D + 1, R) if inputs else None
        self.latents2 = (zeros(R), zeros(R)) if second else None
        self.fired = [zeros(size) for size in adapter.config.encoder_hidden]
        self.aside: list[tuple[Tensor, Tensor]] = []  # x and m of the tokens that are kept aside
        self.aside_tokens = 0

    def add(self, x: Tensor, mask: Tensor | None) -> None:
        """Add the tokens of x ``[..., D]`` that the mask keeps. One of eight examples (first dimension) stays aside."""
        x = x.to(self.adapter.B.dtype)
        x, mask = (x.unsqueeze(0), None) if x.dim() == 1 else (x, mask)
        aside = torch.arange(self.examples, self.examples + len(x), device=x.device) % KEPT_ASIDE == 1
        self.examples += len(x)
        aside = aside.reshape(-1, *[1] * (x.dim() - 2)).expand(x.shape[:-1])
        real = torch.ones_like(aside) if mask is None else mask.bool()
        self._count_fired(x[real])
        if self.aside_tokens < ASIDE_TOKENS:
            rows = x[real & aside][: ASIDE_TOKENS - self.aside_tokens]
            self.aside.append((rows.cpu(), self.adapter._mean(1, rows).cpu()))
            self.aside_tokens += len(rows)
            real = real & ~aside
        self._sum(x[real])

    def _count_fired(self, x: Tensor) -> None:
        hidden = self.adapter._hidden("encoder1")
        for i, counts in enumerate(self.fired):
            counts += (mlp(x, hidden[: i + 1]) > 0).sum(0).to(self.device)

    def _sum(self, x: Tensor) -> None:
        adapter = self.adapter
        m = wide(adapter._mean(1, x))
        self.tokens += len(x)
        self.latents += m.T @ m
        self.latent_sum += m.sum(0)
        if self.latents2 is not None:
            mean2 = wide(adapter._mean(2, x))
            for total, values in zip(self.latents2, (mean2, mean2.square()), strict=True):
                total += values.sum(0)
        if self.inputs is not None and self.products is not None:
            rows = torch.cat((wide(x), torch.ones(len(x), 1, dtype=torch.float64, device=self.device)), 1)
            self.inputs += rows.T @ rows
            self.products += rows.T @ m

    def kept_aside(self) -> tuple[Tensor, Tensor]:
        """x ``[n, D]`` and mean_1 ``[n, R]`` of the tokens that are in no sum, in float64."""
        x, m = (torch.cat(parts) for parts in zip(*self.aside, strict=True))
        return wide(x).to(self.device), wide(m).to(self.device)


def calibrate(
    model: nn.Module, layers: list[AdaptedLayer], data: Iterable[Any], adapter_name: str, **sums: Any
) -> dict[str, Statistics]:
    """Run the model once over `data`, in eval mode and without gradients, and return each layer's sums by its name.

    Padding stays out, as it stays out of the objective. Memory for each layer: 2048 inputs on the CPU, and 8 D^2
    bytes on the device if its inputs are summed.

    Args:
        model: as adapted; its modes, hooks and weights are as before afterwards.
        layers: its adapted layers.
        data: batches: mappings or tuples of arguments, or one argument. Tensors are moved to the adapters' device.
        adapter_name: the adapter; the model must serve it.
        sums: by name, what `Statistics` is asked for; a function of the layer.

    Raises:
        TypeError: `data` is not iterable, for example a single batch in place of a list.
        ValueError: another adapter is active, fewer than two examples, a layer that never ran, or values that are not
            finite.
    """
    check_served(layers, adapter_name, "calibration")
    if isinstance(data, (Mapping, Tensor, str)) or not isinstance(data, Iterable):
        raise TypeError(
            f"calibration data is a {type(data).__name__}; expected batches, for example [batch] or a loader"
        )
    found = {
        layer.name: Statistics(layer.adapter, **{name: wanted(layer) for name, wanted in sums.items()})
        for layer in layers
    }
    handles = [
        layer.module.register_forward_pre_hook(_observer(layer, found[layer.name]), with_kwargs=True)
        for layer in layers
    ]
    device = layers[0].adapter.B.device
    try:
        with evaluating(model):
            for batch in data:
                with masks_noted():
                    run(model, moved(batch, device))
    finally:
        for handle in handles:
            handle.remove()
    for name, statistics in found.items():
        _check(name, statistics)
    return found


def _observer(layer: AdaptedLayer, statistics: Statistics) -> Any:
    def observe(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["x"]
        statistics.add(x, module.token_mask(x, layer.adapter.config))

    return observe


def _check(name: str, statistics: Statistics) -> None:
    if statistics.tokens == 0 or statistics.aside_tokens == 0:
        raise ValueError(
            f"calibration data gave layer {name!r} {statistics.examples} examples; expected at least 2, one to fit and "
            f"one to measure what the fit loses (more examples than the rank and the inputs have is better)"
        )
    if not torch.isfinite(statistics.latents).all():
        raise ValueError(f"calibration data makes layer {name!r} compute values that are not finite (NaN or infinity)")


def run(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch: a mapping of arguments, a tuple or list of them, or one argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def moved(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on `device`."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    return type(batch)(moved(v, device) for v in batch) if type(batch) in (tuple, list) else batch
