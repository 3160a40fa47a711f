"""Adapter folders with the authors' names and random tensors, converted and loaded into PEFT models; errors."""

import json

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn

import fvae_kernels as fk
from fvae_kernels import interop
from fvae_kernels.peft import FVAELoraLinear
from tests.helpers.tiny_models import DIM, batch, build

LAMBDAS = ("lambda_reconstruction", "lambda_kl_z1", "lambda_z2_l2", "lambda_z1_l2")


def random_official(config, D, M, seed, dtype=torch.float64):
    """Random tensors by the authors' names, without our mapping of names; `config` has their names too."""
    generator, r = torch.Generator().manual_seed(seed), config["latent_dim"]
    tensors = {}

    def linear(name, fan_in, fan_out):
        tensors[f"{name}.weight"] = torch.randn(fan_out, fan_in, generator=generator, dtype=dtype) * 0.4
        tensors[f"{name}.bias"] = torch.randn(fan_out, generator=generator, dtype=dtype) * 0.4

    def stack(name, fan_in, width, count):
        for i in range(count):
            linear(f"{name}.{i}", width if i else fan_in, width)

    wide, deep = config["enc_hidden_layer"], config["enc_num_of_layer"]
    for i in range(2):
        stem = f"lora_A.views_conditionalGaussianEncoders_list.{i}"
        for name in ["layers"] if config["encoder_use_common_hidden_layer"] else ["layers_mean", "layers_logvar"]:
            stack(f"{stem}.{name}", D, wide, deep)
        for head in ("mean", "logvar"):
            linear(f"{stem}.{head}", wide if deep else D, r)
    stem, fused = "lora_A.views_conditionalGaussianDecoders", r if config["latent_fusion"] == "average" else 2 * r
    wide, deep = config["dec_hidden_layer"], config["dec_num_of_layer"]
    stack(f"{stem}.layers", fused, wide, deep)
    linear(f"{stem}.output_layer", wide if deep else fused, D)
    tensors[f"{stem}.scale_tril"] = 0.5 + torch.rand(D, generator=generator, dtype=dtype)
    tensors["lora_B"] = torch.randn(M, r, generator=generator, dtype=dtype) * 0.3
    tensors["lora_E"] = torch.zeros(r, 1, dtype=dtype)
    return tensors


def official_config(**more):
    return {
        **{"peft_type": "FVAEPEFT", "task_type": None, "r": 8, "lora_alpha": 4, "lora_dropout": 0.0, "bias": "none"},
        **{"target_modules": ["query", "value"], "modules_to_save": ["classifier"], "inference_mode": True},
        **{"latent_dim": 3, "num_of_z_sampled": 1, "latent_fusion": "concat", "enc_dropout": 0.0, "dec_dropout": 0.0},
        **{"enc_num_of_layer": 1, "enc_hidden_layer": 5, "dec_num_of_layer": 2, "dec_hidden_layer": 6},
        **{"encoder_use_common_hidden_layer": True, "z2_latent_mean": 1.5, "z2_latent_std": 1, "force_minhyp": False},
        **{"lambda_downstream": 1000, **dict.fromkeys(LAMBDAS, 1), "fan_in_fan_out": False, "use_rslora": False},
        **more,
    }


class TestLinearEncoder:
    def make(self, zero_bias):
        config = official_config(enc_num_of_layer=0)
        tensors = random_official(config, 7, 4, seed=0)
        if zero_bias:
            tensors["lora_A.views_conditionalGaussianEncoders_list.0.mean.bias"].zero_()
        return config, {"base_layer.weight": torch.randn(4, 7, dtype=torch.float64), **tensors}

    def test_it_can_be_merged_and_goes_back(self):
        config, tensors = self.make(zero_bias=True)
        layer = interop.from_official(tensors, config).eval()
        x = torch.randn(5, 7, dtype=torch.float64)
        mean = x @ tensors["lora_A.views_conditionalGaussianEncoders_list.0.mean.weight"].T
        expected = x @ tensors["base_layer.weight"].T + 4 / (3 + 1e-5) * mean @ tensors["lora_B"].T
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
        back = interop.to_official(layer)
        assert {k.replace(".default", "") for k in back} == {*tensors, "ranknum"}
        layer.merge()
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
        with pytest.raises(ValueError, match="unmerge"):
            interop.to_official(layer)

    def test_a_mean_bias_has_no_place(self):
        config, tensors = self.make(zero_bias=False)
        with pytest.raises(
            ValueError, match=r"mean.bias of the layer is not zero: expected zeros with a linear encoder"
        ):
            interop.from_official(tensors, config)


