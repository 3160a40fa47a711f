"""Whole models: torch.export of the inference path, and bytes that a step saves for backward."""

import io
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import fvae_kernels as fk
from fvae_kernels.ops._backend import why_missing
from tests.helpers.precisions import Setting, adapted, inputs_for
from tests.helpers.recipe import SMALL_NETWORKS
from tests.helpers.tiny_models import build

# Export of the inference path


def served(style: str, folder: Path) -> nn.Module:
    """A model in eval mode whose adapters change the output."""
    model = adapted("replaced" if style == "replaced" else "peft", Setting())
    if style == "inference only":
        fk.export_for_inference(model, str(folder))
        model = peft.PeftModel.from_pretrained(build("bert"), str(folder))
    return model.eval()


@pytest.mark.compat("Training loops", "`torch.export` of the inference path")
@pytest.mark.parametrize("style", ["peft", "replaced", "inference only"])
def test_exported_is_eager(style: str, tmp_path: Path) -> None:
    model = served(style, tmp_path)
    inputs = inputs_for("replaced" if style == "replaced" else "peft", torch.float32)
    inputs.pop("labels")
    (name,) = inputs
    dynamic = {name: {0: torch.export.Dim("samples", min=1, max=64)}}
    program = torch.export.export(model, (), inputs, dynamic_shapes=dynamic, strict=False)
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [operator for operator in operators if "fvae" in operator], "it needs no kernel of ours"
    assert not [operator for operator in operators if "rand" in operator], "it draws no noise"
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for size in (1, 2):
        part = {name: inputs[name][:size]}
        with torch.no_grad():
            torch.testing.assert_close(loaded(**part).logits, model(**part).logits, rtol=1e-5, atol=1e-6)


def test_one_layer_exported_is_eager() -> None:
    layer = fk.FusedFVAELinear.from_linear(nn.Linear(24, 12), fk.FVAEConfig(rank=3, **SMALL_NETWORKS)).eval()
    nn.init.normal_(layer.adapter.encoder1_mean_weight)
    x = torch.randn(2, 5, 24)
    program = torch.export.export(layer, (x,))
    assert torch.equal(program.module()(x), layer(x))
    assert not torch.equal(layer(x), layer.base_layer(x))


# Bytes that a training step saves for backward


def kept(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Bytes that the forward saves apart from parameters; each storage counts once."""
    storages: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs).loss.backward()
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers(), *inputs.values()]}
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in own)


def bytes_per_token_and_layer(backend: str) -> float:
    """What an adapted ViT saves beyond the ViT without adapters, at the recipe, without the layers' inputs."""
    samples, tokens, layers = 32, 32 * 5, 4
    inputs = {"pixel_values": torch.randn(samples, 3, 8, 8), "labels": torch.zeros(samples, dtype=torch.long)}
    counts = []
    for adapters in (False, True):
        model = build("vit", hidden_size=64)
        if adapters:
            assert (
                len(fk.replace_linears(model, fk.FVAEConfig.preset("paper"), target_modules=["q_proj", "v_proj"]))
                == layers
            )
        model.requires_grad_(True)  # so that the plain model also saves the inputs of its layers
        with fk.use_backend(backend):
            counts.append(kept(model.train(), inputs))
    return (counts[1] - counts[0]) / (tokens * layers)


BUDGET = 1.2e6 / 1576  # bytes per token and adapted layer, whatever the width


@pytest.mark.skipif(why_missing("cpp") is not None, reason="needs the C++ kernels")
def test_a_step_keeps_no_more_than_its_budget() -> None:
    assert 0 < bytes_per_token_and_layer("cpp") <= BUDGET


def test_the_budget_tells_plain_pytorch_from_kernels() -> None:
    assert bytes_per_token_and_layer("reference") > 2 * BUDGET
