"""Use of an adapted model: generation, copies, half precision; and the registration with PEFT."""

import copy
import importlib
import io
import pickle

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

import fvae_kernels as fk
from tests.helpers.peft_models import BROKEN, KINDS, SMALL, adapted, config_for, layers, logits, train_step
from tests.helpers.tiny_models import DIM, batch, build

pytestmark = [
    pytest.mark.filterwarnings("ignore:FVAE. the auxiliary loss entered:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


@pytest.mark.compat("Models", "generation with a KV cache: Llama, GPT-2, T5")
@pytest.mark.parametrize("kind", ["llama", "gpt2", pytest.param("t5", marks=BROKEN)])
def test_generate_with_a_cache_is_generate_without(kind: str) -> None:
    model = adapted(kind).eval()
    ids = batch(kind)["input_ids"]
    start = 1 if kind == "t5" else ids.shape[1]  # tokens before the first new one
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(input_ids=ids, use_cache=True, **options)
    assert cached.shape == (2, start + 8)
    assert torch.equal(cached, model.generate(input_ids=ids, use_cache=False, **options))


@pytest.mark.parametrize("how", ["deepcopy", "torch.save", "pickle"])
def test_copies_after_a_training_step(how: str) -> None:
    model = adapted("bert")
    train_step(model, "bert")
    model(**batch("bert"))  # a forward with an unused loss
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


@pytest.mark.compat("Precision", "bfloat16 and float16 models, adapter in float32 or alike")
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
    got = logits(model.eval(), kind, dtype).float()
    torch.testing.assert_close(got, logits(reference.eval(), kind), rtol=0.1, atol=0.1)


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
