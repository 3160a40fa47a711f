"""Where stock PEFT places the adapters, with which options, and how they start."""

from typing import Any

import peft
import pytest
import torch

import fvae_kernels as fk
from tests.helpers.peft_models import (
    BERT_QUERIES,
    KINDS,
    LAYERS,
    SMALL,
    adapted,
    config_for,
    layers,
    logits,
    train_step,
)
from tests.helpers.tiny_models import DIM, assert_state, batch, build, mlp, state_of

pytestmark = [
    pytest.mark.compat(
        "PEFT", "targets by name, by expression, all-linear; excluded modules; rank, alpha, weight by pattern"
    ),
    pytest.mark.filterwarnings("ignore:FVAE. the auxiliary loss entered:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


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
