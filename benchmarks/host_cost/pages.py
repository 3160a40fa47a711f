"""The measurement as tables, and as one line that sums it up."""

from collections.abc import Iterator
from typing import Any

from ..pages import replace_block, row
from ..sides import TITLES
from . import ROOT

PAGE, README = ROOT / "docs" / "roofline.md", ROOT / "README.md"
Found = dict[str, Any]


def beyond(us: dict[str, float], side: str) -> float:
    """Microseconds of a side beyond the base layer."""
    return us[side] - us["base"]


def table(found: Found) -> list[str]:
    """Every side, and its ratio to LoRA and DoRA in the same run: a layer of a model, and a layer called alone."""
    lines = [row(["host's time of a step", "us", "us beyond the base layer", "/ LoRA", "/ DoRA"]), row(["---"] * 5)]
    for where, us in (("of many in a model", found["in_model"]), ("called alone", found["steps"]["float32"])):
        lines.append(row([f"**a layer {where}**", "", "", "", ""]))
        for side, value in us.items():
            over = beyond(us, side)
            ratios = [f"{over / beyond(us, other):.2f}" for other in ("lora", "dora")] if side != "base" else ["", ""]
            lines.append(row([TITLES[side], f"{value:.0f}", f"{over:.0f}" if side != "base" else "", *ratios]))
    return lines


def summary(found: Found) -> list[str]:
    """An adapted layer of a model, in four rows."""
    us = found["in_model"]
    lines = [
        row(["host's time of a step, of an adapted layer beyond its base", "us", "/ LoRA", "/ DoRA"]),
        row(["---"] * 4),
    ]
    for side in ("lora", "dora", "triton_default", "triton"):
        over = beyond(us, side)
        cells = f"{over:.0f}", f"{over / beyond(us, 'lora'):.2f}", f"{over / beyond(us, 'dora'):.2f}"
        lines.append(row([TITLES[side] + ", the paper's recipe" * (side == "triton"), *cells]))
    return lines


def precisions(found: Found) -> list[str]:
    """Microseconds beyond the base layer in every precision."""
    names = [side for side in found["steps"]["float32"] if side not in ("base", "cpp")]
    lines = [row(["us beyond the base layer", *(TITLES[name] for name in names)]), row(["---"] * (1 + len(names)))]
    for precision in found["steps"]:
        us = found["steps"][precision]
        lines.append(row([precision, *(f"{beyond(us, name):.0f}" for name in names)]))
    return lines


def last_line(found: Found) -> str:
    """The most important numbers in one line: of a layer called alone, with the paper's recipe."""
    ours, lora, dora = (beyond(found["steps"]["float32"], side) for side in ("triton", "lora", "dora"))
    return (
        f"host cost beyond base: ours {ours:.0f} us, LoRA {lora:.0f} us, DoRA {dora:.0f} us; "
        f"ours / LoRA {ours / lora:.2f}, ours / DoRA {ours / dora:.2f}"
    )


def where(found: Found) -> str:
    """The machine and the versions."""
    machine, versions = found["machine"], found["machine"]["versions"]
    return (
        f"{machine['cpu']}, one thread, commit {machine['commit']}; torch {versions['torch']}, "
        f"peft {versions['peft']}, triton {versions['triton']}, Python {versions['python']}"
    )


def text(found: Found) -> Iterator[str]:
    """All results, for a terminal."""
    yield where(found)
    yield (
        "Eager forward and backward, one token, D = M = 64. Sides in turns, each by its quickest call, in CPU time. "
        "The model has 24 linear layers, all adapted by get_peft_model; what it does once a step is shared by them."
    )
    yield from ("", *table(found))
    if len(found["steps"]) > 1:
        yield from ("", *precisions(found))
    if "many" in found:
        yield from ("", row(["ours, Triton, around a base layer that computes nothing: N x D", "us"]), row(["---"] * 2))
        yield from (row([size, f"{us:.0f}"]) for size, us in found["many"].items())
    for title, name in (("ours, Triton, by part", "parts"), ("launches with their arguments at hand", "launches")):
        yield from ("", row([title, "us"]), row(["---"] * 2))
        yield from (row([part, f"{us:.0f}"]) for part, us in found[name].items())
        yield row(["sum", f"{sum(found[name].values()):.0f}"])
    yield from ("", last_line(found))


def write(found: Found) -> None:
    """Write the blocks of docs/roofline.md and of the README."""
    more = ["", *precisions(found)] if len(found["steps"]) > 1 else []
    replace_block(PAGE, "host", [f"Measured on {where(found)}.", "", *table(found), *more])
    replace_block(README, "host", summary(found))
