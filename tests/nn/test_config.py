"""FVAEConfig and FVAELoraConfig: every wrong value has an error text; right values are kept, also through a file."""

import dataclasses
import json
import math
import re

import pytest

from fvae_kernels import FVAEConfig, FVAELoraConfig
from fvae_kernels.config import matches

NAN, INF = math.nan, math.inf
WHOLE, SWITCH = "expected a whole number of at least 1", "expected True or False"
NOT_NEGATIVE, FINITE = "expected a finite number and at least 0.0", "expected a finite number"
SIZES = "expected a sequence of layer sizes"
WEIGHT = "gamma_weight"

# field -> values that are refused, and the allowed range that the error must name
WRONG = {
    "rank": ([0, -1, 1.5, 16.0, "16", None, True], WHOLE),
    "alpha": ([NAN, INF, "16", None, True, 1j], FINITE),
    "rslora": ([0, 1, "yes", None], SWITCH),
    "encoder_hidden": ([16, None, "16"], SIZES),
    "separate_hidden": ([0, 1, "yes", None], SWITCH),
    "decoder_hidden": ([128, None, "128"], SIZES),
    "dropout": ([-0.1, 1.0, 2, NAN, "0.1", None, False], "expected a finite number and at least 0.0 and below 1.0"),
    "fusion": (["sum", "", None, "Concat"], "expected one of 'concat', 'average'"),
    "objective": (["elbo", None, "FVAE"], "expected one of 'fvae', 'vae2lat', 'beta_vae2lat', 'symmetric'"),
    "recon_weight": ([-0.1, NAN, INF, "1", None, True], NOT_NEGATIVE),
    "kl_weight": ([-0.1, NAN, INF, "1", None, True], NOT_NEGATIVE),
    "gamma_weight": ([-0.1, NAN, INF, "1", None, True], NOT_NEGATIVE),
    "gamma_estimator": (["mc", None], "expected one of 'closed_form', 'monte_carlo'"),
    "prior2_mean": ([NAN, -INF, "1.5", None, False], FINITE),
    "prior2_std": ([0.0, -1.0, NAN, "1", None, True], "expected a finite number and above 0.0"),
    "loss_weight": ([-1e-3, NAN, INF, "1", True], NOT_NEGATIVE),
    "detach_target": ([0, 1, "yes", None], SWITCH),
    "start": (["peft", "", None, "LoRA"], "expected one of 'authors', 'lora'"),
    "logvar1_start": (
        [NAN, -21, 20.1, "0", None, True],
        "expected a finite number and at least -20.0 and at most 20.0",
    ),
    "logvar1_max": ([NAN, INF, -21, 20.1, "0", True], "expected a finite number and at least -20.0 and at most 20.0"),
    "logvar1_held": ([0, 1, "yes", None], SWITCH),
    "mask_padding": ([0, 1, "yes", None], SWITCH),
    "sample_at_inference": ([0, 1, "yes", None], SWITCH),
}
CASES = [(name, value, allowed) for name, (values, allowed) in WRONG.items() for value in values]
INSIDE = [  # options, the part that is wrong, what the error must say besides
    ({"encoder_hidden": (16, 0)}, "encoder_hidden=0", WHOLE),
    ({"decoder_hidden": (1.5,)}, "decoder_hidden=1.5", WHOLE),
    ({WEIGHT: (1.0,)}, "gamma_weight=(1.0,)", "expected a number or a pair"),
    ({WEIGHT: [1.0, 2.0, 3.0]}, "gamma_weight=[1.0, 2.0, 3.0]", "expected a number or a pair"),
    ({WEIGHT: (1.0, -2.0)}, "gamma_weight=-2.0", NOT_NEGATIVE),
    ({"separate_hidden": True, "encoder_hidden": ()}, "separate_hidden=True", "expected False where encoder_hidden=()"),
    ({"objective": "vae2lat", WEIGHT: 0.5}, "gamma_weight=0.5", "the default 1.0 (or 0.0) with objective='vae2lat'"),
    ({"objective": "symmetric", WEIGHT: (1.0, 0.0)}, "gamma_weight=(1.0, 0.0)", "with objective='symmetric'"),
    ({"objective": "vae2lat", "kl_weight": 2.0}, "kl_weight=2.0", "expected 1.0 with objective='vae2lat'"),
    (
        {"logvar1_max": -1.0, "logvar1_start": 0.0, "logvar1_held": False},
        "logvar1_start=0.0",
        "at most -1.0 (beyond the bounds of z_1's log-variance no gradient",
    ),
    ({"logvar1_max": 0.0, "logvar1_held": True}, "logvar1_max=0.0", "expected None with logvar1_held=True"),
    ({"loss_weight": {}}, "loss_weight={}", "a table with at least one pattern"),
    ({"loss_weight": {1: 1.0}}, "loss_weight={1: 1.0}", "a table whose keys are strings"),
    ({"loss_weight": {"a(": 1.0}}, "loss_weight='a('", "expected a regular expression"),
    ({"loss_weight": {"a": -1.0}}, "loss_weight=-1.0", NOT_NEGATIVE),
    ({"loss_weight": {"a": None}}, "loss_weight=None", NOT_NEGATIVE),
]


