"""reference.py against torch.distributions, Monte Carlo and the equations; kernels are checked against it."""

import itertools
import math

import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from fvae_kernels import FVAEConfig, reference
from tests.helpers.reference_layers import D, M, N, R, draw, equal, latents, make, run

PRIORS = [(0.0, 1.0), (1.5, 1.0), (-2.0, 0.5), (0.3, 3.0)]


def gaussian(mean, logvar):
    return Independent(Normal(mean, (logvar / 2).exp()), 1)


def prior_like(mean, prior_mean, prior_std):
    return Independent(Normal(torch.full_like(mean, prior_mean), torch.full_like(mean, prior_std)), 1)


class TestGaussians:
    @pytest.mark.parametrize("prior", PRIORS)
    def test_kl(self, prior):
        mean, logvar = latents()[:2]
        expected = kl_divergence(gaussian(mean, logvar), prior_like(mean, *prior))
        equal(reference.gaussian_kl(mean, logvar, *prior), expected)

    @pytest.mark.parametrize("prior", PRIORS)
    def test_expected_log_prior_is_minus_cross_entropy(self, prior):
        mean, logvar = latents()[:2]
        q = gaussian(mean, logvar)
        expected = -q.entropy() - kl_divergence(q, prior_like(mean, *prior)) + R / 2 * math.log(2 * math.pi)
        equal(reference.expected_log_prior(mean, logvar, *prior), expected)

    @pytest.mark.parametrize("prior", PRIORS)
    def test_sampled_log_prior(self, prior):
        z = latents()[0]
        expected = prior_like(z, *prior).log_prob(z) + R / 2 * math.log(2 * math.pi)
        equal(reference.sampled_log_prior(z, *prior), expected)

    @pytest.mark.parametrize("prior", PRIORS)
    def test_divergence_is_a_mean_over_tokens(self, prior):
        mean1, logvar1, mean2, logvar2 = latents()
        kl, gamma = reference.divergence(mean1, logvar1, mean2, logvar2, *prior)
        p1, p2 = prior_like(mean1, 0.0, 1.0), prior_like(mean1, *prior)
        q1, q2 = gaussian(mean1, logvar1), gaussian(mean2, logvar2)
        equal(kl, kl_divergence(q1, p1).mean())
        # E_q log p = -H(q) - KL(q || p)
        equal(gamma, (q1.entropy() - q2.entropy() + kl_divergence(q1, p1) - kl_divergence(q2, p2)).mean())

    @pytest.mark.parametrize("prior", PRIORS)
    def test_gamma_against_monte_carlo(self, prior):
        means = latents((R,))
        q1, q2 = gaussian(*means[:2]), gaussian(*means[2:])
        torch.manual_seed(1)
        samples = prior_like(means[0], *prior).log_prob(q2.sample((200_000,)))
        samples = samples - prior_like(means[0], 0.0, 1.0).log_prob(q1.sample((200_000,)))
        error = samples.std() / math.sqrt(samples.numel())
        assert abs(reference.divergence(*means, *prior)[1] - samples.mean()) < 4 * error


class TestReconstruct:
    @pytest.mark.parametrize("sizes", [(), (6,), (6, 4, 2)])
    def test_nll(self, sizes):
        x, latent, scale = draw(2, N, D), draw(2, N, 2 * R, seed=1), draw(D, seed=2).abs() + 0.2
        widths = (2 * R, *sizes)
        hidden = [(draw(b, a, seed=b), draw(b, seed=9)) for a, b in itertools.pairwise(widths)]
        w_out, b_out = draw(D, widths[-1], seed=3), draw(D, seed=4)
        g = latent
        for weight, bias in hidden:
            g = (g @ weight.T + bias).clamp(min=0)
        x_hat = g @ w_out.T + b_out
        nll = reference.reconstruct(x, latent, hidden, w_out, b_out, scale)
        equal(nll, -Independent(Normal(x_hat, scale), 1).log_prob(x).mean())
        equal(nll, -MultivariateNormal(x_hat, scale_tril=scale.diag()).log_prob(x).mean())
        equal(nll, reference.reconstruct(x, latent, hidden, w_out, b_out, -scale))  # |t| counts

    def test_without_bias(self):
        x, latent, w_out = draw(N, D), draw(N, R, seed=1), draw(D, R, seed=2)
        zeros = torch.zeros(D, dtype=torch.float64)
        ours = reference.reconstruct(x, latent, [], w_out, None, zeros + 2)
        equal(ours, reference.reconstruct(x, latent, [], w_out, zeros, zeros + 2))


