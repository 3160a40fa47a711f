"""The interface of a task: a pretrained model with a new head, examples in groups, batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Group = tuple[int, int]  # label, spurious attribute


class Example(Protocol):
    """One example. Tasks may store more in it."""

    @property
    def group(self) -> Group:
        """Label and spurious attribute."""


@dataclass(frozen=True)
class Recipe:
    """Training settings: AdamW, linear warm-up over a tenth of the steps, linear decay, gradients clipped to 1."""

    epochs: int
    lr: float
    batch_size: int = 32


@dataclass(frozen=True)
class Splits:
    """Examples of one seed. Validation and test do not depend on the seed; their groups have equal sizes."""

    train: Sequence[Any]
    validation: Sequence[Any]
    test: Sequence[Any]


@dataclass(frozen=True)
class Placement:
    """Where PEFT puts adapters, and what else it trains. Every method's config takes these options."""

    target_modules: Sequence[str]
    options: Mapping[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """A task. Under group shift, label and spurious attribute correlate in training, but not in the tests."""

    name: str
    recipe: Recipe
    placement: Placement
    minority: Sequence[Group]  # rare in training; () where groups are just labels
    classes: int  # 0 for a language model, which is scored in nats a token

    def splits(self, seed: int) -> Splits:
        """The examples; the seed chooses the training examples."""

    def model(self, seed: int) -> nn.Module:
        """The pretrained model with a head drawn from the seed. Called with a batch, it returns loss and logits."""

    def batch(self, examples: Sequence[Any]) -> tuple[Mapping[str, Tensor], Tensor]:
        """Keyword arguments of the model, and the labels."""


class Features(NamedTuple):
    """An example as the adapted blocks see it: what the frozen blocks before them put out."""

    states: Tensor  # [tokens, features]
    label: int
    attribute: int

    @property
    def group(self) -> Group:
        """Label and attribute."""
        return self.label, self.attribute


def batch_of(examples: Sequence[Features]) -> tuple[Mapping[str, Tensor], Tensor]:
    """Hidden states of the examples, and their labels."""
    return {"states": torch.stack([e.states for e in examples])}, torch.tensor([e.label for e in examples])


def loss_and_logits(logits: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
    """What a classifier of ours returns: the loss, if labels are given, and the logits."""
    return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def first(output: Any) -> Any:
    """The states that a block returns; in transformers 4 they come in a tuple."""
    return output[0] if isinstance(output, tuple) else output


@dataclass(frozen=True)
class BuiltIn:
    """A task by name: the module of this package and the class that make it, with their options."""

    title: str
    module: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def make(self, name: str) -> Task:
        """The task, with its model and data fetched."""
        task: Task = getattr(import_module(f"{__name__}.{self.module}"), self.kind)(name=name, **self.options)
        return task


def _text(title: str, **options: Any) -> BuiltIn:
    return BuiltIn(f"sentiment of review snippets, {title}", "text", "TextTask", options)


def _images(title: str, **options: Any) -> BuiltIn:
    return BuiltIn(f"silhouettes on photographs, {title}", "images", "ImageTask", options)


BUILT_IN: Mapping[str, BuiltIn] = {
    "text": _text("80 % from the source that goes with the label"),
    "text-0.5": _text("source and label independent", rho=0.5),
    "text-0.95": _text("95 % from the source that goes with the label", rho=0.95),
    "text-long": _text("80 % from the source that goes with the label, 10 epochs", epochs=10),
    "text-100": _text("100 of them, 40 epochs, no shift", size=100, rho=0.5, epochs=40),
    "text-300": _text("300 of them, 15 epochs, no shift", size=300, rho=0.5, epochs=15),
    "text-noise-10": _text("10 % of the training labels wrong, no shift", rho=0.5, noise=0.1),
    "text-noise-20": _text("20 % of the training labels wrong, no shift", rho=0.5, noise=0.2),
    "images": _images("95 % on the background that goes with the label"),
    "images-0.5": _images("background and label independent", rho=0.5),
    "images-0.98": _images("98 % on the background that goes with the label", rho=0.98),
    "images-other": _images("cats and horses in place of birds and elephants", animals=("cat", "horse")),
    "images-long": _images("30 epochs", epochs=30),
    "images-other-long": _images("cats and horses, 30 epochs", animals=("cat", "horse"), epochs=30),
    "audio": BuiltIn("language of telephone prompts, voices that training did not hear", "audio", "AudioTask"),
    "perplexity": BuiltIn("a small language model on product reviews", "language", "LanguageTask"),
}


def find(name: str) -> Task:
    """The built-in task of this name, with its model and data fetched.

    Raises:
        ValueError: for another name.
        examples.assets.AssetError: if model or data cannot be fetched.
    """
    if name not in BUILT_IN:
        raise ValueError(f"there is no task {name!r}; there are {', '.join(BUILT_IN)}")
    return BUILT_IN[name].make(name)
