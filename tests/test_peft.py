"""The life of an adapter in stock PEFT and transformers: placed, trained, saved, loaded, switched, merged, removed."""

import copy
import importlib
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from tiny_models import BUILD, DIM, TARGETS, assert_state, batch, build, mlp, state_of
from torch import Tensor, nn

import fvae_kernels as fk
from fvae_kernels.peft import FVAELoraLinear

pytestmark = [
    pytest.mark.filterwarnings("ignore:FVAE. the auxiliary loss entered:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

TASKS = {"bert": "SEQ_CLS", "vit": None, "llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM"}
LAYERS = {"bert": 4, "vit": 4, "llama": 4, "gpt2": 2}
KINDS = list(BUILD)
SMALL: dict[str, Any] = {"r": 3, "encoder_hidden": (5,), "decoder_hidden": (7,), "dropout": 0.0, "loss_weight": 0.01}


def config_for(kind: str, **options: Any) -> fk.FVAELoraConfig:
    """A small config whose adapters change the output from the start."""
    placed = {"task_type": TASKS[kind], "target_modules": TARGETS[kind], "init_weights": False}
    return fk.FVAELoraConfig(**{**SMALL, **placed, **options})


def adapted(kind: str, **options: Any) -> Any:
    torch.manual_seed(7)
    return peft.get_peft_model(build(kind), config_for(kind, **options))


def logits(model: nn.Module, kind: str) -> Tensor:
    inputs = batch(kind)
    inputs.pop("labels")
    with torch.no_grad():
        return model(**inputs).logits


def layers(model: nn.Module) -> dict[str, FVAELoraLinear]:
    found = {n: m for n, m in model.named_modules() if isinstance(m, FVAELoraLinear)}
    return {name.removeprefix("base_model.model."): layer for name, layer in found.items()}


def train_step(model: nn.Module, kind: str) -> None:
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**batch(kind)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


# Placing


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_in_eval_mode_is_the_base_model(kind: str) -> None:
    expected = logits(build(kind).eval(), kind)
    model = adapted(kind, init_weights=True).eval()
    assert torch.equal(logits(model, kind), expected)
    assert len(layers(model)) == LAYERS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_train_mode_samples_and_eval_mode_does_not(kind: str) -> None:
    model = adapted(kind)
    base = logits(build(kind).eval(), kind)
    model.train()
    assert not torch.equal(logits(model, kind), logits(model, kind))
    model.eval()
    assert torch.equal(logits(model, kind), logits(model, kind))
    assert not torch.equal(logits(model, kind), base)


@pytest.mark.parametrize("kind", KINDS)
def test_default_targets(kind: str) -> None:
    chosen, default = adapted(kind), adapted(kind, target_modules=None)
    assert list(layers(default)) == list(layers(chosen))
    assert torch.equal(logits(default.eval(), kind), logits(chosen.eval(), kind))


def test_no_default_targets_for_an_unknown_model() -> None:
    with pytest.raises(ValueError, match="specify `target_modules`"):
        peft.get_peft_model(mlp(), fk.FVAELoraConfig(**SMALL))


BERT_QUERIES = [f"bert.encoder.layer.{i}.attention.self.query" for i in range(2)]
BERT_LINEARS = {"query", "key", "value", "dense"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["query", "q_proj", "nowhere"]}, BERT_QUERIES),
        ({"target_modules": r".*\.1\..*query"}, BERT_QUERIES[1:]),
        ({"target_modules": BERT_QUERIES[0]}, BERT_QUERIES[:1]),
        ({"target_modules": ["query", "value"], "exclude_modules": ["value"]}, BERT_QUERIES),
        ({"target_modules": ["query"], "exclude_modules": r".*layer\.0.*"}, BERT_QUERIES[1:]),
        ({"target_modules": ["query"], "layers_to_transform": [1]}, BERT_QUERIES[1:]),
        ({"target_modules": ["query"], "layers_to_transform": 0, "layers_pattern": "layer"}, BERT_QUERIES[:1]),
    ],
)
def test_which_layers_are_adapted(options: dict[str, Any], expected: list[str]) -> None:
    model = adapted("bert", **options)
    assert list(layers(model)) == expected
    train_step(model, "bert")


def test_all_linear_leaves_the_head() -> None:
    found = list(layers(adapted("bert", target_modules="all-linear")))
    assert {name.rpartition(".")[2] for name in found} == BERT_LINEARS
    assert "bert.pooler.dense" in found
    assert len(found) == 2 * 6 + 1
    causal = list(layers(adapted("llama", target_modules="all-linear")))
    assert len(causal) == 2 * 7
    assert not any("lm_head" in name for name in causal)


