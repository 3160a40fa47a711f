"""Language of a telephone prompt, read by voices that training heard or by others: the unseen voice is the shift.

Label: English, Spanish, French, Italian, Russian. A group is a language and whether its voice is unseen (1); only
Spanish, French and Italian have a second voice. The last two layers of Whisper's encoder are adapted; the output of the
frozen ones before them is computed once for each clip.
"""

import copy
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import Features, Placement, Recipe, Splits, audio_assets, batch_of, first, loss_and_logits, sound

LAYERS = 2  # adapted, of 4
RATE = 16000  # of the samples that Whisper takes
SEED = 2014
VALIDATION, TEST = 40, 80  # clips of each voice; unseen voices have test clips alone


class AudioTask:
    """120 training clips of 2 seconds for each of five languages, each language by one voice."""

    placement = Placement(("q_proj", "v_proj"), {"modules_to_save": ["classifier"]})
    minority = tuple((label, 1) for label in audio_assets.UNSEEN)
    classes = len(audio_assets.LANGUAGES)

    def __init__(self, size: int = 600, epochs: int = 3, cache: Path = audio_assets.CACHE, name: str = "audio") -> None:
        self.name, self.size, self.recipe = name, size, Recipe(epochs=epochs, lr=5e-3)
        cache = audio_assets.fetch(cache)
        encoder = audio_assets.encoder(cache)
        self.layers, self.norm = encoder.layers[-LAYERS:], encoder.layer_norm
        encoder.layers, encoder.layer_norm = encoder.layers[:-LAYERS], nn.Identity()
        self.frozen = encoder
        voices = audio_assets.voices(cache)
        self.pool: list[Sequence[Features]] = []
        validation: list[Features] = []
        test: list[Features] = []
        for label, voice in enumerate(audio_assets.SEEN):
            clips = self._clips(voices[voice], label, 0)
            test += clips[:TEST]
            validation += clips[TEST : TEST + VALIDATION]
            self.pool.append(clips[TEST + VALIDATION :])
        for label, voice in audio_assets.UNSEEN.items():
            test += self._clips(voices[voice], label, 1, TEST)
        self.validation, self.test = tuple(validation), tuple(test)

    def splits(self, seed: int) -> Splits:
        """Training clips of this seed; for every seed the same 40 (validation) and 80 (test) of each voice."""
        rng = random.Random(seed)
        train = [clip for clips in self.pool for clip in rng.sample(clips, self.size // self.classes)]
        rng.shuffle(train)
        return Splits(train, self.validation, self.test)

    def model(self, seed: int) -> nn.Module:
        """The last layers with a new classifier."""
        torch.manual_seed(seed)
        return TopLayers(self.layers, self.norm, self.classes)

    def batch(self, examples: Sequence[Any]) -> tuple[Mapping[str, Tensor], Tensor]:
        """Hidden states of the clips, and their labels."""
        return batch_of(examples)

    def _clips(self, samples: Tensor, label: int, unseen: int, count: int | None = None) -> list[Features]:
        """The voice's clips in an order of their own, the first `count` of them."""
        order = random.Random(f"{label} {unseen} {SEED}").sample(range(len(samples)), count or len(samples))
        return [Features(states, label, unseen) for states in _states(self.frozen, samples[order])]


class TopLayers(nn.Module):
    """The last layers of a WhisperEncoder, its norm, and a classifier on the mean over the frames."""

    def __init__(self, layers: nn.ModuleList, norm: nn.LayerNorm, classes: int) -> None:
        super().__init__()
        self.layers, self.norm = copy.deepcopy(layers), copy.deepcopy(norm)
        self.classifier = nn.Linear(norm.normalized_shape[0], classes)

    def forward(self, states: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Loss (if labels are given) and logits."""
        for layer in self.layers:
            states = first(layer(states, attention_mask=None, layer_head_mask=None))  # transformers 4 wants both
        logits = self.classifier(self.norm(states).mean(1))
        return loss_and_logits(logits, labels)


@torch.no_grad()
def _states(frozen: Any, samples: Tensor) -> Tensor:
    """Output of the frozen layers for clips, int16 ``[n, samples]`` at 8 kHz."""
    from transformers import WhisperFeatureExtractor

    extract = WhisperFeatureExtractor(chunk_length=audio_assets.SECONDS)
    found = []
    for part in samples.split(64):
        waves = list(sound.resample(part / 32768, audio_assets.RATE, RATE).numpy())
        features = extract(waves, sampling_rate=RATE, return_tensors="pt").input_features
        found.append(frozen(features).last_hidden_state)
    return torch.cat(found)