def within(logvar, config):
    """z_1's log-variance as the options ask for it: learned, bounded above, or a constant that has no gradient."""
    if config.logvar1_held:
        return torch.full_like(logvar, config.logvar1_start) + 0 * logvar
    return logvar if config.logvar1_max is None else torch.stack([min(v, v * 0 + config.logvar1_max) for v in logvar])


def by_the_equations(p, config, x, noise):
    """s B z_1 and the terms, token by token, from the parameters and the equations."""
    depth, keys, deltas, losses, nlls, kls, gammas = len(config.encoder_hidden), p.keys(), [], [], [], [], []

    def affine(stem, h):
        return p[f"{stem}_weight"] @ h + (p[f"{stem}_bias"] if f"{stem}_bias" in keys else 0)

    def relu_stack(stem, h, count):
        for i in range(count):
            h = torch.relu(affine(f"{stem}_hidden{i}", h))
        return h

    mu, tau, two_pi = config.prior2_mean, config.prior2_std, 2 * math.pi
    for token, *eps in zip(x.reshape(-1, D), *(n.reshape(-1, R) for n in noise), strict=True):
        q = []
        for i in (1, 2):
            h = relu_stack(f"encoder{i}", token, depth)
            v = relu_stack(f"encoder{i}_logvar", token, depth) if config.separate_hidden else h
            mean, logvar = affine(f"encoder{i}_mean", h), affine(f"encoder{i}_logvar", v)
            variance = (logvar if i == 2 else within(logvar, config)).exp()
            q.append((mean, variance, mean + variance.sqrt() * eps[i - 1]))
        (m1, v1, z1), (m2, v2, z2) = q
        g = torch.cat([z1, z2]) if config.fusion == "concat" else 0.5 * (z1 + z2)
        x_hat = affine("decoder_out", relu_stack("decoder", g, len(config.decoder_hidden)))
        t = p["decoder_scale"]
        nll = ((x_hat - token) ** 2 / (2 * t**2) + t.log() + math.log(two_pi) / 2).sum()

        def kl(mean, var, centre, std):
            return ((var + (mean - centre) ** 2) / (2 * std**2) - 0.5 + (std**2 / var).log() / 2).sum()

        if config.gamma_estimator == "closed_form":
            log_p1 = -((m1**2 + v1) / 2).sum()
            log_p2 = -(((m2 - mu) ** 2 + v2) / (2 * tau**2)).sum() - R * math.log(tau)
        else:
            log_p1, log_p2 = -(z1**2 / 2).sum(), -((z2 - mu) ** 2 / (2 * tau**2)).sum() - R * math.log(tau)
        a, b, (d2, d1) = config.recon_weight, config.kl_weight, config.gamma_weights
        loss = {
            "fvae": a * nll + b * kl(m1, v1, 0, 1) - d2 * log_p2 + d1 * log_p1,
            "vae2lat": a * nll + kl(m1, v1, 0, 1) + kl(m2, v2, mu, tau),
            "beta_vae2lat": a * nll + b * (kl(m1, v1, 0, 1) + kl(m2, v2, mu, tau)),
            "symmetric": a * nll
            + b * (kl(m1, v1, 0, 1) + kl(m2, v2, mu, tau))
            - kl(m2, v2, 0, 1)
            - kl(m1, v1, mu, tau),
        }[config.objective]
        deltas.append(config.alpha / (math.sqrt(R) if config.rslora else R) * (p["B"] @ z1))
        for values, value in ((losses, loss), (nlls, nll), (kls, kl(m1, v1, 0, 1)), (gammas, log_p2 - log_p1)):
            values.append(value)
    terms = reference.Terms(*(torch.stack(values).mean() for values in (losses, nlls, kls, gammas)))
    return torch.stack(deltas).reshape(*x.shape[:-1], M), terms


OBJECTIVES = {
    "fvae": {"recon_weight": 0.3, "kl_weight": 2.0, "gamma_weight": (0.7, 0.4)},
    "vae2lat": {"recon_weight": 0.3},
    "beta_vae2lat": {"kl_weight": 3.0},
    "symmetric": {"kl_weight": 0.5},
}


