"""Two processes against one: adapted models, shards of a batch, and the same noise for both."""

from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

import fvae_kernels as fk
from fvae_kernels.nn.adapter import FVAEAdapter
from tests.helpers.recipe import SMALL_NETWORKS
from tests.helpers.tiny_models import TARGETS, Regressor, batch, build
from tests.helpers.total_loss import by_hand

OPTIONS = {**SMALL_NETWORKS, "kl_weight": 2.0, "loss_weight": 0.01}
SIZE = 4  # samples in the batch of both ranks together
Batch = dict[str, Tensor]


class Noise:
    """Noise by position in the whole batch, so that one process and two draw the same."""

    first: int | None = 0  # position of this process's first sample; None: the same noise for all samples
    own = FVAEAdapter.draw_noise

    @classmethod
    def draw(cls, adapter: FVAEAdapter, x: Tensor) -> Tensor:
        shape = torch.Size((*x.shape[:-1], adapter.config.rank))
        per_sample = shape[1:].numel()
        entries = torch.arange(shape.numel())
        entries = entries % per_sample if cls.first is None else entries + cls.first * per_sample
        return entries.to(adapter.B).sin().view(shape)


def model_of(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """An adapted model, the same in every process."""
    torch.manual_seed(0)
    if kind == "mlp":
        model = Regressor().to(dtype)
        fk.replace_linears(model, fk.FVAEConfig(rank=3, **OPTIONS), target_modules=["0", "2"])
        model.net[4].requires_grad_(True)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            nn.init.normal_(parameter, std=0.2)
        return model.train()
    task = "SEQ_CLS" if kind == "bert" else "CAUSAL_LM"
    config = fk.FVAELoraConfig(task_type=task, r=3, target_modules=TARGETS[kind], init_weights=False, **OPTIONS)
    return peft.get_peft_model(build(kind).to(dtype), config, autocast_adapter_dtype=False).train()


def whole_batch(kind: str, seed: int = 0) -> Batch:
    if kind == "mlp":
        generator = torch.Generator().manual_seed(seed)
        draw = (torch.randn(SIZE, n, generator=generator, dtype=torch.float64) for n in (24, 3))
        return dict(zip(("x", "labels"), draw, strict=True))
    inputs = batch(kind, SIZE, seed)
    if kind == "llama":
        inputs["labels"] = inputs["input_ids"].clone()  # as many labels on each rank
    return inputs


def shard(inputs: Batch, sizes: tuple[int, int] = (SIZE // 2, SIZE // 2)) -> Batch:
    """This rank's samples."""
    Noise.first = sum(sizes[: dist.get_rank()])
    return {name: value[Noise.first : Noise.first + sizes[dist.get_rank()]] for name, value in inputs.items()}


def whole(inputs: Batch) -> Batch:
    """Every sample, as one process sees them."""
    Noise.first = 0
    return inputs


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of all trained parameters; a missing one is an error."""
    trained = {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for name, p in trained.items() if p.grad is None]
    assert not missing, f"no gradient: {missing}"
    return {name: full(p.grad).clone() for name, p in trained.items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-9) -> None:
    assert actual.keys() == expected.keys(), actual.keys() ^ expected.keys()
    for name, wanted in expected.items():
        assert wanted.norm() > 0, f"{name}: a gradient of zero proves nothing"
        error = (actual[name] - wanted).norm() / wanted.norm()
        assert error <= rtol, f"{name}: relative error {error:.2e}"


def mean_over_ranks(value: Tensor) -> Tensor:
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def by_one_process(model: nn.Module, criterion: str, inputs: Batch) -> tuple[Tensor, Tensor]:
    """The total loss on one process, with the layers' terms added by hand."""
    with by_hand(model) as terms:
        task = CRITERIA["outside" if criterion == "attached" else criterion](model, model, inputs)
    return task, torch.stack(terms).sum()


def wrap(engine: str, model: nn.Module, **options: Any) -> nn.Module:
    """DDP around the model, or FSDP2 of each block and of the rest."""
    if engine == "ddp":
        return DistributedDataParallel(model, **options)
    for module in model.modules():
        if type(module).__name__ in ("BertLayer", "LlamaDecoderLayer", "FusedFVAELinear"):
            fully_shard(module, **options)
    return fully_shard(model, **options)


def accumulating(engine: str, model: Any, last: bool) -> Any:
    """A context that keeps the gradients of a micro-batch on their rank, unless it is the last."""
    if engine == "ddp" and not last:
        return model.no_sync()
    if engine == "fsdp2":
        model.set_requires_gradient_sync(last)
    return torch.enable_grad()


def inside(model: nn.Module, called: Any, inputs: Batch) -> Tensor:
    """The loss that the model computes."""
    return called(**inputs)["loss"]


def outside(model: nn.Module, called: Any, inputs: Batch) -> Tensor:
    """A loss that the caller computes; the objective enters with weight 1."""
    inputs = dict(inputs)
    labels = inputs.pop("labels")
    logits = called(**inputs)["logits"]
    if labels.is_floating_point():
        return (logits - labels).square().mean()
    return nn.functional.cross_entropy(logits, labels)


def attached(model: nn.Module, called: Any, inputs: Batch) -> Tensor:
    """A loss that the caller computes, and the objective attached to it."""
    return fk.attach_aux_loss(model, outside(model, called, inputs))


CRITERIA = {"inside": inside, "outside": outside, "attached": attached}


def step_of_trainer(model: nn.Module, inputs: Batch, folder: Path) -> None:
    """One step of SGD by transformers' Trainer, which distributes the samples over the ranks."""
    samples = [{name: value[i] for name, value in inputs.items()} for i in range(SIZE)]
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        ddp_backend="gloo",
        ddp_find_unused_parameters=False,
        max_steps=1,
        per_device_train_batch_size=SIZE // 2,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=samples).train()