def refused(make, name_and_value, allowed):
    with pytest.raises(ValueError) as error:
        make()
    assert f"{name_and_value} is not allowed: " in str(error.value)
    assert allowed in str(error.value)


def test_the_table_covers_every_field():
    assert list(WRONG) == [f.name for f in dataclasses.fields(FVAEConfig)]


@pytest.mark.parametrize(("name", "value", "allowed"), CASES, ids=lambda v: str(v)[:20])
def test_wrong_values(name, value, allowed):
    refused(lambda: FVAEConfig(**{name: value}), f"{name}={value!r}", allowed)
    ours = "r" if name == "rank" else name
    refused(lambda: FVAELoraConfig(**{ours: value}), f"{name}={value!r}", allowed)


@pytest.mark.parametrize(("options", "wrong", "allowed"), INSIDE, ids=lambda v: str(v)[:30])
def test_wrong_parts_and_combinations(options, wrong, allowed):
    refused(lambda: FVAEConfig(**options), wrong, allowed)
    refused(lambda: FVAELoraConfig(**options), wrong, allowed)


def test_bounds_that_are_allowed():
    FVAEConfig(
        rank=1, dropout=0.0, recon_weight=0, kl_weight=0, gamma_weight=0, loss_weight=0, alpha=-1, prior2_mean=-3
    )
    FVAEConfig(objective="vae2lat", kl_weight=1.0, gamma_weight=(0.0, 0.0))
    FVAEConfig(encoder_hidden=(), decoder_hidden=())


@pytest.mark.parametrize(
    ("options", "bounds"),
    [
        ({}, (-4, -4)),
        ({"logvar1_start": -2, "logvar1_held": True}, (-2, -2)),
        ({"logvar1_start": 1, "logvar1_held": False}, (-20, 20)),
        ({"logvar1_start": -4, "logvar1_max": -2, "logvar1_held": False}, (-20, -2)),
    ],
)
def test_bounds_of_the_log_variance_of_z1(options, bounds):
    assert FVAEConfig(**options).logvar1_bounds == FVAELoraConfig(**options).to_fvae_config().logvar1_bounds == bounds


def test_sequences_become_tuples():
    config = FVAEConfig(encoder_hidden=[3, 4], decoder_hidden=iter([5]), gamma_weight=[1, 2])
    assert (config.encoder_hidden, config.decoder_hidden, config.gamma_weight) == ((3, 4), (5,), (1, 2))
    assert config.gamma_weights == (1, 2)
    assert FVAEConfig(gamma_weight=0.5).gamma_weights == (0.5, 0.5)
    assert hash(config) == hash(dataclasses.replace(config))


