"""The report of the results so far."""

from collections.abc import Iterator, Sequence
from typing import Any

from ..pages import row
from .case import Found, Plan
from .results import replace_text

NAME = "GPU.md"
DRY = (
    "**DRY RUN. No number on this page is a measurement**: the kernels were interpreted on a CPU at tiny sizes, and a "
    "stand-in for the clock said 1 ms each time. It shows that the flow works."
)
METHOD = """
Times are medians in milliseconds of `triton.testing.do_bench`, which clears the L2 cache before each call. *eager* is
the call as PyTorch users make it; *graph* is the replay of the same call as a CUDA graph, which is the device's time
alone; *host* is how long the host takes to issue the call. Where eager is about host, the host is the bottleneck. Every
side is checked against plain PyTorch in float64 before it is timed, and marked WRONG if it computes something else.
Sides share base weights and rank 16; PEFT's methods have no dropout, FVAE-LoRA has the 0.1 of its recipe. "Beyond base"
takes the base layer's time off both, of graphs where all have one. Peak is memory beyond what the side holds between
calls. Predictions are those of docs/roofline.md with what this device reached: bandwidth of a copy, rates of products
of 8192 x 8192, and the seconds of one operator on one number.
"""
TITLES = {
    "base": "base layer",
    "lora": "PEFT LoRA",
    "dora": "PEFT DoRA",
    "plain": "plain PyTorch FVAE",
    "compiled": "torch.compile of it",
    "triton": "ours, Triton",
}
BASELINES = ("lora", "plain")  # ratios are to the first of these in a group


def write(module: Any, plan: Plan, cases: dict[str, Found], wanted: Sequence[str], state: str) -> None:
    """Write the whole page, with the cases of earlier runs."""
    order = dict.fromkeys((*wanted, *cases))
    found = {key: cases[key] for key in order if key in cases}
    missing = [key for key in wanted if key not in cases]
    replace_text(plan.folder / NAME, "\n".join(text(module.PARTS, found, missing, state, plan.dry)) + "\n")


def failures(cases: dict[str, Found]) -> dict[str, str]:
    """Errors by case. A side that computes wrong results keeps its times, which then mean nothing."""
    wrong = {key: one["found"]["wrong"] for key, one in cases.items() if "wrong" in one.get("found", {})}
    return {key: one["error"] for key, one in cases.items() if "error" in one} | wrong


def text(parts: Sequence[Any], cases: dict[str, Found], missing: Sequence[str], state: str, dry: bool) -> Iterator[str]:
    """The lines of the page."""
    yield from ("# On a GPU", "")
    if dry:
        yield from (DRY, "")
    yield from (f"The run {state}: {len(cases)} cases are here, {len(missing)} are missing.", "")
    errors = failures(cases)
    if errors:
        yield from (f"## Failed: {len(errors)}", "")
        yield from (f"- **{key}**: {error}" for key, error in errors.items())
        yield ""
    for part in parts:
        prefix = f"{part.name}: "
        here = {
            key.removeprefix(prefix): one for key, one in cases.items() if key.startswith(prefix) and "found" in one
        }
        if here:
            yield from (f"## {part.title}", "")
            yield from SECTIONS.get(part.name, _list)(here, cases)
            yield ""
    yield from ("## Method", METHOD.rstrip())
    if missing:
        yield from ("", "## Missing", "")
        yield from (f"- {key}" for key in missing)


def _machine(here: dict[str, Found], _: dict[str, Found]) -> Iterator[str]:
    if "software" in here:
        found = here["software"]["found"]
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        gpu = f"{found['gpu']}, {found['memory'] / 1e9:.0f} GB" if "gpu" in found else "no GPU"
        built = f"CUDA {found['cuda']}" if found["cuda"] else f"ROCm {found['hip']}" if found["hip"] else "no GPU"
        yield f"{gpu}; {found['cpu']}, {found['cores']} cores; {versions}; torch built for {built}."
        yield f"Commit {found['commit']}."
    reached = []
    if "bandwidth" in here:
        reached.append(f"{here['bandwidth']['found']['bytes_per_second'] / 1e12:.3g} TB/s")
    if "products" in here:
        rates = here["products"]["found"]["flop_per_second"]
        reached += [f"{rate / 1e12:.3g} TFLOP/s {name}" for name, rate in rates.items()]
    if "launch" in here:
        reached.append(f"{here['launch']['found']['seconds'] * 1e6:.3g} us a launch")
    if reached:
        yield f"Reached: {', '.join(reached)}."


def _list(here: dict[str, Found], _: dict[str, Found]) -> Iterator[str]:
    """One line for each case: name and numbers."""
    for name, one in here.items():
        numbers = ", ".join(f"{key} {_number(value)}" for key, value in one["found"].items() if key != "kernels")
        yield f"- {name}: {numbers or 'passed'} ({one['seconds']:.3g} s)"
        for kernel in one["found"].get("kernels", ()):
            yield "  - " + ", ".join(f"{key} {value}" for key, value in kernel.items())


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _tables(here: dict[str, Found], _: dict[str, Found]) -> Iterator[str]:
    """A table for each group of sides; cases are named "group: side"."""
    groups: dict[str, dict[str, Found]] = {}
    for name, one in here.items():
        group, _, side = name.rpartition(": ")
        groups.setdefault(group, {})[side] = one["found"]
    for title, sides in groups.items():
        baseline = next((name for name in BASELINES if name in sides), None)
        than = TITLES[baseline] if baseline else "-"
        columns = ["side", "eager, ms", "graph, ms", "host, ms", "peak, MB", f"eager / {than}", f"graph / {than}"]
        columns += [f"beyond base / {than}"] * ("base" in sides)
        yield from (f"**{title}**", "", row(columns), row(["---"] * len(columns)))
        for side, found in sides.items():
            other = sides.get(baseline or "", {})
            cells = [
                TITLES[side] + " (WRONG)" * ("wrong" in found),
                *(_cell(found.get(key)) for key in ("ms", "graph_ms", "host_ms", "peak_mb")),
            ]
            cells += [_ratio(found.get(key), other.get(key)) for key in ("ms", "graph_ms")]
            if "base" in sides:
                cells.append(_beyond(found, other, sides["base"]))
            yield row(cells)
        for side, found in sides.items():
            if "graph_error" in found:
                yield from ("", f"{TITLES[side]} was not captured: {found['graph_error']}")
        yield ""


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _ratio(a: float | None, b: float | None) -> str:
    return f"{a / b:.2f}" if a is not None and b else "-"


def _beyond(found: Found, other: Found, base: Found) -> str:
    """Ratio of two sides' times beyond the base layer: of graphs if all three have one, else of eager calls."""
    for key in ("graph_ms", "ms"):
        if all(key in one for one in (found, other, base)):
            return _ratio(found[key] - base[key], other[key] - base[key])
    return "-"


def _prediction(here: dict[str, Found], cases: dict[str, Found]) -> Iterator[str]:
    yield row(["layer (N, D, M)", "side", "predicted, ms", "graph, ms", "eager, ms", "eager / predicted"])
    yield row(["---"] * 6)
    for name, one in here.items():
        for side, expected in one["found"].items():
            found, base = (cases.get(f"layer: {name}: {which}", {}).get("found", {}) for which in (side, "base"))
            times = [found[key] - base[key] if key in found and key in base else None for key in ("graph_ms", "ms")]
            yield row([name, TITLES[side], f"{expected:.3g}", *map(_cell, times), _ratio(times[1], expected)])


SECTIONS = {"machine": _machine, "layer": _tables, "ops": _tables, "steps": _tables, "prediction": _prediction}
