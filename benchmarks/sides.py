"""The sides of every comparison, built in one place with equal base weights, rank, targets and seed.

    base        the model without adapters, frozen
    plain       FVAE-LoRA in plain PyTorch (backend "reference")
    compiled    torch.compile of it
    cpp, triton ours, one per backend that can run the fused layer here
    lora, dora, hira    PEFT's own methods; lora_dropout and dora_dropout drop their input as FVAE-LoRA's recipe does

All of them go through `peft.get_peft_model`, so that PEFT's bookkeeping costs every side the same.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn

import fvae_kernels as fk
from fvae_kernels.ops._backend import backends_for, interpreting
from fvae_kernels.presets import preset

from .cost import count

RANK, ALPHA, SEED, DROPOUT = 16, 16, 0, 0.1
METHOD: dict[str, Any] = {"alpha": ALPHA, **preset("paper", RANK)}
BY_DEFAULT: dict[str, Any] = {"alpha": ALPHA, **preset("default", RANK)}
DEFAULT = "_default"  # suffix of a side's name: the package's default in place of the paper's recipe
TITLES = {
    "base": "base layer",
    "plain": "plain PyTorch FVAE",
    "compiled": "torch.compile of it",
    "cpp": "ours, C++",
    "triton": "ours, Triton",
    "cpp_default": "ours, C++, the default config",
    "triton_default": "ours, Triton, the default config",
    "lora": "PEFT LoRA",
    "dora": "PEFT DoRA",
    "hira": "PEFT HiRA",
    "lora_dropout": "PEFT LoRA, dropout 0.1",
    "dora_dropout": "PEFT DoRA, dropout 0.1",
}
FVAE = ("plain", "compiled", "cpp", "triton", "cpp_default", "triton_default")
PEFT = ("lora", "dora", "hira")


@dataclass
class Side:
    """One side of a comparison: the timed function and its module."""

    name: str
    module: nn.Module
    step: Callable[[], Any]  # for a caller that is in the side's `environment`
    forward: Callable[[], Any]
    inputs: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        self.run = within(self.name, self.step)  # the same for any caller

    def cost(self) -> dict[str, Any]:
        """Operators, bytes, FLOPs and saved bytes of one run. Weights, buffers and inputs do not count as saved.

        Empty for a compiled side: the dispatcher cannot see inside it.
        """
        if self.name == "compiled":
            return {}
        return count(self.run, [*self.module.parameters(), *self.module.buffers(), *self.inputs])


def kernels(op: str, device: str = "cpu") -> tuple[str, ...]:
    """Our backends that have a kernel of `op` on this device. An interpreted kernel says nothing about time."""
    found = [name for name in backends_for(op, device) if name != "reference"]
    return tuple(name for name in found if not (name == "triton" and interpreting()))


def ours(device: str = "cpu") -> str:
    """The side that runs if no backend is named: the fused layer, or plain PyTorch without one."""
    return next(iter(kernels("layer", device)), "plain")


def names(compiled: bool = True) -> tuple[str, ...]:
    """Every adapted side that can run here."""
    fused = kernels("layer")
    return ("plain", *(["compiled"] if compiled else []), *fused, *(name + DEFAULT for name in fused), *PEFT)


def backend_of(name: str) -> str | None:
    """The backend of the package that a side runs on."""
    plain = {"plain": "reference", "compiled": "reference"}
    return plain.get(name, name.removesuffix(DEFAULT)) if name in FVAE else None


@contextlib.contextmanager
def environment(name: str) -> Iterator[None]:
    """The context that a side runs in: its backend."""
    with fk.use_backend(backend_of(name)):
        yield


def within(name: str, function: Callable[[], Any]) -> Callable[[], Any]:
    """`function` in its side's environment."""
    backend = backend_of(name)
    if backend is None:
        return function

    def run() -> Any:
        with fk.use_backend(backend):
            return function()

    return run


def peft_config(name: str, targets: list[str], linear: bool = False) -> Any:
    """The config of a side; `linear` takes encoders without a hidden layer, whose mean path is LoRA's."""
    common: dict[str, Any] = {"r": RANK, "target_modules": targets}
    if name in FVAE:
        hidden: dict[str, Any] = {"encoder_hidden": ()} if linear else {}
        return fk.FVAELoraConfig(**common, **{**(BY_DEFAULT if name.endswith(DEFAULT) else METHOD), **hidden})
    method, _, dropout = name.partition("_")
    if method in ("lora", "dora"):
        common |= {"lora_dropout": DROPOUT if dropout else 0.0}
        return peft.LoraConfig(lora_alpha=ALPHA, use_dora=method == "dora", **common)
    return peft.HiraConfig(**common)


