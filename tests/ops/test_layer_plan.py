"""Plans of a layer: a planned step equals the general one bit for bit, and a plan notices every change."""

import copy
import gc
import os
import pickle
import traceback
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

import fvae_kernels as fk
from fvae_kernels import testing
from fvae_kernels.nn.adapter import FVAEAdapter
from fvae_kernels.ops._backend import interpreting, why_missing
from tests.helpers.recipe import SMALL_NETWORKS

OP = "layer"
D, M, R = 12, 10, 3
needs_cpp = pytest.mark.skipif(why_missing("cpp") is not None, reason="the C++ kernels are not built")


def made(dtype=torch.float32, device="cpu", **options):
    torch.manual_seed(0)
    config = fk.FVAEConfig(rank=R, **{**SMALL_NETWORKS, "kl_weight": 2.0, **options})
    adapter = FVAEAdapter(D, M, config, dtype=dtype, device=device).train()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return adapter


def step(adapter, backend, N=5, mask=None, planned=True, needs_x=True):
    """y, loss and all gradients of one step, and True if a plan ran it."""
    torch.manual_seed(1)
    B = adapter.B
    x = torch.randn(N, D, dtype=B.dtype, device=B.device, requires_grad=needs_x)
    base = torch.randn(N, M, dtype=B.dtype, device=B.device)
    with fk.use_backend(backend):
        found = adapter.planned(x, base, mask, None) if planned else None
        noise = None if planned or backend == "triton" else (adapter.draw_noise(x), adapter.draw_noise(x))
        y, terms = found or adapter(x, noise, mask, base)
        leaves = [p for p in (x, *adapter.parameters()) if p.requires_grad]
        grads = torch.autograd.grad((y, terms.loss), leaves, (torch.ones_like(y), torch.ones_like(terms.loss)))
    return [y.detach(), *(term.detach() for term in terms), *grads], found is not None


def assert_as_general(adapter, backend, **options):
    planned, by_plan = step(adapter, backend, **options)
    general, _ = step(adapter, backend, planned=False, **options)
    assert by_plan
    assert len(planned) == len(general)
    assert all(torch.equal(one, other) for one, other in zip(planned, general, strict=True))


@pytest.fixture
def backend_with_plans(backend):
    if backend == "reference":
        pytest.skip("plain PyTorch has no plans")
    return backend


def test_steps_are_those_without_plans(backend_with_plans, monkeypatch, device):
    results = []
    for planned in (True, False):
        with monkeypatch.context() as patch, fk.use_backend(backend_with_plans):
            if not planned:
                patch.setattr(FVAEAdapter, "planned", lambda *_: None)
            torch.manual_seed(0)
            config = fk.FVAEConfig(rank=R, **{**SMALL_NETWORKS, "decoder_hidden": (), "dropout": 0.2, "kl_weight": 2.0})
            layer = fk.FusedFVAELinear.from_linear(nn.Linear(D, M, device=device), config).train()
            optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], 1e-2)
            x, target = torch.randn(3, D, device=device), torch.randn(3, M, device=device)
            for _ in range(5 if interpreting() else 50):  # interpreted, a step takes more than a second
                optimizer.zero_grad()
                fk.attach_aux_loss(layer, (layer(x) - target).square().mean()).backward()
                optimizer.step()
            results.append([p.detach() for p in layer.parameters()])
            assert (layer.adapter.plans.plan is not None) == planned
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def replaced(adapter):
    adapter.B = nn.Parameter(adapter.B.detach() * 2)


def new_data(adapter):
    adapter.B.data = adapter.B.data * 2


def other_scale(adapter):
    adapter.set_scale(3.0)


def no_dropout(adapter):
    adapter.eval()


def other_weights(adapter):
    adapter.training_config = replace(adapter.training_config, kl_weight=5.0, gamma_weight=0.5)


def bounded(adapter):
    adapter.bound_noise(-3.0)


def half_as_wide(adapter):
    adapter.to(torch.float64)


def frozen(adapter):
    adapter.decoder_scale.requires_grad_(False)
    adapter.encoder1_mean_weight.requires_grad_(False)


CHANGES = (replaced, new_data, half_as_wide, frozen)
CHANGES_OF_OPTIONS = (other_scale, no_dropout, other_weights, bounded)  # noticed before any backend is asked


@pytest.mark.parametrize(
    "change", [*CHANGES, *(pytest.param(change, marks=pytest.mark.not_interpreted) for change in CHANGES_OF_OPTIONS)]
)
def test_a_plan_notices(change, backend_with_plans, device):
    adapter = made(dropout=0.3, device=device)
    before, _ = step(adapter, backend_with_plans)
    change(adapter)
    assert_as_general(adapter, backend_with_plans)
    after, _ = step(adapter, backend_with_plans)
    same = len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not same, "the change had no effect, so that a stale plan would pass"


def test_weights_with_gaps_take_the_general_road(backend_with_plans, device):
    adapter = made(device=device)
    expected, _ = step(adapter, backend_with_plans)
    weight = adapter.encoder1_hidden0_weight
    weight.data = weight.data.t().contiguous().t()
    actual, by_plan = step(adapter, backend_with_plans)
    assert not by_plan
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def test_hooks_and_another_forward_take_the_general_road(backend_with_plans, device):
    adapter, seen = made(device=device), []
    step(adapter, backend_with_plans)
    handle = adapter.register_forward_hook(lambda *_: seen.append("hook"))
    _, by_plan = step(adapter, backend_with_plans)
    assert not by_plan
    handle.remove()
    adapter.forward = adapter.forward
    _, by_plan = step(adapter, backend_with_plans)
    assert not by_plan
    del adapter.forward
    _, by_plan = step(adapter, backend_with_plans)
    assert by_plan


