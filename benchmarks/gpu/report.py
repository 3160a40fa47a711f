"""The report of ``make gpu``, from what the parts found."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..pages import row
from ..sides import TITLES

NAME = "GPU.md"
DRY = (
    "**DRY RUN. No number on this page is a measurement**: the kernels were interpreted on a CPU at tiny sizes, and a "
    "stand-in for the clock said 1 ms each time. It shows that the flow works."
)
METHOD = """
Times are medians of `triton.testing.do_bench`, which clears the L2 cache before each call. Every side is checked
against plain PyTorch in float64 before it is timed. Sides share base weights and rank 16; PEFT's methods have no
dropout, FVAE-LoRA has the 0.1 of its recipe. "Beyond base" takes the base layer's time off both. Predictions are those
of docs/roofline.md with what this device reached: bandwidth of a copy, rates of products of 8192 x 8192, and the
seconds of one operator on one number.
"""

Found = dict[str, Any]


def write(folder: Path, failures: dict[str, str], dry: bool) -> bool:
    """Write the page; whether anything failed."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    failures = {f"part {name}": why for name, why in failures.items()}
    for part in found.values():
        failures |= part.get("errors", {})
    (folder / NAME).write_text("\n".join(text(found, failures, dry)) + "\n")
    return bool(failures)


def text(found: Found, failures: dict[str, str], dry: bool) -> Iterator[str]:
    """The lines of the page."""
    yield from ("# On a GPU", "")
    if dry:
        yield from (DRY, "")
    if failures:
        yield from (f"## Failed: {len(failures)}", "")
        yield from (f"- **{name}**: {' '.join(why.split())}" for name, why in failures.items())
        yield ""
    sections = {"about": _about, "suite": _suite, "prediction": _prediction, "layer": _layer, "ops": _ops}
    for name, section in sections.items():
        if name in found:
            yield from section(found[name])
    yield from ("## Method", METHOD.rstrip())


def _about(found: Found) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    gpu = f"{found['gpu']}, {found['memory'] / 1e9:.0f} GB" if "gpu" in found else "no GPU"
    built = f"CUDA {found['cuda']}" if found["cuda"] else f"ROCm {found['hip']}" if found["hip"] else "no GPU support"
    yield from ("## Machine", "", f"{gpu}; {found['cpu']}, {found['cores']} cores; {versions}; {built}.")
    yield f"Commit {found['commit']}."
    rates = ", ".join(f"{rate / 1e12:.3g} TFLOP/s {name}" for name, rate in found["rates"].items())
    yield f"Reached: {found['bandwidth'] / 1e12:.3g} TB/s, {rates}, {found['launch'] * 1e6:.3g} us a launch."
    yield ""


def _suite(found: Found) -> Iterator[str]:
    yield from ("## Test suite", "")
    yield (
        f"{found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped; "
        f"{found['on_triton']} of them on Triton's kernels."
    )
    yield ""


def _table(group: Found, baseline: str) -> Iterator[str]:
    ms, base = group["ms"], group["ms"].get("base")
    columns = ["side", "median, ms", f"time / {TITLES[baseline]}"]
    columns += [f"beyond base / {TITLES[baseline]}"] if base is not None else []
    yield from (f"**{group['title']}**", "", row(columns), row(["---"] * len(columns)))
    for side, value in ms.items():
        cells = [TITLES[side], f"{value:.4g}", _ratio(value, ms.get(baseline))]
        if base is not None:
            cells.append(_ratio(value - base, ms[baseline] - base if baseline in ms else None))
        yield row(cells)
    yield ""


def _ratio(a: float, b: float | None) -> str:
    return f"{a / b:.2f}" if b else "-"


def _layer(found: Found) -> Iterator[str]:
    yield from ("## One adapted layer, forward and backward", "")
    for group in found["groups"]:
        yield from _table(group, "lora")


def _ops(found: Found) -> Iterator[str]:
    yield from ("## The ops, forward and backward", "")
    for group in found["groups"]:
        yield from _table(group, "plain")


def _prediction(found: Found) -> Iterator[str]:
    yield from ("## Prediction against measurement, beyond the base layer", "")
    yield row(["layer (N, D, M)", "side", "predicted, ms", "measured, ms", "measured / predicted"])
    yield row(["---"] * 5)
    for one in found["rows"]:
        measured = one["measured"]
        cells = [one["title"], TITLES[one["side"]], f"{one['predicted']:.3g}"]
        yield row(
            [
                *cells,
                *(
                    ["not measured", "-"]
                    if measured is None
                    else [f"{measured:.3g}", _ratio(measured, one["predicted"])]
                ),
            ]
        )
    yield ""
