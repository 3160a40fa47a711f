"""A task of examples.compare that takes no time: two labels that the first feature tells apart."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.compare.tasks import Placement, Recipe, Splits


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

    def batch(self, examples: list[Point]) -> tuple[dict[str, Tensor], Tensor]:
        return {"x": torch.cat([e.x for e in examples])}, torch.tensor([e.label for e in examples])


def find(name: str) -> Points:
    return Points()
