"""The demo's task: sentiment of review snippets. Their source is the spurious attribute (examples/data.py)."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from examples import assets, data, train

from . import Placement, Recipe, Splits


class TextTask:
    """MiniLM, query and value of all six blocks; 1200 snippets, 80 % from the source that goes with the label."""

    name = "text"
    recipe = Recipe(epochs=3, lr=5e-3)
    placement = Placement(("query", "value"), {"task_type": "SEQ_CLS"})
    minority = ((0, 0), (1, 1))
    classes = 2

    def __init__(self, size: int = 1200, rho: float = 0.8) -> None:
        files = assets.fetch()
        self.folder, self.size, self.rho = files.model, size, rho
        self.snippets = data.split(data.load(files.sdist))
        self.tokenize = train.Tokenizer(files.model)

    def splits(self, seed: int) -> Splits:
        """Training snippets of this seed; for every seed the same 80 (validation) and 200 (test) of each group."""
        chosen = data.training_set(self.snippets.train, self.size, self.rho, seed)
        return Splits(chosen, self.snippets.validation, self.snippets.test)

    def model(self, seed: int) -> nn.Module:
        """The encoder with a new classifier."""
        model: nn.Module = train.base_model(self.folder, seed)
        return model

    def batch(self, examples: Sequence[Any]) -> tuple[Mapping[str, Tensor], Tensor]:
        """Tokens, padded to the longest snippet, and labels."""
        inputs, labels = self.tokenize(examples)
        return dict(inputs), labels
