"""Tasks of examples.compare that take no time, and an edit of the runner that finds them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.compare import __main__ as command
from examples.compare.tasks import Placement, Recipe, Splits
from tests.helpers import tiny_models


class Point(NamedTuple):
    x: Tensor
    label: int
    other: int

    @property
    def group(self) -> tuple[int, int]:
        return self.label, self.other


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.classifier = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.classifier(torch.tanh(self.query(x)))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Points:
    """Two labels that the first feature tells apart."""

    name = "points"
    recipe = Recipe(epochs=5, lr=0.05, batch_size=8)
    placement = Placement(("query", "absent"), {"modules_to_save": ["classifier"]})
    minority = ((0, 1), (1, 0))
    classes = 2

    def splits(self, seed: int) -> Splits:
        def points(count: int, seed: int) -> list[Point]:
            x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
            return [Point(row.unsqueeze(0), int(row[0] > 0), i % 2) for i, row in enumerate(x)]

        return Splits(points(64, seed), points(40, 100), points(40, 101))

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return Net()

    def batch(self, examples: Sequence[Point]) -> tuple[dict[str, Tensor], Tensor]:
        return {"x": torch.cat([e.x for e in examples])}, torch.tensor([e.label for e in examples])


class Sentence(NamedTuple):
    tokens: Tensor
    label: int

    @property
    def group(self) -> tuple[int, int]:
        return self.label, int(self.tokens[0]) % 2


class Sentences:
    """Each of three classes has tokens of its own; a tiny BERT."""

    name = "sentences"
    recipe = Recipe(epochs=2, lr=0.02, batch_size=8)
    placement = Placement(("query", "value"), {"task_type": "SEQ_CLS"})
    minority = ()
    classes = 3

    def splits(self, seed: int) -> Splits:
        def some(count: int, seed: int) -> list[Sentence]:
            generator = torch.Generator().manual_seed(seed)
            return [Sentence(torch.randint(13, (6,), generator=generator) + 13 * (i % 3), i % 3) for i in range(count)]

        return Splits(some(32, seed), some(16, 100), some(16, 101))

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return tiny_models.bert()

    def batch(self, examples: Sequence[Sentence]) -> tuple[dict[str, Tensor], Tensor]:
        tokens = torch.stack([e.tokens for e in examples])
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, torch.tensor(
            [e.label for e in examples]
        )


class Counting:
    """The language of sequences that count up; a tiny Llama. The last two tokens of the labels are ignored."""

    name = "counting"
    recipe = Recipe(epochs=3, lr=0.05, batch_size=8)
    placement = Placement(None, {"task_type": "CAUSAL_LM"})
    minority = ()
    classes = 0

    def splits(self, seed: int) -> Splits:
        starts = [torch.arange(start, start + 8) for start in range(30)]
        return Splits(starts[:24], starts[24:27], starts[27:])

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return tiny_models.llama()

    def batch(self, examples: Sequence[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        tokens = torch.stack(list(examples))
        labels = tokens.clone()
        labels[:, -2:] = -100
        return {"input_ids": tokens}, labels


class Failing(Points):
    """By seed: 1 has a loss that is no number, 2 an error, others have nothing to learn from."""

    name = "failing"

    def model(self, seed: int) -> nn.Module:
        if seed == 2:
            raise RuntimeError("no memory")
        torch.manual_seed(seed)
        return Net()

    def splits(self, seed: int) -> Splits:
        points = super().splits(seed)
        factor = float("nan") if seed == 1 else 0.0
        return Splits([p._replace(x=factor * p.x) for p in points.train], points.validation, points.test)


TASKS = {task.name: task for task in (Points, Sentences, Counting, Failing)}


def find(name: str) -> Any:
    """Like `examples.compare.tasks.find`; other processes can import it."""
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}; there are {', '.join(TASKS)}")
    return TASKS[name]()


def run(path: Path, *arguments: str) -> list[dict[str, Any]]:
    """The lines of the file after the command."""
    command.main(["--out", str(path), *arguments])
    return [json.loads(line) for line in path.read_text().splitlines()]
