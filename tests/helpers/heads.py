"""Tiny models of every family of transformers that has one of four heads, as far as one recipe of sizes builds them."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

HEADS = {
    "sequence": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "token": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}
WIDE, VOCAB, LONG, LARGEST = 16, 32, 6, 1_000_000
ONE = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth")
TWO = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads")
TWO += ("num_key_value_heads", "num_experts", "num_local_experts", "n_routed_experts")
SIZES: dict[str, Any] = {
    **dict.fromkeys(ONE, 1),
    **dict.fromkeys(TWO, 2),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim"), WIDE),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff"), 32),
    **dict.fromkeys(("hidden_dim", "moe_intermediate_size"), 32),
    **dict.fromkeys(("head_dim", "d_kv"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 64),
    **{"vocab_size": VOCAB, "num_labels": 3, "image_size": 8, "patch_size": 4, "num_channels": 3},
    **{"num_experts_per_tok": 1, "use_cache": False},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
}


def families() -> dict[str, list[str]]:
    """Model types, and the heads that each has."""
    from transformers.models.auto import modeling_auto

    found: dict[str, list[str]] = {}
    for head, mapping in HEADS.items():
        for kind in getattr(modeling_auto, mapping):
            found.setdefault(kind, []).append(head)
    return found


def tiny(kind: str, head: str) -> nn.Module:
    """The model, or an error of transformers' where the recipe does not fit."""
    import transformers
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    name = getattr(modeling_auto, HEADS[head])[kind]
    name = name if isinstance(name, str) else name[0]
    config_class = CONFIG_MAPPING[kind]
    accepted = set(inspect.signature(config_class.__init__).parameters) | set(vars(config_class()))
    accepted |= set(getattr(config_class, "attribute_map", {})) | {"num_labels"}
    config = config_class(**{key: value for key, value in SIZES.items() if key in accepted})
    for key, value in vars(config).items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    if head == "causal" and hasattr(config, "is_decoder"):
        config.is_decoder = True
    with torch.device("meta"):
        size = sum(p.numel() for p in getattr(transformers, name)(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{name} has {size} parameters: the recipe does not reach all of its sizes")
    torch.manual_seed(0)
    model = getattr(transformers, name)(config)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def example(head: str, size: int = 4) -> dict[str, Tensor]:
    """A batch with labels, some of them ignored where there are tokens."""
    generator = torch.Generator().manual_seed(0)
    if head == "image":
        pixels = torch.randn(size, 3, 8, 8, generator=generator)
        return {"pixel_values": pixels, "labels": torch.arange(size) % 3}
    ids = torch.randint(3, VOCAB, (size, LONG), generator=generator)
    ids[:, -1] = 2  # the end of a sequence, where some pool
    labels = {"sequence": torch.arange(size) % 3, "token": ids % 3, "causal": ids.clone()}[head]
    if head != "sequence":
        labels[0, :3] = -100
    return {"input_ids": ids, "labels": labels}