def test_rank_and_alpha_patterns() -> None:
    ranks, alphas = {r"layer\.1\..*query": 2}, {"value": 8.0}
    model = adapted("bert", r=4, alpha=4.0, rank_pattern=ranks, alpha_pattern=alphas)
    found = {name: layer.fvae_adapter["default"].config for name, layer in layers(model).items()}
    expected = {"0.query": (4, 1.0), "0.value": (4, 2.0), "1.query": (2, 2.0), "1.value": (4, 2.0)}
    stems = {".".join((name.split(".")[3], name.split(".")[-1])): (c.rank, c.scaling) for name, c in found.items()}
    assert stems == expected
    shapes = {name: tuple(layer.fvae_adapter["default"].B.shape) for name, layer in layers(model).items()}
    assert sorted(shapes.values()) == [(DIM, 2), (DIM, 4), (DIM, 4), (DIM, 4)]


def test_loss_weight_by_layer() -> None:
    model = adapted("bert", loss_weight={r"layer\.0\..*query": 0.5, "value": 0.0, ".*": 0.25})
    weights = {name: layer.fvae_loss_weight["default"] for name, layer in layers(model).items()}
    assert sorted(weights.values()) == [0.0, 0.0, 0.25, 0.5]
    assert weights[BERT_QUERIES[0]] == 0.5
    inputs = batch("bert")
    total = model.train()(**inputs).loss
    terms = fk.collect_terms(model)
    added = sum(weights[name.removeprefix("base_model.model.")] * term["loss"] for name, term in terms.items())
    assert total.item() > added > 0
    assert total.item() - added == pytest.approx(1.1, abs=0.5)  # the cross entropy of three classes


@pytest.mark.parametrize(
    ("table", "message"),
    [({"query": 0.1}, "no pattern for .*value"), ({"query": 0.1, "value": 0.1, "key": 0.1}, r"match no.*'key'")],
)
def test_loss_weight_table_that_does_not_fit(table: dict[str, float], message: str) -> None:
    model = build("bert")
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(model, config_for("bert", loss_weight=table))
    assert_state(model, before)


def test_print_trainable_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted("llama")
    model.print_trainable_parameters()
    trained = sum(p.numel() for n, p in model.named_parameters() if "fvae_adapter" in n)
    assert f"trainable params: {trained:,}" in capsys.readouterr().out
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "fvae_" in n
    }


def test_keys_hold_one_level_below_the_adapter() -> None:
    model = adapted("bert", separate_hidden=True)
    keys = [key for key in model.state_dict() if "fvae_adapter" in key]
    names = {key.partition(".fvae_adapter.default.")[2] for key in keys}
    assert len(keys) == LAYERS["bert"] * len(names)
    assert "B" in names
    assert not any("." in name or not name for name in names)
    saved = peft.get_peft_model_state_dict(model)
    assert {key for key in saved if "default" in key} == set()
    assert sum("fvae_adapter" in key for key in saved) == len(keys)


# Saving and loading


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["default", "bert", "a"])  # "bert" is a module's name too
def test_save_and_load(kind: str, name: str, tmp_path: Path) -> None:
    model = adapted(kind)
    train_step(model, kind)
    expected = logits(model.eval(), kind)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build(kind), tmp_path, adapter_name=name)
    assert not loaded.training
    assert torch.equal(logits(loaded, kind), expected)
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{"is_trainable": True}, {"low_cpu_mem_usage": True}])
def test_load_to_train_and_with_little_memory(kind: str, options: dict[str, bool], tmp_path: Path) -> None:
    model = adapted(kind).eval()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build(kind), tmp_path, **options)
    assert all(p.device.type == "cpu" for p in loaded.parameters())
    assert torch.equal(logits(loaded.eval(), kind), logits(model, kind))
    trained = {n for n, p in loaded.named_parameters() if p.requires_grad}
    if "is_trainable" in options:
        assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
        train_step(loaded, kind)
        assert not torch.equal(logits(loaded.eval(), kind), logits(model, kind))
    else:
        assert trained == set()


def test_two_saved_adapters_keep_apart(tmp_path: Path) -> None:
    model = adapted("bert").eval()
    model.add_adapter("other", config_for("bert"))
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = logits(model, "bert")
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in (tmp_path / "other").iterdir() if p.suffix != ".md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = peft.PeftModel.from_pretrained(build("bert"), tmp_path / "other", adapter_name="x")
    assert torch.equal(logits(loaded, "bert"), expected["other"])
    loaded.load_adapter(tmp_path, "y")
    assert torch.equal(logits(loaded, "bert"), expected["other"])
    loaded.set_adapter("y")
    assert torch.equal(logits(loaded, "bert"), expected["default"])
    assert not torch.equal(expected["default"], expected["other"])


