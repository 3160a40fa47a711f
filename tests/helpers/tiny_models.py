"""Tiny transformers with random weights, and batches for them: real architectures, nothing is downloaded."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

DIM, VOCAB = 24, 40


def _config(cls: type, **extra: Any) -> Any:
    sizes = {"hidden_size": DIM, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return cls(**{**sizes, **extra})


def bert(**extra: Any) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    free = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = _config(BertConfig, vocab_size=VOCAB, max_position_embeddings=32, num_labels=3, **free, **extra)
    return BertForSequenceClassification(config)


def vit(**extra: Any) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = _config(ViTConfig, image_size=8, patch_size=4, num_labels=3, **extra)
    return ViTForImageClassification(config)


def llama(**extra: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(_config(LlamaConfig, vocab_size=VOCAB, max_position_embeddings=64, **extra))


def gpt2(**extra: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    free = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=DIM, n_layer=2, n_head=2, **free, **extra)
    )


def t5(**extra: Any) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": DIM, "d_kv": 12, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": VOCAB}
    config = T5Config(**{**sizes, "dropout_rate": 0.0, "decoder_start_token_id": 0, **extra})
    return T5ForConditionalGeneration(config)


def wav2vec2(**extra: Any) -> nn.Module:
    from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

    names = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "final_dropout")
    free = {**dict.fromkeys(names, 0.0), "layerdrop": 0.0, "apply_spec_augment": False}
    convolutions = {"conv_dim": (8, 8), "conv_kernel": (4, 3), "conv_stride": (2, 2), "feat_extract_norm": "layer"}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 12}
    config = _config(Wav2Vec2Config, **convolutions, **positions, **free, num_labels=3, **extra)
    return Wav2Vec2ForSequenceClassification(config)


def whisper(**extra: Any) -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    stacks = {
        f"{stack}_{size}": n
        for stack in ("encoder", "decoder")
        for size, n in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 32))
    }
    positions = {"max_source_positions": 6, "max_target_positions": 16, "num_mel_bins": 4}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    sizes = {"d_model": DIM, "vocab_size": VOCAB, "dropout": 0.0, "use_cache": False}
    return WhisperForConditionalGeneration(WhisperConfig(**stacks, **positions, **tokens, **sizes, **extra))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(DIM, 32), nn.ReLU(), nn.Linear(32, DIM), nn.ReLU(), nn.Linear(DIM, 3))


class Regressor(nn.Module):
    """A model that computes its loss when it gets labels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.net(x)
        return {"logits": logits} if labels is None else {"loss": (logits - labels).square().mean(), "logits": logits}


VIT = ["query", "value", "q_proj", "v_proj"]  # the names of transformers 4 and 5
Q_V = ["q_proj", "v_proj"]
TARGETS = {
    **{"bert": ["query", "value"], "vit": VIT, "llama": Q_V, "gpt2": ["c_attn"]},
    **{"t5": ["q", "v"], "wav2vec2": Q_V, "whisper": Q_V},
}
TASKS = {
    **{"bert": "SEQ_CLS", "vit": None, "llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM"},
    **{"t5": "SEQ_2_SEQ_LM", "wav2vec2": None, "whisper": None},
}
BUILD: dict[str, Callable[..., nn.Module]] = {
    **{"bert": bert, "vit": vit, "llama": llama, "gpt2": gpt2},
    **{"t5": t5, "wav2vec2": wav2vec2, "whisper": whisper},
}


def build(kind: str, seed: int = 0, **extra: Any) -> nn.Module:
    """A model of this kind; torch's generator is not changed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BUILD[kind](**extra)


def batch(kind: str, size: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Inputs with labels; causal models get unequal numbers of labelled tokens."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "vit":
        pixels = torch.randn(size, 3, 8, 8, generator=generator).to(dtype)
        return {"pixel_values": pixels, "labels": torch.randint(3, (size,), generator=generator)}
    if kind == "whisper":
        features = torch.randn(size, 4, 12, generator=generator).to(dtype)
        return {"input_features": features, "labels": torch.randint(3, VOCAB, (size, 5), generator=generator)}
    if kind == "wav2vec2":
        samples = torch.randn(size, 40, generator=generator).to(dtype)
        return {"input_values": samples, "labels": torch.randint(3, (size,), generator=generator)}
    ids = torch.randint(1, VOCAB, (size, 6), generator=generator)
    if kind == "t5":
        return {"input_ids": ids, "labels": torch.randint(1, VOCAB, (size, 5), generator=generator)}
    if kind == "bert":
        return {"input_ids": ids, "labels": torch.randint(3, (size,), generator=generator)}
    labels = ids.clone()
    labels[0, : 1 + seed % 4] = -100
    return {"input_ids": ids, "labels": labels}


def state_of(model: nn.Module) -> dict[str, Any]:
    """What a failed call must not change: values, module types, hooks, requires_grad, and modes."""
    modules = list(model.named_modules())
    return {
        "values": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "types": {name: type(module) for name, module in modules},
        "modes": {name: module.training for name, module in modules},
        "hooks": {name: (list(m._forward_hooks), list(m._forward_pre_hooks)) for name, m in modules},
        "trained": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "attributes": sorted(vars(model)),
        "adapters": sorted(vars(model).get("peft_config", {})),
    }


def assert_state(model: nn.Module, before: dict[str, Any]) -> None:
    """The model equals the state from `state_of`, bit for bit."""
    after = state_of(model)
    values, old = after.pop("values"), before["values"]
    for key, value in after.items():
        assert value == before[key], f"{key} changed"
    assert values.keys() == old.keys()
    for name, tensor in values.items():
        assert torch.equal(tensor, old[name]), f"{name} has changed"
