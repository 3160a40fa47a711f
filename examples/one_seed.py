"""One seed of the demo: train, evaluate, save, load again, export, draw."""

import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import safe_open
from torch import Tensor

import fvae_kernels as fk
from examples import figure, report, train
from examples.data import Snippet, Splits
from examples.report import Result
from examples.train import METHODS, Run, Settings, Tokenizer
from fvae_kernels.diagnostics import linear_probe

TOLERANCE = 1e-5  # of a logit


def one_seed(
    settings: Settings, model: Path, splits: Splits, sample: Sequence[Snippet], out: Path, console: Console
) -> tuple[list[Result], bool]:
    """The results, and True if the saved adapters predict the same after loading."""
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    runs, steps = train.train(settings, model, sample)
    follow(steps, runs, console)
    tokenize = Tokenizer(model)
    results, lines, good = [], [], True
    with console.status("evaluating, saving, loading again"):
        for run in runs:
            result, said, same = finish(run, runs, tokenize, model, splits, out)
            results.append(result)
            lines += said
            good = good and same
        figure.draw(runs, results, latent_space(runs, tokenize, splits), out / "demo.png")
    report.save(results, settings, out / "results.json")
    console.print()
    console.print(report.table(results))
    for line in [report.verdict(results), *lines, f"figure: {out / 'demo.png'}; all numbers: {out / 'results.json'}"]:
        console.print(line, soft_wrap=True)
    console.print(f"seed {settings.seed} took {time.perf_counter() - start:.0f} s")
    return results, good


def follow(steps: Iterator[int], runs: Sequence[Run], console: Console) -> None:
    """Run the steps, with a progress bar, or with ten plain lines if there is no terminal."""
    total = runs[0].settings.total_steps
    if not console.is_terminal:
        for done in steps:
            if done % max(1, total // 10) == 0 or done == total:
                console.print(f"step {done}/{total}  task loss: {recent_losses(runs)}")
        return
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("task loss: {task.fields[losses]}"), console=console) as progress:
        task = progress.add_task("", total=total, losses="")
        for done in steps:
            progress.update(task, completed=done, losses=recent_losses(runs))


def recent_losses(runs: Sequence[Run], last: int = 10) -> str:
    """Mean losses over the last steps, for example "LoRA 0.412, FVAE-LoRA 0.398"."""
    return ", ".join(f"{METHODS[run.method]} {statistics.mean(run.history.task_loss[-last:]):.3f}" for run in runs)


def finish(
    run: Run, runs: Sequence[Run], tokenize: Tokenizer, model: Path, splits: Splits, out: Path
) -> tuple[Result, list[str], bool]:
    """Evaluate and save a trained run. Returns the result, a text about its files, and if they load correctly."""
    folder = served = out / run.method
    logits = train.predict(run.model, tokenize, splits.test)
    validation = report.by_group(train.predict(run.model, tokenize, splits.validation), splits.validation)
    run.model.save_pretrained(folder)
    checks = [load_again(run, folder, tokenize, model, splits.test, logits)]
    lines = [f"{METHODS[run.method]}: saved to {checks[0][0]}"]
    if run.method == "fvae":
        served = out / "fvae-serving"
        sizes = export(run, served)
        checks.append(load_again(run, served, tokenize, model, splits.test, logits))
        lines.append(f"{METHODS[run.method]}: exported for serving to {checks[1][0]}; {sizes}")
    baseline = next((r for r in runs if r.method == "lora"), None)
    result = Result(
        method=run.method,
        title=METHODS[run.method],
        validation=statistics.mean(share.value for share in validation.values()),
        validation_worst=min(share.value for share in validation.values()),
        groups=report.by_group(logits, splits.test),
        trainable=sum(p.numel() for p in run.parameters),
        served=count_parameters(served),
        adapter_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        seconds_per_step=statistics.median(run.history.seconds),
        time_ratio=report.time_ratio(run.history.seconds, baseline.history.seconds) if baseline else None,
    )
    return result, lines, all(same for _, same in checks)


def load_again(
    run: Run, folder: Path, tokenize: Tokenizer, model: Path, snippets: Sequence[Snippet], expected: Tensor
) -> tuple[str, bool]:
    """Load a saved adapter onto a new base model; a sentence on its predictions, and if they are as expected."""
    logits = train.predict(train.reload(folder, model, run.settings.seed), tokenize, snippets)
    difference = (logits - expected).abs().max().item()
    same = difference <= TOLERANCE
    sentence = f"{'same' if same else 'OTHER'} predictions on {len(snippets)} test snippets"
    return f"{folder}; on a fresh base model: {sentence} (largest difference of a logit {difference:.0e})", same


def export(run: Run, folder: Path) -> str:
    """Export for serving (encoder 1's mean path and B of every layer, the classifier); say how much smaller it is."""
    sizes = fk.export_for_inference(run.model, folder)
    full, served = sizes.full_bytes / 1000, sizes.served_bytes / 1000
    return f"its adapters take {served:,.0f} KB instead of {full:,.0f} KB"


def count_parameters(folder: Path) -> int:
    """Number of parameters in the safetensors files of a folder."""
    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            count += sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 (not a dict)
    return count


def latent_space(runs: Sequence[Run], tokenize: Tokenizer, splits: Splits) -> figure.Latents | None:
    """Latents of the test snippets, and the accuracy of readouts of label and source, fitted on validation."""
    run = next((r for r in runs if r.method == "fvae"), None)
    if run is None:
        return None
    name, *test = train.latent_means(run.model, tokenize, splits.test)
    _, *fit = train.latent_means(run.model, tokenize, splits.validation)

    def readable(index: int) -> tuple[float, float]:
        def of(target: Any) -> float:
            fit_targets, test_targets = ([target(s) for s in part] for part in (splits.validation, splits.test))
            return linear_probe(fit[index], torch.tensor(fit_targets), test[index], torch.tensor(test_targets))

        return of(lambda s: s.label), of(lambda s: s.source)

    short = ".".join(name.split(".")[-5:])
    return figure.Latents(short, (test[0], test[1]), (readable(0), readable(1)), splits.test)
