"""Train LoRA and FVAE-LoRA side by side: one step of each in turn, on the same batch."""

import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

import fvae_kernels as fk
from examples import data
from examples.data import Snippet
from fvae_kernels.peft import FVAELoraLinear

METHODS = {"lora": "LoRA", "fvae": "FVAE-LoRA"}
TARGETS = ["query", "value"]
WEIGHTS = ("recon_weight", "kl_weight", "gamma_weight", "loss_weight")
MAX_TOKENS = 32

logging.set_verbosity_error()  # no warning that the classifier's weights are new
logging.disable_progress_bar()
warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT calls it


@dataclass(frozen=True)
class Settings:
    """All settings that a run depends on."""

    methods: tuple[str, ...] = ("lora", "fvae")
    seed: int = 0
    train_size: int = 1200
    rho: float = 0.8
    epochs: int = 3
    steps: int | None = None  # in place of epochs
    batch_size: int = 32
    rank: int = 16
    alpha: float = 16.0
    lr: float = 5e-3
    lr_fvae: float | None = None  # as lr
    preset: str = "default"  # of FVAELoraConfig: networks, start, noise
    loss_weight: float | None = None  # lambda; 1 / (1000 * adapted layers)
    kl_weight: float = 3.0
    gamma_weight: float = 1.0
    recon_weight: float = 1.0
    test_per_group: int = data.TEST_PER_GROUP

    @property
    def total_steps(self) -> int:
        return self.steps or self.epochs * (self.train_size // self.batch_size)


@dataclass
class History:
    """One entry for each step."""

    task_loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    terms: dict[str, list[float]] = field(default_factory=lambda: {"nll": [], "kl": [], "gamma": []})


class Tokenizer:
    """Snippets to padded batches."""

    def __init__(self, folder: Path):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def __call__(self, snippets: Sequence[Snippet]) -> tuple[Any, Tensor]:
        texts = [s.text for s in snippets]
        inputs = self.tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        return inputs, torch.tensor([s.label for s in snippets])


def base_model(folder: Path, seed: int) -> Any:
    """The pretrained encoder with a new, seeded classifier."""
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)


def adapter_config(method: str, settings: Settings) -> peft.PeftConfig:
    """Stock LoRA, or a preset of FVAE-LoRA with the weights of `settings`."""
    if method == "lora":
        return peft.LoraConfig(task_type="SEQ_CLS", r=settings.rank, lora_alpha=settings.alpha, target_modules=TARGETS)
    return fk.FVAELoraConfig.preset(
        settings.preset,
        task_type="SEQ_CLS",
        r=settings.rank,
        alpha=settings.alpha,
        target_modules=TARGETS,
        **{name: getattr(settings, name) for name in WEIGHTS},
    )


class Run:
    """One method's model and the history of its training."""

    def __init__(self, method: str, settings: Settings, folder: Path):
        self.method, self.settings, self.history = method, settings, History()
        base = base_model(folder, settings.seed)
        self.model = peft.get_peft_model(base, adapter_config(method, settings)).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        lr = settings.lr_fvae if method == "fvae" and settings.lr_fvae else settings.lr
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, linear_schedule(settings.total_steps))

    def step(self, index: int, inputs: Any, labels: Tensor) -> None:
        """One optimizer step. Its noise depends only on seed and step, not on other methods."""
        torch.manual_seed(self.settings.seed * 1_000_003 + index)
        start = time.perf_counter()
        out = self.model(**inputs, labels=labels)  # in training, out.loss includes the auxiliary loss of the adapters
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.history.seconds.append(time.perf_counter() - start)
        self.history.task_loss.append(F.cross_entropy(out.logits.detach(), labels).item())
        if self.method == "fvae":
            self.note_terms()

    def note_terms(self) -> None:
        """Note the terms, averaged over the adapted layers."""
        layers = list(fk.collect_terms(self.model).values())
        for name, values in self.history.terms.items():
            values.append(sum(layer[name] for layer in layers) / len(layers))


def linear_schedule(steps: int) -> Callable[[int], float]:
    """Warm-up over a tenth of the steps, then linear decay to zero."""
    warm_up = max(1, steps // 10)
    return lambda done: min((done + 1) / warm_up, (steps - done) / (steps - warm_up + 1))


def train(settings: Settings, folder: Path, examples: Sequence[Snippet]) -> tuple[list[Run], Iterator[int]]:
    """The runs, and an iterator that runs their steps and yields the number of steps done."""
    runs = [Run(method, settings, folder) for method in settings.methods]
    return runs, _steps(runs, settings, Tokenizer(folder), examples)


def _steps(runs: list[Run], settings: Settings, tokenize: Tokenizer, examples: Sequence[Snippet]) -> Iterator[int]:
    stream = data.batches(examples, settings.batch_size, settings.total_steps, settings.seed)
    for index, batch in enumerate(stream):
        inputs, labels = tokenize(batch)
        for run in runs if index % 2 == 0 else runs[::-1]:  # so that neither always finds the caches warm
            run.step(index, inputs, labels)
        yield index + 1


@torch.no_grad()
def predict(model: Any, tokenize: Tokenizer, snippets: Sequence[Snippet], batch_size: int = 64) -> Tensor:
    """Logits in eval mode, in the order of `snippets`."""
    model.eval()
    order = sorted(range(len(snippets)), key=lambda i: len(snippets[i].text))
    logits = torch.empty(len(snippets), 2)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        inputs, _ = tokenize([snippets[i] for i in chosen])
        logits[chosen] = model(**inputs).logits
    return logits


@torch.no_grad()
def latent_means(model: Any, tokenize: Tokenizer, snippets: Sequence[Snippet]) -> tuple[str, Tensor, Tensor]:
    """Name of the last adapted layer, and its posterior means of z1 and z2, averaged over each snippet's tokens."""
    name, layer = [(n, m) for n, m in model.named_modules() if isinstance(m, FVAELoraLinear)][-1]
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.eval()
    pooled: tuple[list[Tensor], list[Tensor]] = ([], [])  # z1, z2
    try:
        for start in range(0, len(snippets), 64):
            inputs, _ = tokenize(snippets[start : start + 64])
            model(**inputs)
            mask = inputs["attention_mask"].unsqueeze(-1)
            for out, mean in zip(pooled, layer.posterior_means(seen.pop()), strict=True):
                out.append((mean * mask).sum(1) / mask.sum(1))
    finally:
        handle.remove()
    return name, torch.cat(pooled[0]), torch.cat(pooled[1])


def reload(folder: Path, model_folder: Path, seed: int) -> Any:
    """The saved adapter on a new base model. The saved classifier replaces the random one."""
    return peft.PeftModel.from_pretrained(base_model(model_folder, seed + 1), folder)


def shrink(settings: Settings, splits: data.Splits) -> data.Splits:
    """The test and validation groups cut to the size asked for."""
    rng = random.Random(0)

    def cut(snippets: Sequence[Snippet], size: int) -> tuple[Snippet, ...]:
        groups = [[s for s in snippets if s.group == group] for group in data.GROUPS]
        return tuple(s for group in groups for s in rng.sample(group, min(size, len(group))))

    size = settings.test_per_group
    return replace(splits, test=cut(splits.test, size), validation=cut(splits.validation, size))
