"""Several adapters in one model: switched, combined, disabled, deleted; and state dicts by hand."""

from pathlib import Path

import peft
import pytest
import torch

from tests.helpers.peft_models import BERT_QUERIES, KINDS, adapted, config_for, layers, logits, train_step
from tests.helpers.tiny_models import DIM, assert_state, batch, build, state_of

pytestmark = [
    pytest.mark.compat(
        "PEFT", "several adapters: switched, added up, disabled, deleted; `modules_to_save`; state dicts, injection"
    ),
    pytest.mark.filterwarnings("ignore:FVAE. the auxiliary loss entered:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


def test_switching_adapters_and_what_is_trained() -> None:
    model = adapted("bert", modules_to_save=["classifier"])

    def trained() -> set[str]:
        return {n for n, p in model.named_parameters() if p.requires_grad}

    names = trained()
    assert any("fvae_adapter.default." in name for name in names)
    assert {name for name in names if "fvae" not in name} == {
        f"base_model.model.classifier.modules_to_save.default.{p}" for p in ("weight", "bias")
    }
    model.add_adapter("other", config_for("bert", r=2))
    assert trained() == names, "adding an adapter changes nothing until it is active"
    model.set_adapter("other")
    assert trained() == {name.replace("default", "other") for name in names}
    model.set_adapter("default")
    assert trained() == names
    model.delete_adapter("other")
    assert trained() == names
    assert not any("other" in key for key in model.state_dict())
    for layer in layers(model).values():
        assert set(layer.fvae_adapter) == set(layer.fvae_loss_weight) == {"default"}
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("other")


def test_two_active_adapters_add_up() -> None:
    model = adapted("llama", target_modules=["q_proj"]).eval()
    model.add_adapter("other", config_for("llama", target_modules=["q_proj"], r=2))
    layer = next(iter(layers(model).values()))
    x = torch.randn(2, 5, DIM)
    base = layer.base_layer(x)
    deltas = [layer.fvae_adapter[name].infer(x) for name in ("default", "other")]
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(layer(x), base + deltas[0] + deltas[1])
    model.train()
    model(**batch("llama")).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if "decoder_out_weight" in n}
    assert len(grads) == 4
    assert all(g is not None and g.abs().sum() > 0 for g in grads.values())


@pytest.mark.parametrize("kind", KINDS)
def test_disabled_adapters_are_the_base_model(kind: str) -> None:
    expected = logits(build(kind).eval(), kind)
    model = adapted(kind)
    train_step(model, kind)
    model.eval()
    with model.disable_adapter():
        assert torch.equal(logits(model, kind), expected)
        assert logits(model.train(), kind).requires_grad is False
        assert torch.equal(logits(model, kind), logits(model, kind)), "nothing samples"
        loss = model(**batch(kind)).loss
    with torch.no_grad():
        assert torch.equal(loss, build(kind)(**batch(kind)).loss), "a disabled adapter has no auxiliary loss"
    assert not torch.equal(logits(model.eval(), kind), expected)


def test_adapters_join_a_model_in_eval_mode_without_sampling(tmp_path: Path) -> None:
    model = adapted("bert").eval()
    model.save_pretrained(tmp_path)
    model.add_adapter("same", config_for("bert"))
    model.add_adapter("elsewhere", config_for("bert", target_modules=["key"]))
    for name in ("same", "elsewhere", "loaded"):
        if name == "loaded":
            model.load_adapter(tmp_path, "loaded")  # puts the model into eval mode
        model.set_adapter(name)
        assert torch.equal(logits(model, "bert"), logits(model, "bert")), name
        assert not any(module.training for module in model.modules())
    model.train()
    model.set_adapter("elsewhere")
    assert not torch.equal(logits(model, "bert"), logits(model, "bert"))


def test_modules_to_save_are_trained_and_saved(tmp_path: Path) -> None:
    model = adapted("vit", modules_to_save=["classifier"])
    old = model.base_model.model.classifier.original_module.weight.clone()
    train_step(model, "vit")
    new = model.base_model.model.classifier.modules_to_save["default"].weight
    assert not torch.equal(old, new)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build("vit", seed=1).eval(), tmp_path)
    assert torch.equal(loaded.base_model.model.classifier.modules_to_save["default"].weight, new)
    same_base = peft.PeftModel.from_pretrained(build("vit"), tmp_path)
    assert torch.equal(logits(same_base, "vit"), logits(model.eval(), "vit"))


def test_adapter_names_in_one_batch_are_refused() -> None:
    model = adapted("bert").eval()
    with pytest.raises(ValueError, match="adapter_names"):
        model(**batch("bert"), adapter_names=["default", "__base__"])


def test_mixed_models_are_refused() -> None:
    model = build("bert")
    before = state_of(model)
    with pytest.raises(ValueError, match=r"(?i)mixed"):
        peft.get_peft_model(model, config_for("bert"), mixed=True)
    assert_state(model, before)


# State dicts and direct injection


def test_state_dict_round_trip_and_injection() -> None:
    model = adapted("bert").eval()
    state = peft.get_peft_model_state_dict(model)
    other = adapted("bert", base_model_name_or_path=None).eval()
    with torch.no_grad():
        for layer in layers(other).values():
            layer.fvae_adapter["default"].B.mul_(2)
    assert not torch.equal(logits(other, "bert"), logits(model, "bert"))
    result = peft.set_peft_model_state_dict(other, state)
    assert not result.unexpected_keys
    assert torch.equal(logits(other, "bert"), logits(model, "bert"))

    config = config_for("bert", task_type=None)
    injected = peft.inject_adapter_in_model(config, build("bert"), "x").eval()
    own = {k.removeprefix("base_model.model."): v for k, v in state.items() if "fvae" in k}
    peft.set_peft_model_state_dict(injected, own, adapter_name="x")
    assert torch.equal(logits(injected, "bert"), logits(model, "bert"))
    back = peft.get_peft_model_state_dict(injected, adapter_name="x")
    assert {k.removeprefix("base_model.model.") for k in back} == set(own)
    injected.train()(**batch("bert")).loss.backward()
    assert all(
        p.grad.abs().sum() > 0 for n, p in injected.named_parameters() if "fvae" in n and n.endswith("out_weight")
    )


def test_injection_follows_a_state_dict() -> None:
    model = adapted("bert", target_modules=["query"])
    state = {
        k.removeprefix("base_model.model."): v for k, v in peft.get_peft_model_state_dict(model).items() if "fvae" in k
    }
    injected = peft.inject_adapter_in_model(
        config_for("bert", target_modules=["query"]), build("bert"), state_dict=state
    )
    assert list(layers(injected)) == BERT_QUERIES
