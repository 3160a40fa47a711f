"""Your own data: what is in a file or a folder, checked, and dealt out to training, validation and test."""

import csv
import hashlib
import io
import json
import random
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import Group, Splits

SHARE = 0.15  # of all examples for validation, and again for test, where the data has no such parts
SEED = 2014
PARTS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
TABLES = {".csv": ",", ".tsv": "\t", ".jsonl": "", ".json": ""}
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SOUNDS = (".wav", ".flac", ".ogg", ".mp3")
SUFFIXES = {"text": tuple(TABLES), "images": PICTURES, "audio": SOUNDS, "language": (".txt",)}


class DataError(ValueError):
    """Data or a model cannot be used; the text says what came, what was expected and what to do."""


class Example(NamedTuple):
    """An example: a text, the path of a file, or a window of tokens."""

    content: Any
    label: int = 0
    attribute: int = 0

    @property
    def group(self) -> Group:
        """Label and attribute."""
        return self.label, self.attribute

    @property
    def text(self) -> str:
        """The content if it is a text; so that batches of similar length can be made."""
        return self.content if isinstance(self.content, str) else ""


class Raw(NamedTuple):
    """An example whose label and group are still words."""

    content: Any
    label: str
    group: str


class Labelled(NamedTuple):
    """Splits, and the words that labels and attributes stand for."""

    splits: Splits
    labels: tuple[str, ...]
    attributes: tuple[str, ...]

    @property
    def minority(self) -> tuple[Group, ...]:
        """Pairs of label and attribute that training has less often than if these were independent."""
        train = self.splits.train
        pairs, labels, attributes = (
            Counter(e.group for e in train),
            Counter(e.label for e in train),
            Counter(e.attribute for e in train),
        )
        every = ((y, a) for y in range(len(self.labels)) for a in range(len(self.attributes)))
        return tuple((y, a) for y, a in every if pairs[y, a] * len(train) < labels[y] * attributes[a])


def kind_of(data: Path) -> str:
    """What the data is: "text", "images", "audio" or "language", by the ends of its files' names."""
    files = [data] if data.is_file() else sorted(p for p in data.rglob("*") if p.is_file())
    counts = Counter(k for p in files for k, ends in SUFFIXES.items() if p.suffix.lower() in ends)
    if not data.exists():
        raise DataError(f"{data} does not exist: give a file or a folder of data")
    if len(counts) == 1:
        return next(iter(counts))
    wanted = "; ".join(f"{kind}: {' '.join(ends)}" for kind, ends in SUFFIXES.items())
    raise DataError(f"{data} has files of {sorted(counts) or 'no kind that is known'} ({wanted}): give kind as well")


def digest(data: Path, *options: Any) -> str:
    """Eight characters that change with the data (files' contents; of pictures and sounds names and sizes)."""
    found = hashlib.sha256(repr(options).encode())
    for path in [data] if data.is_file() else sorted(p for p in data.rglob("*") if p.is_file()):
        media = path.suffix.lower() in PICTURES + SOUNDS
        found.update(f"{path.relative_to(data)} {path.stat().st_size}".encode() if media else path.read_bytes())
    return found.hexdigest()[:8]


def table(data: Path, text: str, label: str, group: str | None) -> Labelled:
    """Texts of a CSV or JSONL file, or of a folder with one for each of train, validation and test."""
    parts = _parts(data, TABLES)
    return _labelled({p: list(_rows(path, text, label, group)) for p, path in parts.items()}, data)


def folder_of_files(data: Path, suffixes: Sequence[str]) -> Labelled:
    """Files in folders by class, these in train, validation and test or right in `data`."""
    parts = _parts(data, None)
    return _labelled({p: list(_files(path, suffixes)) for p, path in parts.items()}, data)


def documents(data: Path) -> dict[str, list[str]]:
    """Texts by part: of a .txt file, a folder of them, or a folder with train, validation and test of either."""
    out = {}
    for part, path in (_parts(data, (".txt",)) if data.is_dir() else {"all": data}).items():
        files = [path] if path.is_file() else sorted(path.rglob("*.txt"))
        out[part] = [text for file in files if (text := _text(file)).strip()]
        if not out[part]:
            raise DataError(f"{path} has no text: give a .txt file, or a folder of them, that is not empty")
    return out


def in_order(parts: Mapping[str, Sequence[Example]], source: Path) -> Splits:
    """Windows of texts. Validation and test, where they are not given, are the last ones, so that neighbours stay."""
    train, test = parts.get("all", parts.get("train", ())), parts.get("test")
    count = round(SHARE * len(train))
    if test is None:
        train, test = train[: len(train) - count], train[len(train) - count :]
    validation = parts.get("validation")
    if validation is None:
        train, validation = train[: len(train) - count], train[len(train) - count :]
    if not train or not validation or not test:
        raise DataError(
            f"{source} makes {len(train)} windows for train, {len(validation)} for validation, {len(test)} for test, "
            "and each needs one: give a longer text, or a smaller max_tokens"
        )
    return Splits(train, validation, test)


