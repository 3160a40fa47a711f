"""The parts of the report; each returns plain numbers, and what failed in it under ``"errors"``.

Those that use the device run in processes of their own, for a broken kernel leaves no CUDA context to go on with.
"""

import contextlib
import json
import os
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fvae_kernels.ops._backend import backends_for, interpreting

from .. import experiments, gate, machine, roofline, sides
from ..sides import TITLES

Found = dict[str, Any]
LAYER_SIDES = ("base", "plain", "compiled", "lora", "dora", "triton")
OP_SIDES = ("plain", "compiled", "triton")
INTERPRETED = {"TRITON_INTERPRET": "1"}
OPS: dict[str, dict[str, Any]] = {
    "encode": {"D": 768, "R": 16},
    "divergence": {"R": 16},
    "reconstruct": {"D": 768, "latent": 32, "hidden": (128, 128, 128)},
}
OPS_TINY: dict[str, dict[str, Any]] = {
    "encode": {"D": 24, "R": 4},
    "divergence": {"R": 4},
    "reconstruct": {"D": 24, "latent": 8, "hidden": (16,)},
}


def do_bench(run: Callable[[], Any]) -> float:
    """Median milliseconds on the GPU, the L2 cache cleared before each call."""
    from triton.testing import do_bench as bench

    return float(bench(run, return_mode="median"))


def stand_in(run: Callable[[], Any]) -> float:
    """In a dry run: calls once, measures nothing, and says 1."""
    run()
    return 1.0


@dataclass(frozen=True)
class Plan:
    """Where, how much, and with which clock."""

    folder: Path
    device: str = "cuda"
    tokens: tuple[int, ...] = (1576, 65536)
    ops: tuple[tuple[str, dict[str, Any]], ...] = tuple(OPS.items())
    shapes: tuple[roofline.Shape, ...] = (roofline.Shape("ViT-B/16, 8 images", 1576, 768, 768), *roofline.SHAPES)
    timer: Callable[[Callable[[], Any]], float] = do_bench
    compiler: str = "inductor"
    size: int = 8192  # of the square products that show the device's rate
    tests: tuple[str, ...] = ()


def plan(folder: Path, dry: bool) -> Plan:
    """Of a real run, or of one that shows on any machine that the flow works."""
    full = Plan(folder)
    if not dry:
        return full
    tiny = (replace(full.shapes[0], N=24, D=12, M=10),)
    few = ("tests/ops/test_divergence.py", "-k", "triton and standard_normal", "-p", "no:cacheprovider")
    return Plan(folder, "cpu", (24,), tuple(OPS_TINY.items()), tiny, stand_in, "eager", 16, few)


def about(p: Plan) -> Found:
    """The device, and what it reaches: bandwidth of a copy, rates of products, seconds of a launch."""
    found: Found = {
        **machine.describe(),
        "interpreted": interpreting(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }
    if p.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "multiprocessors": properties.multi_processor_count}
        found |= {"memory": properties.total_memory, "count": torch.cuda.device_count()}
    one = torch.ones(1, device=p.device)
    found["launch"] = p.timer(lambda: [one.add_(1) for _ in range(100)]) / 1e3 / 100
    big = torch.empty(p.size**2, device=p.device)
    found["bandwidth"] = 2 * 4 * big.numel() / (p.timer(lambda: big.clone()) / 1e3)
    found["rates"] = {}
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.ones(p.size, p.size, device=p.device, dtype=dtype)
        found["rates"][str(dtype)[6:]] = 2 * p.size**3 / (p.timer(lambda square=square: square @ square) / 1e3)
    return found


def suite(p: Plan) -> Found:
    """The whole test suite; Triton's cases on the device."""
    xml = p.folder / "tests.xml"
    xml.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={xml}", "-o", "junit_family=xunit1", *p.tests]
    environment = os.environ | (INTERPRETED if p.device == "cpu" else {})
    with (p.folder / "suite.log").open("w") as log:
        done = subprocess.run(command, cwd=machine.ROOT, env=environment, stdout=log, stderr=log, check=False)
    if not xml.exists():
        raise RuntimeError(f"pytest ended with {done.returncode} and wrote no results")
    cases = list(ET.parse(xml).getroot().iter("testcase"))

    def named(kind: str) -> list[str]:
        return [f"{c.get('file')}::{c.get('name')}" for c in cases if c.find(kind) is not None]

    failed, skipped = named("failure") + named("error"), named("skipped")
    on_triton = sum("triton" in (c.get("name") or "").partition("[")[2] for c in cases)
    errors = dict.fromkeys(failed, "failed, see the log")
    if not cases or not (on_triton or p.device == "cpu"):
        errors["the suite"] = "no test ran on Triton's kernels"
    counts = {"passed": len(cases) - len(failed) - len(skipped), "failed": len(failed), "skipped": len(skipped)}
    return {**counts, "on_triton": on_triton, "errors": errors}