def share(model: nn.Module) -> nn.Module:
    """A copy of the structure of `model` that shares its weights."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in tensors})


def adapt(name: str, model: nn.Module, targets: list[str], linear: bool = False) -> nn.Module:
    """`model` adapted as the side `name`, in training mode. The model itself is only frozen."""
    model = share(model.requires_grad_(False))
    if name == "base":
        return model.train()
    torch.manual_seed(SEED)
    return peft.get_peft_model(model, peft_config(name, targets, linear)).train()


class OneLinear(nn.Module):
    """A model of one linear layer, in a form that PEFT accepts."""

    def __init__(self, D: int, M: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.linear = nn.Linear(D, M, dtype=dtype, device=device)


def layer_module(name: str, model: OneLinear, linear: bool = False) -> nn.Module:
    """The adapted layer of a side, with a seeded start."""
    module = adapt(name, model, ["linear"], linear)
    return module.linear if name == "base" else module.base_model.model.linear  # type: ignore[union-attr,return-value]


def layer_side(
    name: str,
    model: OneLinear,
    x: Tensor,
    grad_y: Tensor,
    compiler: str = "inductor",
    adapter: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
) -> Side:
    """Forward and backward of one adapted layer: gradients of its parameters and of x.

    Args:
        name: the side.
        model: its base model.
        x: input.
        grad_y: gradient of the output.
        compiler: backend of torch.compile, for the compiled side.
        adapter: dtype of the trained parameters; None is PEFT's choice, at least float32.
        autocast: dtype of autocast in forward; None is without autocast.
    """
    module: Any = layer_module(name, model)
    trained = [p for p in module.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.to(adapter or p.dtype)
    call = module
    if name == "compiled":
        call = torch.compile(module, dynamic=False, backend=compiler)

    def forward() -> Tensor:
        with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
            return call(x)

    def step() -> None:
        x.grad = None
        for p in trained:
            p.grad = None
        forward().backward(grad_y)

    return Side(name, module, step, within(name, forward), (x,))


def layer_sides(
    which: tuple[str, ...],
    tokens: int,
    D: int,
    M: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **options: Any,
) -> dict[str, Side]:
    """Sides of a layer of D inputs and M outputs on one batch of tokens; `options` as for `layer_side`."""
    model = OneLinear(D, M or D, dtype, device)
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(tokens, D, generator=generator).to(device, dtype).requires_grad_()
    grad_y = torch.randn(tokens, M or D, generator=generator).to(device, dtype)
    return {name: layer_side(name, model, x, grad_y, **options) for name in which}


def inference_sides(tokens: int, D: int) -> dict[str, Side]:
    """The mean path without autograd: the recipe's encoder, a linear one, that one merged; PEFT's; the base.

    All sides read the same base weight: times of two copies differ by 5 %, because of their place in memory.
    """
    model = OneLinear(D, D)
    x = torch.randn(tokens, D, generator=torch.Generator().manual_seed(SEED))
    modules = {name: layer_module(name, model).eval() for name in ("base", "lora", "dora")}
    modules["fvae"] = layer_module("plain", model).eval()
    modules["fvae_linear"] = layer_module("plain", model, linear=True).eval()
    # Merged before training: the update is exactly zero, so the shared weights do not change.
    config = fk.FVAEConfig(rank=RANK, **{**METHOD, "encoder_hidden": ()})
    wrapper = fk.FusedFVAELinear.from_linear(share(model).linear, config).eval()  # type: ignore[arg-type]
    wrapper.merge()
    modules["merged"] = wrapper
    unloaded = peft.get_peft_model(share(model), peft_config("plain", ["linear"], linear=True)).merge_and_unload()
    modules["unloaded"] = unloaded.linear
    return {name: _inference(name, module, x) for name, module in modules.items()}


def _inference(name: str, module: nn.Module, x: Tensor) -> Side:
    @torch.no_grad()
    def forward() -> Tensor:
        return module(x)

    return Side(name, module, forward, forward)


def adapters(module: nn.Module) -> list[Any]:
    """The FVAE adapters inside a side."""
    return [m for m in module.modules() if type(m).__name__ == "FVAEAdapter"]


def without_dropout(adapter: Any) -> Any:
    """A copy of an adapter without dropout and with random parameters, for comparisons."""
    twin = copy.deepcopy(adapter)
    twin.config = dataclasses.replace(adapter.config, dropout=0.0)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, p in twin.named_parameters():
            scale = 0.3 * p.shape[-1] ** -0.5 if p.dim() > 1 else 0.1
            values = torch.randn(p.shape, generator=generator) * scale
            p.copy_(values.to(p) + (1.0 if name == "decoder_scale" else 0.0))
    return twin
