"""Wrong arguments of what exports, trims and loads: the error says what was expected, and model and files stay."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import fvae_kernels as fk
from tests.helpers.peft_models import LINEAR, adapted, config_for
from tests.helpers.tiny_models import DIM, assert_state, batch, build, state_of

BATCHES = [{"input_ids": batch("bert", size=8)["input_ids"]}]
TARGETS = ["query"]


@cache
def model() -> Any:
    return adapted("bert")


@cache
def two_linear() -> Any:
    found = adapted("bert", **LINEAR)
    found.add_adapter("two", config_for("bert", **LINEAR))
    return found


def lora(**options: Any) -> Callable[[Any, Path], Any]:
    return lambda m, folder: fk.export_as_lora(m, **{"folder": folder, "calibration": BATCHES, **options})


def served(**options: Any) -> Callable[[Any, Path], Any]:
    return lambda m, folder: fk.export_for_inference(m, **{"folder": folder, **options})


def trim(ranks: Any) -> Callable[[Any, Path], Any]:
    return lambda m, _: fk.trim(m, ranks, BATCHES)


def suggest(**options: Any) -> Callable[[Any, Path], Any]:
    return lambda m, _: fk.suggest_ranks(m, BATCHES, **options)


CASES = [
    (lora(uniform_rank="no"), ValueError, "uniform_rank='no' is not allowed: expected True or False"),
    (lora(bias="all"), ValueError, "bias='all' is not allowed: expected True or False"),
    (lora(ridge="x"), ValueError, "ridge='x' is not allowed: expected a relative penalty above 0"),
    (lora(ridge=float("inf")), ValueError, "ridge=inf is not allowed"),
    (lora(rank={"(": 1}), ValueError, r"ranks='\(' is not allowed: expected a regular expression"),
    (lora(rank=2, tolerance=0.1), ValueError, "rank=2 and tolerance=0.1 both say where to truncate"),
    (lora(metric=3), TypeError, "metric is a int; expected a function of the model"),
    (lora(metric=lambda _: None), TypeError, "metric returned None; expected a number"),
    (lora(metric=lambda _: torch.ones(2)), TypeError, "expected a number"),
    (lora(folder=None), TypeError, "the folder is a NoneType; expected a path"),
    (lora(folder=__file__), ValueError, "is a file; expected a folder"),
    (lora(folder=f"{__file__}/inside"), ValueError, "is a file; expected a folder"),
    (lambda m, folder: fk.export_as_lora("bert", folder), TypeError, "the model is a str; expected a torch.nn.Module"),  # type: ignore[arg-type]
    (served(folder=__file__), ValueError, "is a file; expected a folder"),
    (served(tolerance=True), ValueError, "tolerance=True is not allowed"),
    (lambda m, folder: fk.export_for_inference(m.base_model, folder), ValueError, "inside of a PeftModel"),
    (suggest(threshold="x"), ValueError, "threshold='x' is not allowed: expected a variance of at least 0, or None"),
    (suggest(threshold=float("nan")), ValueError, "threshold=nan is not allowed"),
    (trim(None), ValueError, "ranks=None is not allowed: expected a table"),
    (trim({1: 2}), ValueError, "expected a table whose keys are strings"),
    (trim({"query": "2"}), ValueError, "rank='2' is not allowed for"),
    (lambda *_: fk.restore_linears("bert"), TypeError, "the model is a str"),  # type: ignore[arg-type]
    (lambda m, folder: fk.load_adapters("bert", folder), TypeError, "the model is a str"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "error", "message"), CASES)
def test_wrong_arguments(call: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    before = state_of(model())
    with pytest.raises(error, match=message):
        call(model(), tmp_path / "new")
    assert_state(model(), before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("default", [1.0], "sum"), "expected adapters, each once, with one weight each; got 'default'"),
        ((["default", "two"], None, "sum"), "with one weight each; got .* and None"),
        ((["default", "two"], [True, 1.0], "sum"), "expected finite numbers"),
        ((["default", "two"], [1.0, 1.0], 3), "adapter_name=3 is not allowed"),
        ((["default", "two"], [1.0, 1.0], "a.b"), "adapter_name='a.b' is not allowed: expected a name without a dot"),
        ((["default", "two"], [1.0, 1.0], "sum", "svd", 1.5), "svd_rank=1.5 is not allowed"),
        ((["default", "two"], [1.0, 1.0], "sum", "svd", "x"), "svd_rank='x' is not allowed"),
    ],
)
def test_wrong_sums(arguments: Any, message: str) -> None:
    before = state_of(two_linear())
    with pytest.raises(ValueError, match=message):
        two_linear().add_weighted_adapter(*arguments)
    assert_state(two_linear(), before)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "adapter_config.json cannot be read: .* It is no JSON"),
        ("[1]", "holds a list; expected the options of an adapter"),
        ({"rank_pattern": "zz"}, "rank_pattern='zz' is not allowed: expected a table"),
        ({"alpha_pattern": [["(", 2]]}, r"alpha_pattern='\(' is not allowed: expected a regular expression"),
        ({"target_modules": 3}, "target_modules=3; expected a list of names"),
    ],
)
def test_broken_configs(text: Any, message: str, tmp_path: Path) -> None:
    plain = build("bert")
    fk.replace_linears(plain, fk.FVAEConfig(rank=2), TARGETS)
    fk.save_adapters(plain, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(text if isinstance(text, str) else json.dumps({**json.loads(path.read_text()), **text}))
    base = build("bert")
    before = state_of(base)
    with pytest.raises(ValueError, match=message):
        fk.load_adapters(base, tmp_path)
    assert_state(base, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_pattern": "query"}, "rank_pattern='query' is not allowed: expected a table"),
        ({"rank_pattern": [1]}, r"rank_pattern=\[1\] is not allowed: expected a table"),
        ({"rank_pattern": {1: 2}}, "expected a table whose keys are strings"),
        ({"encoder_hidden_pattern": {"(": (2,)}}, r"encoder_hidden_pattern='\(' is not allowed"),
        ({"alpha_pattern": {"query": None}}, "alpha=None is not allowed"),
        ({"trainable_token_indices": [True]}, r"trainable_token_indices=\[True\] is not allowed"),
        ({"trainable_token_indices": {3: [1]}}, "a table of lists by embedding"),
        ({"target_parameters": {"experts": 1}}, "target_parameters=.* expected a list of names"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_for("bert", **options)


def test_layers_without_peft_have_other_exports(tmp_path: Path) -> None:
    plain = build("bert")
    fk.replace_linears(plain, fk.FVAEConfig(rank=2), TARGETS)
    with pytest.raises(ValueError, match="Layers of replace_linears are exported by export_as_lora"):
        fk.export_for_inference(plain, tmp_path)


def test_wrong_inputs_of_the_generator() -> None:
    layer = fk.FusedFVAELinear(torch.nn.Linear(DIM, 4), fk.FVAEConfig(rank=2))
    x = torch.randn(3, DIM)
    with pytest.raises(TypeError, match="x is a str; expected a tensor"):
        fk.generate_features(layer, "x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="other is a list; expected a tensor"):
        fk.generate_features(layer, x, [1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="other has shape"):
        fk.generate_features(layer, x, x[:2])
