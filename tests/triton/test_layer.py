"""What one adapted layer costs on a GPU, and the normals that its kernels make: interpreted and metered.

`test_interpreted.py` starts it.
"""

import math
import re

import pytest
import torch

import fvae_kernels as fk
from fvae_kernels import testing
from fvae_kernels.nn.explain import explain
from fvae_kernels.ops._backend import interpreting
from tests.helpers.layer_inputs import layer_inputs, raw_layer, run_layer
from tests.helpers.philox import philox

if not interpreting():
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl

from fvae_kernels._triton import _random, tables
from fvae_kernels._triton.launchers import LAUNCHERS
from fvae_kernels._triton.layer.forward import layer_mean_kernel
from fvae_kernels._triton.layer.prepared import numbers_of
from fvae_kernels.ops._layer_inputs import Options
from tests.tools.triton.meter import Meter
from tests.tools.triton.strict import strict

# cost


def recipe(D, sizes, rank):
    config = fk.FVAEConfig.preset("paper", rank=rank, decoder_hidden=sizes)
    return fk.FusedFVAELinear.from_linear(torch.nn.Linear(D, D), config).train()


def test_launches_of_a_training_step():
    """What they move: test_traffic.py."""
    fused, x = recipe(48, (12, 20), 5), torch.randn(40, 48, requires_grad=True)
    with fk.use_backend("triton"), testing.Calls() as calls, Meter() as meter:
        y, terms = fused.forward_with_terms(x)
        (y.square().sum() + terms.loss).backward()
    names = [launch.name.removesuffix("_kernel") for launch in meter.launches]
    assert names == ["layer_fwd", "layer_mean", "layer_bwd", "layer_grads", "layer_reduce"]
    drawn = calls.count("randint", "randn", "rand", "normal_")
    assert (drawn, calls.count("layer_fwd", "layer_bwd")) == (1, 2)


def test_gradients_that_are_not_needed_cost_nothing():
    _, *inputs = raw_layer((20,), 24, 20, dtype=torch.float32)
    state = torch.randn(20, 22)
    grads = [torch.randn(20, 20), torch.tensor(0.5), None, None, None]
    launches = {}
    for needed in range(5):
        with strict(), Meter() as meter:
            LAUNCHERS["layer_bwd"](*grads, *inputs, state, False, [i == needed for i in range(5)])
        launches[needed] = {launch.name: launch for launch in meter.launches}
    assert "layer_bwd_kernel" not in launches[4], "B needs no decoder"
    assert launches[3]["layer_bwd_kernel"].stored.keys() == {"inputs_ptr"}, (
        "scale needs no way back through the decoder"
    )
    assert not {"layer.x", "grad_y_ptr"} & launches[3]["layer_bwd_kernel"].loaded.keys()
    assert not {"grad_y_ptr", "grad_state_ptr"} & launches[3]["layer_grads_kernel"].loaded.keys()
    assert "grad_y_ptr" not in launches[2]["layer_bwd_kernel"].loaded
    assert launches[0]["layer_grads_kernel"].stored.keys() == {"grad_x_ptr"}


def test_terms_of_more_programs_and_features_than_one_read_takes():
    """The kernel alone, for the forward of so many tokens takes too long here."""
    P, D = (2 * tables.MEAN[name] + 3 for name in ("BLOCK_P", "BLOCK_D"))
    N, R, kept = 16 * P, 7, torch.tensor(30_000)
    statistics, scale, table = torch.rand(P, 16), torch.rand(D) + 0.5, torch.rand(3, 12, dtype=torch.float64)
    options = Options(1, 0.0, False, 1.0, 1.5, -20.0, 20.0, tuple(table.flatten().tolist()), None)
    terms, numbers = torch.empty(4, dtype=torch.float64), numbers_of(options)
    with strict(), Meter() as meter:
        weights = numbers.tables.named
        layer_mean_kernel[(1,)](statistics, scale, *weights, kept, terms, P, N, D, R, MASKED=True, **tables.MEAN)
    assert (meter.launches[0].outside, meter.launches[0].races) == ([], [])
    means = statistics.double().sum(0)[:12] / kept
    nll = means[1] / 2 + scale.double().log().sum() + D * math.log(2 * math.pi) / 2
    means[[0, 1, 4, 9]] = torch.stack([torch.ones_like(nll), nll, means[4] + R, means[9] + R])  # var1, var2
    loss, kl, gamma = table @ means
    torch.testing.assert_close(terms, torch.stack((loss, nll, kl, gamma)), rtol=1e-12, atol=0)


