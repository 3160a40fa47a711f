"""What an adapter may train beside its layers, as LoRA's does: biases and single tokens; and what is refused."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import fvae_kernels as fk
from tests.helpers.peft_models import CONFIG, LINEAR, OLD_PEFT, WEIGHTS, adapted, config_for, logits, train_step
from tests.helpers.tiny_models import assert_state, build, state_of

pytestmark = [
    pytest.mark.compat("PEFT", "`bias` and `trainable_token_indices`"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:FVAE. the auxiliary loss entered:UserWarning"),
]
TOKENS = {"trainable_token_indices": [1, 2, 3]}
BIASES = pytest.mark.skipif(OLD_PEFT, reason="PEFT before 0.21 does not save biases; they are refused")
CASES = [
    pytest.param({"bias": "all"}, marks=BIASES),
    pytest.param({"bias": "fvae_only"}, marks=BIASES),
    TOKENS,
]


def lora_of(options: dict[str, Any]) -> Any:
    """PEFT's LoRA with the same options."""
    given = {**options, "bias": "lora_only"} if options.get("bias") == "fvae_only" else options
    placed = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    return peft.get_peft_model(build("bert"), peft.LoraConfig(r=3, **placed, **given))


@pytest.mark.parametrize("options", CASES)
def test_what_is_trained_and_saved_is_what_lora_does(options: dict[str, Any], tmp_path: Path) -> None:
    model, lora = adapted("bert", **options), lora_of(options)
    trained = [
        {n for n, p in m.named_parameters() if p.requires_grad and "fvae_" not in n and "lora_" not in n}
        for m in (model, lora)
    ]
    assert (
        trained[0]
        == trained[1]
        != {n for n, p in adapted("bert").named_parameters() if p.requires_grad and "fvae_" not in n}
    )
    train_step(model, "bert")
    expected = logits(model.eval())
    model.save_pretrained(tmp_path / "ours")
    lora.save_pretrained(tmp_path / "theirs")
    names = [
        {k for k in load_file(tmp_path / d / WEIGHTS) if "fvae_" not in k and "lora_" not in k}
        for d in ("ours", "theirs")
    ]
    assert names[0] == names[1]
    loaded = peft.PeftModel.from_pretrained(build("bert"), tmp_path / "ours").eval()
    assert torch.equal(logits(loaded), expected)
    fk.export_for_inference(model, tmp_path / "served")
    served = peft.PeftModel.from_pretrained(build("bert"), tmp_path / "served").eval()
    assert torch.equal(logits(served), expected)


@pytest.mark.parametrize("options", CASES)
def test_it_goes_along_as_stock_lora(options: dict[str, Any], tmp_path: Path) -> None:
    model = adapted("bert", **LINEAR, **options)
    train_step(model, "bert")
    fk.export_as_lora(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(build("bert"), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(model.eval()), rtol=1e-5, atol=1e-6)
    assert json.loads((tmp_path / CONFIG).read_text())["bias"] in ("none", "all", "lora_only")


@pytest.mark.parametrize("options", CASES)
def test_files_without_them_or_with_others_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    model = adapted("bert", **options)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    wanted = "trainable_tokens" if "trainable_token_indices" in options else "query.base_layer.bias"
    (key, *_) = [k for k in state if wanted in k]
    base = build("bert")
    before = state_of(base)
    for spoiled in ({k: t for k, t in state.items() if k != key}, {**state, key: torch.zeros(7)}):
        save_file(spoiled, tmp_path / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(ValueError, match="does not fit"):
            peft.PeftModel.from_pretrained(base, tmp_path)
        assert_state(base, before)
    with pytest.raises(ValueError, match="which only PEFT can load"):
        fk.load_adapters(base, tmp_path)
    assert_state(base, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": "lora_only"}, r"bias='lora_only' is not allowed: expected one of \('none', 'all', 'fvae_only'\)"),
        ({"trainable_token_indices": [-1]}, r"trainable_token_indices=\[-1\] is not allowed"),
        ({"trainable_token_indices": {"embeddings": 3}}, "a table of lists by embedding"),
        (
            {"rank_pattern": {"query": 0}},
            r"rank=0 is not allowed.*rank_pattern gives it to 'query'; exclude_modules leaves layers out",
        ),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_for("bert", **options)


def test_fused_experts_are_refused_where_a_model_has_none() -> None:
    with pytest.raises(ValueError, match=r"\['experts.gate_up_proj'\] name no parameter of Bert.*; it has none"):
        adapted("bert", target_parameters=["experts.gate_up_proj"])
