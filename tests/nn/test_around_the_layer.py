"""What others do with the modules around an adapter: accelerate's offloading, PyTorch's fast path of encoders."""

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import fvae_kernels as fk
from tests.helpers.recipe import SMALL_NETWORKS
from tests.helpers.tiny_models import TARGETS, batch, build

CONFIG = fk.FVAEConfig(rank=3, **SMALL_NETWORKS)


def adapted(model: nn.Module, targets: Any) -> nn.Module:
    fk.replace_linears(model, CONFIG, targets)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".adapter." in name:
                p.add_(0.3 * torch.randn_like(p))
    return model.eval()


@pytest.mark.parametrize("how", ["peft", "replaced"])
def test_offloaded_weights_serve(how: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model = build("bert")
    if how == "peft":
        config = fk.FVAELoraConfig(target_modules=TARGETS["bert"], r=3, init_weights=False, **SMALL_NETWORKS)
        model = peft.get_peft_model(model, config).eval()
    else:
        adapted(model, TARGETS["bert"])
    inputs = batch("bert")
    with torch.no_grad():
        expected = model(**inputs).logits
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert any(p.is_meta for p in model.parameters())
        assert torch.equal(model(**inputs).logits, expected)


def encoder(kind: str) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    if kind == "layer":
        return layer
    return nn.TransformerEncoder(layer, 2) if kind == "encoder" else nn.Sequential(nn.TransformerEncoder(layer, 2))


@pytest.mark.parametrize("kind", ["layer", "encoder", "encoder inside"])
@pytest.mark.parametrize("targets", [["linear1"], ["linear1", "linear2"]], ids=["one", "two"])
def test_the_fast_path_of_encoders_does_not_pass_the_adapters_by(kind: str, targets: list[str]) -> None:
    torch.manual_seed(0)
    model, x = encoder(kind).eval(), torch.randn(2, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    masks: dict[str, Tensor] = {} if kind == "encoder inside" else {"src_key_padding_mask": padding}
    with torch.no_grad():
        base = model(x, **masks)
        adapted(model, targets)
        found = model(x, **masks)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            expected = model(x, **masks)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    kept = ~padding if masks else torch.ones_like(padding)
    torch.testing.assert_close(found[kept], expected[kept])
    assert not torch.allclose(found[kept], base[kept], atol=1e-3)
