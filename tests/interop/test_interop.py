"""Single layers of the authors' code against ours: golden cases, round trips, settings, errors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fvae_kernels import interop

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.safetensors"))
LAMBDAS = ("lambda_reconstruction", "lambda_kl_z1", "lambda_z2_l2", "lambda_z1_l2")


def golden(path):
    with safe_open(path, "pt") as file:
        settings = file.metadata()
    tensors = load_file(path)
    return tensors, {k.removeprefix("param."): t for k, t in tensors.items() if k.startswith("param.")}, settings


def close(ours, theirs, tolerance=1e-12):
    torch.testing.assert_close(ours, theirs.reshape(ours.shape), rtol=tolerance, atol=tolerance)


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem)
def case(request):
    return golden(request.param)


def test_every_golden_case_is_there():
    names = ["average_fusion", "deep_encoder", "prior_shifted", "rank3_odd", "separate_hidden", "vit_default"]
    assert [path.stem for path in GOLDEN] == names


class TestGolden:
    def test_training(self, case):
        t, parameters, settings = case
        layer = interop.from_official(parameters, settings)
        y, terms = layer.forward_with_terms(t["x"], noise=(t["noise_z1"], t["noise_z2"]))
        close(y, t["y_train"])
        close(terms.kl, t["kl_z1"])
        close(terms.nll, t["recon_nll"])
        close(terms.loss, t["minus_elbo"])
        r = layer.config.rank
        close(terms.gamma, r / 2 * (t["z1_l2"] - t["z2_l2"]))
        weights = [json.loads(settings[name]) for name in LAMBDAS]
        parts = (t["recon_nll"], t["kl_z1"], t["z2_l2"], -t["z1_l2"])
        close(terms.loss, sum(w * part for w, part in zip(weights, parts, strict=True)))

    def test_eval_and_means(self, case):
        t, parameters, settings = case
        layer = interop.from_official(parameters, settings).eval()
        close(layer(t["x"]), t["y_eval"])
        for ours, theirs in zip(layer.posterior_means(t["x"]), (t["z1_mean"], t["z2_mean"]), strict=True):
            close(ours, theirs)

    def test_gradients(self, case):
        t, parameters, settings = case
        layer = interop.from_official(parameters, settings)
        layer.base_layer.bias.requires_grad_(True)
        x = t["x"].clone().requires_grad_(True)
        y, terms = layer.forward_with_terms(x, noise=(t["noise_z1"], t["noise_z2"]))
        assert layer.loss_weight == json.loads(settings["aux_weight"])
        (layer.loss_weight * terms.loss + (y * t["grad_y"]).sum()).backward()
        close(x.grad, t["grad_x"])
        ours = interop.to_official(layer, gradients=True)
        theirs = {k.removeprefix("grad."): g for k, g in t.items() if k.startswith("grad.")}
        assert set(ours) == set(theirs)
        for name, grad in theirs.items():
            close(ours[name], grad)

    @pytest.mark.filterwarnings("ignore::UserWarning")  # there is no model and no loss, so the weight is the layer's
    def test_injected_gradients(self, case):
        """In training layer(x) gives the same gradients, with the same noise."""
        t, parameters, settings = case
        layer = interop.from_official(parameters, settings)
        forward = layer.adapter.forward
        layer.adapter.forward = lambda x, mask, base: forward(x, (t["noise_z1"], t["noise_z2"]), mask, base)
        x = t["x"].clone().requires_grad_(True)
        (layer(x) * t["grad_y"]).sum().backward()
        close(x.grad, t["grad_x"])

    def test_round_trip(self, case):
        _, parameters, settings = case
        back = interop.to_official(interop.from_official(parameters, settings))
        assert set(back) == set(parameters)
        for name, tensor in back.items():
            assert tensor.dtype == torch.float64
            if "lora_E" not in name:
                torch.testing.assert_close(tensor, parameters[name], rtol=0, atol=1e-15)
        again = interop.from_official(back, settings)
        first = interop.from_official(parameters, settings).state_dict()
        for name, tensor in again.state_dict().items():
            torch.testing.assert_close(tensor, first[name], rtol=0, atol=1e-15)


def by_their_names(settings):
    short = {
        **{"r": "latent_dim", "enc_hidden": "enc_hidden_layer", "enc_layers": "enc_num_of_layer"},
        **{"dec_hidden": "dec_hidden_layer", "dec_layers": "dec_num_of_layer", "fusion": "latent_fusion"},
        **{"common_hidden": "encoder_use_common_hidden_layer", "num_z_samples": "num_of_z_sampled"},
        **{"z2_mean": "z2_latent_mean", "z2_std": "z2_latent_std"},
    }
    return {short.get(name, name): json.loads(value) for name, value in settings.items()}


class TestSettings:
    def test_names_of_their_config_file(self, case):
        _, _, settings = case
        theirs = {
            **by_their_names(settings),
            "r": 77,
            "lora_dropout": 0.5,
            "force_minhyp": False,
        }  # r is not used there
        assert interop.config_from_official(theirs) == interop.config_from_official(settings)

    def test_mapping(self):
        _, parameters, settings = golden(GOLDEN[1])
        config = interop.from_official(parameters, settings).config
        assert config.gamma_estimator == "monte_carlo"
        assert config.gamma_weight == (2 * 0.5 / 4, 2 * 0.25 / 4)
        assert config.scaling == pytest.approx(4 / (4 + 1e-5), rel=1e-15)
        assert config.prior2_std == 1.0

    @pytest.mark.parametrize(
        ("more", "weight"), [({"lambda_downstream": 1000}, 1e-3), ({}, 1.0), ({"aux_weight": "0.2"}, 0.2)]
    )
    def test_loss_weight(self, more, weight):
        settings = {"r": 3, "enc_hidden": 5, "enc_layers": 1, "dec_hidden": 5, "dec_layers": 1, **more}
        assert interop.config_from_official(settings).loss_weight == weight

    def test_alpha_of_zero_is_the_rank(self):
        settings = {"r": 3, "enc_hidden": 5, "enc_layers": 1, "dec_hidden": 5, "dec_layers": 1, "lora_alpha": 0}
        assert interop.config_from_official(settings).alpha == pytest.approx(3, rel=1e-5)

    @pytest.mark.parametrize("prior_std", ["1.0", "3.0"])
    def test_their_objective_ignores_tau(self, prior_std):
        t, parameters, settings = golden(GOLDEN[0])
        layer = interop.from_official(parameters, {**settings, "z2_std": prior_std})
        close(layer.forward_with_terms(t["x"], noise=(t["noise_z1"], t["noise_z2"]))[1].loss, t["minus_elbo"])

    @pytest.mark.parametrize(
        ("setting", "text"),
        [
            ({"num_z_samples": "2"}, "num_of_z_sampled=2 is not supported: expected 1"),
            ({"num_of_z_sampled": 5}, "num_of_z_sampled=5 is not supported: expected 1"),
            ({"force_minhyp": True}, "force_minhyp=True is not supported: expected false"),
            ({"force_classical_vae": "true"}, "force_classical_vae=True is not supported"),
            ({"enc_dropout": 0.1, "dec_dropout": 0.5}, "enc_dropout=0.1 and dec_dropout=0.5 differ"),
            ({"fusion": '"sum"'}, "fusion='sum' is not allowed: expected one of 'concat', 'average'"),
            ({"latent_fusion": "sum"}, "fusion='sum' is not allowed"),
            ({"r": "0"}, "latent_dim=0 is not allowed: expected a whole number of at least 1"),
            ({"enc_hidden": [4, 4]}, r"enc_hidden_layer=\[4, 4\] is not allowed: expected a whole number"),
            ({"dec_layers": -1}, "dec_num_of_layer=-1 is not allowed: expected a whole number of at least 0"),
            ({"enc_layers": None}, "no enc_num_of_layer or enc_layers: expected it"),
            ({"aux_weight": -1}, "loss_weight=-1 is not allowed"),
            ({"lora_alpha": "much"}, "lora_alpha='much' is not allowed: expected a finite number"),
            ({"lambda_z1_l2": -1}, "gamma_weight=-0.5 is not allowed"),
        ],
    )
    def test_errors(self, setting, text):
        _, parameters, settings = golden(GOLDEN[0])
        with pytest.raises(ValueError, match=text):
            interop.from_official(parameters, {**settings, **setting})

    def test_downstream_weight_of_zero(self):
        settings = {"r": 3, "enc_hidden": 5, "enc_layers": 1, "dec_hidden": 5, "dec_layers": 1, "lambda_downstream": 0}
        with pytest.raises(ValueError, match="lambda_downstream=0 is not allowed: expected a finite number above 0"):
            interop.config_from_official(settings)


SCALE = "lora_A.default.views_conditionalGaussianDecoders.scale_tril"


class TestTensors:
    def setup_method(self):
        self.golden, self.parameters, self.settings = golden(GOLDEN[0])

    @pytest.mark.parametrize("adapter", ["", ".other"])
    def test_with_and_without_the_adapters_name(self, adapter):
        renamed = {k.replace(".default", adapter): t for k, t in self.parameters.items()}
        close(interop.from_official(renamed, self.settings).eval()(self.golden["x"]), self.golden["y_eval"])

    def test_unused_tensors_and_bias_may_be_absent(self):
        fewer = {k: t for k, t in self.parameters.items() if "lora_E" not in k and "ranknum" not in k}
        del fewer["base_layer.bias"]
        layer = interop.from_official(fewer, self.settings)
        assert layer.bias is None
        y = layer.eval()(self.golden["x"]) + self.parameters["base_layer.bias"]
        close(y, self.golden["y_eval"])

    def test_tensors_are_copied(self):
        layer = interop.from_official(self.parameters, self.settings)
        with torch.no_grad():
            for p in [*layer.base_layer.parameters(), *layer.adapter.parameters()]:
                p.zero_()
        assert all(t.any() for k, t in self.parameters.items() if k in ("base_layer.weight", "base_layer.bias"))
        assert all(t.any() for k, t in self.parameters.items() if k.startswith("lora_A"))

    def test_float32_stays_float32(self):
        parameters = {k: t.float() for k, t in self.parameters.items()}
        layer = interop.from_official(parameters, self.settings)
        assert {p.dtype for p in layer.parameters()} == {torch.float32}
        close(layer.eval()(self.golden["x"].float()), self.golden["y_eval"].float(), 1e-5)

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"base_layer.weight": None}, "base_layer.weight is missing"),
            ({"lora_B.default": None}, r"the layer do not fit the settings: missing \['lora_B'\]"),
            ({SCALE: None}, "missing .*scale_tril"),
            ({"lora_A.default.views_other.weight": torch.ones(1)}, "unexpected .*views_other.weight"),
            ({"classifier.weight": torch.ones(1)}, "unexpected tensors .*classifier.weight.*single layer"),
            ({"lora_A.weight": torch.ones(1)}, "unexpected tensor 'lora_A.weight': expected lora_A.<adapter>.views_"),
            ({"lora_B.other": torch.ones(1)}, "'lora_B.other' comes a second time"),
            ({SCALE: torch.ones(19)}, r"scale_tril of the layer has shape \(19,\): expected \(20,\)"),
            ({"ranknum.default": torch.tensor([3.0])}, r"ranknum of the layer is \[3.0\]: expected \[4\]"),
        ],
    )
    def test_errors(self, change, text):
        tensors = {k: t for k, t in {**self.parameters, **change}.items() if t is not None}
        with pytest.raises(ValueError, match=text):
            interop.from_official(tensors, self.settings)


def test_gradients_before_backward_are_an_error():
    _, parameters, settings = golden(GOLDEN[0])
    with pytest.raises(RuntimeError, match=r"no gradient has reached .*call backward"):
        interop.to_official(interop.from_official(parameters, settings), gradients=True)
