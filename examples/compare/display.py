"""What the runner shows: progress with what is left, a line for each finished cell, tables at the end."""

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from . import records, report
from .methods import METHODS
from .search import Candidate, value

Row = dict[str, Any]
LINES = 10  # of progress, without a terminal


def follow(rows: Iterable[Row], open_cells: int, title: str, console: Console) -> Iterator[Row]:
    """Yield the rows, with a progress bar, or with ten plain lines if there is no terminal; and print each row."""
    start = time.perf_counter()
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(title, total=open_cells, left="")
        for done, row in enumerate(rows, 1):
            left = remaining(time.perf_counter() - start, done, open_cells)
            console.print(line(row), soft_wrap=True, markup=False, highlight=False)
            progress.update(bar, completed=done, left=left)
            if not console.is_terminal and (done % max(1, open_cells // LINES) == 0 or done == open_cells):
                console.print(f"{title}: {done} of {open_cells} finished; {left}", soft_wrap=True, highlight=False)
            yield row


def remaining(seconds: float, done: int, total: int) -> str:
    """The time left, if the cells that are open take as long as those that are finished."""
    left = round(seconds / done * (total - done))
    unit, size = next(((u, n) for u, n in (("h", 3600), ("min", 60)) if left >= 2 * n), ("s", 1))
    return f"about {left // size} {unit} left"


def name(row: Row) -> str:
    """A cell in words."""
    weight = "" if row["weight"] is None else f", {METHODS[row['method']].search.option} {row['weight']:g}"
    seed = "search" if row.get("search") else f"seed {row['seed']}"
    return f"{row['task']}, {row['method']}, {seed}, {row['epochs']} epochs, lr {row['lr']:g}{weight}"


def line(row: Row) -> str:
    """A finished cell in one line."""
    if "does_not_apply" in row:
        return f"{name(row)}: does not apply: {row['does_not_apply']}"
    if "error" in row:
        return f"{name(row)}: {row['error']}"
    split = "validation" if row.get("search") else "test"
    said = [f"{split} {_scores(row[split])}"]
    if "best_epoch" in row and not row.get("search"):
        said.append(f"of epoch {row['best_epoch']}, best on validation: {_scores(row['test_best'])}")
    if row["failed"]:
        said.append("DIVERGED" if row["diverged"] else "FAILED: its loss was at chance in the last third")
    return f"{name(row)}: {'; '.join(said)}; {row['seconds']:.0f} s"


def _scores(scores: dict[str, Any]) -> str:
    shown = {k: v for k, v in scores.items() if k in ("average", "worst", "minority", "nats")}
    return ", ".join(f"{k} {'-' if v is None else format(v, '.3f')}" for k, v in shown.items())


def choices(found: Mapping[tuple[str, str], Candidate | None], rows: Iterable[Row]) -> list[str]:
    """What the search chose; of methods that apply."""
    scored = {(row["task"], row["method"]) for row in rows if row.get("search") and value(row) > -math.inf}
    out = []
    for (task, method), candidate in found.items():
        if candidate is None:
            continue
        lr, weight = candidate
        own = "" if weight is None else f", {METHODS[method].search.option} {weight:g}"
        why = "" if (task, method) in scored else ", the first one, for no run of its search has succeeded"
        out.append(f"chosen on validation: {task}, {method}: lr {lr:g}{own}{why}")
    return out


def table(rows: Sequence[Row], baseline: str, searched: bool, console: Console) -> None:
    """The tables of the rows, and a count of those without scores."""
    shown = [{**row, "lr": None} if searched else row for row in rows if records.scored(row)]
    text = report.tables(shown, baseline)
    if console.is_terminal:
        console.print(Markdown("\n".join(text)))
    else:
        console.print("\n".join(text), soft_wrap=True, markup=False, highlight=False)
    for said, count in Counter(map(_without, rows)).items():
        if said:
            console.print(f"{said} ({count} run{'s' * (count > 1)})", soft_wrap=True, markup=False, highlight=False)


def _without(row: Row) -> str:
    """Why a row has no scores."""
    for key, said in (("does_not_apply", "does not apply"), ("error", "ERROR")):
        if key in row:
            return f"{row['task']}, {row['method']}: {said}: {row[key]}"
    return ""


def listing(tasks: Iterable[tuple[str, str]], console: Console) -> None:
    """Methods and tasks, a line each."""
    for title, lines in (("methods", ((n, m.title) for n, m in METHODS.items())), ("tasks", tasks)):
        console.print(title)
        for each, said in lines:
            console.print(f"  {each:22} {said}", soft_wrap=True, markup=False, highlight=False)
