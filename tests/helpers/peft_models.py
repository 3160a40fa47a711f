"""Tiny models with a small adapter, for the tests of the PEFT plug-in."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils import check_peft_version

import fvae_kernels as fk
from fvae_kernels.peft import FVAELoraLinear
from tests.helpers.recipe import SMALL_NETWORKS
from tests.helpers.tiny_models import BUILD, TARGETS, TASKS, batch, build


def accepted() -> bool:
    """True if transformers' own add_adapter and load_adapter accept this PEFT."""
    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError:
        return False
    return True


OLD_PEFT = tuple(map(int, peft.__version__.split(".")[:2])) < (0, 21)
LAYERS = {"bert": 4, "vit": 4, "llama": 4, "gpt2": 2, "t5": 12, "wav2vec2": 4, "whisper": 12}
PEFT_CALLS = "_prepare_encoder_decoder_kwargs_for_generation"  # of PEFT before 0.21; gone from transformers 5
NO_SEQ2SEQ = OLD_PEFT and not hasattr(transformers.T5ForConditionalGeneration, PEFT_CALLS)
BROKEN = pytest.mark.skipif(NO_SEQ2SEQ, reason="this PEFT's model for encoder-decoders needs another transformers")
NATIVE = pytest.mark.skipif(not accepted(), reason="this transformers takes no adapters of this PEFT by itself")
KINDS = [pytest.param(kind, marks=BROKEN) if kind == "t5" else kind for kind in BUILD]
SMALL: dict[str, Any] = {**SMALL_NETWORKS, "r": 3, "loss_weight": 0.01}
BERT_QUERIES = [f"bert.encoder.layer.{i}.attention.self.query" for i in range(2)]
LINEAR: dict[str, Any] = {"encoder_hidden": ()}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
AUTO = {
    "bert": transformers.AutoModelForSequenceClassification,
    "vit": transformers.AutoModelForImageClassification,
    "llama": transformers.AutoModelForCausalLM,
    "gpt2": transformers.AutoModelForCausalLM,
    "t5": transformers.AutoModelForSeq2SeqLM,
    "wav2vec2": transformers.AutoModelForAudioClassification,
    "whisper": transformers.AutoModelForSpeechSeq2Seq,
}


def served(folder: Path, kind: str = "bert") -> Any:
    """The adapter of a folder, loaded into its base model."""
    return peft.PeftModel.from_pretrained(build(kind), folder).eval()


def config_for(kind: str = "bert", **options: Any) -> fk.FVAELoraConfig:
    """A small config whose adapters change the output from the start."""
    placed = {"task_type": TASKS[kind], "target_modules": TARGETS[kind], "init_weights": False}
    return fk.FVAELoraConfig(**{**SMALL, **placed, **options})


def adapted(kind: str = "bert", **options: Any) -> Any:
    torch.manual_seed(7)
    return peft.get_peft_model(build(kind), config_for(kind, **options))


def unlabelled(kind: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A batch without labels; an encoder-decoder gets decoder tokens."""
    inputs = batch(kind, dtype=dtype)
    labels = inputs.pop("labels")
    return {**inputs, "decoder_input_ids": labels} if kind in ("t5", "whisper") else inputs


def logits(model: nn.Module, kind: str = "bert", dtype: torch.dtype = torch.float32) -> Tensor:
    with torch.no_grad():
        return model(**unlabelled(kind, dtype)).logits


def layers(model: nn.Module) -> dict[str, FVAELoraLinear]:
    found = {n: m for n, m in model.named_modules() if isinstance(m, FVAELoraLinear)}
    return {name.removeprefix("base_model.model."): layer for name, layer in found.items()}


def train_step(model: nn.Module, kind: str) -> None:
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**batch(kind)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def saved_base_and_adapter(kind: str, folder: Path) -> Any:
    build(kind).save_pretrained(folder / "base")
    base = AUTO[kind].from_pretrained(folder / "base")
    model = peft.get_peft_model(base, config_for(kind)).eval()
    model.save_pretrained(folder / "adapter")
    return model
