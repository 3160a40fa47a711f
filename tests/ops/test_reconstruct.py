"""reconstruct: gradients, the reference, low precision, edges, errors; for every backend that has the op."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fvae_kernels as fk
from fvae_kernels import reference, testing

OP = "reconstruct"


# gradcheck


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mask", ["as bias", pytest.param("other", marks=pytest.mark.not_interpreted)])
def test_gradcheck(backend, device, bias, mask):
    inputs = testing.reconstruct_inputs(hidden=(), bias=bias, mask=(mask == "as bias") == bias, device=device)
    assert torch.autograd.gradcheck(
        lambda x, latent, w, b, t: fk.reconstruct(x, latent, (), w, b, t, mask=inputs["mask"], backend=backend),
        tuple(inputs[name] for name in ("x", "latent", "w_out", "b_out", "scale")),
    )


# hypothesis


@given(
    lead=st.sampled_from([(), (1,), (0,), (2, 0), (3, 1), (2, 3), (17,), (2, 2, 3)]),
    D=st.integers(1, 35),
    latent=st.integers(1, 9),
    hidden=st.sampled_from([(), (5,), (8, 3)]),
    bias=st.booleans(),
    mask=st.booleans(),
    stride=st.sampled_from(testing.STRIDES),
    seed=st.integers(0, 99),
)
def test_matches_reference(backend, device, lead, D, latent, hidden, bias, mask, stride, seed):
    inputs = testing.reconstruct_inputs(lead, D, latent, hidden, bias, mask, device=device, seed=seed)
    expected = testing.run(reference.reconstruct, inputs)
    actual = testing.run(fk.reconstruct, testing.restride(inputs, stride), backend=backend)
    testing.assert_same(actual, expected)


@pytest.mark.parametrize("mask", [pytest.param(False, marks=pytest.mark.not_interpreted), True])
@pytest.mark.parametrize(("N", "D"), [(4001, 40), (70, 3000)])
def test_many_tiles_match_reference(backend, device, many, N, D, mask):
    inputs = testing.reconstruct_inputs((many(N),), many(D), mask=mask, device=device)
    testing.assert_same(
        testing.run(fk.reconstruct, inputs, backend=backend), testing.run(reference.reconstruct, inputs)
    )


def test_same_inputs_give_the_same_bits(backend, device, many):
    inputs = testing.reconstruct_inputs((many(4001),), 40, dtype=torch.float32, device=device)
    first, second = (testing.run(fk.reconstruct, inputs, backend=backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# low precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse(backend, device, dtype):
    inputs = testing.reconstruct_inputs((300,), 60, latent=16, hidden=(), mask=True, dtype=dtype, device=device)
    same_dtype, exact = testing.exact_and_rounded(OP, inputs)
    actual = testing.run(fk.reconstruct, inputs, backend=backend)
    testing.assert_no_worse(actual, same_dtype, exact)
    assert actual["out0"].dtype == torch.float32


# edges


def test_matches_torch_distributions(backend, device):
    inputs = testing.reconstruct_inputs((50,), hidden=(), device=device)
    inputs["scale"].data[0] *= -1
    x_hat = torch.nn.functional.linear(inputs["latent"], inputs["w_out"], inputs["b_out"])
    expected = -torch.distributions.Normal(x_hat, inputs["scale"].abs()).log_prob(inputs["x"]).sum(-1).mean()
    torch.testing.assert_close(fk.reconstruct(**inputs, backend=backend), expected, rtol=1e-12, atol=0)


def test_zero_where_there_is_no_token(backend, device):
    empty = testing.reconstruct_inputs((0,), device=device)
    hidden = testing.reconstruct_inputs((4,), device=device) | {"mask": torch.zeros(4, dtype=torch.bool, device=device)}
    for inputs in (empty, hidden):
        results = testing.run(fk.reconstruct, inputs, backend=backend)
        assert all((result == 0).all() for result in results.values())


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_mask_of_any_dtype_drops_tokens(backend, device, dtype):
    inputs = testing.reconstruct_inputs((6,), device=device)
    mask = torch.tensor([1, 0, 1, 1, 0, 0], device=device)
    kept = inputs | {name: inputs[name][mask.bool()] for name in ("x", "latent")}
    with_mask = fk.reconstruct(**(inputs | {"mask": mask.to(dtype)}), backend=backend)
    torch.testing.assert_close(with_mask, fk.reconstruct(**kept, backend=backend), rtol=1e-12, atol=0)


def test_tokens_that_the_mask_drops_do_not_count_even_if_nan(backend, device):
    inputs = testing.reconstruct_inputs((3,), device=device) | {
        "mask": torch.tensor([True, False, True], device=device)
    }
    inputs["x"].data[1] = math.nan
    assert fk.reconstruct(**inputs, backend=backend).isfinite()


def test_dropout_draws_as_the_reference_does(backend, device):
    inputs = testing.reconstruct_inputs((20,), hidden=(30, 30), device=device)
    results = []
    for function, options in ((fk.reconstruct, {"backend": backend}), (reference.reconstruct, {})):
        torch.manual_seed(5)
        results.append(testing.run(function, inputs, dropout=0.4, **options))
    testing.assert_same(*results)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["x", "latent", "w_out", "b_out", "scale"])
def test_nan_and_inf_travel(backend, device, name, value):
    inputs = testing.reconstruct_inputs((3,), hidden=(), device=device)
    inputs[name].data.view(-1)[1] = value
    results = testing.run(fk.reconstruct, inputs, backend=backend)
    testing.assert_same(results, testing.run(reference.reconstruct, inputs))


@pytest.mark.parametrize("trained", ["x", "latent", "w_out", "b_out", "scale"])
def test_frozen_inputs_get_no_gradient_and_no_work(backend, device, trained):
    inputs = testing.reconstruct_inputs(hidden=(), device=device)
    names = ("x", "latent", "w_out", "b_out", "scale")
    for name in set(names) - {trained}:
        inputs[name].requires_grad_(False)
    with testing.Calls() as calls:
        fk.reconstruct(**inputs, backend=backend).backward()
    assert [name for name in names if inputs[name].grad is not None] == [trained]
    needs = [
        args[-1] for name, args in zip(calls.names, calls.arguments, strict=True) if name.endswith("reconstruct_bwd")
    ]
    skipped = backend == "reference" or trained == "scale"  # the forward's sums are the gradient of the scale
    assert needs == ([] if skipped else [[name == trained for name in names[:4]]])


def test_x_hat_is_not_saved(backend, device):
    if backend == "reference":
        pytest.skip("autograd keeps what it needs")
    inputs = testing.reconstruct_inputs((100,), D=50, latent=4, hidden=(6,), device=device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fk.reconstruct(**inputs, backend=backend)
    own = {t.data_ptr() for t in testing.leaves(inputs).values()}
    assert sum(t.numel() for t in {t.data_ptr(): t for t in saved}.values() if t.data_ptr() not in own) <= 100 * 6 + 50


def test_retain_graph_twice(backend, device):
    inputs = testing.reconstruct_inputs(device=device)
    nll = fk.reconstruct(**inputs, backend=backend)
    asked = list(testing.leaves(inputs).values())
    first, second = (torch.autograd.grad(nll, asked, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_double_backward_says_no(backend, device):
    if backend == "reference":
        pytest.skip("plain PyTorch differentiates twice")
    inputs = testing.reconstruct_inputs(device=device)
    (grad,) = torch.autograd.grad(fk.reconstruct(**inputs, backend=backend), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_autocast_does_not_reach_the_kernel(backend, device):
    if backend == "reference":
        pytest.skip("PyTorch's own matrix products do follow autocast")
    inputs = testing.reconstruct_inputs((50,), 64, hidden=(), dtype=torch.float32, device=device)
    with torch.autocast(device, torch.bfloat16):
        under = fk.reconstruct(**inputs, backend=backend)
        mixed = fk.reconstruct(**testing.reconstruct_inputs(dtype=torch.float32, device=device), backend=backend)
    assert torch.equal(under, fk.reconstruct(**inputs, backend=backend))
    assert mixed.dtype == torch.float32  # hidden layers follow autocast, the likelihood does not


def test_compiles_in_one_graph(backend, device):
    inputs = testing.reconstruct_inputs(mask=True, device=device)
    compiled = torch.compile(
        lambda **args: fk.reconstruct(**args, backend=backend), fullgraph=True, backend="aot_eager"
    )
    testing.assert_same(testing.run(compiled, inputs), testing.run(reference.reconstruct, inputs))


# errors


@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        ("x", torch.zeros((), dtype=torch.float64), ValueError, "x is 0-dim"),
        ("latent", torch.zeros(4, 4).double(), ValueError, r"latent has shape \(4, 4\); expected \(5, 4\)"),
        ("latent", torch.zeros((), dtype=torch.float64), ValueError, "latent is 0-dim"),
        ("latent", torch.zeros(5, 4), TypeError, "latent is torch.float32 but x is torch.float64"),
        (
            "hidden",
            ((torch.zeros(6, 5).double(), None),),
            ValueError,
            r"hidden\[0\]\[0\] has shape \(6, 5\); expected \[out, 4\]",
        ),
        (
            "hidden",
            ((torch.zeros(6, 4).double(), torch.zeros(5).double()),),
            ValueError,
            r"hidden\[0\]\[1\] has shape \(5,\)",
        ),
        (
            "hidden",
            (),
            ValueError,
            r"w_out has shape \(7, 6\); expected \[out, 4\], where 4 is the last dimension of latent",
        ),
        ("w_out", torch.zeros(8, 6).double(), ValueError, r"w_out has shape \(8, 6\); expected \(7, 6\)"),
        ("b_out", torch.zeros(8).double(), ValueError, r"b_out has shape \(8,\); expected \(7,\)"),
        ("scale", torch.zeros(1).double(), ValueError, r"scale has shape \(1,\); expected \(7,\)"),
        ("scale", 1.0, TypeError, "scale is float; expected a tensor"),
        ("mask", torch.ones(4), ValueError, r"mask has shape \(4,\); expected \(5,\)"),
        ("dropout", 1.0, ValueError, "dropout=1.0; expected a probability, at least 0 and below 1"),
    ],
)
def test_errors_say_what_to_do(name, value, error, text):
    with pytest.raises(error, match=f"reconstruct: {text}"):
        fk.reconstruct(**(testing.reconstruct_inputs() | {name: value}))
