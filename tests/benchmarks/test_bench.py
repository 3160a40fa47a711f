"""The benchmarks: their statistics, their sides, their gate, and a tiny report from end to end."""

import contextlib
import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")

import fvae_kernels as fk
from benchmarks import cost, experiments, gate, goals, host_cost, memory, models, report, sides, stats
from fvae_kernels import ops, reference, testing
from fvae_kernels.nn import adapter
from tests.helpers.host_costs import FOUND

pytestmark = pytest.mark.filterwarnings("ignore:FVAE. the auxiliary loss", "ignore::FutureWarning")


def test_the_interval_of_a_median_is_the_binomial_one() -> None:
    found = stats.estimate(list(range(1, 11)))  # n = 10: the second and the ninth value enclose the median with 97.9 %
    assert (found.value, found.low, found.high) == (5.5, 2, 9)
    assert found.coverage == pytest.approx(1 - 2 * (1 + 10) / 2**10)
    few = stats.estimate([3.0, 1.0, 2.0])
    assert (few.value, few.low, few.high, few.coverage) == (2, 1, 3, 0.75)
    assert stats.estimate([7.0]).coverage == 0
    with pytest.raises(ValueError, match="no values"):
        stats.estimate([])


def test_the_interval_covers_the_median_as_often_as_it_says() -> None:
    draws = torch.randn(2000, 15, generator=torch.Generator().manual_seed(0)).exp() - 1  # skewed, median 0
    found = [stats.estimate(row) for row in draws.tolist()]
    share = sum(e.low <= 0 <= e.high for e in found) / len(found)
    assert share == pytest.approx(found[0].coverage, abs=0.015)


def test_ratios_are_paired_and_the_base_is_taken_off() -> None:
    seconds = {"a": [2.0, 4.0, 8.0], "b": [1.0, 2.0, 4.0], "base": [0.5, 1.0, 2.0]}
    assert stats.ratio(seconds, "a", "b").value == 2
    assert stats.ratio(seconds, "a", "b", beyond="base").value == 3
    assert stats.ratio({"a": [1.0], "b": [1.0], "base": [1.0]}, "a", "b", beyond="base").value == math.inf


def test_power_law_finds_the_exponent() -> None:
    sizes = [128, 512, 2048]
    slope, error = stats.power_law(sizes, [3e-6 * n**1.25 for n in sizes])
    assert slope == pytest.approx(1.25)
    assert error == pytest.approx(0, abs=1e-7)
    assert math.isnan(stats.power_law([1], [1.0])[0])