def test_other_tokens_masks_and_needs_share_a_plan(backend_with_plans, device):
    adapter = made(device=device)
    step(adapter, backend_with_plans)
    plan = adapter.plans.plan
    for options in (
        {"N": 9},
        {"N": 1},
        {"N": 5, "mask": torch.tensor([True, False, True, True, False], device=device)},
        {"needs_x": False},
    ):
        assert_as_general(adapter, backend_with_plans, **options)
        assert adapter.plans.plan is plan


class Marked(torch.Tensor):
    """A subclass, which may want to see each operation."""


INPUTS = {
    "x's dtype": lambda x, base: (x.bfloat16(), base),
    "features of x": lambda x, base: (x[:, :-1], base),
    "x's class": lambda x, base: (x.as_subclass(Marked), base),
    "base's dtype": lambda x, base: (x, base.bfloat16()),
    "outputs of base": lambda x, base: (x, base[:, :-1]),
    "tokens of base": lambda x, base: (x, base[1:]),
    "base's class": lambda x, base: (x, base.as_subclass(Marked)),
}


@pytest.mark.parametrize("change", INPUTS.values(), ids=INPUTS)
def test_a_plan_serves_no_other_inputs(change, backend_with_plans, device):
    adapter = made(device=device)
    step(adapter, backend_with_plans)
    plans = adapter.plans
    x, base = torch.randn(5, D, device=device), torch.randn(5, M, device=device)
    order = [adapter._parameters.get(name) for name in adapter._order]

    def fitting(x, base):
        return plans.fitting(order, x, adapter.training_config, adapter.config.dropout, None, base)

    with fk.use_backend(backend_with_plans):
        assert fitting(x, base) is plans.plan is not None
        assert fitting(*change(x, base)) is None
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            assert fitting(x, base) is None


def test_a_mask_that_does_not_fit_is_refused_as_ever(backend_with_plans, device):
    adapter = made(device=device)
    step(adapter, backend_with_plans)
    with pytest.raises(ValueError, match="mask has shape"):
        step(adapter, backend_with_plans, mask=torch.ones(4, dtype=torch.bool, device=device))


def test_another_weight_of_the_loss_is_noticed(backend_with_plans, device):
    """Its gradient is a tensor that the plan keeps: one weight must not enter with another's."""
    adapter, weights = made(device=device), (0.5, 2.0, 2.0, 0.5)
    x, base = torch.randn(5, D, device=device), torch.randn(5, M, device=device)
    found = []
    with fk.use_backend(backend_with_plans):
        for weight in weights:
            torch.manual_seed(1)
            y, _ = adapter.planned(x, base, None, lambda constant, weight=weight: constant(weight))
            (0 * y).sum().backward()
            found.append(adapter.decoder_scale.grad / weight)
            adapter.zero_grad()
    assert all(torch.equal(one, found[0]) for one in found)
    assert found[0].abs().max() > 0


@needs_cpp
def test_another_backend_and_a_dispatch_mode_take_no_old_plan(device):
    adapter = made()
    step(adapter, "cpp")
    found, by_plan = step(adapter, "reference")
    assert not by_plan
    step(adapter, "cpp")
    with testing.Calls() as calls:
        _, by_plan = step(adapter, "cpp")
    assert not by_plan
    assert calls.count("layer_fwd", "layer_bwd") == 2, "a mode sees the operators"
    assert found


def test_hooks_of_saved_tensors_give_backward_other_tensors(backend_with_plans, device):
    """Parameters come back as copies at other addresses, as with offloaded activations."""
    adapter = made(device=device)
    expected, _ = step(adapter, backend_with_plans)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        actual, by_plan = step(adapter, backend_with_plans)
    assert by_plan
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def test_copies_and_files_carry_no_plan(backend_with_plans, device):
    adapter = made(device=device)
    expected, _ = step(adapter, backend_with_plans)
    for twin in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
        assert twin.plans.plan is None
        actual, _ = step(twin, backend_with_plans)
        assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def test_a_plan_keeps_no_model_alive(backend_with_plans, device):
    adapter = made(device=device)
    step(adapter, backend_with_plans)
    gone = weakref.ref(adapter), weakref.ref(adapter.B)
    del adapter
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


@needs_cpp
@pytest.mark.skipif(interpreting(), reason="the interpreter starts threads, which a fork does not copy")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_goes_on():
    adapter = made()
    expected, _ = step(adapter, "cpp")
    child = os.fork()
    if child == 0:
        same = False
        try:  # whatever happens, this process must not go on as pytest
            actual, by_plan = step(adapter, "cpp")
            same = by_plan and all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(not same)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")
def test_an_override_of_blocks_is_noticed(backend_with_plans):
    if backend_with_plans != "triton":
        pytest.skip("C++ has no tables")
    from tests.tools.triton.meter import Meter

    adapter, grids = made(), []
    for blocks in (16, 32):
        with fk.tuning.override("layer_fwd", BLOCK_N=blocks), Meter() as meter:
            step(adapter, "triton", N=40)
        grids.append(next(one.grid[0] for one in meter.launches if one.name == "layer_fwd_kernel"))
    assert grids == [3, 2]


def test_double_backward_raises(backend_with_plans, device):
    adapter = made(device=device)
    x = torch.randn(4, D, device=device, requires_grad=True)
    with fk.use_backend(backend_with_plans):
        y, _ = adapter.planned(x, torch.randn(4, M, device=device), None, None)
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()
