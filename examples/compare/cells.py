"""The cells of a comparison, and the processes that run them."""

import multiprocessing
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from . import records, training
from .adapt import DoesNotApply
from .methods import METHODS
from .tasks import Splits, Task

Row = dict[str, Any]
QUICK = {"epochs": 2, "batch_size": 4, "batches": 2, "held_out": 16}  # of --quick


@dataclass(frozen=True)
class Setup:
    """What every cell of a comparison shares. It goes to other processes.

    Args:
        tasks: makes each task, by name.
        out: the file of the runs.
        early_stopping: evaluate along the training.
        quick: a few examples of each task alone.
    """

    tasks: Mapping[str, Callable[[], Task]]
    out: Path
    early_stopping: bool = True
    quick: bool = False


class Worker:
    """Runs cells, one after the other. Keeps the tasks, and the examples of one task and seed."""

    def __init__(self, setup: Setup, made: Mapping[str, Task] | None = None) -> None:
        self.setup = setup
        self.tasks = dict(made or {})
        self.made: tuple[tuple[str, int], Splits] | None = None
        warnings.filterwarnings("ignore", "kl_weight=", UserWarning)  # the ablations choose it

    def __call__(self, cell: Row) -> Row:
        """The row of this cell, which is then in the file. An error becomes a row too."""
        try:
            result = self.run(cell)
        except DoesNotApply as reason:
            result = {"does_not_apply": str(reason)}
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}, line {place.lineno}"
            result = {"error": f"{type(error).__name__}: {error} ({where})", "failed": True}
        row = {**cell, **result, "at": time.strftime("%Y-%m-%dT%H:%M:%S")}
        records.append(self.setup.out, row)
        return row

    def run(self, cell: Row) -> Row:
        """What `training.run` returns, with one thread, so that a row does not depend on the number of processes."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            task = self.task(cell["task"])
            recipe = replace(task.recipe, epochs=cell["epochs"], lr=cell["lr"])
            return training.run(
                task,
                METHODS[cell["method"]],
                cell["seed"],
                self.splits(task, cell["seed"]),
                replace(recipe, batch_size=cell.get("batch_size") or recipe.batch_size),
                weight=cell["weight"],
                early_stopping=self.setup.early_stopping,
                search=cell["search"],
            )
        finally:
            torch.set_num_threads(threads)

    def task(self, name: str) -> Task:
        """The task of this name, made once."""
        if name not in self.tasks:
            self.tasks[name] = self.setup.tasks[name]()
        return self.tasks[name]

    def splits(self, task: Task, seed: int) -> Splits:
        """The examples, made once as long as task and seed stay the same."""
        if self.made is None or self.made[0] != (task.name, seed):
            splits = task.splits(seed)
            self.made = (task.name, seed), shortened(splits) if self.setup.quick else splits
        return self.made[1]


def shortened(splits: Splits) -> Splits:
    """A few examples of each split, from everywhere in it."""

    def some(examples: Sequence[Any], count: int) -> Sequence[Any]:
        return examples[:: max(1, len(examples) // count)][:count]

    held_out = QUICK["held_out"]
    train = some(splits.train, QUICK["batch_size"] * QUICK["batches"])
    return Splits(train, some(splits.validation, held_out), some(splits.test, held_out))


def run(setup: Setup, cells: Sequence[Row], jobs: int = 1, made: Mapping[str, Task] | None = None) -> Iterator[Row]:
    """Run the cells, in so many processes with one thread each; rows as they are finished.

    Args:
        setup: what they share.
        cells: the cells, without results.
        jobs: the number of processes; 1 is this one.
        made: tasks that this process has already.

    Raises:
        concurrent.futures.process.BrokenProcessPool: if a process was ended from outside.
    """
    if jobs == 1 or len(cells) < 2:
        yield from map(Worker(setup, made), cells)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(jobs, len(cells)), mp_context=context, initializer=_begin, initargs=(setup,))
    try:
        for future in as_completed([pool.submit(_work, cell) for cell in cells]):
            yield future.result()
    except BaseException:  # interrupted
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


_worker: Worker | None = None


def _begin(setup: Setup) -> None:
    """Begin a process: the parent alone answers Ctrl-C, and the process ends with its parent."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _worker = Worker(setup)


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _work(cell: Row) -> Row:
    assert _worker is not None
    return _worker(cell)
