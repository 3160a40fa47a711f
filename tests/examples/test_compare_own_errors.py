"""Your own data as a task: every error names the file, row or column, and says what to do."""

import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL")
pytest.importorskip("rich")
pytest.importorskip("transformers")

from examples.compare.tasks import own_data
from examples.compare.tasks.own import own_task
from examples.compare.tasks.own_data import DataError
from tests.helpers.own_data import pictures, recordings, rows, write
from tests.helpers.texts import tokenizer

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
