"""divergence: gradients, the reference, low precision, edges, errors; for every backend that has the op."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fvae_kernels as fk
from fvae_kernels import reference, testing

OP = "divergence"
NAMES = ("mean1", "logvar1", "mean2", "logvar2")


# gradcheck


@pytest.mark.parametrize("mask", [False, True])
def test_gradcheck(backend, device, mask):
    inputs = testing.divergence_inputs(mask=mask, device=device)
    assert torch.autograd.gradcheck(lambda *args: fk.divergence(*args, backend=backend), tuple(inputs.values()))


# hypothesis


@given(
    lead=st.sampled_from([(), (1,), (0,), (2, 0), (3, 1), (2, 3), (17,), (2, 2, 3)]),
    R=st.integers(1, 35),
    mask=st.booleans(),
    prior=st.tuples(st.floats(-3, 3), st.floats(0.1, 4)),
    stride=st.sampled_from(testing.STRIDES),
    seed=st.integers(0, 99),
)
def test_matches_reference(backend, device, lead, R, mask, prior, stride, seed):
    inputs = testing.divergence_inputs(lead, R, mask, device=device, seed=seed)
    inputs["prior2_mean"], inputs["prior2_std"] = prior
    expected = testing.run(reference.divergence, inputs)
    actual = testing.run(fk.divergence, testing.restride(inputs, stride), backend=backend)
    testing.assert_same(actual, expected)


@pytest.mark.parametrize("mask", [pytest.param(False, marks=pytest.mark.not_interpreted), True])
def test_many_tiles_match_reference(backend, device, many, mask):
    inputs = testing.divergence_inputs((many(20_001),), 3, mask, device=device)
    testing.assert_same(testing.run(fk.divergence, inputs, backend=backend), testing.run(reference.divergence, inputs))


def test_same_inputs_give_the_same_bits(backend, device, many):
    inputs = testing.divergence_inputs((many(20_001),), 3, dtype=torch.float32, device=device)
    first, second = (testing.run(fk.divergence, inputs, backend=backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# low precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse(backend, device, dtype):
    inputs = testing.divergence_inputs((300,), 16, mask=True, dtype=dtype, device=device)
    same_dtype, exact = testing.exact_and_rounded(OP, inputs)
    actual = testing.run(fk.divergence, inputs, backend=backend)
    testing.assert_no_worse(actual, same_dtype, exact)
    assert actual["out0"].dtype == torch.float32


# edges


def test_matches_torch_distributions(backend, device):
    inputs = testing.divergence_inputs((50,), 4, device=device)
    q = [torch.distributions.Normal(inputs[f"mean{i}"], (inputs[f"logvar{i}"] / 2).exp()) for i in (1, 2)]
    numbers = torch.tensor([0.0, 1.0, 1.5, 0.8], dtype=torch.float64, device=device)
    p1, p2 = torch.distributions.Normal(*numbers[:2]), torch.distributions.Normal(*numbers[2:])
    kl1, kl2 = torch.distributions.kl_divergence(q[0], p1), torch.distributions.kl_divergence(q[1], p2)
    gamma = (q[0].entropy() + kl1 - q[1].entropy() - kl2).sum(-1).mean()  # E log p = -entropy - KL
    kl, actual = fk.divergence(**inputs, backend=backend)
    torch.testing.assert_close(kl, kl1.sum(-1).mean(), rtol=1e-10, atol=0)
    torch.testing.assert_close(actual, gamma, rtol=1e-10, atol=1e-12)


def test_standard_normal_posteriors_diverge_by_nothing(backend, device):
    zeros = torch.zeros(3, 4, dtype=torch.float64, device=device)
    kl, gamma = fk.divergence(zeros, zeros, zeros, zeros, 1.5, 1.0, backend=backend)
    assert kl.item() == 0
    assert gamma.item() == -4 * 1.5**2 / 2


def test_zero_where_there_is_no_token(backend, device):
    empty = testing.divergence_inputs((0,), device=device)
    hidden = testing.divergence_inputs((4,), device=device) | {"mask": torch.zeros(4, dtype=torch.bool, device=device)}
    for inputs in (empty, hidden):
        results = testing.run(fk.divergence, inputs, backend=backend)
        assert all((result == 0).all() for result in results.values())


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_mask_of_any_dtype_drops_tokens(backend, device, dtype):
    inputs = testing.divergence_inputs((6,), device=device)
    mask = torch.tensor([1, 0, 1, 1, 0, 0], device=device)
    kept = {name: value[mask.bool()] if name in NAMES else value for name, value in inputs.items()}
    with_mask = fk.divergence(**(inputs | {"mask": mask.to(dtype)}), backend=backend)
    torch.testing.assert_close(with_mask, fk.divergence(**kept, backend=backend), rtol=1e-12, atol=1e-12)


def test_tokens_that_the_mask_drops_do_not_count_even_if_nan(backend, device):
    inputs = testing.divergence_inputs((3,), device=device)
    inputs["mask"] = torch.tensor([True, False, True], device=device)
    inputs["mean1"].data[1] = math.nan
    assert all(out.isfinite() for out in fk.divergence(**inputs, backend=backend))


def test_logvar_at_and_beyond_the_clamp(backend, device):
    inputs = testing.divergence_inputs((2,), R=6, device=device)
    for name in ("logvar1", "logvar2"):
        inputs[name].data.copy_(torch.tensor([-1e4, -20.5, -20.0, 20.0, 20.5, 1e4]))
    results = testing.run(fk.divergence, inputs, backend=backend)
    testing.assert_same(results, testing.run(reference.divergence, inputs))
    for name in ("grad_logvar1", "grad_logvar2"):
        assert (results[name] != 0)[0].tolist() == [False, False, True, True, False, False]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_nan_and_inf_travel(backend, device, name, value):
    inputs = testing.divergence_inputs((3,), device=device)
    inputs[name].data[1, 0] = value
    results = testing.run(fk.divergence, inputs, backend=backend)
    testing.assert_same(results, testing.run(reference.divergence, inputs))


@pytest.mark.parametrize("trained", NAMES)
def test_frozen_inputs_get_no_gradient_and_no_work(backend, device, trained):
    inputs = testing.divergence_inputs(device=device)
    for name in set(NAMES) - {trained}:
        inputs[name].requires_grad_(False)
    with testing.Calls() as calls:
        sum(fk.divergence(**inputs, backend=backend)).backward()
    assert [name for name in NAMES if inputs[name].grad is not None] == [trained]
    needs = [
        args[-1] for name, args in zip(calls.names, calls.arguments, strict=True) if name.endswith("divergence_bwd")
    ]
    assert needs == ([] if backend == "reference" else [[name == trained for name in NAMES]])


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_may_be_used_alone(backend, device, used):
    inputs = testing.divergence_inputs(device=device)
    expected = testing.run(lambda **args: reference.divergence(**args)[used], inputs)
    actual = testing.run(lambda **args: fk.divergence(**args, backend=backend)[used], inputs)
    testing.assert_same(actual, expected)


def test_retain_graph_twice(backend, device):
    inputs = testing.divergence_inputs(device=device)
    kl, gamma = fk.divergence(**inputs, backend=backend)
    first, second = (torch.autograd.grad(kl * gamma, inputs["mean1"], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_double_backward_says_no(backend, device):
    if backend == "reference":
        pytest.skip("plain PyTorch differentiates twice")
    inputs = testing.divergence_inputs(device=device)
    (grad,) = torch.autograd.grad(fk.divergence(**inputs, backend=backend)[0], inputs["mean1"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_compiles_in_one_graph(backend, device):
    inputs = testing.divergence_inputs(mask=True, device=device)
    compiled = torch.compile(lambda **args: fk.divergence(**args, backend=backend), fullgraph=True, backend="aot_eager")
    testing.assert_same(testing.run(compiled, inputs), testing.run(reference.divergence, inputs))


# errors


@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        ("mean1", torch.zeros((), dtype=torch.float64), ValueError, "mean1 is 0-dim"),
        ("mean2", torch.zeros(5, 3), TypeError, "mean2 is torch.float32 but mean1 is torch.float64"),
        ("logvar2", torch.zeros(5, 4).double(), ValueError, r"logvar2 has shape \(5, 4\); expected \(5, 3\)"),
        ("logvar1", torch.zeros(5, 3, device="meta").double(), ValueError, "logvar1 is on meta but mean1 is on cpu"),
        ("mask", torch.ones(4), ValueError, r"mask has shape \(4,\); expected \(5,\), one entry for each token"),
        ("mask", [1, 0], TypeError, "mask is list; expected a tensor"),
        ("mask", torch.ones(5, device="meta"), ValueError, r"mask is on meta; expected cpu"),
        ("prior2_std", 0.0, ValueError, "prior2_std=0.0; expected a finite number above 0"),
        ("prior2_std", math.inf, ValueError, "prior2_std=inf"),
        ("prior2_mean", math.nan, ValueError, "prior2_mean=nan; expected a finite number"),
        ("prior2_mean", "1", ValueError, "prior2_mean='1'"),
    ],
)
def test_errors_say_what_to_do(name, value, error, text):
    with pytest.raises(error, match=f"divergence: {text}"):
        fk.divergence(**(testing.divergence_inputs() | {name: value}))
