"""Adapters beside quantised base layers: gradients, what is trained, files, and the merge that is refused.

Each case runs if its package is installed. Packages in a separate folder of the environment are tested in another
process; bitsandbytes, more than 100 MB, is not among them.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import fvae_kernels as fk
from fvae_kernels.nn.quantised import is_quantised
from fvae_kernels.peft import FVAELoraLinear
from tests import ROOT
from tests.helpers.recipe import SMALL_NETWORKS
from tests.helpers.tiny_models import batch, build
from tests.helpers.total_loss import fix_noise

pytestmark = pytest.mark.filterwarnings("ignore:.*cast from torch.float32 to float16:UserWarning")

APART = Path(sys.prefix) / "quantised"
OPTIONS = {**SMALL_NETWORKS, "kl_weight": 2.0, "loss_weight": 0.01}
TARGETS = ["query", "value"]
Quantise = Callable[[nn.Linear], nn.Module]


def torchao_int8(linear: nn.Linear) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(linear, Int8WeightOnlyConfig())
    return linear


def hqq_4bit(linear: nn.Linear) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    return HQQLinear(linear, BaseQuantizeConfig(nbits=4, group_size=8), compute_dtype=torch.float32, device="cpu")


def bitsandbytes_8bit(linear: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear8bitLt

    return _loaded(Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False), linear)


def bitsandbytes_4bit(linear: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear4bit

    return _loaded(Linear4bit(linear.in_features, linear.out_features, compute_dtype=torch.float32), linear)


def _loaded(layer: nn.Module, linear: nn.Linear) -> nn.Module:
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")  # which quantises


# and how far the gradients may be from those on the weights that they stand for; 8 bits round the activations too
KINDS: dict[str, tuple[Quantise, float]] = {
    "torchao": (torchao_int8, 1e-4),
    "hqq": (hqq_4bit, 1e-4),
    "bitsandbytes-4bit": (bitsandbytes_4bit, 1e-4),
    "bitsandbytes-8bit": (bitsandbytes_8bit, 0.05),
}


INSTALLED = [kind for kind in KINDS if importlib.util.find_spec(kind.partition("-")[0]) is not None]


@pytest.fixture(params=INSTALLED)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    fix_noise(monkeypatch)
    return request.param


def quantised(kind: str) -> nn.Module:
    """A tiny BERT whose blocks are quantised, and whose head is not."""
    model = build("bert", hidden_size=64, intermediate_size=64)
    for name, module in list(model.bert.encoder.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.bert.encoder.get_submodule(parent), child, KINDS[kind][0](module))
    return model


def dequantised(kind: str) -> nn.Module:
    """The same model in float32: each layer's weight is what the quantised layer multiplies with."""
    model, rounded = build("bert", hidden_size=64, intermediate_size=64), quantised(kind).eval()
    with torch.no_grad():
        for name, module in model.bert.encoder.named_modules():
            if isinstance(module, nn.Linear):
                layer: Any = rounded.bert.encoder.get_submodule(name)
                rows = torch.eye(module.in_features).requires_grad_(kind == "bitsandbytes-4bit")
                module.weight.copy_((layer(rows) - module.bias).T)
    return model


def adapted(model: nn.Module, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    config = fk.FVAELoraConfig(
        task_type="SEQ_CLS", r=3, target_modules=TARGETS, init_weights=False, **{**OPTIONS, **options}
    )
    return peft.get_peft_model(model, config).train()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(**batch("bert")).logits


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_gradients_are_those_on_the_weights_it_stands_for(kind: str) -> None:
    grads = []
    for base in (dequantised(kind), quantised(kind)):
        model = adapted(base)
        model(**batch("bert")).loss.backward()
        grads.append({name: p.grad for name, p in trained(model).items()})
    assert grads[0].keys() == grads[1].keys()
    for name, wanted in grads[0].items():
        assert wanted.norm() > 0, f"{name}: a gradient of zero proves nothing"
        error = (grads[1][name] - wanted).norm() / wanted.norm()
        assert error < KINDS[kind][1], f"{name}: relative error {error:.1e}"


def test_trains_the_adapter_alone_saves_and_loads(kind: str, tmp_path: Path) -> None:
    model = adapted(quantised(kind))
    assert all("fvae_adapter" in name or "modules_to_save" in name for name in trained(model))
    layers = [module for module in model.modules() if isinstance(module, FVAELoraLinear)]
    assert len(layers) == 4
    assert all(is_quantised(layer.get_base_layer()) for layer in layers)
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    before = logits(adapted(quantised(kind)))  # on CPUs with bfloat16, 4 bits of bitsandbytes do not train after eval
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.5)
    for _ in range(2):
        model.train()(**batch("bert")).loss.backward()
        optimizer.step()
    after = logits(model)
    assert (after - before).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(quantised(kind), str(tmp_path))
    torch.testing.assert_close(logits(loaded), after, rtol=1e-4, atol=1e-5)
    unloaded = loaded.unload()
    assert is_quantised(unloaded.bert.encoder.layer[0].attention.self.query)
    with torch.no_grad():
        hidden = [model.eval().bert(batch("bert")["input_ids"]).pooler_output for model in (unloaded, quantised(kind))]
    torch.testing.assert_close(*hidden, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload", "one layer", "without PEFT"])
def test_merging_is_refused_and_changes_nothing(kind: str, how: str) -> None:
    if how == "without PEFT":
        model = quantised(kind)
        fk.replace_linears(model, fk.FVAEConfig(**{**OPTIONS, "encoder_hidden": ()}), target_modules=TARGETS)
    else:
        model = adapted(quantised(kind), encoder_hidden=())
    before = logits(model)
    (layer, *_) = (m for m in model.modules() if isinstance(m, (FVAELoraLinear, fk.FusedFVAELinear)))
    merge = getattr(model, how, layer.merge)
    with pytest.raises(ValueError, match="cannot merge into a quantised layer"):
        merge()
    assert torch.equal(logits(model), before)


def test_without_peft(kind: str) -> None:
    fresh, model = quantised(kind), quantised(kind)
    for each in (fresh, model):
        assert len(fk.replace_linears(each, fk.FVAEConfig(rank=3, **OPTIONS), target_modules=TARGETS)) == 4
    torch.testing.assert_close(logits(fresh), logits(quantised(kind)), rtol=1e-4, atol=1e-5)
    model.train()(**batch("bert")).loss.backward()
    assert trained(model)
    assert all(p.grad is not None and ".adapter." in name for name, p in trained(model).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_of_floats_is_not_quantised(dtype: torch.dtype) -> None:
    assert not is_quantised(nn.Linear(2, 3, dtype=dtype))


@pytest.mark.compat(
    "Precision", "quantised base layers: torchao int8, HQQ; bitsandbytes 8 and 4 bit where it is installed"
)
def test_with_the_packages_that_are_kept_apart() -> None:
    if not APART.is_dir() or str(APART) in sys.path:
        pytest.skip(f"there is no {APART}, or this is the process that has it")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(APART), str(ROOT)))}
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert all(f"test_without_peft[{kind}] PASSED" in done.stdout for kind in ("torchao", "hqq"))
