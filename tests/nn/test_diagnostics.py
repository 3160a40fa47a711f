"""diagnostics.py: properties of equation (5) and of its bound, and the terms of a model."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fvae_kernels as fk
from fvae_kernels import diagnostics, reference
from tests.helpers.tiny_models import TARGETS, batch, build

CFG = fk.FVAEConfig(rank=3, encoder_hidden=(4,), decoder_hidden=(5,), dropout=0.0)


def draw(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def latents(tokens, rank, seed=0, scale=1.0):
    return [draw(tokens, rank, seed=4 * seed + i, scale=scale) for i in range(4)]


token = st.lists(st.floats(-30, 30), min_size=8, max_size=8).map(
    lambda v: torch.tensor(v, dtype=torch.float64).view(4, 2)
)


class TestGeometry:
    @given(token, st.floats(-3, 3), st.floats(0.1, 4))
    def test_gamma_is_lambda_plus_delta(self, values, prior_mean, prior_std):
        found = diagnostics.latent_geometry(*values, prior_mean, prior_std)
        gamma = reference.divergence(*values, prior_mean, prior_std)[1]
        size = 1e-12 * (1 + abs(found["Lambda"]) + abs(found["Delta"]))
        assert abs(found["Gamma"] - gamma) <= size
        assert abs(found["Lambda"] + found["Delta"] - gamma) <= size

    @given(token)
    def test_delta_is_bounded(self, values):
        """|Delta| <= W2^2 / 2 + sqrt(sum(mean_1^2 + var_1)) W2, of each token."""
        found = diagnostics.latent_geometry(*values)
        assert abs(found["Delta"]) <= found["delta_bound"] * (1 + 1e-12)

    @pytest.mark.parametrize("scale", [1e-3, 1.0, 5.0])
    def test_definitions(self, scale):
        mean1, logvar1, mean2, logvar2 = values = latents(50, 4, scale=scale)
        found = diagnostics.latent_geometry(*values, 1.5, 0.7)
        q1, q2 = (torch.distributions.Normal(m, (v / 2).exp()) for m, v in ((mean1, logvar1), (mean2, logvar2)))
        kl = torch.distributions.kl_divergence
        p1, p2 = (torch.distributions.Normal(*torch.tensor(p, dtype=torch.float64)) for p in ((0.0, 1.0), (1.5, 0.7)))
        expected = {
            "Lambda": (kl(q2, p1) - kl(q2, p2)).sum(-1).mean(),
            # E_q log p = -H(q) - KL(q || p)
            "Delta": (q1.entropy() + kl(q1, p1) - q2.entropy() - kl(q2, p1)).sum(-1).mean(),
            "W2_squared": ((mean1 - mean2) ** 2 + (q1.stddev - q2.stddev) ** 2).sum(-1).mean(),
        }
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-11)

    def test_equal_posteriors(self):
        mean, logvar = latents(20, 4)[:2]
        found = diagnostics.latent_geometry(mean, logvar, mean, logvar)
        assert found["W2_squared"] == found["Delta"] == found["delta_bound"] == 0
        assert found["Gamma"] == found["Lambda"] != 0

    def test_equal_priors_have_no_mismatch(self):
        found = diagnostics.latent_geometry(*latents(20, 4), prior2_mean=0.0, prior2_std=1.0)
        assert abs(found["Lambda"]) < 1e-14
        assert found["Delta"] != 0

    def test_mask_and_leading_shape(self):
        values, mask = latents(20, 4), torch.arange(20) % 3 == 0
        kept = diagnostics.latent_geometry(*(v[mask] for v in values))
        masked = diagnostics.latent_geometry(*(v.view(4, 5, 4) for v in values), mask=mask.view(4, 5))
        torch.testing.assert_close(masked, kept, rtol=1e-14, atol=1e-14)

    def test_far_log_variances_and_low_precision(self):
        values = [v.bfloat16() for v in latents(20, 4, scale=100.0)]
        found = diagnostics.latent_geometry(*values)
        assert {v.dtype for v in found.values()} == {torch.float32}
        assert all(v.isfinite() and v.dim() == 0 for v in found.values())
        assert all(v == 0 for v in diagnostics.latent_geometry(*(v[:0] for v in values)).values())


class TestCollectTerms:
    @pytest.mark.parametrize("objective", ["fvae", "symmetric"])
    def test_values_are_those_of_forward_with_terms(self, objective):
        model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).double()
        config = fk.FVAEConfig(rank=3, encoder_hidden=(4,), decoder_hidden=(5,), objective=objective)  # with dropout
        fk.replace_linears(model, config, ["0", "2"])
        x = draw(7, 6)
        model.train()
        torch.manual_seed(1)
        model(x)
        found = fk.collect_terms(model)
        torch.manual_seed(1)
        y, first = model[0].forward_with_terms(x)
        _, second = model[2].forward_with_terms(model[1](y))
        assert found == {
            name: {term: value.item() for term, value in terms._asdict().items()}
            for name, terms in (("0", first), ("2", second))
        }

    def test_the_last_step_counts_and_eval_does_not(self):
        model = nn.Sequential(nn.Linear(6, 5))
        fk.replace_linears(model, CFG, ["0"])
        model.eval()(torch.randn(2, 6))
        assert fk.collect_terms(model) == {}
        model.train()(torch.randn(2, 6))
        first = fk.collect_terms(model)
        model.eval()(torch.randn(2, 6))
        assert fk.collect_terms(model) == first
        model.train()(torch.randn(2, 6))
        assert fk.collect_terms(model) != first

    @pytest.mark.parametrize("kind", ["bert", "vit"])
    def test_a_peft_model(self, kind):
        from peft import get_peft_model

        config = fk.FVAELoraConfig(
            r=3, target_modules=TARGETS[kind], decoder_hidden=(5,), dropout=0.0, loss_weight=1e-3
        )
        model = get_peft_model(build(kind), config).train()
        loss = model(**batch(kind)).loss
        found = fk.collect_terms(model)
        assert len(found) == 4
        assert all(list(terms) == ["loss", "nll", "kl", "gamma"] for terms in found.values())
        assert all(
            terms["loss"] == pytest.approx(terms["nll"] + config.kl_weight * terms["kl"] - terms["gamma"])
            for terms in found.values()
        )
        assert loss.item() > config.loss_weight * sum(terms["loss"] for terms in found.values())


class TestActiveUnits:
    def test_counts_entries_that_vary(self):
        mean = torch.zeros(2, 50, 4)
        mean[..., 1] = torch.linspace(-1, 1, 50)
        mean[..., 2] = 7.0  # constant: carries nothing
        mean[..., 3] = 0.01 * torch.linspace(-1, 1, 50)
        assert diagnostics.active_units(mean) == 1
        assert diagnostics.active_units(mean, threshold=1e-6) == 2
        assert diagnostics.active_units(mean.reshape(-1, 4)) == 1

    def test_few_tokens(self):
        assert diagnostics.active_units(torch.ones(1, 3)) == 0
        assert diagnostics.active_units(torch.ones(0, 3)) == 0

    def test_a_fresh_layer_has_none(self):
        layer = fk.FusedFVAELinear(nn.Linear(6, 5), dataclasses.replace(CFG, start="authors"))
        assert [diagnostics.active_units(mean) for mean in layer.posterior_means(torch.randn(9, 6))] == [0, 0]


class TestWhatTheLatentsHold:
    """On latents whose answer is known."""

    def test_signal_to_noise(self):
        mean = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
        logvar = torch.tensor([0.25, 0.25]).log().expand(4, 2)
        assert diagnostics.signal_to_noise(mean, logvar) == pytest.approx(2.0)
        assert diagnostics.signal_to_noise(mean + 7, logvar) == pytest.approx(2.0)  # a constant tells nothing
        assert diagnostics.signal_to_noise(mean[:0], logvar[:0]) == 0

    @pytest.mark.parametrize("directions", [1, 2, 3])
    def test_effective_rank_counts_equal_directions(self, directions):
        mean, B = torch.zeros(60, 4), torch.linalg.qr(draw(9, 4))[0].float()
        mean[torch.arange(60), torch.arange(60) % directions] = 2.0
        assert diagnostics.effective_rank(mean, B) == pytest.approx(directions, rel=1e-5)

    def test_effective_rank_is_that_of_the_updates(self):
        mean, B = draw(50, 4), draw(9, 4, seed=1)
        energies = torch.linalg.svdvals(mean @ B.T).square()
        expected = float(energies.sum().square() / energies.square().sum())
        assert diagnostics.effective_rank(mean, B) == pytest.approx(expected, rel=1e-10)
        assert diagnostics.effective_rank(mean, 0 * B) == 0

    def test_token_independent_share(self):
        mean, B = draw(50, 4), draw(9, 4, seed=1)
        u = mean @ B.T
        expected = float(u.mean(0).square().sum() / u.square().sum(-1).mean())
        assert diagnostics.token_independent_share(mean, B) == pytest.approx(expected, rel=1e-10)
        assert diagnostics.token_independent_share(mean[:1].expand(9, 4), B) == pytest.approx(1)
        assert diagnostics.token_independent_share(mean, 0 * B) == 0

    def test_masked_tokens_do_not_count(self):
        mean, logvar, B, mask = (
            draw(4, 5, 3),
            draw(4, 5, 3, seed=1),
            draw(9, 3, seed=2),
            torch.arange(20).view(4, 5) % 3 > 0,
        )
        loud = mean.where(mask[..., None], 100 * mean)
        for of in (
            lambda m, k: diagnostics.signal_to_noise(m, logvar if k is not None else logvar[mask], k),
            lambda m, k: diagnostics.effective_rank(m, B, k),
            lambda m, k: diagnostics.token_independent_share(m, B, k),
        ):
            assert of(loud, mask) == pytest.approx(of(mean[mask], None), rel=1e-12)

    def test_not_a_number_stays_one(self):
        assert math.isnan(diagnostics.effective_rank(torch.full((3, 2), math.nan), torch.ones(4, 2)))

    @pytest.mark.parametrize("classes", [2, 3])
    def test_linear_probe(self, classes):
        y = torch.arange(300) % classes
        x = torch.cat([torch.nn.functional.one_hot(y, classes) + 0.1 * draw(300, classes), 9 * draw(300, 2, seed=1)], 1)
        assert diagnostics.linear_probe(x[:200], y[:200], x[200:], y[200:]) == 1.0
        guess = diagnostics.linear_probe(x[:200, classes:], y[:200], x[200:, classes:], y[200:])
        assert guess < 1 / classes + 0.2