def test_sides_are_timed_in_turns() -> None:
    calls: list[str] = []
    runs = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    found = stats.interleave(runs, seconds=0, minimum=30, call_seconds=0)
    assert {name: len(values) for name, values in found.items()} == {"a": 30, "b": 30, "c": 30}
    assert "".join(calls[:6]) == "aabbcc"  # warm-up
    rounds = ["".join(calls[i : i + 3]) for i in range(6, len(calls), 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) == 6  # each side follows every other side


def test_counts_of_a_linear_layer() -> None:
    x, w = torch.randn(5, 7, requires_grad=True), torch.randn(3, 7, requires_grad=True)
    found = cost.count(lambda: (x @ w.t()).sin(), known=[x, w])
    assert found["launches"] == 2
    assert found["flops"] == 2 * 5 * 7 * 3
    assert found["bytes"] == 4 * (35 + 21 + 15 + 15 + 15)
    assert found["saved_bytes"] == 4 * 15  # the input of the sine; x and w are there anyway


@pytest.mark.skipif("cpp" not in fk.available_backends(), reason="the C++ kernels are missing")
@pytest.mark.parametrize("x_needs", [True, False])
def test_a_kernel_does_the_products_of_plain_pytorch_and_the_decoder_once_more(x_needs: bool) -> None:
    found = sides.layer_sides(("plain", "cpp", "cpp_default"), 8, 12, 10)
    for side in found.values():
        side.inputs[0].requires_grad_(x_needs)
    (adapter,), (default,) = (sides.adapters(found[name].module) for name in ("cpp", "cpp_default"))
    decoder = sum(p.numel() for n, p in adapter.named_parameters() if n.startswith("decoder") and p.dim() == 2)
    assert found["cpp"].cost()["flops"] == found["plain"].cost()["flops"] + 2 * 8 * decoder

    sizes = {name: p.numel() for name, p in default.named_parameters() if p.dim() == 2}
    encoders = sum(size for name, size in sizes.items() if name.startswith("encoder"))
    made = encoders - sizes["encoder1_logvar_weight"]  # which the default holds
    products = made * (2 + x_needs) + sizes["decoder_out_weight"] * 4 + sizes["B"] * 3
    base = 8 * 12 * 10 * (1 + x_needs)
    assert found["cpp_default"].cost()["flops"] == 2 * (8 * products + base)


@pytest.mark.skipif("cpp" not in fk.available_backends(), reason="the C++ kernels are missing")
@pytest.mark.parametrize("op", sorted(testing.INPUTS))
def test_a_kernel_of_one_op_does_no_other_products(op: str) -> None:
    inputs = testing.INPUTS[op]((8,))

    def flops(backend: str | None) -> int:
        return cost.count(lambda: testing.run(getattr(ops, op), inputs, backend=backend))["flops"]

    once_more = 2 * 8 * inputs["w_out"].numel() if op == "reconstruct" else 0
    assert flops("cpp") == flops("reference") + once_more


@pytest.mark.parametrize("key", sorted(models.TINY))
def test_the_sides_of_every_model_start_alike_and_train(key: str) -> None:
    model, batch = models.build(models.TINY[key])
    with torch.no_grad():
        base = models.output(model.eval(), batch)
    found = {name: models.step_side(name, model, batch) for name in sides.names(compiled=False)}
    gate.check_sides(found, lambda module: models.output(module, batch), base)
    for name, side in found.items():
        side.run()
        grads = [p.grad for p in side.module.parameters() if p.requires_grad]
        assert any(g is not None and g.abs().sum() > 0 for g in grads), name
    with torch.no_grad():
        torch.testing.assert_close(models.output(model.eval(), batch), base)  # the shared weights are unchanged


def test_the_layers_have_one_rank_and_one_base() -> None:
    found = sides.layer_sides(("base", *sides.names(compiled=False)), 8, 12, 10)
    weights = [side.module.weight if n == "base" else side.module.base_layer.weight for n, side in found.items()]
    assert all(weight is not None and torch.equal(weight, weights[0]) for weight in weights)
    for name in ("plain", *sides.PEFT):
        assert any(p.shape == (10, sides.RANK) for p in found[name].module.parameters()), name
    assert found["plain"].cost()["saved_bytes"] > found["lora"].cost()["saved_bytes"] > 0


def test_merged_is_the_base_layer() -> None:
    found = sides.inference_sides(4, 12)
    assert type(found["unloaded"].module) is torch.nn.Linear
    for side in found.values():
        torch.testing.assert_close(side.run(), found["base"].run())


def test_the_gate_refuses_a_wrong_op() -> None:
    inputs = testing.encode_inputs(dtype=torch.float32)
    gate.check_op("encode", fk.encode, inputs)
    with pytest.raises(gate.WrongKernel, match="encode differs from the reference: out2"):
        gate.check_op("encode", lambda **kw: (*fk.encode(**kw)[:2], fk.encode(**kw)[2] * (1 + 1e-6)), inputs)


def test_the_gate_forgives_half_precision_a_rounding_and_no_more() -> None:
    exact = {"kl": torch.tensor(100.0).double()}
    rounded = {"kl": torch.tensor(100.0)}  # correct by luck
    near, far = {"kl": torch.tensor(100.1)}, {"kl": torch.tensor(101.0)}
    half, full = (gate.FLOOR + gate.half_roundings(dtype) for dtype in (torch.bfloat16, torch.float32))
    gate.no_worse("layer", near, rounded, exact, half)
    for found, floor in ((near, full), (far, half)):
        with pytest.raises(gate.WrongKernel, match="layer differs from the reference: kl"):
            gate.no_worse("layer", found, rounded, exact, floor)


def test_the_gate_knows_that_the_terms_are_differences_of_larger_sums() -> None:
    """A KL of 0.01 nat may be wrong by two roundings of one nat. A gradient of that size may not."""
    near, far = 0.01 + 2e-7, 0.01 + 4e-7
    for name, found, passes in (("kl", near, True), ("kl", far, False), ("grad_B", near, False)):
        exact, rounded = ({name: torch.tensor(0.01, dtype=torch.float64)} for _ in range(2))
        actual = {name: torch.tensor(found, dtype=torch.float64)}
        with contextlib.nullcontext() if passes else pytest.raises(gate.WrongKernel):
            gate.no_worse("layer", actual, rounded, exact, gate.FLOOR)


def test_the_gate_refuses_a_wrong_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """One gradient is wrong by two millionths, only on the backend under test."""
    from fvae_kernels.ops import _backend

    module = sides.layer_side("plain", sides.OneLinear(12, 10), torch.ones(1, 12), torch.ones(1, 10)).module
    (found,) = sides.adapters(module)
    gate.check_adapter(found, "reference")
    right = adapter.layer

    def wrong(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, reference.Terms]:
        delta, terms = right(*args, **kwargs)
        if _backend._selected == "cpp" and delta.requires_grad:
            delta.register_hook(lambda grad: grad * (1 + 2e-6))
        return delta, terms

    monkeypatch.setattr(adapter, "layer", wrong)
    monkeypatch.setattr(_backend, "why_missing", lambda name: None)
    monkeypatch.setattr(_backend, "_resolve", lambda op, device, name: "reference")
    with pytest.raises(gate.WrongKernel, match="layer differs from the reference: grad_"):
        gate.check_adapter(found, "cpp")


def test_the_gate_refuses_a_side_that_does_not_start_as_the_base() -> None:
    found = sides.layer_sides(("lora",), 4, 12)
    torch.nn.init.ones_(found["lora"].module.lora_B["default"].weight)
    x = torch.ones(1, 12)
    with pytest.raises(gate.WrongKernel, match="lora does not start as the base"):
        gate.check_sides(found, lambda module: module(x), sides.OneLinear(12, 12).linear(x))


def test_the_report_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(host_cost, "possible", lambda: True)
    monkeypatch.setattr(host_cost, "run", lambda quick: FOUND)
    monkeypatch.setattr(memory, "peak", lambda case, side, threads, tiny: {"lora": 200.0}.get(side, 210.0))
    threads = torch.get_num_threads()
    try:
        written = report.main(["--quick", "--threads", "1", "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    text, found = written.read_text(), json.loads((tmp_path / "results.json").read_text())
    assert found["machine"]["commit"] in text
    assert "1.050 (1.050 to 1.050 over 1 pairs; 210 against 200 MB) | **not met**" in text
    for section in (
        "## Goals",
        "## One training step",
        "## One adapted layer",
        "## Inference",
        "PEFT HiRA",
        "Llama",
        "costs the host",
    ):
        assert section in text
    for name in ("ratios.png", "scaling.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert f"({name})" in text
    assert text.count("| met |") + text.count("| **not met** |") == len(goals.goals(found["results"], found["ours"]))
    written.unlink()
    assert report.main(["--render", "--out", str(tmp_path)]).read_text() == text
    assert "PEFT LoRA" in capsys.readouterr().out


def test_a_section_that_fails_loses_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(settings: experiments.Settings) -> list[experiments.Group]:
        raise gate.WrongKernel("layer differs from the reference: kl")

    monkeypatch.setitem(experiments.SECTIONS, "layer", fails)
    with pytest.raises(SystemExit, match="failed: layer"):
        report.main(["--quick", "--only", "layer", "inference", "--out", str(tmp_path)])
    text = (tmp_path / "REPORT.md").read_text()
    assert "`layer` was not measured: WrongKernel: layer differs from the reference: kl" in text
    assert "## Inference" in text


def test_peak_memory_is_read_from_the_process_or_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def process(code: int, out: str, error: str) -> None:
        done = subprocess.CompletedProcess([], code, out, error)
        monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: done)

    process(0, 'noise\n{"peak": 812.5}\n', "")
    assert memory.peak("vit", "lora", 1) == 812.5
    process(1, "", "Traceback\nKeyError: 'nothing'")
    with pytest.raises(RuntimeError, match=r"peak memory of lora on nothing: .*KeyError"):
        memory.peak("nothing", "lora", 1)
