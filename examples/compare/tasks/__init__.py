"""The interface of a task: a pretrained model with a new head, examples in groups, batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

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


def find(name: str) -> Task:
    """The task of this name, with its model and data fetched.

    Raises:
        ValueError: for another name.
        examples.assets.AssetError: if model or data cannot be fetched.
    """
    if name == "text":
        from .text import TextTask

        return TextTask()
    if name == "images":
        from .images import ImageTask

        return ImageTask()
    raise ValueError(f"there is no task {name!r}; there are text and images")