# names of transformers 4 -> names in the installed version, if they differ
NAMES = {
    "bert": ["bert.encoder.layer.{}.attention.self.query", "bert.encoder.layer.{}.attention.self.value"],
    "vit": ["vit.encoder.layer.{}.attention.attention.query", "vit.encoder.layer.{}.attention.attention.value"],
    "gpt2": ["transformer.h.{}.attn.c_attn"],
}
OLD = int(transformers.__version__.partition(".")[0]) < 5
TODAY = {"vit": ["vit.layers.{}.attention.q_proj", "vit.layers.{}.attention.v_proj"]}
PARTS = {"gpt2": ["c_attn"]}


def write_checkpoint(folder, family, form="", **settings):
    """An adapter folder as the authors' code saves it; returns its tensors by the layers' names in the model."""
    model, state, layers = build(family).eval(), {}, {}
    config = official_config(**{"target_modules": PARTS.get(family, ["query", "value"]), **settings})
    for i in range(2):
        today = NAMES[family] if OLD else TODAY.get(family, NAMES[family])
        for theirs, name in zip(NAMES[family], today, strict=True):
            M = 3 * DIM if family == "gpt2" else DIM
            tensors = random_official(config, DIM, M, seed=len(layers), dtype=torch.float32)
            layers[name.format(i)] = tensors
            for key, tensor in tensors.items():
                root, _, rest = key.partition(".")
                state[f"base_model.model.{theirs.format(i)}.{root}{form}{'.' + rest if rest else ''}"] = tensor
    if config["modules_to_save"]:
        state |= {f"base_model.model.classifier.{k}": p + 1 for k, p in model.classifier.named_parameters()}
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(state, folder / "adapter_model.safetensors")
    return model, config, layers, state


def single_layer(base, tensors, config):
    """`from_official` of one layer of the checkpoint."""
    weight = base.weight.T if type(base).__name__ == "Conv1D" else base.weight
    return interop.from_official({"base_layer.weight": weight, "base_layer.bias": base.bias, **tensors}, config).eval()


class TestCheckpoint:
    @pytest.mark.parametrize("form", ["", ".default", ".other"])
    @pytest.mark.parametrize("family", NAMES)
    def test_every_layer_gives_their_outputs(self, tmp_path, family, form):
        more = {"modules_to_save": None, "fan_in_fan_out": True} if family == "gpt2" else {}
        model, config, layers, state = write_checkpoint(tmp_path / "theirs", family, form, **more)
        singles = {name: single_layer(model.get_submodule(name), t, config) for name, t in layers.items()}
        peft_model = interop.peft_model_from_official(model, tmp_path / "theirs").eval()
        adapted = [name for name, m in model.named_modules() if isinstance(m, FVAELoraLinear)]
        assert sorted(adapted) == sorted(layers)
        x = torch.randn(2, 5, DIM)
        for name, single in singles.items():
            ours = peft_model.base_model.model.get_submodule(name)
            exact = 1e-6 if family == "gpt2" else 0  # Conv1D adds in another order
            torch.testing.assert_close(ours(x), single(x), rtol=exact, atol=exact)
            assert (ours(x) - ours.base_layer(x)).abs().max() > 0.1
            assert ours.fvae_loss_weight["default"] == 1 / (1000 * len(layers))
        if config["modules_to_save"]:
            head = peft_model.base_model.model.classifier.modules_to_save["default"]
            assert torch.equal(head.weight, state["base_model.model.classifier.weight"])

    def test_a_converted_folder_is_one_of_ours(self, tmp_path):
        write_checkpoint(tmp_path / "theirs", "bert")
        interop.convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
        files = ["adapter_config.json", "adapter_model.safetensors"]
        assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == files
        config = fk.FVAELoraConfig.from_pretrained(str(tmp_path / "ours"))
        assert config.target_modules == {"query", "value"}
        assert (config.r, config.modules_to_save, config.loss_weight) == (3, ["classifier"], 1 / 4000)
        first = PeftModel.from_pretrained(build("bert"), str(tmp_path / "ours")).eval()
        second = interop.peft_model_from_official(build("bert"), tmp_path / "theirs").eval()
        assert torch.equal(first(**batch("bert")).logits, second(**batch("bert")).logits)

    @pytest.mark.parametrize("family", ["bert", "vit"])
    def test_it_trains_on(self, tmp_path, family):
        """The authors' total loss over lambda_downstream is ours: task + sum of minus_elbo / (1000 layers)."""
        model, *_ = write_checkpoint(tmp_path / "theirs", family)
        peft_model = interop.peft_model_from_official(model, tmp_path / "theirs", is_trainable=True).train()
        inputs = batch(family)
        output = peft_model(**inputs)
        terms = fk.collect_terms(peft_model)
        task = nn.functional.cross_entropy(output.logits, inputs["labels"])
        expected = task + sum(values["loss"] for values in terms.values()) / len(terms) / 1000
        assert len(terms) == 4
        torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=1e-6)
        output.loss.backward()
        assert all(p.grad is not None for name, p in peft_model.named_parameters() if "fvae_" in name)

    @pytest.mark.parametrize(
        "more",
        [
            {"encoder_use_common_hidden_layer": False},
            {"latent_fusion": "average"},
            {"enc_num_of_layer": 2, "dec_num_of_layer": 0, "enc_dropout": 0.1, "dec_dropout": 0.1},
            {"target_modules": r".*\.(query|value)", "lambda_z1_l2": 0.5},
        ],
    )
    def test_other_settings(self, tmp_path, more):
        model, config, layers, _ = write_checkpoint(tmp_path / "theirs", "bert", **more)
        name, x = "bert.encoder.layer.1.attention.self.value", torch.randn(4, DIM)
        single = single_layer(model.get_submodule(name), layers[name], config)
        peft_model = interop.peft_model_from_official(model, tmp_path / "theirs").eval()
        torch.testing.assert_close(peft_model.base_model.model.get_submodule(name)(x), single(x), rtol=0, atol=0)


