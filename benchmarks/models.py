"""Real architectures from transformers' configs with random weights, no downloads; and a training step of each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .sides import SEED, Side, adapt, within

Batch = dict[str, Tensor]
ATTENTION = ["query", "value", "q_proj", "v_proj"]  # names of different models


@dataclass(frozen=True)
class Case:
    """A model to adapt, and its batch."""

    name: str
    title: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]


class Block(nn.Module):
    """One block of a large model. Its input needs a gradient, as in the middle of a stack."""

    def __init__(self, block: nn.Module, rotary: nn.Module | None = None) -> None:
        super().__init__()
        self.block, self.rotary = block, rotary

    def forward(self, hidden: Tensor) -> dict[str, Tensor]:
        """The mean square of the block's output, in place of a task."""
        extra = {}
        if self.rotary is not None:
            positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
            extra["position_embeddings"] = self.rotary(hidden, positions)
        out = self.block(hidden, **extra)
        out = out[0] if isinstance(out, tuple) else out
        return {"loss": out.float().square().mean(), "logits": out}


def vit(**sizes: Any) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config: Any = ViTConfig(**sizes)
    config.num_labels = 10
    return ViTForImageClassification(config)


def roberta(**sizes: Any) -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    shape = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, **sizes}
    return RobertaForSequenceClassification(RobertaConfig(**shape))


def llama_block(**sizes: Any) -> nn.Module:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, **sizes}
    config = LlamaConfig(num_hidden_layers=1, **shape)
    config._attn_implementation = "sdpa"
    return Block(LlamaDecoderLayer(config, 0), LlamaRotaryEmbedding(config))


def wav2vec2_block(**sizes: Any) -> nn.Module:
    from transformers import Wav2Vec2Config
    from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2EncoderLayerStableLayerNorm

    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, **sizes}
    config = Wav2Vec2Config(num_hidden_layers=1, **shape)
    config._attn_implementation = "sdpa"
    return Block(Wav2Vec2EncoderLayerStableLayerNorm(config))


def images(batch: int = 8, size: int = 224) -> Batch:
    return {"pixel_values": torch.randn(batch, 3, size, size), "labels": torch.arange(batch) % 10}


def sentences(batch: int = 8, length: int = 64, vocabulary: int = 50265) -> Batch:
    return {"input_ids": torch.randint(4, vocabulary, (batch, length)), "labels": torch.arange(batch) % 2}


def hidden_states(batch: int, length: int, size: int) -> Batch:
    return {"hidden": torch.randn(batch, length, size).requires_grad_()}


CASES = {
    "vit": Case("vit", "ViT-B/16, 8 images", vit, images),
    "roberta": Case("roberta", "RoBERTa-base, 8 x 64 tokens", roberta, sentences),
    "llama": Case("llama", "Llama block of 4096, 256 tokens", llama_block, lambda: hidden_states(1, 256, 4096)),
    "wav2vec2": Case(
        "wav2vec2", "Wav2Vec2-large block, 4 x 200 frames", wav2vec2_block, lambda: hidden_states(4, 200, 1024)
    ),
}

_TINY = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
TINY = {
    "vit": Case(
        "vit",
        "tiny ViT",
        lambda: vit(**_TINY, num_hidden_layers=2, image_size=16, patch_size=8),
        lambda: images(2, 16),
    ),
    "roberta": Case(
        "roberta",
        "tiny RoBERTa",
        lambda: roberta(**_TINY | {"vocab_size": 50, "num_hidden_layers": 2}),
        lambda: sentences(2, 8, 50),
    ),
    "llama": Case("llama", "tiny Llama block", lambda: llama_block(**_TINY), lambda: hidden_states(1, 8, 32)),
    "wav2vec2": Case(
        "wav2vec2", "tiny Wav2Vec2 block", lambda: wav2vec2_block(**_TINY), lambda: hidden_states(2, 8, 32)
    ),
}


def build(case: Case) -> tuple[nn.Module, Batch]:
    """The base model and a batch, both seeded."""
    torch.manual_seed(SEED)
    return case.build(), case.batch()


def output(model: nn.Module, batch: Batch) -> Tensor:
    """The model's output for the first sample, for comparison."""
    result = model(**{name: t[:1].detach() for name, t in batch.items()})
    return result["logits"]


def step_side(name: str, model: nn.Module, batch: Batch) -> Side:
    """One training step of a side: forward, backward, AdamW (fused, as in Trainer) on its trained parameters."""
    adapted = adapt(name, model, ATTENTION)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True, capturable=trained[0].is_cuda) if trained else None

    def forward() -> Tensor:
        return adapted(**batch)["loss"]

    def step() -> None:
        if name == "compiled":
            compile_blocks(adapted)
        for t in (*trained, *batch.values()):
            t.grad = None
        loss = forward()
        if loss.requires_grad:
            loss.backward()
        if optimizer is not None:
            optimizer.step()

    return Side(name, adapted, step, within(name, forward), tuple(batch.values()))


def compile_blocks(model: nn.Module) -> None:
    """Compile every block of the stack; blocks share their graphs, as in training scripts."""
    if getattr(model, "_blocks_compiled", False):
        return
    torch._dynamo.reset()
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    blocks = list(stacks[0]) if stacks else [m.block for m in model.modules() if isinstance(m, Block)]
    for block in blocks:
        block.compile(dynamic=False)
    model._blocks_compiled = True  # type: ignore[assignment]
