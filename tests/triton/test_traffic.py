"""The closed form of the fused layer's traffic, which cost table and roofline use, against the metered kernels.

`test_interpreted.py` starts it.
"""

import pytest
import torch

import fvae_kernels as fk
from benchmarks import fused
from benchmarks.cost import Cost, Saved
from fvae_kernels.ops._backend import interpreting

if not interpreting():
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from tests.tools.triton.meter import Meter
from tests.tools.triton.strict import strict

CASES = [
    ((70, 40, 24), {"rank": 5, "encoder_hidden": (7,), "decoder_hidden": (36, 33, 40)}),
    ((33, 17, 50), {"rank": 3, "encoder_hidden": (5,), "decoder_hidden": (6, 4)}),
    ((40, 33, 17), {"rank": 3, "encoder_hidden": (), "decoder_hidden": ()}),
    ((33, 17, 50), {"rank": 16, "encoder_hidden": (18, 20), "decoder_hidden": (33,), "fusion": "average"}),
]


def metered(N, D, M, config):
    """Launches, operators and saved bytes of one forward and backward."""
    module = fk.FusedFVAELinear.from_linear(torch.nn.Linear(D, M), config).train()
    x = torch.randn(N, D, requires_grad=True)
    parameters = [p for p in module.parameters() if p.requires_grad]
    with strict(), Meter() as meter, Cost() as cost, fk.use_backend("triton"):
        with Saved([x, *module.parameters()]) as saved:
            y, terms = module.forward_with_terms(x)
        torch.autograd.grad((y, terms.loss), (x, *parameters), (torch.randn_like(y), torch.ones(())))
    return {one.name.removesuffix("_kernel"): one for one in meter.launches}, cost.operators, saved.bytes


@pytest.mark.parametrize(("shape", "options"), CASES, ids=str)
def test_bytes_of_every_launch(shape, options):
    layer_of = fused.Layer(*shape, fk.FVAEConfig.preset("paper", **options))
    launched, operators, saved = metered(*shape, layer_of.config)
    expected = {one.name: one.bytes for one in fused.launches(layer_of)}
    drawn = [one.bytes for one in operators if "randint" in one.name]
    assert drawn == [expected.pop("seed")]
    assert {name: one.distinct for name, one in launched.items()} == expected
    assert saved == fused.saved(layer_of)


def test_budget_at_the_recipe():
    """The closed form, which the test above proves: 6 launches with the draw of the seed, and 54 MB."""
    launches = fused.launches(fused.Layer(1576, 768, 768))
    assert len(launches) <= 6
    assert sum(one.bytes for one in launches) <= 54e6


def test_flops_of_every_launch():
    """For sizes that blocks divide: the meter counts masked lanes too."""
    config = fk.FVAEConfig.preset("paper", decoder_hidden=(32, 64, 32))
    launched, _, _ = metered(64, 64, 32, config)
    expected = {one.name: one.flops for one in fused.launches(fused.Layer(64, 64, 32, config)) if one.flops}
    assert {name: one.flops for name, one in launched.items() if one.flops} == expected
