"""Edges of reference.py: masks, no tokens, the clamp of log-variances, detached targets, low precision, gradients."""

import pytest
import torch

from fvae_kernels import reference
from tests.helpers.reference_layers import D, M, N, R, draw, equal, latents, make, run

ALL = [
    {"objective": "fvae", "gamma_weight": (0.7, 0.4)},
    {"objective": "fvae", "gamma_estimator": "monte_carlo"},
    {"objective": "symmetric", "kl_weight": 2.0},
    {"objective": "vae2lat", "fusion": "average"},
]


def gradients(adapter, x, noise, **more):
    x = x.clone().requires_grad_(True)
    y, terms = run(adapter, x, noise, **more)
    leaves = [x, *adapter.parameters()]
    return torch.autograd.grad(terms.loss + 0 * y.sum(), leaves, allow_unused=True, materialize_grads=True)


class TestMask:
    @pytest.mark.parametrize("options", ALL)
    def test_it_drops_tokens_from_the_terms(self, options):
        adapter, x, noise = make(**options)
        mask = torch.rand(2, N) < 0.5
        kept = [t[mask] for t in (x, *noise)]
        y, terms = run(adapter, x, noise, mask=mask)
        y_kept, terms_kept = run(adapter, kept[0], tuple(kept[1:]))
        assert 0 < mask.sum() < mask.numel()
        equal(tuple(terms), tuple(terms_kept))
        equal(y[mask], y_kept)
        equal(y, run(adapter, x, noise)[0])  # y does not depend on the mask
        equal(gradients(adapter, x, noise, mask=mask)[1:], gradients(adapter, kept[0], tuple(kept[1:]))[1:])
        assert not gradients(adapter, x, noise, mask=mask)[0][~mask].any()

    def test_what_it_drops_may_be_nan(self):
        adapter, x, noise = make()
        mask = torch.arange(N).expand(2, N) < 4
        dirty = x.masked_fill(~mask[..., None], float("nan"))
        equal(tuple(run(adapter, dirty, noise, mask=mask)[1]), tuple(run(adapter, x, noise, mask=mask)[1]))

    @pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
    def test_a_mask_of_numbers(self, dtype):
        adapter, x, noise = make()
        mask = torch.rand(2, N) < 0.5
        equal(tuple(run(adapter, x, noise, mask=mask.to(dtype))[1]), tuple(run(adapter, x, noise, mask=mask)[1]))

    def test_all_and_none(self):
        adapter, x, noise = make()
        ones = torch.ones(2, N, dtype=torch.bool)
        equal(tuple(run(adapter, x, noise, mask=ones)[1]), tuple(run(adapter, x, noise)[1]))
        assert [t.item() for t in run(adapter, x, noise, mask=~ones)[1]] == [0.0] * 4
        assert not any(g.any() or g.isnan().any() for g in gradients(adapter, x, noise, mask=~ones))


@pytest.mark.parametrize("options", ALL)
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_no_tokens(options, shape):
    adapter = make(**options)[0]
    x, noise = draw(*shape, D), (draw(*shape, R), draw(*shape, R))
    y, terms = run(adapter, x, noise)
    assert y.shape == (*shape, M)
    assert [t.item() for t in terms] == [0.0] * 4
    assert not any(g.any() or g.isnan().any() for g in gradients(adapter, x, noise))


class TestClamp:
    """logvar acts as if it were clamped to [-20, 20], with zero gradient beyond."""

    LOGVAR = (-1000.0, -20.5, -19.5, 0.0, 19.5, 20.5, 1000.0)

    @pytest.mark.parametrize(
        "function",
        [
            lambda mean, v: reference.gaussian_kl(mean, v, 1.5, 2.0),
            lambda mean, v: reference.expected_log_prior(mean, v, 1.5, 2.0),
            lambda mean, v: reference.divergence(mean, v, mean, 0 * v)[1],
        ],
        ids=["kl", "expected_log_prior", "gamma"],
    )
    def test_terms(self, function):
        logvar = torch.tensor(self.LOGVAR, dtype=torch.float64, requires_grad=True)[:, None]
        mean = draw(len(self.LOGVAR), 1)
        (grad,) = torch.autograd.grad(function(mean, logvar).sum(), logvar)
        equal(function(mean, logvar), function(mean, logvar.clamp(-20, 20)))
        assert grad.isfinite().all()
        assert [bool(g != 0) for g in grad[:, 0]] == [False, False, True, True, True, False, False]

    @pytest.mark.parametrize("value", [-1000.0, -20.5, 20.5, 1000.0])
    def test_layer(self, value):
        adapter, x, noise = make()
        edge = make()[0]
        with torch.no_grad():
            for which, v in ((adapter, value), (edge, max(-20.0, min(20.0, value)))):
                for i in (1, 2):
                    getattr(which, f"encoder{i}_logvar_weight").zero_()
                    getattr(which, f"encoder{i}_logvar_bias").fill_(v)
        equal(run(adapter, x, noise)[0], run(edge, x, noise)[0])
        equal(tuple(run(adapter, x, noise)[1]), tuple(run(edge, x, noise)[1]))
        grads = dict(zip(["x", *dict(adapter.named_parameters())], gradients(adapter, x, noise), strict=True))
        assert all(grad.isfinite().all() for grad in grads.values())
        assert not any(grad.any() for name, grad in grads.items() if "logvar" in name)
        assert grads["encoder1_mean_weight"].any()

    def test_encode_returns_logvar_as_it_is(self):
        x, w, noise = draw(N, D), 100 * draw(R, D), draw(N, R)
        mean, logvar, z = reference.encode(x, w, None, w, None, noise)
        equal(logvar, x @ w.T)
        assert logvar.abs().max() > 20
        equal(z, mean + (logvar.clamp(-20, 20) / 2).exp() * noise)


