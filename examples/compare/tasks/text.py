"""The demo's task: sentiment of review snippets. Their source is the spurious attribute (examples/data.py)."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from examples import assets, data, train

from . import Placement, Recipe, Splits


def with_wrong_labels(snippets: Sequence[data.Snippet], share: float, seed: int) -> list[data.Snippet]:
    """The snippets in their order, with the other label for a share of them (rounded to whole snippets)."""
    wrong = set(random.Random(f"noise {seed}").sample(range(len(snippets)), round(share * len(snippets))))
    return [s._replace(label=1 - s.label) if i in wrong else s for i, s in enumerate(snippets)]


class TextTask:
    """MiniLM, query and value of all six blocks. A share `rho` of the snippets is from the source of the label.

    A share `noise` of the training labels is wrong. Validation and test do not depend on any of these.
    """

    placement = Placement(("query", "value"), {"task_type": "SEQ_CLS"})
    minority = ((0, 0), (1, 1))
    classes = 2

    def __init__(
        self, size: int = 1200, rho: float = 0.8, noise: float = 0.0, epochs: int = 3, name: str = "text"
    ) -> None:
        files = assets.fetch()
        self.name, self.recipe = name, Recipe(epochs=epochs, lr=5e-3)
        self.folder, self.size, self.rho, self.noise = files.model, size, rho, noise
        self.snippets = data.split(data.load(files.sdist))
        self.tokenize = train.Tokenizer(files.model)

    def splits(self, seed: int) -> Splits:
        """Training snippets of this seed; for every seed the same 80 (validation) and 200 (test) of each group."""
        chosen = data.training_set(self.snippets.train, self.size, self.rho, seed)
        return Splits(with_wrong_labels(chosen, self.noise, seed), self.snippets.validation, self.snippets.test)

    def model(self, seed: int) -> nn.Module:
        """The encoder with a new classifier."""
        model: nn.Module = train.base_model(self.folder, seed)
        return model

    def batch(self, examples: Sequence[Any]) -> tuple[Mapping[str, Tensor], Tensor]:
        """Tokens, padded to the longest snippet, and labels."""
        inputs, labels = self.tokenize(examples)
        return dict(inputs), labels
