"""layer: gradcheck, reference, low precision; for every backend with the op. Edges: test_layer_edges.py."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fvae_kernels import testing
from tests.helpers.layer_inputs import assert_layer_no_worse, layer_inputs, plain, replaced, run_layer

OP = "layer"

not_interpreted = pytest.mark.not_interpreted

OBJECTIVES = [
    {},
    {"recon_weight": 0.3, "kl_weight": 2.0, "gamma_weight": (0.5, 2.0)},
    {"gamma_estimator": "monte_carlo", "gamma_weight": 0.7},
    {"objective": "vae2lat"},
    {"objective": "beta_vae2lat", "kl_weight": 3.0},
    {"objective": "symmetric", "kl_weight": 1.5, "gamma_estimator": "monte_carlo"},
]
SHAPES = [
    {"encoder_hidden": ()},
    {"encoder_hidden": (5, 4)},
    {"encoder_hidden": (4, 3, 6), "decoder_hidden": ()},
    {"decoder_hidden": (6, 9, 4)},
    {"fusion": "average"},
    {"fusion": "average", "decoder_hidden": (), "encoder_hidden": ()},
    {"detach_target": True},
]
TERMS = ("delta", "loss", "nll", "kl", "gamma")


# gradcheck


@not_interpreted
@pytest.mark.parametrize("options", [*OBJECTIVES, *SHAPES[:-1]], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(backend, device, options, dropout):
    inputs = layer_inputs((4,), D=5, M=4, mask=True, device=device, **options)
    names = list(testing.leaves(inputs))

    def function(*tensors):
        torch.manual_seed(7)  # the same activations are dropped at every call
        return run_layer(**replaced(inputs, dict(zip(names, tensors, strict=True))), dropout=dropout, backend=backend)

    assert torch.autograd.gradcheck(function, tuple(testing.leaves(inputs).values()), fast_mode=True)


@pytest.mark.parametrize("options", [OBJECTIVES[2] | SHAPES[0] | {"fusion": "average"}, SHAPES[1]], ids=str)
def test_gradcheck_of_a_sum(backend, device, options):
    """All outputs along one direction of all inputs, with noise: few enough runs for interpreted kernels."""
    inputs = layer_inputs((4,), D=5, M=4, mask=True, device=device, **options) | {"noise": None}
    leaves = testing.leaves(inputs)
    direction = {name: torch.randn_like(leaf) for name, leaf in leaves.items()}

    def function(step):
        torch.manual_seed(7)
        moved = {name: leaf.detach() + step * direction[name] for name, leaf in leaves.items()}
        outputs = run_layer(**replaced(inputs, moved), dropout=0.4, backend=backend)
        return sum((out * torch.ones_like(out).cumsum(0)).sum() for out in outputs)

    assert torch.autograd.gradcheck(function, torch.zeros((), dtype=torch.float64, device=device, requires_grad=True))


# hypothesis


@given(
    lead=st.sampled_from([(), (1,), (0,), (2, 0), (3, 1), (2, 3), (17,), (2, 2, 3)]),
    D=st.integers(1, 35),
    M=st.integers(1, 20),
    rank=st.integers(1, 9),
    shape=st.sampled_from([{}, *SHAPES]),
    objective=st.sampled_from(OBJECTIVES),
    bias=st.booleans(),
    mask=st.booleans(),
    stride=st.sampled_from(testing.STRIDES),
    seed=st.integers(0, 99),
)
def test_matches_reference(backend, device, lead, D, M, rank, shape, objective, bias, mask, stride, seed):
    inputs = layer_inputs(lead, D, M, bias, mask, device=device, seed=seed, rank=rank, **shape, **objective)
    actual = testing.run(run_layer, testing.restride(inputs, stride), backend=backend)
    testing.assert_same(actual, testing.run(plain, inputs))


@pytest.mark.parametrize("options", [*OBJECTIVES, *SHAPES], ids=str)
def test_every_option_matches_reference(backend, device, options):
    inputs = layer_inputs((9,), mask=True, device=device, **options)
    testing.assert_same(testing.run(run_layer, inputs, backend=backend), testing.run(plain, inputs))


@pytest.mark.parametrize("mask", [pytest.param(False, marks=not_interpreted), True])
@pytest.mark.parametrize(
    ("N", "D"),
    [pytest.param(4001, 40, marks=not_interpreted), pytest.param(70, 3000, marks=not_interpreted), (900, 700)],
)
def test_many_tiles_match_reference(backend, device, many, N, D, mask):
    sizes = {"encoder_hidden": (5, 4), "decoder_hidden": (8, 9)}
    inputs = layer_inputs((many(N),), many(D), M=50, mask=mask, device=device, **sizes)
    testing.assert_same(testing.run(run_layer, inputs, backend=backend), testing.run(plain, inputs))


@pytest.mark.parametrize("term", TERMS)
def test_each_output_alone_matches_reference(backend, device, term):
    """The gradient of terms.kl alone has nothing of the other terms."""
    inputs, which = layer_inputs(mask=True, device=device), TERMS.index(term)
    testing.assert_same(
        testing.run(lambda **args: run_layer(**args, backend=backend)[which], inputs),
        testing.run(lambda **args: plain(**args)[which], inputs),
    )


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=not_interpreted), 0.2])
def test_same_inputs_give_the_same_bits(backend, device, many, dropout):
    inputs = layer_inputs((many(1000) // 2,), 40, dtype=torch.float32, device=device)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(testing.run(run_layer, inputs, dropout=dropout, backend=backend))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@not_interpreted
def test_two_threads_give_what_one_after_the_other_does(backend, device):
    cases = [layer_inputs((700,), 60 + 20 * i, dtype=torch.float32, device=device, seed=i) for i in range(2)]
    alone = [testing.run(run_layer, inputs, backend=backend) for inputs in cases]
    together = [[], []]

    def work(i):
        torch.set_num_threads(threads)
        together[i] = [testing.run(run_layer, cases[i], backend=backend) for _ in range(20)]

    threads = torch.get_num_threads()
    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for expected, repeats in zip(alone, together, strict=True):
        assert len(repeats) == 20
        assert all(torch.equal(actual[name], expected[name]) for actual in repeats for name in expected)


# low precision


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=not_interpreted), torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options", [{}, pytest.param({"encoder_hidden": (), "fusion": "average"}, marks=not_interpreted)]
)
def test_low_precision_is_no_worse(backend, device, many, dtype, options):
    tokens, seeds = (300, 4) if many(300) == 300 else (12, 6)

    def inputs(seed):
        return layer_inputs((tokens,), 60, 50, mask=True, dtype=dtype, device=device, rank=8, seed=seed, **options)

    assert_layer_no_worse(inputs, plain, backend, seeds)
