"""Silhouettes of two animals on photographs of water or land: the background is the spurious attribute.

Silhouettes and photographs are disjoint across training, validation and test. The last two blocks of the ViT are
adapted; the output of the frozen blocks before them is computed once for each picture.
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from . import Features, Group, Placement, Recipe, Splits, batch_of, first, image_assets, loss_and_logits

SIZE = 70
BLOCKS = 2  # adapted, of 12
ANIMALS = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")  # classes of the data
SEED = 2014
PER_GROUP = {"validation": 100, "test": 150}
SHARES = {"train": (0.0, 0.6), "validation": (0.6, 0.75), "test": (0.75, 1.0)}  # of the silhouettes
WALLPAPERS, BACKGROUNDS = "wallpapers", "backgrounds/mate/nature"
PHOTOGRAPHS = (  # of water, of land
    {
        "train": ("Kite", "DarkestHour", "Storm.jpg", "BytheWater"),
        "validation": ("ColdRipple",),
        "test": ("summer_1am", "Aqua.jpg"),
    },
    {
        "train": ("Path", "OneStandsOut", "GreenMeadow.jpg", "FallenLeaf"),
        "validation": ("LadyBird.jpg",),
        "test": ("RainDrops.jpg", "Blinds.jpg"),
    },
)
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


class ImageTask:
    """480 training pictures at 70 pixels, a share `rho` of them on the background that goes with the label."""

    placement = Placement(
        ("query", "value", "q_proj", "v_proj"), {"modules_to_save": ["classifier"]}
    )  # transformers 4 and 5
    minority = ((0, 1), (1, 0))
    classes = 2

    def __init__(
        self,
        size: int = 480,
        rho: float = 0.95,
        animals: tuple[str, str] = ("bird", "elephant"),  # the first goes with water
        epochs: int = 10,
        cache: Path = image_assets.CACHE,
        name: str = "images",
    ) -> None:
        self.name, self.recipe = name, Recipe(epochs=epochs, lr=5e-3)
        self.cache, self.size, self.rho = image_assets.fetch(cache), size, rho
        self.backbone = image_assets.backbone(self.cache)
        self.pool = _silhouettes(self.cache, animals)
        self.held_out = {
            split: self._pictures(split, dict.fromkeys(_groups(), count), SEED) for split, count in PER_GROUP.items()
        }

    def splits(self, seed: int) -> Splits:
        """Training pictures of this seed; for every seed the same 100 (validation) and 150 (test) of each group."""
        agreeing = round(self.size / 2 * self.rho)
        counts = {(y, b): agreeing if y == b else self.size // 2 - agreeing for y, b in _groups()}
        train = self._pictures("train", counts, seed)
        random.Random(seed).shuffle(train)
        return Splits(train, self.held_out["validation"], self.held_out["test"])

    def model(self, seed: int) -> nn.Module:
        """The last blocks with a new classifier."""
        torch.manual_seed(seed)
        return TopBlocks(image_assets.backbone(self.cache))

    def batch(self, examples: Sequence[Any]) -> tuple[Mapping[str, Tensor], Tensor]:
        """Hidden states of the pictures, and their labels."""
        return batch_of(examples)

    def _pictures(self, split: str, counts: dict[Group, int], seed: int) -> list[Features]:
        rng = random.Random(f"{split} {seed}")
        photographs = [[_photograph(self.cache, name) for name in kind[split]] for kind in PHOTOGRAPHS]
        groups = [group for group, count in counts.items() for _ in range(count)]
        images = [_paste(rng.choice(photographs[b]), rng.choice(self.pool[split][y]), rng) for y, b in groups]
        states = _states(self.backbone, torch.stack(images))
        return [Features(s, *group) for s, group in zip(states, groups, strict=True)]


class TopBlocks(nn.Module):
    """The last blocks of a Dinov2Model, its norm, and a classifier on the class token."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.blocks = backbone.encoder.layer[-BLOCKS:]
        self.norm = backbone.layernorm
        self.classifier = nn.Linear(backbone.config.hidden_size, 2)

    def forward(self, states: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Loss (if labels are given) and logits."""
        for block in self.blocks:
            states = first(block(states))
        logits = self.classifier(self.norm(states)[:, 0])
        return loss_and_logits(logits, labels)


def _groups() -> list[Group]:
    return [(y, b) for y in (0, 1) for b in (0, 1)]


@torch.no_grad()
def _states(backbone: Any, images: Tensor) -> Tensor:
    """Output of the frozen blocks for pictures, uint8 ``[n, 3, size, size]``."""
    found = []
    for part in images.split(64):
        pixels = (part.float() / 255 - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
        states = backbone.embeddings(pixels)
        for block in backbone.encoder.layer[:-BLOCKS]:
            states = first(block(states))
        found.append(states)
    return torch.cat(found)


def _silhouettes(cache: Path, animals: Sequence[str]) -> dict[str, list[list[Image.Image]]]:
    """Silhouettes by split and animal. No silhouette, and no mirror image of one, is in two splits."""
    pictures, classes = image_assets.silhouettes(cache)
    out: dict[str, list[list[Image.Image]]] = {split: [] for split in SHARES}
    for animal in animals:
        of_class = pictures[classes == ANIMALS.index(animal)]
        unique = sorted({min(bytes(p.flatten().tolist()), bytes(p.flip(1).flatten().tolist())) for p in of_class})
        random.Random(SEED).shuffle(unique)
        for split, (low, high) in SHARES.items():
            chosen = unique[round(low * len(unique)) : round(high * len(unique))]
            out[split].append([Image.frombytes("L", (28, 28), raw) for raw in chosen])
    return out


def _photograph(cache: Path, name: str, width: int = 640) -> Image.Image:
    folder = cache / "photographs" / "usr" / "share"
    path = folder / BACKGROUNDS / name
    if not name.endswith(".jpg"):
        path = min((folder / WALLPAPERS / name / "contents" / "images").iterdir(), key=lambda p: (p.stat().st_size, p))
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    return image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)


def _paste(photograph: Image.Image, shape: Image.Image, rng: random.Random) -> Tensor:
    """A crop of the photograph with the shape pasted on it, dark or light grey; uint8 ``[3, size, size]``."""
    side = rng.randint(int(SIZE * 1.2), min(photograph.size))
    x, y = rng.randint(0, photograph.width - side), rng.randint(0, photograph.height - side)
    crop = photograph.crop((x, y, x + side, y + side)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    crop = _mirrored(crop, rng)
    mask = shape.resize((112, 112), Image.Resampling.BICUBIC)
    mask = mask.crop(mask.point(lambda value: 255 * (value > 60)).getbbox())
    scale = rng.uniform(0.6, 0.8) * SIZE / max(mask.size)
    mask = mask.resize((max(1, int(mask.width * scale)), max(1, int(mask.height * scale))), Image.Resampling.BILINEAR)
    mask = _mirrored(mask, rng)
    grey = rng.choice((rng.randint(0, 60), rng.randint(190, 255)))
    crop.paste((grey,) * 3, (rng.randint(0, SIZE - mask.width), rng.randint(0, SIZE - mask.height)), mask)
    return torch.frombuffer(bytearray(crop.tobytes()), dtype=torch.uint8).view(SIZE, SIZE, 3).permute(2, 0, 1)


def _mirrored(image: Image.Image, rng: random.Random) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image