def test_frozen():
    config = FVAEConfig()
    for field in dataclasses.fields(config):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, getattr(config, field.name))


@pytest.mark.parametrize(("rank", "alpha", "rslora", "s"), [(9, 9, False, 1), (4, 6.0, False, 1.5), (4, 6.0, True, 3)])
def test_scaling(rank, alpha, rslora, s):
    assert FVAEConfig(rank=rank, alpha=alpha, rslora=rslora).scaling == s


def test_mergeable():
    assert FVAEConfig(encoder_hidden=()).mergeable
    assert not FVAEConfig(encoder_hidden=(16,)).mergeable
    assert not FVAEConfig(encoder_hidden=(), sample_at_inference=True).mergeable


TABLE = {"layer.0.query": 1.0, "query": 2.0, r"layer\.\d+\.value": 3, ".*": 4.0}


class TestLossWeightTable:
    @pytest.mark.parametrize(
        ("name", "weight"),
        [
            ("bert.layer.0.query", 1.0),
            ("layer.0.query", 1.0),
            ("bert.layer.1.query", 2.0),
            ("query", 2.0),
            ("bert.layer.12.value", 3.0),
            ("bert.layer.12.value.dense", 4.0),
            ("my_query", 4.0),  # a pattern matches from a dot on
            ("", 4.0),
        ],
    )
    def test_the_first_match_counts(self, name, weight):
        found = FVAEConfig(loss_weight=TABLE).loss_weight_for(name)
        assert (found, type(found)) == (weight, float)

    def test_order_matters(self):
        assert FVAEConfig(loss_weight={".*": 4.0, "query": 2.0}).loss_weight_for("a.query") == 4.0

    def test_a_number_is_for_all(self):
        assert FVAEConfig(loss_weight=2).loss_weight_for("anything") == 2.0

    def test_alternatives_stay_inside_their_pattern(self):
        assert matches("query|value", "a.value")
        assert not matches("query|value", "value.b")

    def test_no_pattern(self):
        config = FVAEConfig(loss_weight={"value": 1.0, "key": 2.0})
        for name, text in [("a.query", "'a.query'; it has ['value', 'key']"), ("", "'(unnamed)'; it has")]:
            with pytest.raises(ValueError, match=re.escape(f"loss_weight has no pattern for layer {text}")):
                config.loss_weight_for(name)
        with pytest.raises(ValueError, match=re.escape("no pattern for layer 'a.query'")):
            config.check_loss_weight_patterns(["a.key", "a.value", "a.query"])

    def test_unused_pattern(self):
        config = FVAEConfig(loss_weight={"value": 1.0, "quary": 2.0})
        with pytest.raises(
            ValueError, match=re.escape("match no adapted layer: ['quary']; the layers are ['a.value']")
        ):
            config.check_loss_weight_patterns(["a.value"])
        FVAEConfig(loss_weight={"value": 1.0, "query": 2.0}).check_loss_weight_patterns(iter(["a.value", "query"]))
        FVAEConfig(loss_weight=1.0).check_loss_weight_patterns(["a"])


OPTIONS = {
    **{"rank": 5, "alpha": 3.5, "rslora": True, "encoder_hidden": (7, 6), "separate_hidden": True},
    **{"decoder_hidden": (9,), "dropout": 0.25, "fusion": "average", "objective": "fvae", "recon_weight": 0.1},
    **{"kl_weight": 10.0, "gamma_weight": (0.5, 0.25), "gamma_estimator": "monte_carlo", "prior2_mean": -1.0},
    **{"prior2_std": 2.0, "loss_weight": {"query": 0.5, ".*": 0.25}, "detach_target": True},
    **{"start": "lora", "logvar1_start": -4.0, "logvar1_max": -1.0, "logvar1_held": False},
    **{"mask_padding": False, "sample_at_inference": True},
}


