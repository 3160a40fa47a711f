"""One of two processes of test_trainer_ddp: ``torchrun ... trainer_ddp_child.py FILE``, where rank 0 writes."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fvae_kernels as fk
from tests.helpers.total_loss import fix_noise
from tests.helpers.trainer_tools import ONE_STEP, STEPS, InOrder, Rows, adapted, step_of, trainer_of


class MeanTrainer(InOrder):
    """A loss of its own, a mean over the micro-batch."""

    loss_is_scaled_for_ga = False

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        logits = model(**inputs).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())


CASES: dict[str, dict[str, Any]] = {"label smoothing": {"label_smoothing_factor": 0.1}, "mean": {"cls": MeanTrainer}}


def one_step(case: str, folder: Path) -> tuple[dict[str, Tensor], float]:
    """One step and its reported loss. The micro-batches are divided among the processes."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    options = {**ONE_STEP, "gradient_accumulation_steps": STEPS // processes, **CASES[case]}
    model, rows = adapted("llama", "CAUSAL_LM"), Rows("llama", torch.float64)
    trainer = fk.prepare_trainer(trainer_of(model, rows, output_dir=str(folder), **options))
    return step_of(trainer), trainer.state.log_history[0]["loss"]


def main(file: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        fix_noise(patch)
        steps = {case: one_step(case, file.parent) for case in CASES}
    if os.environ["RANK"] == "0":
        torch.save(steps, file)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
