"""encode: gradients, the reference, low precision, edges, errors; for every backend that has the op."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fvae_kernels as fk
from fvae_kernels import reference, testing

OP = "encode"


def leading_shapes():
    return st.sampled_from([(), (1,), (0,), (2, 0), (3, 1), (2, 3), (17,), (2, 2, 3)])


# gradcheck


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(backend, device, bias):
    inputs = testing.encode_inputs(bias=bias, device=device)
    inputs["noise"].requires_grad_()
    assert torch.autograd.gradcheck(lambda *args: fk.encode(*args, backend=backend), tuple(inputs.values()))


# hypothesis


@given(
    lead=leading_shapes(),
    D=st.integers(1, 35),
    R=st.integers(1, 19),
    bias=st.booleans(),
    stride=st.sampled_from(testing.STRIDES),
    seed=st.integers(0, 99),
)
def test_matches_reference(backend, device, lead, D, R, bias, stride, seed):
    inputs = testing.encode_inputs(lead, D, R, bias, device=device, seed=seed)
    expected = testing.run(reference.encode, inputs)
    actual = testing.run(fk.encode, testing.restride(inputs, stride), backend=backend)
    testing.assert_same(actual, expected)


@pytest.mark.parametrize(("N", "D"), [(1500, 40), (70, 3000)])
def test_many_tiles_match_reference(backend, device, many, N, D):
    inputs = testing.encode_inputs((many(N),), many(D), 4, device=device)
    testing.assert_same(testing.run(fk.encode, inputs, backend=backend), testing.run(reference.encode, inputs))


def test_same_inputs_give_the_same_bits(backend, device, many):
    inputs = testing.encode_inputs((many(1500),), 40, 4, dtype=torch.float32, device=device)
    first, second = (testing.run(fk.encode, inputs, backend=backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# low precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse(backend, device, dtype):
    inputs = testing.encode_inputs((64,), 200, 16, dtype=dtype, device=device)
    same_dtype, exact = testing.exact_and_rounded(OP, inputs)
    testing.assert_no_worse(testing.run(fk.encode, inputs, backend=backend), same_dtype, exact)


# edges


def test_logvar_is_clamped_where_it_is_exponentiated_alone(backend, device):
    inputs = testing.encode_inputs((2,), D=1, R=8, device=device)
    for name in ("w_mean", "b_mean", "w_logvar"):
        inputs[name].data.zero_()
    inputs["b_logvar"].data.copy_(torch.tensor([-1e4, -20.5, -20.0, -19.5, 19.5, 20.0, 20.5, 1e4]))
    inputs["noise"].requires_grad_()
    results = testing.run(fk.encode, inputs, backend=backend)
    testing.assert_same(results, testing.run(reference.encode, inputs))
    assert torch.equal(results["out1"][0], inputs["b_logvar"])
    assert results["out2"].isfinite().all()


def test_gradient_of_the_clamp_is_zero_outside(backend, device):
    inputs = testing.encode_inputs((1,), D=1, R=4, device=device)
    inputs["w_logvar"].data.zero_()
    inputs["b_logvar"].data.copy_(torch.tensor([-20.5, -20.0, 20.0, 20.5]))
    z = fk.encode(**inputs, backend=backend)[2]
    (grad,) = torch.autograd.grad(z.sum(), inputs["b_logvar"])
    assert (grad != 0).tolist() == [False, True, True, False]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_travel(backend, device, value):
    inputs = testing.encode_inputs((3,), device=device)
    inputs["x"].data[1, 0] = value
    results = testing.run(fk.encode, inputs, backend=backend)
    testing.assert_same(results, testing.run(reference.encode, inputs))
    assert not results["out0"][1].isfinite().any()
    assert results["out2"][[0, 2]].isfinite().all()


def test_frozen_inputs_get_no_gradient_and_no_work(backend, device):
    inputs = testing.encode_inputs(device=device)
    for name in ("x", "w_mean", "w_logvar", "b_mean"):
        inputs[name].requires_grad_(False)
    z = fk.encode(**inputs, backend=backend)[2]
    with testing.Calls() as calls:
        z.sum().backward()
    assert [name for name in inputs if inputs[name].grad is not None] == ["b_logvar"]
    assert calls.count("mm", "addmm", "matmul") == 0


@pytest.mark.parametrize("frozen", [("w_mean", "b_mean"), ("w_logvar", "b_logvar"), ("x",), ("b_mean", "w_logvar")])
def test_any_subset_may_be_frozen(backend, device, frozen):
    inputs = testing.encode_inputs(device=device)
    for name in frozen:
        inputs[name].requires_grad_(False)
    testing.assert_same(testing.run(fk.encode, inputs, backend=backend), testing.run(reference.encode, inputs))


@pytest.mark.parametrize("used", [0, 1, 2])
def test_one_output_may_be_used_alone(backend, device, used):
    inputs = testing.encode_inputs(device=device)
    expected = testing.run(lambda **args: reference.encode(**args)[used], inputs)
    actual = testing.run(lambda **args: fk.encode(**args, backend=backend)[used], inputs)
    testing.assert_same(actual, expected)


def test_retain_graph_twice(backend, device):
    inputs = testing.encode_inputs(device=device)
    total = sum(out.square().sum() for out in fk.encode(**inputs, backend=backend))
    first, second = (torch.autograd.grad(total, inputs["x"], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_double_backward_says_no(backend, device):
    if backend == "reference":
        pytest.skip("plain PyTorch differentiates twice")
    inputs = testing.encode_inputs(device=device)
    (grad,) = torch.autograd.grad(
        fk.encode(**inputs, backend=backend)[2].square().sum(), inputs["x"], create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_inputs_and_gradients_are_left_as_they_were(backend, device):
    inputs = testing.encode_inputs(device=device)
    before = testing.convert(inputs, torch.float64)
    outputs = fk.encode(**inputs, backend=backend)
    grads = [torch.ones_like(out) for out in outputs]
    torch.autograd.backward(outputs, grads)
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)
    assert all(torch.equal(grad, torch.ones_like(grad)) for grad in grads)


def test_saves_inputs_and_logvar_alone(backend, device):
    if backend == "reference":
        pytest.skip("autograd keeps what it needs")
    inputs = testing.encode_inputs((100,), D=50, R=3, device=device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fk.encode(**inputs, backend=backend)
    own = {inputs[name].data_ptr() for name in ("x", "w_mean", "w_logvar", "noise")}
    assert sum(t.numel() for t in saved if t.data_ptr() not in own) == 100 * 3


def test_autocast_does_not_reach_the_kernel(backend, device):
    if backend == "reference":
        pytest.skip("PyTorch's own matrix products do follow autocast")
    inputs = testing.encode_inputs((50,), 64, 4, dtype=torch.float32, device=device)
    with torch.autocast(device, torch.bfloat16):
        under = fk.encode(**inputs, backend=backend)
    for out, plain in zip(under, fk.encode(**inputs, backend=backend), strict=True):
        assert torch.equal(out, plain)


def test_compiles_in_one_graph(backend, device):
    inputs = testing.encode_inputs(device=device)
    compiled = torch.compile(lambda **args: fk.encode(**args, backend=backend), fullgraph=True, backend="aot_eager")
    testing.assert_same(testing.run(compiled, inputs), testing.run(reference.encode, inputs))


# errors


@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        ("x", torch.zeros((), dtype=torch.float64), ValueError, "x is 0-dim"),
        ("x", torch.zeros(5, 7, dtype=torch.int64), TypeError, "x is torch.int64; expected a float dtype"),
        ("x", torch.zeros(5, 7), TypeError, r"w_mean is torch.float64 but x is torch.float32.*w_mean.to\(x.dtype\)"),
        ("x", [1.0], TypeError, "x is list; expected a tensor"),
        ("noise", 3, TypeError, "noise is int; expected a tensor"),
        ("w_mean", torch.zeros(3, 6).double(), ValueError, r"w_mean has shape \(3, 6\); expected \[out, 7\]"),
        ("w_logvar", torch.zeros(4, 7).double(), ValueError, r"w_logvar has shape \(4, 7\); expected \(3, 7\)"),
        ("b_mean", torch.zeros(4).double(), ValueError, r"b_mean has shape \(4,\); expected \(3,\)"),
        ("noise", torch.zeros(3).double(), ValueError, r"noise has shape \(3,\); expected \(5, 3\)"),
        ("noise", torch.zeros(5, 3, device="meta").double(), ValueError, "noise is on meta but x is on cpu"),
    ],
)
def test_errors_say_what_to_do(name, value, error, text):
    with pytest.raises(error, match=f"encode: {text}"):
        fk.encode(**(testing.encode_inputs() | {name: value}))
