"""A comparison: the cells asked for, those of them that are open, and their results."""

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from . import cells as processes
from . import display, methods, options, records, tasks
from .records import Setting
from .search import SEED, Candidate, chosen
from .tasks import Task

Row = dict[str, Any]
Chosen = dict[tuple[str, str], Candidate | None]  # by task and method
Made = dict[str, tuple[Callable[[], Task], Task]]  # by name: what makes a task, and the task
OWN = ("data", "model", "kind", "text", "label", "group", "max_tokens", "targets")


class Comparison:
    """The cells asked for, those of them that are open, and their results."""

    def __init__(self, args: argparse.Namespace, parser: options.Parser, console: Console) -> None:
        self.args, self.parser, self.console = args, parser, console

    def run(self) -> None:
        """Search if asked to, run, print."""
        args = self.args
        if args.list:
            display.listing(_titles(), self.console)
            return
        try:
            self.methods = methods.named(args.methods or ("all" if args.quick else "lora,fvae"))
            self.candidates = {m: methods.METHODS[m].search.candidates(args.budget) for m in self.methods}
            self._check()
            self.out = args.out or self._file()
            list(records.read(self.out))  # a broken file is refused before anything runs
            self.made = self._tasks()
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            self.parser.error(str(error).replace("\n", " "))
        self.seeds = args.seeds or [0] if args.quick else args.seeds or options.seeds("0-4")
        if args.dry_run:
            self._count()
            return
        self._finish()

    def _check(self) -> None:
        args = self.args
        self.baseline = args.baseline or self.methods[0]
        if self.baseline not in self.methods:
            raise ValueError(f"the baseline {self.baseline!r} is not among the methods {self.methods}")
        if args.search and args.lr:
            raise ValueError("--lr and --search exclude each other: the search chooses the rates")
        if args.search and args.seeds and SEED in args.seeds:
            raise ValueError(f"seed {SEED} is the search's own; report others")
        if args.data and args.tasks:
            raise ValueError("--data and --tasks exclude each other: your data are the task")
        if args.data and not args.model:
            raise ValueError("--data needs --model, the folder or name of a pretrained model")
        if not args.data and (own := [name for name in OWN if getattr(args, name) is not None]):
            raise ValueError(f"--{own[0].replace('_', '-')} is about your own data; give them by --data")
        if args.data and not args.data.exists():
            raise ValueError(f"there is no file or folder {args.data}")

    def _file(self) -> Path:
        """Where rows go if the user does not say it."""
        if self.args.quick:
            return Path(tempfile.mkdtemp(prefix="compare-")) / "runs.jsonl"
        return Path("compare.jsonl") if self.args.data else records.FILE

    def _tasks(self) -> Made:
        """Makers and tasks by the tasks' names."""
        if self.args.data:
            make = partial(_own, {n: getattr(self.args, n) for n in OWN})
            task = make()
            return {task.name: (make, task)}
        named = self.args.tasks or (",".join(n for n, _ in _titles()) if self.args.quick else "text,images")
        makers = [partial(tasks.find, name) for name in named.split(",")]
        return {task.name: (make, task) for make in makers for task in [make()]}

    def cells(self, search: bool, found: Mapping[tuple[str, str], Any] | None = None) -> list[Row]:
        """The cells of the search, or those to report with what it found; seed by seed."""
        quick, size, out = self.args.quick, self.args.batch_size, []
        for seed in [SEED] if search else self.seeds:
            for name, (_, task) in self.made.items():
                epochs = self.args.epochs or (processes.QUICK["epochs"] if quick else task.recipe.epochs)
                setting = Setting(name, epochs, None, processes.QUICK["batch_size"] if quick else size, quick)
                for method in self.methods:
                    plain = [(self.args.lr or task.recipe.lr, None)]
                    pairs = self.candidates[method] if search else [found[name, method]] if found else plain
                    out += records.cells(setting, method, seed, pairs, search)
        return out

    def open(self, cells: Sequence[Row]) -> list[Row]:
        """Those that are not finished."""
        done = {records.cell(row) for row in records.read(self.out) if records.finished(row)}
        return [cell for cell in cells if records.cell(cell) not in done]

    def choices(self) -> Chosen:
        """Rate and weight that the search found, by task and method; None where it is not finished."""
        rows = list(records.read(self.out))
        found: dict[tuple[str, str], list[Row]] = {}
        for cell in self.cells(search=True):
            found.setdefault((cell["task"], cell["method"]), []).append(cell)
        return {pair: chosen(rows, cells, self.args.early_stopping) for pair, cells in found.items()}

    def _count(self) -> None:
        found = self.choices() if self.args.search else None
        if found is not None:
            cells = self.cells(search=True)
            self.console.print(f"search: {len(self.open(cells))} of {len(cells)} cells are open")
        known = {key: pair or (None, None) for key, pair in found.items()} if found else None  # not known yet: open
        cells = self.cells(search=False, found=known)
        self.console.print(
            f"{len(self.open(cells))} of {len(cells)} cells are open; {self.out} has the others", soft_wrap=True
        )

    def _finish(self) -> None:
        found = None
        if self.args.search:
            self._run(self.cells(search=True), "search")
            found = self.choices()
            for said in display.choices(found, records.read(self.out)):
                self.console.print(said, soft_wrap=True, highlight=False)
        cells = self.cells(search=False, found=found)
        self._run(cells, "runs")
        rows = {records.cell(row): row for row in records.read(self.out)}
        asked = [rows[records.cell(cell)] for cell in cells]
        display.table(asked, self.baseline, self.args.search, self.console)
        self.console.print(f"all runs: {self.out}", soft_wrap=True, highlight=False)
        if any("error" in row for row in asked):
            raise SystemExit(1)

    def _run(self, cells: Sequence[Row], title: str) -> None:
        todo = self.open(cells)
        makers = {name: make for name, (make, _) in self.made.items()}
        setup = processes.Setup(makers, self.out, self.args.early_stopping, self.args.quick)
        made = {name: task for name, (_, task) in self.made.items()}
        self.console.print(f"{title}: {len(cells) - len(todo)} finished before, {len(todo)} open", highlight=False)
        try:
            for _ in display.follow(processes.run(setup, todo, self.args.jobs, made), len(todo), title, self.console):
                pass
        except BrokenProcessPool:
            self.console.print("a process was ended from outside, perhaps for its memory: take fewer --jobs and go on")
            raise SystemExit(1) from None


def _own(given: dict[str, Any]) -> Task:
    """The task of the user's own data."""
    from .tasks.own import own_task

    more = {name: value for name, value in given.items() if name not in ("data", "model") and value is not None}
    if "targets" in more:
        more["targets"] = more["targets"].split(",")
    task: Task = own_task(given["data"], given["model"], **more)
    return task


def _titles() -> list[tuple[str, str]]:
    """Names of the built-in tasks, and what they are."""
    return [(name, built_in.title) for name, built_in in tasks.BUILT_IN.items()]
