"""Dropout inside the layer kernels: which activations it drops, how often; nothing else changes."""

import math

import pytest
import torch

import fvae_kernels as fk
from fvae_kernels import testing
from fvae_kernels.ops._raw import RAW
from tests.helpers.layer_inputs import layer_inputs, plain, raw_inputs, run_layer
from tests.helpers.philox import philox

OP = "layer"

not_interpreted = pytest.mark.not_interpreted


@pytest.fixture(autouse=True)
def _kernels_alone(backend):
    if backend == "reference":
        pytest.skip("torch draws its dropout")


def kept_by_the_book(seed, layer, tokens, width, dropout):
    """bool [tokens, width], computed as csrc/philox.h defines it."""
    blocks, threshold = -(-width // 8), round((1 - dropout) * 2**16)
    rows = []
    for token in range(tokens):
        halves = []
        for block in range(blocks):
            position = token * blocks + block
            words = philox((position % 2**32, position >> 32, layer, 0), (seed % 2**32, seed >> 32))
            halves.append([half for word in words for half in (word % 2**16, word >> 16)])
        rows.append([halves[j % blocks][j // blocks] < threshold for j in range(width)])
    return torch.tensor(rows)


def visible_inputs(tokens, width, device):
    """Encoders whose activations are all 1 and whose means are these activations."""
    inputs = layer_inputs((tokens,), 4, M=width, device=device, rank=width, encoder_hidden=(width,), alpha=width)
    eye = torch.eye(width, dtype=torch.float64, device=device)
    for name in ("encoder1", "encoder2"):
        ((w, b),), _, w_mean, b_mean, w_logvar, b_logvar = inputs[name]
        for parameter, value in ((w, 0), (b, 1), (w_mean, eye), (b_mean, 0), (w_logvar, 0), (b_logvar, -1e3)):
            parameter.data.copy_(torch.as_tensor(value))
    inputs["B"].data.copy_(eye)
    for eps in inputs["noise"]:
        eps.zero_()
    return inputs


def first_hidden(inputs, dropout, seed, backend):
    """The first hidden layer of both encoders [N, 2H], from the raw op's state."""
    seed = torch.tensor(seed, device=inputs["x"].device)
    _, _, state = RAW[backend].layer_fwd(None, *raw_inputs(inputs, dropout, seed))
    return state[:, : 2 * inputs["config"].encoder_hidden[0]]


# the generator


def test_philox_by_the_book_gives_the_published_numbers():
    """Known answers of Random123."""
    assert philox((0,) * 4, (0,) * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox((2**32 - 1,) * 4, (2**32 - 1,) * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(s, marks=not_interpreted) for s in (1, 2**31 + 5)), 2**62 + 12345678901]
)
@pytest.mark.parametrize(
    "width", [1, pytest.param(3, marks=not_interpreted), pytest.param(4, marks=not_interpreted), 20]
)
def test_drops_what_the_book_says(backend, device, seed, width):
    inputs = visible_inputs(40, width, device)
    for dropout in (0.1, 0.5):
        h = first_hidden(inputs, dropout, seed, backend)
        assert torch.equal(h.cpu() != 0, kept_by_the_book(seed, 0, 40, 2 * width, dropout))
        assert torch.allclose(h[h != 0], torch.tensor(2**16 / round((1 - dropout) * 2**16)).to(h))


@not_interpreted
@pytest.mark.parametrize("threads", [1, 2])
def test_position_decides_not_tiles_or_threads(backend, device, threads):
    before = torch.get_num_threads()
    whole = first_hidden(visible_inputs(5000, 8, device), 0.3, 11, backend)
    try:
        torch.set_num_threads(threads)
        part = first_hidden(visible_inputs(1000, 8, device), 0.3, 11, backend)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(whole[:1000], part)


# its effect on activations


@not_interpreted
@pytest.mark.parametrize("dropout", [1e-3, 0.1, 0.5, 0.9])
def test_keep_rate_and_mean(backend, device, dropout):
    h = first_hidden(visible_inputs(20000, 16, device), dropout, 3, backend)
    keep, n = 1 - dropout, h.numel()
    assert abs((h != 0).double().mean().item() - keep) < 5 * math.sqrt(keep * dropout / n) + 2**-16
    assert abs(h.mean().item() - 1) < 5 * math.sqrt(dropout / keep / n)
    assert (h != 0).double().mean(0).sub(keep).abs().max() < 6 * math.sqrt(keep * dropout / len(h)) + 2**-16


@not_interpreted
def test_units_and_tokens_and_seeds_are_independent(backend, device):
    inputs = visible_inputs(20000, 16, device)
    h = torch.cat([first_hidden(inputs, 0.5, seed, backend) for seed in (1, 2)], 1) != 0
    h = torch.cat((h[:-1], h[1:]), 1).double()  # the next token's beside each token's
    correlation = torch.corrcoef(h.t()) - torch.eye(h.shape[1], dtype=torch.float64, device=h.device)
    assert correlation.abs().max() < 6 / math.sqrt(len(h))


@not_interpreted
def test_layers_drop_different_units(backend, device):
    """A decoder of two layers that copy their input: equal drops in both would have no further effect."""
    inputs = layer_inputs((4000,), 8, rank=4, encoder_hidden=(), decoder_hidden=(8, 8), device=device, prior2_mean=0.0)
    eye, zero = torch.eye(8, dtype=torch.float64, device=device), torch.zeros((), dtype=torch.float64, device=device)
    for name in ("encoder1", "encoder2"):  # z is the noise
        for parameter in inputs[name][2:]:
            parameter.data.zero_()
    hidden, w_out, b_out, scale = inputs["decoder"]
    for (w, b), value in zip((*hidden, (w_out, b_out)), (0, eye, eye), strict=True):
        w.data.copy_(value + zero)
        b.data.zero_()
    hidden[0][1].data.fill_(1)  # the first layer's activations are 1 before dropout
    scale.data.fill_(1)
    inputs["x"].data.zero_()
    torch.manual_seed(0)
    nll = run_layer(**inputs, dropout=0.5, backend=backend)[2] - 4 * math.log(2 * math.pi)
    # x_hat is 4 if both layers keep a unit (probability 1/4), else 0: E x_hat^2 = 4; equal drops would give 8
    assert abs(nll.item() - 8 * 4 / 2) < 0.5


@not_interpreted
@pytest.mark.parametrize("options", [{}, {"encoder_hidden": (5, 4), "decoder_hidden": (6, 7)}], ids=str)
def test_distribution_of_outputs_is_the_reference_s(backend, device, options):
    inputs = layer_inputs((6,), device=device, **options)
    samples = {}
    for name, function in (("kernel", run_layer), ("plain", plain)):
        extra = {"backend": backend} if name == "kernel" else {}
        draws = [testing.run(function, inputs, dropout=0.3, **extra) for _ in range(1500)]
        samples[name] = {key: torch.stack([draw[key] for draw in draws]) for key in draws[0]}
    for key, ours in samples["kernel"].items():
        theirs = samples["plain"][key]
        error = ((ours.var(0) + theirs.var(0)) / len(ours)).sqrt()
        assert ((ours.mean(0) - theirs.mean(0)).abs() <= 5.5 * error + 1e-12).all(), key
        assert (ours.std(0) - theirs.std(0)).abs().max() <= 0.25 * theirs.std(0).max() + 1e-12, key


# seeds


def test_manual_seed_repeats_and_another_does_not(backend, device):
    inputs = layer_inputs((10,), device=device)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(testing.run(run_layer, inputs, dropout=0.3, backend=backend))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert not torch.equal(results[0]["out0"], results[2]["out0"])


@pytest.mark.parametrize("use_reentrant", [pytest.param(True, marks=not_interpreted), False])
def test_checkpoint_recomputes_the_same(backend, device, use_reentrant):
    torch.manual_seed(0)
    config = fk.FVAEConfig.preset("paper", rank=4, encoder_hidden=(8,), decoder_hidden=(8,), dropout=0.4)
    layer = fk.FusedFVAELinear.from_linear(torch.nn.Linear(6, 5), config).double().to(device).train()
    for parameter in layer.adapter.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    x, grads = torch.randn(30, 6, dtype=torch.float64, device=device, requires_grad=True), []

    def loss(x):
        y, terms = layer.forward_with_terms(x)
        return y.sum() + terms.loss

    with fk.use_backend(backend):
        for function in (loss, lambda x: torch.utils.checkpoint.checkpoint(loss, x, use_reentrant=use_reentrant)):
            torch.manual_seed(4)
            function(x).backward()
            grads.append([p.grad.clone() for p in (x, *layer.adapter.parameters())])
            for p in (x, *layer.adapter.parameters()):
                p.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_no_dropout_draws_nothing(backend, device):
    state = torch.get_rng_state()
    run_layer(**layer_inputs(device=device), backend=backend)
    assert torch.equal(torch.get_rng_state(), state)
