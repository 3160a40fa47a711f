"""Adapted models, and the gradient of their total loss (6) computed directly, to compare training loops with."""

import peft
import torch
from torch import Tensor, nn

import fvae_kernels as fk
from tests.helpers.recipe import SMALL_NETWORKS
from tests.helpers.tiny_models import TARGETS, TASKS, build
from tests.helpers.total_loss import by_hand

OPTIONS = {**SMALL_NETWORKS, "loss_weight": 0.01}
# transformers' causal LM loss is float32 whatever the model is, and so is its gradient, the weight
EXACT, CAUSAL = 1e-9, 5e-7


def adapted(kind: str, dtype: torch.dtype = torch.float64, task: str | None = "auto", **options: object) -> nn.Module:
    """A PEFT model whose adapters already change the output."""
    torch.manual_seed(0)
    task = TASKS[kind] if task == "auto" else task
    placed = {"r": 3, "target_modules": TARGETS[kind], "init_weights": False}
    config = fk.FVAELoraConfig(task_type=task, **{**placed, **OPTIONS, **options})
    return peft.get_peft_model(build(kind).to(dtype), config, autocast_adapter_dtype=False).train()


def params(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def grads(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params(model)]


def checkpoint_activations(model: nn.Module, reentrant: bool) -> None:
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.base_model.model.enable_input_require_grads()


def direct(model: nn.Module, steps: list[tuple[dict[str, Tensor], float, float]]) -> list[Tensor]:
    """Gradient of ``sum_k t_k * task_k + a_k * aux_k`` over micro-batches (inputs, t, a)."""
    model.zero_grad()
    for inputs, task_weight, aux_weight in steps:
        with by_hand(model) as terms:
            task = model(**inputs).loss
        (task_weight * task + aux_weight * torch.stack(terms).sum()).backward()
    expected = grads(model)
    model.zero_grad()
    assert all(g.abs().sum() > 0 for g in expected), "a parameter that gets no gradient proves nothing"
    return expected


def assert_same(model: nn.Module, expected: list[Tensor], rtol: float = EXACT) -> None:
    got, names = grads(model), [n for n, p in model.named_parameters() if p.requires_grad]
    for name, g, e in zip(names, got, expected, strict=True):
        assert (g - e).norm() <= rtol * e.norm(), f"{name}: relative error {(g - e).norm() / e.norm():.2e}"


def own_criterion(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    inputs = dict(inputs)
    labels = inputs.pop("labels")
    return nn.functional.cross_entropy(model(**inputs).logits, labels)
