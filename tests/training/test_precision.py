"""Whole models in mixed and low precision: errors of gradients are no larger than those of plain PyTorch.

For each setting three gradients are compared on equal parameters: the exact one in float64; plain PyTorch in the
setting's dtypes, with the terms added by hand; and that of a training step, with kernels and the hooks on the model.
"""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import fvae_kernels as fk
from fvae_kernels import testing
from tests.helpers.precisions import BF16, F16, Setting, adapted, inputs_for
from tests.helpers.total_loss import by_hand

SETTINGS = {
    "autocast bfloat16": Setting(autocast=BF16),
    "autocast float16 and GradScaler": Setting(autocast=F16, scale=1024.0),
    "bfloat16 with float32 adapters": Setting(base=BF16),
    "float32 with bfloat16 adapters": Setting(adapter=BF16),
    "bfloat16": Setting(base=BF16, adapter=BF16),
}


pytestmark = pytest.mark.usefixtures("fixed_noise")


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    assert all(g is not None and g.norm() > 0 for g in found.values()), "a gradient of zero proves nothing"
    return found


def total_by_hand(model: nn.Module, inputs: dict[str, Tensor], setting: Setting | None) -> dict[str, Tensor]:
    """Gradient of the total loss in plain PyTorch."""
    precision = nullcontext() if setting is None else setting.precision()
    with precision, fk.use_backend("reference"), by_hand(model) as terms:
        task = model(**inputs).loss
    scale = 1.0 if setting is None or setting.scale is None else setting.scale
    (scale * (task + torch.stack(terms).sum())).backward()
    return {name: grad / scale for name, grad in gradients(model).items()}


def exact(model: nn.Module, style: str) -> dict[str, Tensor]:
    """Gradient in float64, from the same parameter values."""
    model = copy.deepcopy(model).double()
    return total_by_hand(model, inputs_for(style, torch.float64), None)


def step(model: nn.Module, inputs: dict[str, Tensor], setting: Setting) -> dict[str, Tensor]:
    """Gradient of a step as a training loop makes it."""
    with setting.precision():
        loss = model(**inputs).loss
    if setting.scale is None:
        loss.backward()
        return gradients(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=setting.scale)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == setting.scale, "the step was left out"
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    return gradients(model)


CASES = [(style, name, None) for style in ("peft", "replaced") for name in SETTINGS]
CASES += [("peft", name, reentrant) for name in SETTINGS for reentrant in (False, True)]


@pytest.mark.compat("Precision", "autocast")
@pytest.mark.compat("Precision", "bfloat16 and float16 models, adapter in float32 or alike")
@pytest.mark.parametrize(("style", "name", "checkpoint"), CASES)
def test_no_worse_than_plain_pytorch(style: str, name: str, checkpoint: bool | None) -> None:
    setting = SETTINGS[name]
    model, inputs = adapted(style, setting), inputs_for(style, setting.base)
    truth, plain = exact(model, style), total_by_hand(model, inputs, setting)
    if checkpoint is not None:
        inner = model.base_model.model if style == "peft" else model
        inner.gradient_checkpointing_enable({"use_reentrant": checkpoint})
        inner.enable_input_require_grads()
    assert_no_worse(step(model, inputs, setting), plain, truth)


def assert_no_worse(actual: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """Compare the gradient as a whole; and no tensor may lack a part.

    A layer's y is rounded once, not twice as in plain PyTorch. Everything after it is then rounded differently, and
    for single tensors chance decides, since their sums cancel to different degrees.
    """
    everything = ({"all": torch.cat([g.double().flatten() for g in side.values()])} for side in (actual, plain, truth))
    testing.assert_no_worse(*everything)
    for name, wanted in truth.items():
        ours, baseline = ((side[name] - wanted).norm() for side in (actual, plain))
        assert ours <= 2 * baseline + 0.05 * wanted.norm(), f"{name}: error {ours:.1e}, plain PyTorch {baseline:.1e}"


def test_compiled_as_one_graph_is_eager() -> None:
    """A whole tiny model without PEFT, its loss inside, under autocast."""
    setting = SETTINGS["autocast bfloat16"]
    model, inputs = adapted("replaced", setting), inputs_for("replaced", setting.base)
    with setting.precision():
        eager = model(**inputs).loss
    eager.backward()
    expected = gradients(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with setting.precision():
        loss = compiled(**inputs).loss
    loss.backward()
    torch.testing.assert_close(loss, eager, rtol=1e-5, atol=0)
    testing.assert_same(gradients(model), expected, rtol=0.02)
    torch.compiler.reset()
