"""Sentiment of review snippets from two sources. Source and label are correlated in training, not in the tests.

A *group* is a pair (label, source). Training draws a share rho of the positives from movies and a share rho of the
negatives from Amazon; validation and test groups have equal sizes. The splits share no review and no text, and do not
depend on the seed. The seed only chooses the training examples, among the training reviews, and their order.
"""

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from examples.assets import read_snippets

SOURCES = ("movies", "Amazon")
FILES = ("movieReview", "amazonReview")
LABELS = ("negative", "positive")
GROUPS = tuple((label, source) for label in (0, 1) for source in (0, 1))
MIN_RATING = 1.0  # mean human rating, from -4 to 4; snippets nearer to neutral are left out
TEST_PER_GROUP, VALIDATION_PER_GROUP = 200, 80
SPLIT_SEED = 2014

Group = tuple[int, int]


class Snippet(NamedTuple):
    """One sentence of a review."""

    text: str
    label: int  # index into LABELS
    source: int  # index into SOURCES
    review: str  # sentences of one review share it

    @property
    def group(self) -> Group:
        return self.label, self.source


@dataclass(frozen=True)
class Splits:
    """Snippets of each split; validation and test hold equally many of each group."""

    train: tuple[Snippet, ...]
    validation: tuple[Snippet, ...]
    test: tuple[Snippet, ...]


def group_name(group: Group) -> str:
    """Name of a group, for example "negative, movies"."""
    return f"{LABELS[group[0]]}, {SOURCES[group[1]]}"


def parse(raw: str, source: int) -> Iterator[Snippet]:
    """Lines of ``id <tab> mean rating <tab> text``; the id is ``review_sentence`` or, for movies, the review's own."""
    for line in filter(None, raw.replace("\r", "").split("\n")):
        identity, rating, text = line.split("\t", 2)
        if abs(float(rating)) >= MIN_RATING:
            yield Snippet(text.strip(), int(float(rating) > 0), source, f"{SOURCES[source]} {identity.split('_')[0]}")


def without_duplicates(snippets: Iterable[Snippet]) -> list[Snippet]:
    """Drop snippets that repeat an earlier one, up to case and white space."""
    unique: dict[str, Snippet] = {}
    for snippet in snippets:
        unique.setdefault(" ".join(snippet.text.casefold().split()), snippet)
    return list(unique.values())


def load(sdist: Path) -> list[Snippet]:
    """All snippets of both sources."""
    return without_duplicates(s for i, name in enumerate(FILES) for s in parse(read_snippets(sdist, name), i))


def split(snippets: Sequence[Snippet], test: int = TEST_PER_GROUP, validation: int = VALIDATION_PER_GROUP) -> Splits:
    """Deal out whole reviews: to the test groups until they are full, then to validation, then to training.

    Snippets of a test or validation review whose group is full already are dropped.
    """
    reviews: dict[str, list[Snippet]] = defaultdict(list)
    for snippet in snippets:
        reviews[snippet.review].append(snippet)
    order = sorted(reviews)
    random.Random(SPLIT_SEED).shuffle(order)
    parts: list[tuple[int | None, dict[Group, list[Snippet]]]] = [
        (size, {group: [] for group in GROUPS}) for size in (test, validation, None)
    ]
    for name in order:
        _deal(reviews[name], parts)
    for (size, part), title in zip(parts[:2], ("test", "validation"), strict=True):
        for group, members in part.items():
            if len(members) != size:
                raise ValueError(
                    f"the {title} group ({group_name(group)}) wants {size} snippets, there are {len(members)}"
                )
    flat = [tuple(s for members in part.values() for s in members) for _, part in parts]
    return Splits(train=flat[2], validation=flat[1], test=flat[0])


def _deal(review: list[Snippet], parts: Sequence[tuple[int | None, dict[Group, list[Snippet]]]]) -> None:
    """Give the review to the first part that still wants one of its snippets."""
    for size, part in parts:
        before = sum(map(len, part.values()))
        for snippet in review:
            if size is None or len(part[snippet.group]) < size:
                part[snippet.group].append(snippet)
        if sum(map(len, part.values())) > before:
            return


def training_counts(size: int, rho: float) -> dict[Group, int]:
    """Number of snippets of each group: half of each label, a share rho of these from the label's source."""
    positives = size // 2
    negatives = size - positives
    movies, amazon = round(positives * rho), round(negatives * rho)
    return {(1, 0): movies, (1, 1): positives - movies, (0, 1): amazon, (0, 0): negatives - amazon}


def training_set(pool: Sequence[Snippet], size: int, rho: float, seed: int) -> list[Snippet]:
    """Draw the correlated training set, shuffled.

    Raises:
        ValueError: if a group of the pool is too small.

    """
    rng = random.Random(seed)
    chosen: list[Snippet] = []
    for group, count in training_counts(size, rho).items():
        members = [s for s in pool if s.group == group]
        if count > len(members):
            raise ValueError(
                f"a training set of {size} at rho={rho} wants {count} snippets ({group_name(group)}), there are "
                f"{len(members)}: choose a smaller --train-size or another --rho"
            )
        chosen += rng.sample(members, count)
    rng.shuffle(chosen)
    return chosen


def batches(examples: Sequence[Snippet], size: int, steps: int, seed: int) -> Iterator[list[Snippet]]:
    """`steps` full batches. Each pass shuffles the examples again and leaves out its incomplete last batch."""
    rng = random.Random(seed)
    done = 0
    while done < steps:
        order = rng.sample(examples, len(examples))
        for start in range(0, len(order) - size + 1, size):
            if done == steps:
                return
            yield order[start : start + size]
            done += 1