def test_detach_target_cuts_one_of_the_two_ways_into_x():
    adapter, x, noise = make(detach_target=True)
    attached = make()[0]
    equal(tuple(run(adapter, x, noise)[1]), tuple(run(attached, x, noise)[1]))
    grads, whole = gradients(adapter, x, noise), gradients(attached, x, noise)
    equal(grads[1:], whole[1:])
    z1, z2 = (reference.posterior(x, attached._encoder(i), noise[i - 1])[2].detach() for i in (1, 2))
    target = x.clone().requires_grad_(True)
    nll = reference.reconstruct(target, torch.cat((z1, z2), -1), *attached._decoder())
    (as_target,) = torch.autograd.grad(nll, target)
    assert as_target.any()
    equal(whole[0] - grads[0], as_target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", ALL)
def test_low_precision_has_terms_in_float32(dtype, options):
    adapter, x, noise = make(dtype, **options)
    wide = make(torch.float64, **options)[0]
    wide.load_state_dict(adapter.state_dict())
    y, terms = run(adapter, x, noise)
    y_wide, terms_wide = run(wide, x.double(), tuple(n.double() for n in noise))
    assert y.dtype == dtype
    assert {t.dtype for t in terms} == {torch.float32}
    for ours, theirs in zip((y, *terms), (y_wide, *terms_wide), strict=True):
        assert (ours.double() - theirs).norm() <= 4 * torch.finfo(dtype).eps * theirs.norm()


def test_sums_in_float32_do_not_overflow_float16():
    mean, logvar = torch.full((4, 600), 20.0).half(), torch.zeros(4, 600).half()
    kl, gamma = reference.divergence(mean, logvar, mean, logvar)
    assert (kl.item(), kl.dtype) == (0.5 * 400 * 600, torch.float32)
    assert gamma.isfinite()


class TestDropout:
    def test_none_without_it(self):
        adapter, x, noise = make()
        equal(run(adapter, x, noise, dropout=0.0)[0], run(adapter, x, noise)[0])

    def test_it_keeps_the_expectation_of_a_linear_readout(self):
        x, weight = draw(1, D).expand(200_000, D), draw(6, D, seed=1)
        h = reference.mlp(x, [(weight, None)], dropout=0.25)
        full = reference.mlp(x[:1], [(weight, None)])[0]
        assert ((h == 0).double().mean(0)[full > 0] - 0.25).abs().max() < 5e-3
        torch.testing.assert_close(h.mean(0), full, rtol=1e-2, atol=1e-9)


@pytest.mark.parametrize("options", ALL)
@pytest.mark.parametrize("shape", [{}, {"encoder_hidden": ()}, {"encoder_hidden": (4,), "separate_hidden": True}])
def test_gradcheck(options, shape):
    adapter, x, noise = make(**options, **shape)
    names, parameters = zip(*adapter.named_parameters(), strict=True)
    mask = torch.tensor([[True, False], [True, True]])

    def function(x, noise1, noise2, *values):
        y, terms = torch.func.functional_call(
            wrapped, {f"adapter.{n}": v for n, v in zip(names, values, strict=True)}, (x, (noise1, noise2), mask)
        )
        return y, *terms

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.adapter = adapter

        def forward(self, x, noise, mask):
            return run(self.adapter, x, noise, mask=mask)

    wrapped = Wrapped()
    inputs = [t[:, :2].detach().clone().requires_grad_(True) for t in (x, *noise)]
    assert torch.autograd.gradcheck(function, (*inputs, *(p.detach().clone().requires_grad_() for p in parameters)))


def test_latents_of_any_leading_shape():
    for shape in [(R,), (1, R), (N, R), (2, N, R)]:
        assert reference.gaussian_kl(*latents(shape)[:2]).shape == shape[:-1]
