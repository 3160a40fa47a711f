"""``make bench``: time all sides in turns; write ratios with intervals, two pictures, and the goals met.

python -m benchmarks.report                  within 10 minutes on two cores
python -m benchmarks.report --full           more sizes, sides and rounds
python -m benchmarks.report --only layer inference
python -m benchmarks.report --render         write the report again from the numbers of the last run
"""

import argparse
import json
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import experiments, figures, machine
from .goals import goals
from .host_cost import pages
from .sides import TITLES, ours
from .stats import median, ratio

FOLDER = Path(__file__).parent / "results"
NAMES = {
    **TITLES,
    "fvae": "FVAE-LoRA, encoder with a hidden layer",
    "fvae_linear": "FVAE-LoRA, linear encoder",
    "merged": "merged `FusedFVAELinear`",
    "unloaded": "merged and unloaded with PEFT",
}
SECTION_TITLES = {
    "steps": "One training step",
    "layer": "One adapted layer, forward and backward",
    "operators": "The ops, forward and backward",
    "inference": "Inference",
}
HOST = "What a step of one adapted layer costs the host on a GPU, measured without one (`make host-cost`)"


def measure(settings: experiments.Settings, only: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run the sections; return their results and the machine. Writes the report after each; notes failed ones."""
    start = time.perf_counter()
    found: dict[str, Any] = {"machine": machine.describe(), "ours": ours(), "results": {}, "failed": {}}
    for name in only:
        print(f"{time.perf_counter() - start:5.0f} s  {name}", flush=True)
        try:
            found["results"][name] = experiments.SECTIONS[name](settings)
        except Exception as error:
            traceback.print_exc()
            found["failed"][name] = f"{type(error).__name__}: {error}".splitlines()[0]
        found["minutes"] = (time.perf_counter() - start) / 60
        write(found, folder)
    print(f"{time.perf_counter() - start:5.0f} s  done", flush=True)
    return found


def table(group: dict[str, Any]) -> list[str]:
    """One group in markdown: milliseconds, ratio to the baseline with its interval, and the counts."""
    baseline, beyond, counted = group["baseline"], group.get("beyond"), group.get("counted", {})
    head = ["side", "median, ms", f"time / {NAMES[baseline]}"]
    head += [f"beyond base / {NAMES[baseline]}"] * bool(beyond)
    head += ["operators", "MB moved", "GFLOP", "MB saved"] * bool(counted)
    rounds = len(group["seconds"][baseline])
    lines = ["", f"**{group['title']}** ({rounds} rounds)", "", _row(head), _row(["---"] * len(head))]
    for name, values in group["seconds"].items():
        cells = [NAMES[name], f"{1e3 * median(values):.3g}"]
        cells.append("1" if name == baseline else str(ratio(group["seconds"], name, baseline)))
        if beyond:
            special = {baseline: "1", beyond: "0"}.get(name)
            cells.append(special or str(ratio(group["seconds"], name, baseline, beyond)))
        lines.append(_row(cells + _counted(counted.get(name)) * bool(counted)))
    return lines


def _counted(cost: dict[str, Any] | None) -> list[str]:
    if not cost:
        return ["not seen"] * 4
    mb, gflop, saved = cost["bytes"] / 1e6, cost["flops"] / 1e9, cost["saved_bytes"] / 1e6
    return [str(cost["launches"]), f"{mb:.1f}", f"{gflop:.2f}", f"{saved:.2f}"]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def hardware(where: dict[str, Any]) -> str:
    """Commit and machine in one line."""
    v = where["versions"]
    flags = ", ".join(where["flags"]) or where["capability"]
    return (
        f"commit {where['commit']}; {where['cpu']}, {where['cores']} cores, {where['threads']} threads ({flags}); "
        f"load at the start {where['load']}; torch {v['torch']}, peft {v['peft']}, transformers {v['transformers']}, "
        f"Python {v['python']}"
    )


BUSY = (
    "**The machine was busy.** With as many threads as cores, every parallel region then waits for a core that others "
    "hold; such times say little. Run it on an idle machine, or with `--threads 1`."
)
METHOD = """
Wall clock, one process. Every round runs every side once, in an order drawn anew; ratios are taken within a round.
A value is the median over rounds, in brackets its 95 % interval from order statistics (the range, where there are fewer
than 6 rounds). All sides share base weights, rank 16 and targets (query and value), and pass through `get_peft_model`;
PEFT's methods have no dropout, FVAE-LoRA has the 0.1 of its recipe. A step is forward, backward and AdamW,
fused, which is `Trainer`'s default.

Before a group is timed, every side must start as the base model, and our kernels must agree with the reference in
outputs and gradients. "Beyond base": the base layer's time, measured in the same round, is taken off both.

Operators are those dispatched that run a kernel (views do not), MB moved their inputs and outputs, MB saved what
autograd keeps beyond inputs and weights, GFLOP those of matrix products; "not seen": compiled code does not pass the
dispatcher.

Peak memory is `ru_maxrss` of a process that does one step, the sides in turns, with MALLOC_MMAP_THRESHOLD_ fixed so
that freed blocks go back at once.
"""


def text(found: dict[str, Any], pictures: Sequence[str]) -> str:
    """The report in markdown."""
    results, side = found["results"], found["ours"]
    lines = ["# Benchmarks", "", hardware(found["machine"]) + f". Measured in {found['minutes']:.0f} minutes.", ""]
    if side == "plain":
        lines += ['There is no fused kernel of the layer here: "ours" below is plain PyTorch.', ""]
    lines += [line for name, why in found["failed"].items() for line in (f"**`{name}` was not measured: {why}**", "")]
    if (found["machine"]["load"] or 0) > 0.5 * (found["machine"]["cores"] or 1):
        lines += [BUSY, ""]
    lines += ["## Goals", "", _row(["goal", "bound", "measured", ""]), _row(["---"] * 4)]
    lines += [goal.row() for goal in goals(results, side)]
    lines += ["", *(f"![{name.removesuffix('.png')}]({name})" for name in pictures)]
    for section, title in SECTION_TITLES.items():
        if results.get(section):
            lines += ["", f"## {title}", *(line for group in results[section] for line in table(group))]
    for group in results.get("host", []):
        lines += ["", f"## {HOST}", "", pages.where(group["found"]), "", *pages.table(group["found"])]
    return "\n".join([*lines, "", "## Method", METHOD.rstrip(), ""])


def write(found: dict[str, Any], folder: Path) -> Path:
    """Write numbers, pictures and report."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(found))
    where = found["machine"]
    note = f"{where['cpu']}, {where['threads']} thread(s), commit {where['commit']}"
    path = folder / "REPORT.md"
    path.write_text(text(found, figures.draw(found["results"], folder, note)))
    return path


def parser() -> argparse.ArgumentParser:
    """The options."""
    out = argparse.ArgumentParser(prog="benchmarks.report", description="Time all sides in turns and write a report.")
    size = out.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="more sizes, sides and rounds; an hour and more")
    size.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    out.add_argument("--only", nargs="+", choices=list(experiments.SECTIONS), help="these sections alone")
    out.add_argument("--threads", type=int, metavar="N", help="threads of torch (what it takes by itself)")
    out.add_argument("--out", type=Path, default=FOLDER, metavar="FOLDER", help="where the report goes (%(default)s)")
    out.add_argument("--render", action="store_true", help="measure nothing: write the report from results.json")
    return out


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measure, write, print the goals.

    Raises:
        SystemExit: if a section failed; the others are in the report.
    """
    options = parser().parse_args(arguments)
    warnings.filterwarnings("ignore", message="FVAE: the auxiliary loss")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.render:
        found = json.loads((options.out / "results.json").read_text())
    else:
        settings = experiments.FULL if options.full else experiments.QUICK if options.quick else experiments.DEFAULT
        found = measure(settings, options.only or list(experiments.SECTIONS), options.out)
    path = write(found, options.out)
    print(*(goal.row() for goal in goals(found["results"], found["ours"])), f"\n{path}", sep="\n")
    if found["failed"]:
        raise SystemExit("failed: " + ", ".join(found["failed"]))
    return path


if __name__ == "__main__":
    main()
