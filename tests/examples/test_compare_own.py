"""Your own data as a task: every kind trains, splits are disjoint and stratified, every error says what to do."""

import math
import shutil
import wave
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("transformers")

import transformers

from examples.compare import training
from examples.compare.methods import METHODS
from examples.compare.tasks import Placement, own_data, sound
from examples.compare.tasks.own import own_task
from examples.compare.tasks.own_data import DataError
from tests.helpers.own_data import pictures, recordings, rows, write
from tests.helpers.texts import tokenizer, words
from tests.helpers.tiny_models import build

PROCESSORS: dict[str, tuple[str, Callable[[], Any]]] = {
    "text": ("bert", tokenizer),
    "images": ("vit", lambda: transformers.ViTImageProcessor(size={"height": 8, "width": 8})),
    "audio": ("wav2vec2", lambda: transformers.Wav2Vec2FeatureExtractor(sampling_rate=400)),
    "language": ("llama", tokenizer),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny models by kind of data."""
    out = {}
    for kind, (name, processor) in PROCESSORS.items():
        out[kind] = tmp_path_factory.mktemp(name)
        build(name).save_pretrained(out[kind])
        processor().save_pretrained(out[kind])
    return out


def data_of(kind: str, folder: Path) -> Path:
    if kind == "text":
        return write(folder / "data.csv", rows(30))
    if kind == "images":
        return pictures(folder / "data", {"cat": 8, "dog": 8})
    if kind == "audio":
        return recordings(folder / "data")
    (folder / "data.txt").write_text(" ".join(words(i % 3, 8) for i in range(30)))
    return folder / "data.txt"


@pytest.mark.parametrize("kind", PROCESSORS)
def test_every_kind_trains(kind: str, models: dict[str, Path], tmp_path: Path) -> None:
    data = data_of(kind, tmp_path)
    task = own_task(data, models[kind], max_tokens=8, epochs=2, lr=5e-3, batch_size=4)
    splits = task.splits(0)
    classes = {"text": ("bad", "good"), "images": ("cat", "dog"), "audio": ("high", "low"), "language": ()}[kind]
    assert task.labels == classes
    assert task.classes == len(classes)
    for method in ("lora", "fvae"):
        row = training.run(task, METHODS[method], 0, splits, task.recipe, early_stopping=False)
        assert math.isfinite(row["task_loss"][-1])
        assert row["task_loss"][-1] < row["task_loss"][0]
        assert ("nats" in row["test"]) == (kind == "language")
        assert bool(row["anatomy"]) == (method == "fvae")


@pytest.mark.parametrize(("kind", "heads"), [("images", ["classifier"]), ("audio", ["projector", "classifier"])])
def test_what_is_new_is_trained_whole(kind: str, heads: list[str], models: dict[str, Path], tmp_path: Path) -> None:
    task = own_task(data_of(kind, tmp_path), models[kind])
    assert task.placement.options == {"modules_to_save": heads}
    first, again, other = (task.model(seed) for seed in (0, 0, 1))
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), again.parameters(), strict=True))
    different = {
        name for (name, p), q in zip(first.named_parameters(), other.parameters(), strict=True) if not p.equal(q)
    }
    assert different == {"classifier.weight"}
    assert first.config.id2label == dict(enumerate(task.labels))


def test_recordings_become_features_of_a_fixed_length(tmp_path: Path) -> None:
    build("whisper").save_pretrained(tmp_path / "model")
    sizes = {"feature_size": 4, "sampling_rate": 400, "hop_length": 100, "n_fft": 100, "chunk_length": 3}
    transformers.WhisperFeatureExtractor(**sizes).save_pretrained(tmp_path / "model")
    task = own_task(recordings(tmp_path / "data"), tmp_path / "model")
    assert task.placement == Placement(("q_proj", "v_proj"), {"modules_to_save": ["projector", "classifier"]})
    inputs, labels = task.batch(task.splits(0).test)
    assert inputs["input_features"].shape == (2, 4, 12)
    assert task.model(0)(**inputs, labels=labels)["loss"].isfinite()


def test_texts_are_padded_cut_and_in_the_order_of_their_labels(models: dict[str, Path], tmp_path: Path) -> None:
    found = [{"text": words(0, 1 + 2 * y), "label": y, "group": 0} for y in (10, 9) for _ in range(9)]
    data = write(tmp_path / "d.jsonl", [{**row, "text": f"{row['text']} {words(i, 2)}"} for i, row in enumerate(found)])
    task = own_task(data, models["text"], max_tokens=14)
    assert task.labels == ("9", "10")  # as numbers
    inputs, labels = task.batch(task.splits(0).train)
    assert inputs["input_ids"].shape == (len(labels), 14)
    assert (inputs["attention_mask"].sum(1) == 14).all()
    assert Counter(labels.tolist()) == {0: 7, 1: 7}


def test_one_file_is_split_without_overlap_alike_in_every_group(tmp_path: Path) -> None:
    data = write(tmp_path / "d.csv", rows(200))
    found = own_data.table(data, "text", "label", None)
    parts = [getattr(found.splits, name) for name in ("train", "validation", "test")]
    texts = [{e.text for e in part} for part in parts]
    assert sum(map(len, texts)) == len(set().union(*texts)) == 200
    everything = Counter(e.group for part in parts for e in part)
    for part, share in zip(parts, (0.7, 0.15, 0.15), strict=True):
        assert all(abs(Counter(e.group for e in part)[g] - share * n) <= 1 for g, n in everything.items())
    assert own_data.table(data, "text", "label", None) == found
    assert found.attributes == ("s0", "s1")
    assert found.minority == ((0, 1), (1, 0))


def test_without_a_column_of_groups_there_is_no_minority(tmp_path: Path) -> None:
    data = write(tmp_path / "d.csv", [{"text": r["text"], "label": r["label"]} for r in rows()])
    found = own_data.table(data, "text", "label", None)
    assert found.minority == ()
    assert {e.attribute for e in found.splits.test} == {0}


def test_repeated_texts_are_in_one_split_and_said(tmp_path: Path) -> None:
    data = write(tmp_path / "d.csv", [*rows(20), {"text": "  W0  w5 new", "label": "bad", "group": "s0"}] * 2)
    with pytest.warns(UserWarning, match="21 texts repeat an earlier one"):
        own_data.table(data, "text", "label", None)


def test_parts_that_are_given_stay_as_they_are(tmp_path: Path) -> None:
    for name, part in (("train", rows(40)), ("test", rows(10)), ("dev", rows(12))):
        write(tmp_path / f"{name}.csv", part)
    splits = own_data.table(tmp_path, "text", "label", None).splits
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [40, 12, 10]
    (tmp_path / "dev.csv").unlink()
    splits = own_data.table(tmp_path, "text", "label", None).splits
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [34, 6, 10]
    assert not {e.text for e in splits.train} & {e.text for e in splits.validation}


def test_folders_of_classes_in_parts(tmp_path: Path) -> None:
    for name in ("train", "val", "test"):
        pictures(tmp_path / "d" / name, {"b": 3, "a": 2})
    found = own_data.folder_of_files(tmp_path / "d", own_data.PICTURES)
    assert found.labels == ("a", "b")
    assert next((e.content.parts[-3:], e.label) for e in found.splits.validation) == (("val", "a", "0.png"), 0)
    assert own_data.kind_of(tmp_path / "d") == "images"


def test_windows_of_neighbours_stay_in_one_split(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    for name in ("a", "b"):
        (tmp_path / "d" / f"{name}.txt").write_text(words(0, 39))
    task = own_task(tmp_path / "d", models["language"], max_tokens=4)
    assert (task.classes, task.minority, task.placement.options) == (0, (), {"task_type": "CAUSAL_LM"})
    splits = task.splits(0)
    tokens = torch.cat([e.content for part in (splits.train, splits.validation, splits.test) for e in part])
    assert tokens.tolist() == [*tokenizer()(words(0, 39))["input_ids"], 1] * 2
    inputs, labels = task.batch(splits.test)
    assert torch.equal(inputs["input_ids"], labels)
    assert labels.shape == (3, 4)


def test_the_name_changes_with_data_and_options(models: dict[str, Path], tmp_path: Path) -> None:
    data = write(tmp_path / "d.csv", rows())
    names = [own_task(data, models["text"]).name, own_task(data, models["text"], max_tokens=9).name]
    write(data, rows(38))
    names.append(own_task(data, models["text"]).name)
    assert len(set(names)) == 3
    assert all(name.startswith(f"d.csv, {models['text'].name}, ") for name in names)
    assert own_task(data, models["text"], name="mine").name == "mine"


def test_targets(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path / "d.csv", rows())
    assert own_task(data, models["text"]).placement.target_modules == ("query", "value")
    for targets in (("key",), ("layer.1.attention.self.key", "query")):
        assert own_task(data, models["text"], targets=targets).placement.target_modules == targets
    with pytest.raises(
        DataError, match=r"no linear layers named \['keys'\]: choose targets from \['classifier', 'dense'"
    ):
        own_task(data, models["text"], targets=["keys"])
    monkeypatch.setattr("examples.compare.tasks.own.PEFT_TARGETS", {})
    assert own_task(data, models["text"]).placement.target_modules == ("query", "value")
    monkeypatch.setattr("examples.compare.tasks.own.ATTENTION", ())
    with pytest.raises(DataError, match="PEFT knows no targets for the architecture 'bert': choose targets from"):
        own_task(data, models["text"])


def test_a_language_model_can_classify(models: dict[str, Path], tmp_path: Path) -> None:
    task = own_task(write(tmp_path / "d.csv", rows()), models["language"])
    row = training.run(task, METHODS["lora"], 0, task.splits(0), replace(task.recipe, epochs=1))
    assert row["steps"] == 1


TEXT_ERRORS = {
    "no column 'text', only \\['words', 'label'\\]": [{"words": "a", "label": "b"}],
    "5 examples of the classes \\['good'\\]: give examples of two": [
        {"text": f"{i}", "label": "good"} for i in range(5)
    ],
    "1 examples of class 'rare', and none is left for": [*rows(20), {"text": "x", "label": "rare", "group": "s0"}],
    "row 3 of .* has no text in 'text' \\(' '\\): fill it in": [*rows(2), {"text": " ", "label": "bad", "group": "s0"}],
    "row 3 of .* has no 'label' or 'group'": [*rows(2), {"text": "a", "label": "", "group": "s0"}],
}


@pytest.mark.parametrize(("message", "found"), TEXT_ERRORS.items(), ids=range(len(TEXT_ERRORS)))
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_errors_of_tables(message: str, found: list[dict[str, Any]], suffix: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        own_task(write(tmp_path / f"d.{suffix}", found), tmp_path / "no model is looked at")


def test_errors_of_files(models: dict[str, Path], tmp_path: Path) -> None:
    def refused(message: str, data: Path, model: str, **options: Any) -> None:
        with pytest.raises(DataError, match=message):
            own_task(data, models[model], **options)

    refused("missing.csv does not exist: give a file or a folder", tmp_path / "missing.csv", "text")
    refused("missing.csv does not exist: give a file or a folder", tmp_path / "missing.csv", "text", kind="text")
    refused("no kind 'video' of data: give one of text, images", tmp_path, "text", kind="video")
    (tmp_path / "empty.txt").write_text(" \n")
    refused("empty.txt has no text", tmp_path / "empty.txt", "language")
    (tmp_path / "short.txt").write_text("w1 w2 w3")
    refused("makes 1 windows for train, 0 for validation", tmp_path / "short.txt", "language", max_tokens=3)
    (tmp_path / "bad.jsonl").write_text('{"text": "a", "label": 1}\n{"text": ')
    refused("line 2 of .*bad.jsonl is no JSON .*: give one object a line", tmp_path / "bad.jsonl", "text")
    (tmp_path / "list.jsonl").write_text("[1]")
    refused("line 1 of .*list.jsonl is list: give one object a line", tmp_path / "list.jsonl", "text")
    (tmp_path / "latin.csv").write_bytes("text,label\nné,1\n".encode("latin-1"))
    refused("latin.csv is not UTF-8 .*: convert it", tmp_path / "latin.csv", "text")
    refused(r"has files of \['language', 'text'\] .*: give kind", tmp_path, "text")
    write(tmp_path / "parts" / "train.csv", rows())
    refused("has \\['train.csv'\\] but no test: give train and test", tmp_path / "parts", "text")
    write(tmp_path / "two" / "a.csv", rows())
    shutil.copy(tmp_path / "two" / "a.csv", tmp_path / "two" / "b.csv")
    refused("has the tables \\['a.csv', 'b.csv'\\]: give one as the data", tmp_path / "two", "text")


def test_errors_of_pictures_and_recordings(models: dict[str, Path], tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures", {"a": 4, "b": 4})
    (folder / "a" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(
        DataError, match=r"broken.png is no picture that Pillow can read .*: replace it, or take it out"
    ):
        own_task(folder, models["images"])
    whole = (folder / "a" / "0.png").read_bytes()
    (folder / "a" / "broken.png").write_bytes(whole[: len(whole) - 30])
    task = own_task(folder, models["images"])
    with pytest.raises(DataError, match=r"broken.png is no picture"):
        task.batch([own_data.Example(folder / "a" / "broken.png")])
    (folder / "loose.png").write_bytes(whole)
    with pytest.raises(DataError, match=r"loose.png is in no folder of a class: put it into .*pictures/CLASS/"):
        own_task(folder, models["images"])
    heard = recordings(tmp_path / "heard", 4)
    (heard / "low" / "broken.wav").write_bytes(b"RIFF")
    task = own_task(heard, models["audio"])
    with pytest.raises(DataError, match=r"broken.wav is no recording that can be read .*: convert it to .wav"):
        task.batch([own_data.Example(heard / "low" / "broken.wav")])


def test_models_that_cannot_be_loaded(models: dict[str, Path], tmp_path: Path) -> None:
    data = write(tmp_path / "d.csv", rows())
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"AutoTokenizer cannot load '.*empty' .*: give a folder that save_pretrained"):
        own_task(data, tmp_path / "empty")
    tokenizer().save_pretrained(tmp_path / "empty")
    with pytest.raises(DataError, match="AutoModelForSequenceClassification cannot load"):
        own_task(data, tmp_path / "empty")
    with pytest.raises(DataError, match="AutoImageProcessor cannot load"):
        own_task(pictures(tmp_path / "pictures", {"a": 4, "b": 4}), models["text"])


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_pcm_of_every_width(width: int, tmp_path: Path) -> None:
    """Two channels of opposite halves of a value: their mean is known."""
    top = 2 ** (8 * width - 1)
    values = [v + (top if width == 1 else 0) for v in (top // 2, 0, -top // 2, -top // 2)]
    raw = b"".join(v.to_bytes(width, "little", signed=width > 1) for v in values)
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((2, width, 123, 0, "NONE", ""))
        file.writeframes(raw)
    samples, rate = sound.read(tmp_path / "a.wav")
    assert rate == 123
    assert samples.tolist() == [0.25, -0.5]


def test_resampling_keeps_a_tone() -> None:
    def tone(rate: int) -> torch.Tensor:
        return torch.sin(torch.arange(rate) * 2 * math.pi * 5 / rate)

    for rate, new in ((100, 160), (160, 100), (100, 100)):
        torch.testing.assert_close(sound.resample(tone(rate), rate, new), tone(new), rtol=0, atol=1e-5)
