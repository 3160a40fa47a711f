"""add_weighted_adapter: sums of linear encoders; others refuse."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from tests.helpers.peft_models import LINEAR, OLD_PEFT, adapted, config_for, layers, logits
from tests.helpers.tiny_models import assert_state, build, state_of

pytestmark = [
    pytest.mark.compat("PEFT", "`add_weighted_adapter`: linear encoders, exactly (cat) or at a rank (svd)"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


def two(**options: Any) -> Any:
    """Two adapters of other ranks and scales, of which one adapts q_proj alone."""
    model = adapted("llama", **LINEAR).eval()
    model.add_adapter(
        "other", config_for("llama", r=2, alpha=3.0, rslora=True, target_modules=["q_proj"], **LINEAR, **options)
    )
    return model


def deltas(model: Any, adapter: str) -> dict[str, torch.Tensor]:
    return {n: m.get_delta_weight(adapter) for n, m in layers(model).items() if adapter in m.fvae_adapter}


def test_cat_is_exact(tmp_path: Path) -> None:
    model = two()
    one, other = deltas(model, "default"), deltas(model, "other")
    before = state_of(model)
    model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "sum", combination_type="cat")
    after = {n: t for n, t in state_of(model)["values"].items() if ".sum." not in n}
    assert all(torch.equal(t, before["values"][n]) for n, t in after.items())
    assert model.active_adapters == ["default"]
    for name, delta in deltas(model, "sum").items():
        torch.testing.assert_close(delta, 0.5 * one[name] - 2.0 * other.get(name, torch.zeros(())))
    assert [layer.fvae_adapter["sum"].config.rank for layer in layers(model).values()] == [5, 3, 5, 3]
    model.set_adapter("sum")
    expected = logits(model, "llama")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "sum").eval()
    torch.testing.assert_close(logits(loaded, "llama"), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(logits(model.merge_and_unload(), "llama"), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [None, 1])
def test_svd_is_the_best_of_its_rank(rank: int | None) -> None:
    model = two()
    one, other = deltas(model, "default"), deltas(model, "other")
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", svd_rank=rank)
    for name, delta in deltas(model, "sum").items():
        U, S, V = torch.linalg.svd(one[name] + other.get(name, torch.zeros(())))
        k = rank or 3
        torch.testing.assert_close(delta, (U[:, :k] * S[:k]) @ V[:k], rtol=1e-4, atol=1e-5)


def test_it_is_loras() -> None:
    """The same call on the same factors in PEFT's LoRA."""
    model, lora = (
        two(),
        peft.get_peft_model(build("llama"), peft.LoraConfig(r=3, lora_alpha=16, target_modules=["q_proj"])),
    )
    lora.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=3, use_rslora=True, target_modules=["q_proj"]))
    ours = {n: m for n, m in layers(model).items() if n.endswith("q_proj")}
    with torch.no_grad():
        for name, layer in ours.items():
            target = lora.base_model.model.get_submodule(name)
            for adapter in ("default", "other"):
                target.lora_A[adapter].weight.copy_(layer.fvae_adapter[adapter].encoder1_mean_weight)
                target.lora_B[adapter].weight.copy_(layer.fvae_adapter[adapter].B)
    for kind in ("cat",) if OLD_PEFT else ("cat", "svd"):  # older ones scale twice in "svd"
        for m in (model, lora):
            m.add_weighted_adapter(["default", "other"], [0.7, 0.4], kind, combination_type=kind)
        for name, layer in ours.items():
            expected = lora.base_model.model.get_submodule(name).get_delta_weight(kind)
            torch.testing.assert_close(layer.get_delta_weight(kind), expected, rtol=1e-4, atol=1e-6)


BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "hidden layers": (
        {"encoder_hidden": (5,)},
        {},
        r"'other' has an encoder with hidden layers.*set_adapter\(\[\.\.\.\]\)",
    ),
    "trained biases": ({"bias": "all"}, {}, "'other' trains biases"),
    "a trained head": ({"modules_to_save": ["lm_head"]}, {}, "'other' has values of its own for Linear"),
    "an unknown adapter": (
        {},
        {"adapters": ["default", "x"]},
        r"no adapter 'x'; the adapters are \['default', 'other'\]",
    ),
    "a name that is taken": ({}, {"adapter_name": "other"}, "there is an adapter 'other' already"),
    "too few weights": ({}, {"weights": [1.0]}, "with one weight each"),
    "a weight that is no number": ({}, {"weights": [1.0, float("nan")]}, "expected finite numbers"),
    "LoRA's linear": ({}, {"combination_type": "linear"}, "expected 'cat', which is exact, or 'svd'"),
    "a rank of cat": ({}, {"combination_type": "cat", "svd_rank": 2}, "svd_rank=2 is not allowed"),
}


@pytest.mark.parametrize("case", [case for case in BAD if not (OLD_PEFT and case == "trained biases")])
def test_what_is_refused(case: str) -> None:
    options, arguments, message = BAD[case]
    model = two(**options) if "encoder_hidden" not in options else adapted("llama", **LINEAR)
    if "encoder_hidden" in options:
        model.add_adapter("other", config_for("llama", **options))
    before = state_of(model)
    call = {"adapters": ["default", "other"], "weights": [1.0, 1.0], "adapter_name": "sum", **arguments}
    with pytest.raises(ValueError, match=f"(?s){message}"):
        model.add_weighted_adapter(**call)
    assert_state(model, before)


def test_the_sum_cannot_be_trained() -> None:
    model = two()
    model.add_weighted_adapter(["default"], [2.0], "sum", combination_type="cat")
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".sum." in n)
    model.set_adapter("sum")
    with pytest.raises(RuntimeError, match="exported for inference"):
        model.train()(input_ids=torch.ones(1, 3, dtype=torch.long))