def _parts(data: Path, suffixes: Iterable[str] | None) -> dict[str, Path]:
    """Path of each part; of one part "all" if there are none. `suffixes` of files; None: folders."""
    if not data.exists():
        raise DataError(f"{data} does not exist: give a file or a folder of data")
    if data.is_file():
        return {"all": data}
    names = {name: part for part, names in PARTS.items() for name in names}
    inside = sorted(p for p in data.iterdir() if p.is_dir() or (suffixes and p.suffix.lower() in suffixes))
    found = {names[p.stem.lower()]: p for p in inside if p.stem.lower() in names}
    if not found:
        tables = [p for p in inside if p.is_file()]
        if suffixes is TABLES and len(tables) != 1:
            raise DataError(
                f"{data} has the tables {[p.name for p in tables]}: give one as the data, or call them train, "
                "validation and test"
            )
        return {"all": tables[0] if suffixes is TABLES else data}
    if absent := {"train", "test"} - set(found):
        raise DataError(
            f"{data} has {sorted(p.name for p in found.values())} but no {' and no '.join(sorted(absent))}: "
            "give train and test (and validation, or it is taken from train)"
        )
    return found


def _rows(path: Path, text: str, label: str, group: str | None) -> Iterator[Raw]:
    rows = list(_records(path))
    columns = list(rows[0]) if rows else []
    group = group or ("group" if "group" in columns else None)
    for name in filter(None, (text, label, group)):
        if name not in columns:
            raise DataError(f"{path} has no column {name!r}, only {columns}: name the columns, or rename one")
    for number, row in enumerate(rows, 1):
        content = row.get(text)
        if not isinstance(content, str) or not content.strip():
            raise DataError(
                f"row {number} of {path} has no text in {text!r} ({content!r}): fill it in, or drop the row"
            )
        words = [row.get(name) if name else "" for name in (label, group)]
        if any(
            word is None or (name and not str(word).strip()) for word, name in zip(words, (label, group), strict=True)
        ):
            raise DataError(f"row {number} of {path} has no {label!r} or {group!r}: fill it in, or drop the row")
        yield Raw(content, *(str(word).strip() for word in words))


def _records(path: Path) -> Iterator[Mapping[str, Any]]:
    """Rows of a table as mappings from column to value."""
    if not (delimiter := TABLES.get(path.suffix.lower())):
        for number, line in enumerate(filter(str.strip, _text(path).splitlines()), 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"line {number} of {path} is no JSON ({error}): give one object a line") from None
            if not isinstance(row, dict):
                raise DataError(f"line {number} of {path} is {type(row).__name__}: give one object a line")
            yield row
        return
    yield from csv.DictReader(io.StringIO(_text(path), newline=""), delimiter=delimiter)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error}): convert it") from None


def _files(folder: Path, suffixes: Sequence[str]) -> Iterator[Raw]:
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in suffixes):
        name = path.relative_to(folder).parts[0]
        if name == path.name:
            raise DataError(f"{path} is in no folder of a class: put it into {folder}/CLASS/")
        yield Raw(path, name, "")


def _order(words: Iterable[str]) -> tuple[str, ...]:
    """Different words in order: of their value if all are numbers."""
    unique = sorted(set(words))
    try:
        return tuple(sorted(unique, key=float))
    except ValueError:
        return tuple(unique)


def _labelled(parts: dict[str, list[Raw]], source: Path) -> Labelled:
    """Numbers for words, and splits."""
    every = [raw for part in parts.values() for raw in part]
    labels, attributes = _order(r.label for r in every), _order(r.group for r in every)
    if len(labels) < 2:
        raise DataError(
            f"{source} has {len(every)} examples of the classes {list(labels)}: give examples of two classes or more"
        )
    found = {
        part: [Example(r.content, labels.index(r.label), attributes.index(r.group)) for r in rows]
        for part, rows in parts.items()
    }
    splits = _split(found, source)
    for part in ("train", "validation", "test"):
        counts = Counter(e.label for e in getattr(splits, part))
        if absent := [word for i, word in enumerate(labels) if not counts[i]]:
            have = Counter(r.label for r in every)[absent[0]]
            raise DataError(
                f"{source} has {have} examples of class {absent[0]!r}, and none is left for {part}: give more "
                "(three at the least, in one group), or leave the class out"
            )
    return Labelled(splits, labels, attributes)


def _split(parts: dict[str, list[Example]], source: Path) -> Splits:
    if "all" in parts:
        rest, test = _stratified(_without_repeats(parts["all"], source), SHARE)
        train, validation = _stratified(rest, SHARE / (1 - SHARE))
        return Splits(train, validation, test)
    train, validation = parts["train"], parts.get("validation")
    if validation is None:
        train, validation = _stratified(train, SHARE)
    return Splits(train, validation, parts["test"])


def _stratified(examples: Sequence[Example], share: float) -> tuple[list[Example], list[Example]]:
    """The examples without, and with a share of each group (one at least of two or more), shuffled."""
    groups: dict[Group, list[Example]] = defaultdict(list)
    for example in examples:
        groups[example.group].append(example)
    rng = random.Random(SEED)
    kept: list[Example] = []
    taken: list[Example] = []
    for _, members in sorted(groups.items()):
        rng.shuffle(members)
        count = max(round(share * len(members)), int(len(members) >= 2))
        taken += members[:count]
        kept += members[count:]
    rng.shuffle(kept)
    return kept, taken


def _without_repeats(examples: Sequence[Example], source: Path) -> list[Example]:
    """Of equal texts the first, so that none is in two splits."""
    unique: dict[Any, Example] = {}
    for example in examples:
        content = example.content
        unique.setdefault(" ".join(content.casefold().split()) if isinstance(content, str) else content, example)
    if left_out := len(examples) - len(unique):
        warnings.warn(f"{source}: {left_out} texts repeat an earlier one and are left out", stacklevel=2)
    return list(unique.values())
