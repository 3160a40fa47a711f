"""TRL's trainers on tiny models, with the rows in order."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from torch.utils.data import SequentialSampler
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

import fvae_kernels as fk
from tests.helpers.peft_models import SMALL
from tests.helpers.texts import tokenizer, words
from tests.helpers.tiny_models import TARGETS, build
from tests.helpers.trainer_tools import SIZE, STEPS

RTOL = 2e-6  # TRL's log-probabilities are float32
ROWS = range(SIZE * STEPS)
TEXTS = [{"text": words(i, 2 + i % 5)} for i in ROWS]  # of unequal length, so that some are padded
PAIRS = [
    {"prompt": words(i, 2), "chosen": " " + words(i + 2, 1 + i % 3), "rejected": " " + words(i + 7, 2)} for i in ROWS
]
PROMPTS = [{"prompt": words(i, 1 + i % 3)} for i in ROWS]


class SFT(SFTTrainer):
    def _get_train_sampler(self, *args: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class DPO(DPOTrainer):
    _get_train_sampler = SFT._get_train_sampler


class Reward(RewardTrainer):
    _get_train_sampler = SFT._get_train_sampler


class GRPO(GRPOTrainer):
    """Keeps the inputs of each loss."""

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        self.__dict__.setdefault("seen", []).append(dict(inputs))
        return super()._compute_loss(model, inputs)


KINDS: dict[type, tuple[Any, Any]] = {
    **{SFTTrainer: (SFTConfig, TEXTS), DPOTrainer: (DPOConfig, PAIRS)},
    **{RewardTrainer: (RewardConfig, PAIRS), GRPOTrainer: (GRPOConfig, PROMPTS)},
}


def trainer_of(cls: type, folder: Path, kind: str = "llama", **options: Any) -> Any:
    """A prepared trainer. Options are those of its arguments, except its own `reward_funcs` and `model`."""
    torch.manual_seed(0)
    arguments, rows = next(found for base, found in KINDS.items() if issubclass(cls, base))
    own = {name: options.pop(name) for name in ("reward_funcs", "model") if name in options}
    task = "SEQ_CLS" if issubclass(cls, RewardTrainer) else "CAUSAL_LM"
    config = fk.FVAELoraConfig(task_type=task, target_modules=TARGETS[kind], init_weights=False, **SMALL)
    return fk.prepare_trainer(
        cls(
            own.pop("model", None) or build(kind).double(),
            args=arguments(output_dir=str(folder), **{"bf16": False, "save_strategy": "no"} | options),
            train_dataset=Dataset.from_list(rows),
            peft_config=config,
            processing_class=tokenizer(),
            **own,
        )
    )


def log_probs(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Log-probability of each next token."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    logits = model(**inputs).logits[:, :-1]
    return F.log_softmax(logits, -1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
