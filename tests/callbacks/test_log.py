"""FVAELoggingCallback: right values, at logging steps only, in the file and in TensorBoard."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

import fvae_kernels as fk
from fvae_kernels.callbacks import log as module
from fvae_kernels.training.aux_loss import AuxLossLayer
from tests.helpers.recipe import SMALL_NETWORKS
from tests.helpers.tiny_models import TARGETS, build
from tests.helpers.trainer_tools import QUIET, STEPS, Rows, adapted, trainer_of

VALUES = {
    *("loss", "nll", "kl", "gamma"),
    *("Lambda", "Delta", "Gamma", "W2_squared", "delta_bound", "active_units_z1", "active_units_z2"),
    *("signal_to_noise", "effective_rank", "token_independent"),
}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def replaced() -> nn.Module:
    torch.manual_seed(0)
    model = build("bert").double()
    config = fk.FVAEConfig(**{**SMALL_NETWORKS, "dropout": 0.2}, rank=3, prior2_mean=0.7)
    fk.replace_linears(model, config, TARGETS["bert"])
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


def train(model: nn.Module, folder: Path, path: Path | None, *more: TrainerCallback, **options: Any) -> Any:
    rows = Rows("bert", torch.float64)
    options = {**QUIET, "max_steps": 5, "save_strategy": "no", "logging_steps": 2, "eval_dataset": rows, **options}
    trainer = trainer_of(model, rows, output_dir=str(folder), **options)
    trainer.add_callback(fk.FVAELoggingCallback(trainer, path))
    for callback in more:
        trainer.add_callback(callback)
    trainer.train()
    return trainer


def read(path: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


@pytest.mark.compat("Trainers", "logging per layer, to the trainer's reports and a JSON-lines file")
@pytest.mark.parametrize("make", [replaced, lambda: adapted("bert", "SEQ_CLS")], ids=["replace_linears", "peft"])
def test_each_logging_step_has_a_line_with_every_layer(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "layers.jsonl"
    trainer = train(make(), tmp_path, path, eval_strategy="steps", eval_steps=3)
    rows = read(path)
    names = {n for n, m in trainer.model.named_modules() if isinstance(m, AuxLossLayer)}
    assert [row["step"] for row in rows] == [2, 4]
    assert len(names) == 4
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for row, entry in zip(rows, logged, strict=True):
        assert (row["loss"], row["epoch"], row["grad_norm"]) == (entry["loss"], entry["epoch"], entry["grad_norm"])
        assert row["layers"].keys() == names
        for values in row["layers"].values():
            assert values.keys() == VALUES
            assert all(isinstance(value, (int, float)) for value in values.values())
    assert all(not m._forward_pre_hooks for m in trainer.model.modules() if isinstance(m, AuxLossLayer))


def test_values_are_those_of_the_two_posteriors(tmp_path: Path) -> None:
    """Compared with a plain computation on one layer's input, with the parameters of that step."""
    path, model = tmp_path / "layers.jsonl", replaced()
    name, layer = next((n, m) for n, m in model.named_modules() if isinstance(m, AuxLossLayer))
    expected: list[dict[str, float]] = []

    def compute(module: Any, args: Any) -> None:
        with torch.no_grad():
            x, heads = args[0].reshape(-1, 24), []
            for i in (1, 2):
                e = module.adapter._encoder(i)
                h = torch.relu(x @ e.hidden[0][0].T + e.hidden[0][1])
                heads.append((h @ e.w_mean.T + e.b_mean, h @ e.w_logvar.T + e.b_logvar))
            (m1, l1), (m2, l2) = heads
            q2 = torch.distributions.Normal(m2, (l2 / 2).exp())
            p1, p2 = (torch.distributions.Normal(torch.tensor(mu, dtype=torch.float64), 1.0) for mu in (0.0, 0.7))
            kl = torch.distributions.kl_divergence
            norm = [(m.square() + v.exp()).sum(-1).mean() for m, v in heads]
            w2 = (m1 - m2).square() + ((l1 / 2).exp() - (l2 / 2).exp()).square()
            expected.append(
                {
                    "Lambda": float((kl(q2, p1) - kl(q2, p2)).sum(-1).mean()),
                    "Delta": float(0.5 * (norm[0] - norm[1])),
                    "W2_squared": float(w2.sum(-1).mean()),
                    "active_units_z1": int((m1.var(0, correction=0) > 1e-2).sum()),
                }
            )

    layer.register_forward_pre_hook(compute)
    train(model, tmp_path, path, logging_steps=1, max_steps=3)
    rows = read(path)
    for row, values in zip(rows, expected, strict=True):
        got = row["layers"][name]
        assert {key: got[key] for key in values} == pytest.approx(values, rel=1e-9)
        assert got["Gamma"] == pytest.approx(got["Lambda"] + got["Delta"], rel=1e-9)
        terms = got["nll"] + got["kl"] - got["gamma"]
        assert got["loss"] == pytest.approx(terms, rel=1e-9)
    assert rows[0]["layers"][name]["Lambda"] != rows[2]["layers"][name]["Lambda"]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"logging_steps": 3}, [3]),
        ({"logging_steps": 4, "logging_first_step": True}, [1, 4]),
        ({"logging_strategy": "epoch"}, [4, 5]),
        ({"logging_strategy": "epoch", "gradient_accumulation_steps": 3}, [2, 4, 5]),
        ({"logging_strategy": "no"}, []),
    ],
)
def test_it_looks_at_logging_steps_only(
    options: dict[str, Any], steps: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    whole = module.geometry
    monkeypatch.setattr(module, "geometry", lambda *a: looked.append(1) or whole(*a))
    collected: list[int] = []
    collect = module.collect_terms
    monkeypatch.setattr(module, "collect_terms", lambda m: collected.append(1) or collect(m))
    path = tmp_path / "layers.jsonl"
    train(adapted("bert", "SEQ_CLS"), tmp_path, path, **options)
    rows = read(path) if path.exists() else []
    assert [row["step"] for row in rows] == steps
    assert all(values.keys() == VALUES for row in rows for values in row["layers"].values())
    assert len(collected) == len(steps)
    micro_batches = options.get("gradient_accumulation_steps", 1)
    assert len(looked) <= 4 * len(steps) * micro_batches
    assert bool(looked) == bool(steps)


def test_nothing_is_kept_between_steps(tmp_path: Path) -> None:
    model = adapted("bert", "SEQ_CLS")
    trainer = train(model, tmp_path, None, logging_steps=2)
    watcher = next(c for c in trainer.callback_handler.callbacks if isinstance(c, fk.FVAELoggingCallback))
    assert (watcher.seen, watcher.armed, watcher.handles) == ({}, False, [])


def test_tensorboard_gets_every_value_of_every_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    path = tmp_path / "layers.jsonl"
    train(adapted("bert", "SEQ_CLS"), tmp_path, path, report_to=["tensorboard"])
    events = accumulator.EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    for row in read(path):
        for layer, values in row["layers"].items():
            for name, value in values.items():
                series = {e.step: e.value for e in events.Scalars(f"train/fvae/{layer}/{name}")}
                assert series[row["step"]] == pytest.approx(value, rel=1e-6)
    assert {e.step for e in events.Scalars("train/loss")} == {2, 4}


def test_gradient_accumulation_checkpointing_and_a_diverged_layer(tmp_path: Path) -> None:
    path, model = tmp_path / "layers.jsonl", adapted("bert", "SEQ_CLS")
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    train(model, tmp_path, path, gradient_accumulation_steps=STEPS, max_steps=1, logging_steps=1, **options)
    (row,) = read(path)
    assert all(values.keys() == VALUES for values in row["layers"].values())
    layer = next(m for m in model.modules() if isinstance(m, AuxLossLayer))
    with torch.no_grad():
        layer.fvae_adapter["default"].encoder2_mean_bias.fill_(float("inf"))
    train(model, tmp_path, path, max_steps=1, logging_steps=1)
    assert next(iter(read(path)[1]["layers"].values()))["W2_squared"] is None


def test_what_it_cannot_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"pass the trainer first: FVAELoggingCallback\(trainer, path\)"):
        fk.FVAELoggingCallback(tmp_path / "layers.jsonl")
    plain = trainer_of(build("bert"), Rows("bert", torch.float32), output_dir=str(tmp_path), **QUIET)
    with pytest.raises(ValueError, match="BertForSequenceClassification has no FVAE layer to log"):
        fk.FVAELoggingCallback(plain)