def ops(p: Plan) -> Found:
    """Each op alone, forward and backward."""
    found: Found = {"groups": [], "errors": {}}
    for op, size in p.ops:
        for dtype in (torch.float32, torch.bfloat16):
            for tokens in p.tokens:
                title = f"{op}, N={tokens}, " + ", ".join(f"{k}={v}" for k, v in size.items()) + f", {str(dtype)[6:]}"

                def build(side: str, op=op, size=size, dtype=dtype, tokens=tokens) -> Callable[[], Any]:
                    return experiments.checked_op(op, side, tokens, size, dtype, p.device, p.compiler)[0]

                found["groups"].append(_timed(p, title, OP_SIDES, op, build, found["errors"]))
    return found


def layer(p: Plan) -> Found:
    """A whole adapted layer, forward and backward, for every shape and precision of the roofline."""
    found: Found = {"groups": [], "errors": {}}
    for shape in p.shapes:
        for precision, (dtype, adapter, autocast) in roofline.PRECISIONS.items():
            where = {"dtype": dtype, "adapter": adapter, "autocast": autocast}

            def build(side: str, shape=shape, where=where) -> Callable[[], Any]:
                where = where | {"device": p.device, "compiler": p.compiler}
                return experiments.checked_layer((side,), shape.N, shape.D, shape.M, **where)[side].run

            title = f"{shape.title} ({shape.N}, {shape.D}, {shape.M}), {precision}"
            group = _timed(p, title, LAYER_SIDES, "layer", build, found["errors"])
            found["groups"].append(group | {"shape": vars(shape), "precision": precision})
    return found


def _timed(
    p: Plan,
    title: str,
    which: tuple[str, ...],
    op: str,
    build: Callable[[str], Callable[[], Any]],
    errors: dict[str, str],
) -> Found:
    """Median milliseconds of each side; a side that fails is named, and the others go on."""
    print(title, flush=True)
    times: dict[str, float] = {}
    for side in which:
        if side == "triton" and "triton" not in backends_for(op, p.device):
            errors[f"{title}: {TITLES[side]}"] = f"there is no Triton kernel of {op} here"
            continue
        try:
            times[side] = p.timer(build(side))
        except Exception as error:
            errors[f"{title}: {TITLES[side]}"] = f"{type(error).__name__}: {str(error).strip()[:500]}"
        torch._dynamo.reset()
    return {"title": title, "ms": times}


def prediction(p: Plan) -> Found:
    """Predicted milliseconds beyond the base layer on this device, from what parts `about` and `layer` measured."""
    here, layers = (json.loads((p.folder / f"{name}.json").read_text()) for name in ("about", "layer"))
    rates = {getattr(torch, name): rate for name, rate in here["rates"].items()}
    device = roofline.Device(here.get("gpu", "no GPU"), here["bandwidth"], rates, here["launch"])
    rows = []
    for group in layers["groups"]:
        shape, ms = roofline.Shape(**group["shape"]), group["ms"]
        for side in roofline.SIDES:
            expected = 1e3 * roofline.beyond_base(side, shape, group["precision"], device)
            measured = ms[side] - ms["base"] if side in ms and "base" in ms else None
            rows.append({"title": group["title"], "side": side, "predicted": expected, "measured": measured})
    return {"rows": rows}


PARTS: dict[str, Callable[[Plan], Found]] = {
    "about": about,
    "suite": suite,
    "ops": ops,
    "layer": layer,
    "prediction": prediction,
}


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Interpreted kernels compute bfloat16 right under the tests' stricter interpreter alone, and small layers soon."""
    if not interpreting():
        yield
        return
    from tests.tools.triton.strict import strict

    sides.METHOD["decoder_hidden"], gate.TOKENS = (16,), 16
    with strict():
        yield


def run_part(name: str, p: Plan) -> None:
    """Run one part and leave what it found in the folder."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    warnings.filterwarnings("ignore", message="FVAE: the auxiliary loss")
    with _as_on_a_gpu():
        found = PARTS[name](p)
    (p.folder / f"{name}.json").write_text(json.dumps(found))