# normals


@triton.jit
def draw_kernel(seed_ptr, first_ptr, second_ptr, R: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    rows, latent = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, R)
    first, second = _random.normals(seed_ptr, rows, latent, R, ACC)
    tl.store(first_ptr + rows[:, None] * R + latent[None, :], first)
    tl.store(second_ptr + rows[:, None] * R + latent[None, :], second)


def draw(seed, N=1 << 15, R=16, dtype=torch.float32):
    """Both sides [N, R]."""
    pair, block = [torch.empty(N, R, dtype=dtype) for _ in range(2)], 1 << 13
    acc = tl.float64 if dtype == torch.float64 else tl.float32
    with strict():
        draw_kernel[(N // block,)](torch.tensor(seed), *pair, R, acc, block)
    return [side.double() for side in pair]


def test_moments_and_tails_of_the_normals():
    for side in draw(2**40 + 7):
        n = side.numel()
        assert side.isfinite().all()
        for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
            assert abs(side.pow(power).mean().item() - moment) < 5 * math.sqrt(variance / n), power
        for limit in (0.5, 1.0, 2.0, 3.0, 4.0):
            p = math.erfc(limit / math.sqrt(2))
            for tail in (side > limit, side < -limit):
                assert abs(tail.double().mean().item() - p / 2) < 5 * math.sqrt(p / 2 / n), limit


def test_both_sides_and_neighbours_and_seeds_are_independent():
    first, second = draw(3)
    other, _ = draw(4)
    columns = [first[:-1], second[:-1], first[1:], second[1:], other[:-1]]
    for table in (torch.cat(columns, 1), torch.cat(columns, 1).square()):
        correlation = torch.corrcoef(table.t()) - torch.eye(table.shape[1], dtype=torch.float64)
        assert correlation.abs().max() < 6 / math.sqrt(len(table))


def test_normals_follow_philox_and_box_muller():
    """Known answer of Philox at seed 0, position 0 of another stream, and the angle to the last digits."""
    first, second = draw(9, 1 << 13, 16, torch.float64)
    for token, entry in ((0, 0), (1, 5), (4000, 15)):
        a, b, *_ = philox((token * 16 + entry, 0, 1 << 31, 0), (9, 0))
        radius, angle = math.sqrt(-2 * math.log((a + 0.5) / 2**32)), 2 * math.pi * b / 2**32
        assert abs(first[token, entry].item() - radius * math.cos(angle)) < 1e-6
        assert abs(second[token, entry].item() - radius * math.sin(angle)) < 1e-6


def test_backward_makes_the_noise_of_forward():
    """d y / d B is s z_1: backward's samples, against forward's output."""
    inputs = layer_inputs((9,), rank=3, M=3) | {"noise": None}
    inputs["B"] = torch.eye(3, dtype=torch.float64, requires_grad=True)
    y, *_ = run_layer(**inputs, dropout=0.3, backend="triton")
    weights = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, inputs["B"], weights)
    torch.testing.assert_close(grad, weights.t() @ y.detach(), rtol=1e-12, atol=1e-12)


def test_compiles_in_one_graph_through_the_module():
    fused, x = recipe(10, (6,), 3).double(), torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    results = []
    for module in (
        torch.compile(fused.forward_with_terms, fullgraph=True, backend="aot_eager"),
        fused.forward_with_terms,
    ):
        torch.manual_seed(3)
        with fk.use_backend("triton"):
            y, terms = module(x)
            grads = torch.autograd.grad(y.square().sum() + terms.loss, [x, *fused.adapter.parameters()])
        results.append([y, *terms, *grads])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


# what is not covered


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"decoder_hidden": (300,)}, "a hidden layer of more than 256 units"),
        ({"rank": 257}, "a rank above 256"),
        ({"decoder_hidden": (200, 100, 60, 256, 65)}, "of more than 768 units together.*200, 100, 60, 256, 65"),
    ],
    ids=str,
)
def test_too_wide_is_said(options, why):
    layer = fk.FusedFVAELinear.from_linear(torch.nn.Linear(6, 5), fk.FVAEConfig.preset("paper", **options)).train()
    with fk.use_backend("triton"):
        assert re.search(why, explain(layer))
        with pytest.raises(fk.BackendUnavailable, match=why):
            layer(torch.randn(3, 6))