def test_weights_loaded_into_an_adapter_that_is_there(tmp_path: Path) -> None:
    first, second = adapted("bert").eval(), adapted("bert").eval()
    train_step(first, "bert")
    first.save_pretrained(tmp_path)
    second.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(logits(second.eval(), "bert"), logits(first.eval(), "bert"))


def test_config_goes_through_its_file(tmp_path: Path) -> None:
    tables = {"rank_pattern": {"value": 1, "query": 2}, "alpha_pattern": {"value": 4.0, ".*": 2.0}}
    options = {"gamma_weight": (1.0, 0.5), "separate_hidden": True, "loss_weight": {"query": 0.5, ".*": 1.0}}
    config = config_for("bert", **tables, **options)
    config.save_pretrained(tmp_path)
    for cls in (peft.PeftConfig, fk.FVAELoraConfig):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is fk.FVAELoraConfig
        assert loaded == config
        for name in ("loss_weight", "rank_pattern", "alpha_pattern"):
            assert list(getattr(loaded, name)) == list(getattr(config, name)), "the first pattern that matches counts"


def test_a_config_alone_starts_a_fresh_adapter(tmp_path: Path) -> None:
    config_for("bert").save_pretrained(tmp_path)
    model = peft.get_peft_model(build("bert"), fk.FVAELoraConfig.from_pretrained(tmp_path))
    train_step(model, "bert")


def test_the_config_of_a_saved_adapter_fits_another_size_of_model(tmp_path: Path) -> None:
    adapted("bert").save_pretrained(tmp_path)
    config = fk.FVAELoraConfig.from_pretrained(tmp_path)
    larger = build("bert")
    larger.bert.encoder.layer[0].attention.self.query = nn.Linear(DIM, 2 * DIM)
    with pytest.raises(ValueError, match=r"dataclasses\.replace"):
        peft.get_peft_model(larger, config)
    from dataclasses import replace

    fresh = peft.get_peft_model(larger, replace(config, inference_mode=False))
    assert any(p.requires_grad for p in fresh.parameters())


AUTO_PEFT = {"bert": peft.AutoPeftModelForSequenceClassification, "llama": peft.AutoPeftModelForCausalLM}
AUTO = {
    "bert": transformers.AutoModelForSequenceClassification,
    "vit": transformers.AutoModelForImageClassification,
    "llama": transformers.AutoModelForCausalLM,
    "gpt2": transformers.AutoModelForCausalLM,
}


def saved_base_and_adapter(kind: str, folder: Path) -> Any:
    build(kind).save_pretrained(folder / "base")
    base = AUTO[kind].from_pretrained(folder / "base")
    model = peft.get_peft_model(base, config_for(kind)).eval()
    model.save_pretrained(folder / "adapter")
    return model


@pytest.mark.parametrize("kind", list(AUTO_PEFT))
def test_auto_peft_model(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.auto.check_file_exists_on_hf_hub", lambda *_, **__: False)  # of a tokenizer
    model = saved_base_and_adapter(kind, tmp_path)
    loaded = AUTO_PEFT[kind].from_pretrained(str(tmp_path / "adapter"))
    assert torch.equal(logits(loaded.eval(), kind), logits(model, kind))


# transformers' own adapters, without a PeftModel


@pytest.mark.parametrize("kind", KINDS)
def test_auto_model_from_an_adapter_folder(kind: str, tmp_path: Path) -> None:
    model = saved_base_and_adapter(kind, tmp_path)
    loaded = AUTO[kind].from_pretrained(tmp_path / "adapter")
    assert len(layers(loaded)) == LAYERS[kind]
    assert torch.equal(logits(loaded.eval(), kind), logits(model, kind))


def test_native_adapters(tmp_path: Path) -> None:
    model = build("bert").eval()
    base = logits(model, "bert")
    model.add_adapter(config_for("bert"), "a")
    model.eval()
    first = logits(model, "bert")
    model.add_adapter(config_for("bert"), "b")
    assert torch.equal(logits(model, "bert"), logits(model, "bert")), "an adapter that joins must not sample"
    second = logits(model, "bert")
    assert not torch.equal(first, second)
    model.set_adapter("a")
    assert torch.equal(logits(model, "bert"), first)
    model.disable_adapters()
    assert torch.equal(logits(model, "bert"), base)
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    loaded = build("bert")
    loaded.load_adapter(str(tmp_path), "c")
    assert torch.equal(logits(loaded, "bert"), first), "loaded for inference: eval mode, no sampling"
    model.delete_adapter("a")
    model.set_adapter("b")
    assert torch.equal(logits(model, "bert"), second)
    assert not any(".a." in key for key in model.state_dict())


def test_native_adapter_trains_with_the_auxiliary_loss() -> None:
    model = build("bert")
    model.add_adapter(config_for("bert", loss_weight=0.5))
    model.train()
    loss = model(**batch("bert")).loss
    terms = [term["loss"] for term in fk.collect_terms(model).values()]
    assert loss.item() > 0.5 * sum(terms) > 0
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "decoder" in n)


