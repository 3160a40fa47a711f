"""The goals, and if the measurements meet them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .host_cost import pages
from .sides import DEFAULT, TITLES
from .stats import Estimate, estimate, median, power_law, ratio

Results = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Goal:
    """One line of the table: a bound, the value, and for a timing its interval."""

    what: str
    bound: str
    measured: str
    met: bool

    def row(self) -> str:
        """The line in markdown."""
        return f"| {self.what} | {self.bound} | {self.measured} | {'met' if self.met else '**not met**'} |"


def at_most(what: str, value: Estimate, bound: float) -> Goal:
    """A ratio with an upper bound, decided by the median."""
    return Goal(what, f"at most {bound:g}", str(value), value.value <= bound)


def goals(results: Results, ours: str) -> list[Goal]:
    """All goals that the measured sections decide."""
    parts: dict[str, Callable[..., Iterator[Goal]]] = {
        "layer": _layer,
        "steps": _step,
        "memory": _memory,
        "threads": _threads,
        "curves": _curves,
        "inference": _inference,
        "host": _host,
    }
    return [goal for name, part in parts.items() if name in results for goal in part(results[name], ours)]


def _layer(groups: list[dict[str, Any]], ours: str) -> Iterator[Goal]:
    (g,) = groups
    for side, baseline, bound in ((ours, "plain", 0.40), (ours, "dora", 0.75), (ours + DEFAULT, "dora", 0.75)):
        if side in g["seconds"]:
            value = ratio(g["seconds"], side, baseline, beyond="base")
            what = f"layer{_config(side)} beyond its base, time / {TITLES[baseline]} ({g['title']})"
            yield at_most(what, value, bound)
    saved = g["counted"][ours]["saved_bytes"] / 1e6
    yield Goal("MB saved for backward beyond x and weights, same layer", "at most 1.2", f"{saved:.2f}", saved <= 1.2)


def _step(groups: list[dict[str, Any]], ours: str) -> Iterator[Goal]:
    g = next(g for g in groups if g["key"] == "vit")
    for side, baseline, bound in ((ours, "lora", 1.05), (ours, "dora", 0.90), (ours + DEFAULT, "lora", 1.05)):
        if side in g["seconds"]:
            value = ratio(g["seconds"], side, baseline)
            yield at_most(f"step of {g['title']}{_config(side)}, time / {TITLES[baseline]}", value, bound)


def _config(side: str) -> str:
    return " with the default config" if side.endswith(DEFAULT) else ""


def _memory(groups: list[dict[str, Any]], ours: str) -> Iterator[Goal]:
    (g,) = groups
    values = [a / b for a, b in zip(g["megabytes"][ours], g["megabytes"]["lora"], strict=True)]
    value, spread = median(values), f"{min(values):.3f} to {max(values):.3f} over {len(values)} pairs"
    mb = f"{median(g['megabytes'][ours]):.0f} against {median(g['megabytes']['lora']):.0f} MB"
    yield Goal(f"{g['title']} / PEFT LoRA", "at most 1.03", f"{value:.3f} ({spread}; {mb})", value <= 1.03)


def _threads(groups: list[dict[str, Any]], ours: str) -> Iterator[Goal]:
    (g,) = groups
    times = g["seconds"]
    columns = zip(*(times[f"{name}@{count}"] for count in (1, 2) for name in (ours, "base")), strict=True)
    value = estimate([(a - b) / max(c - d, 1e-12) / 2 for a, b, c, d in columns])
    base = estimate([a / b / 2 for a, b in zip(times["base@1"], times["base@2"], strict=True)])
    what = "speed per core, 2 threads against 1, layer beyond its base"
    yield Goal(what, "at least 0.8", f"{value} (base layer alone: {base.value:.2f})", value.value >= 0.8)


def exponents(groups: list[dict[str, Any]], side: str, axis: str) -> tuple[list[int], list[float], float, float]:
    """Sizes, median seconds beyond the base layer, fitted exponent and its standard error."""
    points = [(g["size"], beyond(g, side)) for g in groups if g["axis"] == axis and side in g["seconds"]]
    sizes, costs = [size for size, _ in points], [cost for _, cost in points]
    return sizes, costs, *power_law(sizes, costs)


def beyond(g: dict[str, Any], side: str) -> float:
    """Median over rounds of a side's seconds beyond the base layer."""
    return median([a - b for a, b in zip(g["seconds"][side], g["seconds"]["base"], strict=True)])


def _curves(groups: list[dict[str, Any]], ours: str) -> Iterator[Goal]:
    for axis in ("N", "D"):
        sizes, _, slope, error = exponents(groups, ours, axis)
        what = f"cost against {axis} = {sizes[0]}..{sizes[-1]}, exponent of the fit"
        yield Goal(what, "at most 1.05 (linear)", f"{slope:.2f} ± {error:.2f}", slope <= 1.05)


def _inference(groups: list[dict[str, Any]], ours: str) -> Iterator[Goal]:
    kinds = (("fvae", "encoder with a hidden layer"), ("fvae_linear", "linear encoder"))
    for side, kind in kinds:
        for g in groups:
            what = f"inference, N={g['tokens']}, {kind}, time / unmerged PEFT LoRA"
            yield at_most(what, ratio(g["seconds"], side, "lora"), 1.05)
    for g in groups:
        value = ratio(g["seconds"], "unloaded", "base")
        what = f"merged with PEFT (the result is an `nn.Linear`), N={g['tokens']}, time / base layer"
        yield Goal(what, "1", str(value), g["plain_linear"])
    for g in groups:
        value = ratio(g["seconds"], "merged", "base")
        what = f"merged `FusedFVAELinear`, N={g['tokens']}, time / base layer"
        yield Goal(what, "1 (within 2 %)", str(value), abs(value.value - 1) <= 0.02)


def _host(groups: list[dict[str, Any]], ours: str) -> Iterator[Goal]:
    for g in groups:
        value = pages.beyond(us := g["found"]["steps"]["float32"], "triton") / pages.beyond(us, "dora")
        what = "host's time of a layer beyond its base, Triton's launchers, time / PEFT DoRA"
        yield Goal(what, "at most 1.2", f"{value:.2f}", value <= 1.2)
