"""The table of docs/cost.md: ``make tables`` writes it. Counted, not timed, so equal on every machine."""

import warnings
from pathlib import Path

from . import fused
from .pages import replace_block, row
from .roofline import Shape, dispatched, fused_launches
from .sides import TITLES, layer_sides

PAGE = Path(__file__).parent.parent / "docs" / "cost.md"
SHAPE = Shape("ViT-B/16, 8 images", 1576, 768, 768)
SIDES = ("plain", "dora_dropout", "dora", "lora_dropout", "lora")
AUTHORS = row(["the authors' code", "235", "451", "-"])  # counted once, on their published code


def table() -> list[str]:
    """The table in markdown."""
    head = ["", "launches beyond the base layer", "MB moved beyond the base layer", "MB saved for backward"]
    lines = [row(head), row(["---"] * len(head)), AUTHORS]
    base = dispatched("base", SHAPE)
    for side in SIDES:
        operators = dispatched(side, SHAPE)
        moved = sum(one.bytes for one in operators) - sum(one.bytes for one in base)
        lines.append(_row(TITLES[side], len(operators) - len(base), moved, saved(side)))
    ours = fused_launches(SHAPE)
    kept = fused.saved(fused.Layer(SHAPE.N, SHAPE.D, SHAPE.M))
    lines.append(_row(TITLES["triton"], len(ours), sum(one.bytes for one in ours), kept))
    return lines


def saved(side: str) -> int:
    """Bytes that autograd saves, apart from x and the weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return layer_sides((side,), SHAPE.N, SHAPE.D, SHAPE.M)[side].cost()["saved_bytes"]


def _row(title: str, launches: int, moved: int, kept: int) -> str:
    return row([title, str(launches), f"{moved / 1e6:.0f}", f"{kept / 1e6:.1f}"])


def main() -> None:
    """Write the table into the page, and print it."""
    lines = table()
    replace_block(PAGE, "cost", lines)
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
