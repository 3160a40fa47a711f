"""A training process for test_trainer_resume: ``python resume_child.py FOLDER KILL_AT [FOLDER KILL_AT]``.

A run resumes from the last checkpoint in its folder, if there is one, and kills the process in the forward of step
KILL_AT; with 0 it runs to the end.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer_utils import get_last_checkpoint

import fvae_kernels as fk
from tests.helpers.trainer_tools import shuffled_run


def run(folder: Path, kill_at: int) -> None:
    trainer = shuffled_run(folder, max_steps=8)
    trainer.add_callback(fk.FVAELoggingCallback(trainer, folder / "log.jsonl"))

    def die(module: nn.Module, args: Any, kwargs: Any) -> None:
        if trainer.state.global_step + 1 == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.model.get_base_model().classifier.register_forward_pre_hook(die, with_kwargs=True)  # half-way through
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    trainer.model.save_pretrained(folder / "final")


if __name__ == "__main__":
    for at in range(1, len(sys.argv), 2):
        run(Path(sys.argv[at]), int(sys.argv[at + 1]))