@pytest.mark.parametrize("decoder_hidden", [(), (7, 6, 5)], ids=len)
@pytest.mark.parametrize(("encoder_hidden", "separate"), [((), 0), ((6,), 0), ((6, 4), 0), ((6,), 1), ((6, 4), 1)])
@pytest.mark.parametrize("fusion", ["concat", "average"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_layer_is_the_equations(objective, fusion, encoder_hidden, separate, decoder_hidden):
    shape = {"encoder_hidden": encoder_hidden, "decoder_hidden": decoder_hidden, "separate_hidden": bool(separate)}
    adapter, x, noise = make(objective=objective, fusion=fusion, prior2_std=0.8, **shape, **OBJECTIVES[objective])
    x.requires_grad_(True)
    ours, theirs = run(adapter, x, noise), by_the_equations(dict(adapter.named_parameters()), adapter.config, x, noise)
    equal(ours[0], theirs[0])
    equal(tuple(ours[1]), tuple(theirs[1]))
    leaves = [x, *adapter.parameters()]
    grads = [torch.autograd.grad(t.loss + (y * y.detach()).sum(), leaves) for y, t in (ours, theirs)]
    equal(*grads, tolerance=1e-10)
    assert all(grad.any() for grad in grads[0])


@pytest.mark.parametrize("options", [{"gamma_estimator": "monte_carlo", "prior2_std": 2.0}, {"rslora": True}])
def test_layer_is_the_equations_with(options):
    adapter, x, noise = make(gamma_weight=(0.7, 0.4), **options)
    ours, theirs = run(adapter, x, noise), by_the_equations(dict(adapter.named_parameters()), adapter.config, x, noise)
    equal(ours[0], theirs[0])
    equal(tuple(ours[1]), tuple(theirs[1]))


LOGVAR1 = {
    "bounded": {"logvar1_start": -0.2, "logvar1_max": -0.2, "logvar1_held": False},
    "held": {"logvar1_start": -0.5, "logvar1_held": True},
}


@pytest.mark.parametrize("estimator", ["closed_form", "monte_carlo"])
@pytest.mark.parametrize(("encoder_hidden", "separate"), [((), 0), ((6,), 0), ((6,), 1)])
@pytest.mark.parametrize("logvar1", LOGVAR1)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_layer_is_the_equations_with_bounds(objective, logvar1, encoder_hidden, separate, estimator):
    shape = {"encoder_hidden": encoder_hidden, "separate_hidden": bool(separate), "gamma_estimator": estimator}
    adapter, x, noise = make(objective=objective, **shape, **LOGVAR1[logvar1], **OBJECTIVES[objective])
    leaves = dict(adapter.named_parameters())
    for leaf in leaves.values():
        leaf.requires_grad_()  # those of a held log-variance too, whose gradient is zero
    ours, theirs = run(adapter, x, noise), by_the_equations(dict(adapter.named_parameters()), adapter.config, x, noise)
    equal(ours[0], theirs[0])
    equal(tuple(ours[1]), tuple(theirs[1]))
    grads = [torch.autograd.grad(t.loss + (y * y.detach()).sum(), list(leaves.values())) for y, t in (ours, theirs)]
    equal(*grads, tolerance=1e-10)
    head = dict(zip(leaves, grads[0], strict=True))["encoder1_logvar_weight"]
    assert head.any() == (logvar1 == "bounded")


@pytest.mark.parametrize("logvar1", LOGVAR1)
def test_one_sided_gradient_at_the_bounds(logvar1):
    """At the upper bound the gradient passes, so that the bound can be left; where both bounds are one, never."""
    low, high = FVAEConfig(**LOGVAR1[logvar1]).logvar1_bounds
    logvar = torch.tensor([high - 1, high, high + 1], dtype=torch.float64, requires_grad=True)
    value = reference.bounded(logvar, low, high)
    assert value.tolist() == [max(low, high - 1), high, high]
    value.sum().backward()
    assert logvar.grad.tolist() == ([1, 1, 0] if low < high else [0, 0, 0])


@pytest.mark.parametrize("weights", [1.0, (0.5, 2.0)])
def test_monte_carlo_averages_to_the_closed_form(weights):
    """Means over many samples of noise, for one token: gamma and loss - nll, whose estimates are unbiased."""
    sampled, x, _ = make(gamma_estimator="monte_carlo", gamma_weight=weights, prior2_std=1.7)
    closed = make(gamma_weight=weights, prior2_std=1.7)[0]
    torch.manual_seed(2)
    repeats = 20_000
    x = x[0, :1].expand(repeats, D)
    noise = torch.randn(2, repeats, R, dtype=torch.float64).unbind()
    exact, estimate = run(closed, x, noise)[1], run(sampled, x, noise)[1]
    single = [run(sampled, x[:1], (a, b))[1] for a, b in zip(noise[0][:300, None], noise[1][:300, None], strict=True)]
    for ours, theirs, draws in (
        (estimate.gamma, exact.gamma, [t.gamma for t in single]),
        (estimate.loss - estimate.nll, exact.loss - exact.nll, [t.loss - t.nll for t in single]),
    ):
        assert abs(ours - theirs) < 4 * torch.stack(draws).std() / math.sqrt(repeats)
        assert ours != theirs