# Several adapters


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


# Merging


def conv1d(bias: bool) -> nn.Module:
    module = transformers.pytorch_utils.Conv1D(32, DIM)
    if not bias:
        nn.init.zeros_(module.bias)
    return module


LINEAR_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(DIM, 32),
    "linear, no bias": lambda: nn.Linear(DIM, 32, bias=False),
    "conv1d": lambda: conv1d(True),
    "conv1d, zero bias": lambda: conv1d(False),
}
LINEAR: dict[str, Any] = {"encoder_hidden": ()}


@pytest.mark.parametrize("layer", list(LINEAR_LAYERS))
def test_merge_and_unmerge_one_layer(layer: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(LINEAR_LAYERS[layer](), nn.ReLU(), nn.Linear(32, 3))
    x = torch.randn(4, 5, DIM)
    before = copy.deepcopy(net)
    options = {**SMALL, **LINEAR, "init_weights": False}
    model = peft.get_peft_model(net, fk.FVAELoraConfig(target_modules=["0"], **options)).eval()
    expected, base = model(x), before(x)
    assert (expected - base).abs().max() > 1e-3
    model.merge_adapter()
    wrapped = model.base_model.model[0]
    assert wrapped.merged
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(model.train()(x), model(x)), "a merged layer does not sample"
    model.eval()
    model.unmerge_adapter()
    assert not wrapped.merged
    torch.testing.assert_close(wrapped.base_layer.weight, before[0].weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged[0]) is type(before[0])
    torch.testing.assert_close(merged(x), expected, rtol=1e-6, atol=1e-6)
    assert merged.state_dict().keys() == before.state_dict().keys()


@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_unload(kind: str) -> None:
    model = adapted(kind, **LINEAR)
    train_step(model, kind)
    expected = logits(model.eval(), kind)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, kind), expected, rtol=1e-5, atol=1e-6)
    assert not layers(merged)
    hooks = state_of(build(kind))["hooks"]
    assert state_of(merged)["hooks"][""] == hooks[""]
    assert not hasattr(merged, "_fvae_hooks")
    again = peft.get_peft_model(merged, config_for(kind))
    train_step(again, kind)


def test_two_adapters_merge() -> None:
    model = adapted("llama", **LINEAR).eval()
    model.add_adapter("other", config_for("llama", r=2, **LINEAR))
    model.base_model.set_adapter(["default", "other"])
    expected = logits(model, "llama")
    model.merge_adapter()
    torch.testing.assert_close(logits(model, "llama"), expected, rtol=1e-5, atol=1e-6)
    with model.disable_adapter():
        base = logits(build("llama").eval(), "llama")
        torch.testing.assert_close(logits(model, "llama"), base, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"encoder_hidden": (5,)}, {"sample_at_inference": True}])
@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload", "by name"])
def test_what_is_no_matrix_is_not_merged(options: dict[str, Any], how: str) -> None:
    model = adapted("llama", target_modules=["q_proj"], **LINEAR)
    model.add_adapter("other", config_for("llama", **{**LINEAR, **options, "target_modules": ["v_proj"]}))
    if how != "by name":
        model.base_model.set_adapter(["default", "other"])
    before = state_of(model)
    options = {"adapter_names": ["default", "other"]} if how == "by name" else {}
    with pytest.raises(ValueError, match=r"(?s)cannot merge.*no weight matrix equals it"):
        getattr(model, "merge_and_unload" if how == "by name" else how)(**options)
    assert_state(model, before)
    assert not any(layer.merged for layer in layers(model).values())
    model.set_adapter("default")
    model.merge_and_unload(adapter_names=["default"])


def test_safe_merge_refuses_a_broken_adapter() -> None:
    model = adapted("bert", **LINEAR)
    layer = next(iter(layers(model).values()))
    nn.init.constant_(layer.fvae_adapter["default"].B, float("nan"))
    weight = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, weight)