class TestCheckpointErrors:
    def fails(self, tmp_path, text, model=None):
        with pytest.raises(ValueError, match=text):
            interop.convert_checkpoint(tmp_path / "theirs", tmp_path / "ours", model)
        assert not (tmp_path / "ours").exists()

    @pytest.mark.parametrize(
        ("settings", "text"),
        [
            ({"peft_type": "LORA"}, "peft_type='LORA' is not supported: expected 'FVAEPEFT'"),
            ({"bias": "all"}, "bias='all' is not supported: expected 'none'"),
            ({"num_of_z_sampled": 4}, "num_of_z_sampled=4 is not supported"),
            ({"force_classical_ae": True}, "force_classical_ae=True is not supported"),
        ],
    )
    def test_settings(self, tmp_path, settings, text):
        write_checkpoint(tmp_path / "theirs", "bert", **settings)
        self.fails(tmp_path, text)

    def test_one_bad_tensor_in_the_last_layer(self, tmp_path):
        *_, state = write_checkpoint(tmp_path / "theirs", "bert")
        last = "base_model.model.bert.encoder.layer.1.attention.self.value"
        for change, text in [
            ({f"{last}.lora_B": None}, "1.attention.self.value do not fit the settings: missing .*lora_B"),
            ({f"{last}.lora_B": torch.ones(12, 4)}, r"lora_B of .* has shape \(12, 4\): expected \(12, 3\)"),
            ({f"{last}.lora_A.weight": torch.ones(1)}, "unexpected tensor .*lora_A.weight"),
        ]:
            changed = {k: t for k, t in {**state, **change}.items() if t is not None}
            save_file(changed, tmp_path / "theirs" / "adapter_model.safetensors")
            self.fails(tmp_path, text)

    def test_no_adapter_at_all_and_truncated(self, tmp_path):
        write_checkpoint(tmp_path / "theirs", "bert")
        path = tmp_path / "theirs" / "adapter_model.safetensors"
        save_file({"classifier.weight": torch.ones(300)}, path)
        self.fails(tmp_path, "holds no FVAE-LoRA weights of the authors")
        path.write_bytes(path.read_bytes()[:1000])
        self.fails(tmp_path, "cannot be read")

    def test_pickles_are_refused(self, tmp_path):
        write_checkpoint(tmp_path / "theirs", "bert")
        (tmp_path / "theirs" / "adapter_model.safetensors").rename(tmp_path / "theirs" / "adapter_model.bin")
        self.fails(tmp_path, "a pickle, which can run code")

    def test_missing_config(self, tmp_path):
        write_checkpoint(tmp_path / "theirs", "bert")
        (tmp_path / "theirs" / "adapter_config.json").unlink()
        self.fails(tmp_path, "is no adapter folder")

    def test_the_source_is_never_overwritten(self, tmp_path):
        write_checkpoint(tmp_path / "theirs", "bert")
        with pytest.raises(ValueError, match="is the source folder: expected another"):
            interop.convert_checkpoint(tmp_path / "theirs", tmp_path / "theirs")

    def test_another_base_model(self, tmp_path):
        write_checkpoint(tmp_path / "theirs", "bert")
        self.fails(tmp_path, "has no layer 'bert.encoder.layer.0.attention.self.query'", model=build("vit"))
        self.fails(tmp_path, "Linear has no layer", model=nn.Linear(3, 3))
