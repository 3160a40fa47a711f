"""Your own data as a task: every kind trains, splits are disjoint and stratified."""

import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("rich")
pytest.importorskip("transformers")

import transformers

from examples.compare import __main__ as command
from examples.compare import training
from examples.compare.methods import METHODS
from examples.compare.tasks import Placement, own_data
from examples.compare.tasks.own import own_task
from examples.compare.tasks.own_data import DataError
from tests.helpers.own_data import pictures, recordings, rows, write
from tests.helpers.texts import tokenizer, words
from tests.helpers.tiny_models import build

KINDS = ("text", "images", "audio", "language")


def data_of(kind: str, folder: Path) -> Path:
    if kind == "text":
        return write(folder / "data.csv", rows(30))
    if kind == "images":
        return pictures(folder / "data", {"cat": 8, "dog": 8})
    if kind == "audio":
        return recordings(folder / "data")
    (folder / "data.txt").write_text(" ".join(words(i % 3, 8) for i in range(30)))
    return folder / "data.txt"


@pytest.mark.parametrize("kind", KINDS)
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


@pytest.mark.parametrize("kind", ["text", "images"])
def test_one_command_makes_a_table(
    kind: str, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--data", str(data_of(kind, tmp_path)), "--model", str(models[kind]), "--out", str(tmp_path / "o.jsonl")]
    for _ in range(2):  # the second finds all runs in the file
        command.main([*asked, "--methods", "lora,fvae", "--seeds", "0-1", "--epochs", "1", "--batch-size", "4"])
    assert len((tmp_path / "o.jsonl").read_text().splitlines()) == 4
    said = capsys.readouterr().out
    assert "1 epochs, learning rate 0.001, batches of 4; 95 % t intervals, paired by seed" in said
    assert "runs: 4 finished before, 0 open" in said
    assert said.count("| FVAE-LoRA, the default | 2 |") == 2


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


def test_the_name_changes_with_data_options_and_model(models: dict[str, Path], tmp_path: Path) -> None:
    data = write(tmp_path / "d.csv", rows())
    names = [own_task(data, models["text"]).name, own_task(data, models["text"], max_tokens=9).name]
    write(data, rows(38))
    names.append(own_task(data, models["text"]).name)
    other = shutil.copytree(models["text"], tmp_path / "other" / models["text"].name)  # the same name elsewhere
    names.append(own_task(data, other).name)
    (other / "model.safetensors").touch()  # trained further
    names.append(own_task(data, other).name)
    assert len(set(names)) == 5
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