@pytest.mark.parametrize("kind", KINDS)
def test_unload_returns_the_base_model(kind: str) -> None:
    base = build(kind).eval()
    reference = state_of(base)
    model = peft.get_peft_model(base, config_for(kind, task_type=None))
    train_step(model, kind)
    restored = model.eval().unload()
    after = state_of(restored)
    for key in ("types", "hooks"):
        assert after[key] == reference[key]
    assert all(torch.equal(value, reference["values"][name]) for name, value in after["values"].items())
    assert after["values"].keys() == reference["values"].keys()
    assert not hasattr(restored, "_fvae_hooks")


# Use


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generate_with_a_cache_is_generate_without(kind: str) -> None:
    model = adapted(kind).eval()
    ids = batch(kind)["input_ids"]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(input_ids=ids, use_cache=True, **options)
    assert cached.shape == (2, ids.shape[1] + 8)
    assert torch.equal(cached, model.generate(input_ids=ids, use_cache=False, **options))


@pytest.mark.parametrize("how", ["deepcopy", "torch.save", "pickle"])
def test_copies_after_a_training_step(how: str) -> None:
    model = adapted("bert")
    train_step(model, "bert")
    model(**batch("bert"))  # a forward whose loss nobody used
    if how == "deepcopy":
        copied = copy.deepcopy(model)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        copied = torch.load(buffer, weights_only=False)
    expected = logits(model.eval(), "bert")
    assert torch.equal(logits(copied.eval(), "bert"), expected)
    reported = copied.train()(**batch("bert")).loss
    assert reported.item() > 0.01 * sum(t["loss"] for t in fk.collect_terms(copied).values()) > 0
    train_step(copied, "bert")
    assert torch.equal(logits(model.eval(), "bert"), expected), "the copy shares nothing"
    unloaded = copied.unload()
    assert not unloaded._forward_hooks
    assert model.base_model.model._forward_hooks, "the original keeps its hooks"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(kind: str, dtype: torch.dtype, autocast: bool) -> None:
    torch.manual_seed(7)
    model = peft.get_peft_model(build(kind).to(dtype), config_for(kind), autocast_adapter_dtype=autocast)
    own = {p.dtype for n, p in model.named_parameters() if "fvae" in n}
    assert own == {torch.float32 if autocast else dtype}
    inputs = batch(kind, dtype=dtype)
    output = model.train()(**inputs)
    assert output.logits.dtype == dtype
    output.loss.backward()
    grads = [p.grad for n, p in model.named_parameters() if "fvae" in n]
    assert all(torch.isfinite(g).all() for g in grads)
    reference = peft.get_peft_model(build(kind).to(dtype).float(), config_for(kind))
    state = {key: value.float() for key, value in peft.get_peft_model_state_dict(model).items()}
    peft.set_peft_model_state_dict(reference, state)
    inputs.pop("labels")
    with torch.no_grad():
        got = model.eval()(**inputs).logits.float()
    torch.testing.assert_close(got, logits_of(reference.eval(), inputs), rtol=0.1, atol=0.1)


def logits_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**{k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}).logits


def test_posterior_means_of_an_adapted_layer() -> None:
    layer = next(iter(layers(adapted("bert")).values()))
    x = torch.randn(2, 5, DIM, dtype=torch.bfloat16)
    mean1, mean2 = layer.posterior_means(x)
    assert mean1.shape == mean2.shape == (2, 5, SMALL["r"])
    assert mean1.dtype == torch.float32
    assert repr(layer).startswith("fvae.")


# Registration


def test_the_method_is_registered_once() -> None:
    members = [member for member in peft.PeftType if member.value == "FVAE"]
    assert len(members) == 1
    assert peft.PeftType("FVAE") is members[0] is peft.PeftType.FVAE
    assert pickle.loads(pickle.dumps(members[0])) is members[0]
    from fvae_kernels.peft import _register, config, model

    assert _register.register("fvae", config.FVAELoraConfig, model.FVAELoraModel) is members[0]
    importlib.reload(fk.peft)
    assert [member for member in peft.PeftType if member.value == "FVAE"] == members
    assert PEFT_TYPE_TO_CONFIG_MAPPING["FVAE"] is fk.FVAELoraConfig
    assert fk.FVAELoraConfig().peft_type is members[0]
    with pytest.raises(ImportError, match="already has a method called 'FVAE'"):
        _register.register("fvae", peft.LoraConfig, model.FVAELoraModel)


def test_config_copies_and_pickles() -> None:
    config = config_for("bert", rank_pattern={"query": 2})
    assert copy.deepcopy(config) == copy.copy(config) == pickle.loads(pickle.dumps(config)) == config