class TestLoraConfig:
    def test_same_fields_and_defaults(self):
        ours = {f.name: getattr(FVAELoraConfig(), f.name) for f in dataclasses.fields(FVAELoraConfig)}
        for field in dataclasses.fields(FVAEConfig):
            assert ours["r" if field.name == "rank" else field.name] == field.default, field.name
        assert FVAELoraConfig().to_fvae_config() == FVAEConfig()

    def test_options_arrive(self):
        assert set(OPTIONS) == {f.name for f in dataclasses.fields(FVAEConfig)}
        config = FVAELoraConfig(**{"r" if name == "rank" else name: value for name, value in OPTIONS.items()})
        assert config.to_fvae_config() == FVAEConfig(**OPTIONS)
        assert config.to_fvae_config(rank=2, alpha=9.0) == FVAEConfig(**{**OPTIONS, "rank": 2, "alpha": 9.0})

    @pytest.mark.parametrize("name", ["rank", "lora_alpha", "gama_weight"])
    def test_unknown_options(self, name):
        with pytest.raises(TypeError, match=rf"FVAELoraConfig .* it has no option \['{name}'\]. Check the spelling"):
            FVAELoraConfig(**{name: 1})

    def test_unknown_options_in_a_file(self, tmp_path):
        FVAELoraConfig().save_pretrained(str(tmp_path))
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "from_the_future": 1}))
        with pytest.warns(UserWarning, match="from_the_future"):  # a newer version's: as in PEFT's own configs
            assert FVAELoraConfig.from_pretrained(str(tmp_path)).to_fvae_config() == FVAEConfig()

    @pytest.mark.parametrize("targets", [["query", "value"], r".*\.query", "all-linear", None])
    def test_file_round_trip(self, tmp_path, targets):
        options = {"r" if name == "rank" else name: value for name, value in OPTIONS.items()}
        more = {"modules_to_save": ["classifier"], "rank_pattern": {"query": 2}, "alpha_pattern": {"value": 0.5}}
        config = FVAELoraConfig(target_modules=targets, **options, **more)
        config.save_pretrained(str(tmp_path))
        loaded = FVAELoraConfig.from_pretrained(str(tmp_path))
        config.inference_mode = loaded.inference_mode  # what PEFT writes
        assert loaded == config
        assert loaded.to_fvae_config() == FVAEConfig(**OPTIONS)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "FVAE"

    def test_the_order_of_patterns_survives_a_file(self, tmp_path):
        tables = {
            "loss_weight": {"query": 0.5, ".*": 0.25},
            "rank_pattern": {"z": 2, "a": 3},
            "alpha_pattern": {"z": 2.0},
        }
        FVAELoraConfig(**tables).save_pretrained(str(tmp_path))
        loaded = FVAELoraConfig.from_pretrained(str(tmp_path))
        assert {name: list(getattr(loaded, name).items()) for name in tables} == {
            name: list(table.items()) for name, table in tables.items()
        }
        assert loaded.to_fvae_config().loss_weight_for("a.query") == 0.5

    @pytest.mark.parametrize("rank", [0, -1, 1.5, True, "4"])
    def test_rank_pattern(self, rank):
        with pytest.raises(ValueError, match=rf"rank.*={rank!r} is not allowed: {WHOLE}"):
            FVAELoraConfig(rank_pattern={"query": rank})

    @pytest.mark.parametrize("alpha", [NAN, "4", True])
    def test_alpha_pattern(self, alpha):
        with pytest.raises(ValueError, match=rf"alpha.*={alpha!r} is not allowed: {FINITE}"):
            FVAELoraConfig(alpha_pattern={"query": alpha})

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"inference_only": True, "sample_at_inference": True}, "does not go with sample_at_inference=True"),
            ({"target_modules": "x", "layers_to_transform": [0]}, "layers_to_transform needs target_modules as a list"),
            ({"target_modules": ["x"], "layers_pattern": "h"}, "give their indices in layers_to_transform too"),
        ],
    )
    def test_placement(self, options, text):
        with pytest.raises(ValueError, match=text):
            FVAELoraConfig(**options)