def test_it_sees_the_tokens_that_the_objective_sees(tmp_path: Path) -> None:
    """Without dropout the closed form of Gamma equals that of the training forward, also for padded batches."""
    path, rows = tmp_path / "layers.jsonl", Rows("bert", torch.float64)
    for k, row in enumerate(rows.rows):
        row["attention_mask"] = (torch.arange(6) < 2 + k % 5).long()
    trainer = trainer_of(
        adapted("bert", "SEQ_CLS"), rows, output_dir=str(tmp_path), max_steps=2, logging_steps=1, **QUIET
    )
    trainer.add_callback(fk.FVAELoggingCallback(trainer, path))
    trainer.train()
    for row in read(path):
        for values in row["layers"].values():
            assert values["Gamma"] == pytest.approx(values["gamma"], rel=1e-9)


def test_masked_tokens_do_not_count() -> None:
    adapter, x = next(m for m in replaced().modules() if isinstance(m, AuxLossLayer)).adapter, torch.randn(3, 5, 24)
    x, mask = x.double(), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])
    expected = module.geometry(adapter, x[mask.bool()])
    got = module.geometry(adapter, x.where(mask.bool()[..., None], 100 * x), mask)
    for name, value in expected.items():
        assert float(got[name]) == pytest.approx(float(value), rel=1e-9), name


def test_the_package_alone_does_not_import_transformers() -> None:
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n in ('peft', 'transformers') else find(n, *a)\n"
        "import fvae_kernels as fk\n"
        "assert 'transformers' not in sys.modules\n"
        "try: fk.FVAELoggingCallback\n"
        "except ImportError as e: assert 'needs transformers' in str(e), e\n"
        "else: raise SystemExit('no error')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
