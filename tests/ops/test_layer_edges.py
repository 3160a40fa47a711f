"""layer: edges and errors, for every backend with the op. Other sections: test_layer.py."""

import math

import pytest
import torch

import fvae_kernels as fk
from fvae_kernels import testing
from fvae_kernels.nn.adapter import FVAEAdapter
from fvae_kernels.nn.explain import explain
from tests.helpers.layer_inputs import layer_inputs, plain, replaced, run_layer

OP = "layer"

not_interpreted = pytest.mark.not_interpreted


# edges


def test_zero_where_there_is_no_token(backend, device):
    empty = layer_inputs((0,), device=device)
    hidden = layer_inputs((4,), device=device) | {"mask": torch.zeros(4, dtype=torch.bool, device=device)}
    for inputs in (empty, hidden):
        results = testing.run(lambda **args: run_layer(**args, backend=backend)[1:], inputs)
        assert all((result == 0).all() for result in results.values())


@pytest.mark.parametrize("value", [-30.0, *(pytest.param(v, marks=not_interpreted) for v in (-20.0, 20.0)), 30.0])
def test_logvar_is_clamped(backend, device, value):
    inputs = layer_inputs(device=device)
    for name in ("encoder1", "encoder2"):
        inputs[name][4].data.zero_()
        inputs[name][5].data.fill_(value)
    testing.assert_same(testing.run(run_layer, inputs, backend=backend), testing.run(plain, inputs))


@pytest.mark.parametrize("value", [math.nan, pytest.param(math.inf, marks=not_interpreted)])
@pytest.mark.parametrize("name", ["x", "encoder1[2]", "encoder2[5]", "decoder[0][0][1]", "decoder[3]", "B"])
def test_nan_and_inf_travel(backend, device, name, value):
    inputs = layer_inputs((3,), device=device)
    testing.leaves(inputs)[name].data.view(-1)[1] = value
    actual, expected = testing.run(run_layer, inputs, backend=backend), testing.run(plain, inputs)
    for key, wanted in expected.items():
        assert torch.equal(actual[key].isfinite(), wanted.isfinite()), key


def test_a_term_beyond_the_range_of_its_dtype_is_infinite(backend, device):
    inputs = layer_inputs((3,), D=200, dtype=torch.float32, device=device)
    inputs["decoder"][3].data.fill_(3e-19)  # squares fit, their sum does not
    terms, expected = run_layer(**inputs, backend=backend)[1:], plain(**inputs)[1:]
    assert [term.isinf().item() for term in terms] == [term.isinf().item() for term in expected]
    assert terms[1] == math.inf


def test_tokens_that_the_mask_drops_do_not_count_even_if_nan(backend, device):
    inputs = layer_inputs((3,), device=device) | {"mask": torch.tensor([True, False, True], device=device)}
    inputs["x"].data[1] = math.nan
    assert all(term.isfinite() for term in run_layer(**inputs, backend=backend)[1:])


GROUPS = ("x", "encoder1", "encoder2", "decoder", "decoder[3]", "B")


@pytest.mark.parametrize("trained", GROUPS)
def test_frozen_inputs_get_no_gradient(backend, device, trained):
    if backend == "reference":
        pytest.skip("autograd decides")
    inputs = layer_inputs(device=device)
    expected = testing.run(plain, inputs)
    everything = testing.leaves(inputs)
    for name, tensor in everything.items():
        tensor.requires_grad_(name.startswith(trained))
    with testing.Calls() as calls:
        actual = testing.run(run_layer, inputs, backend=backend)
    assert {name for name in actual if "grad" in name} == {f"grad_{n}" for n in everything if n.startswith(trained)}
    testing.assert_same(actual, {name: expected[name] for name in actual})
    (needs,) = [args[-1] for name, args in zip(calls.names, calls.arguments, strict=True) if name.endswith("layer_bwd")]
    assert needs == [trained == "x", "encoder" in trained, trained == "decoder", "decoder" in trained, trained == "B"]


@pytest.mark.parametrize("N", [pytest.param(1576, marks=not_interpreted), 32])
def test_saved_for_backward_at_the_recipe(backend, device, N):
    if backend == "reference":
        pytest.skip("autograd keeps what it needs")
    adapter = FVAEAdapter(768, 768, fk.FVAEConfig.preset("paper"), device=device)
    x = torch.randn(N, 768, device=device, requires_grad=True)
    saved = {}
    with (
        fk.use_backend(backend),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t),
    ):
        adapter(x)
    own = {t.data_ptr() for t in (x, *adapter.parameters())}
    assert 0 < sum(t.nbytes for pointer, t in saved.items() if pointer not in own) <= 1.2e6 * N / 1576


@pytest.mark.parametrize(
    "sizes",
    [
        {"rank": 20, "encoder_hidden": (17,), "decoder_hidden": (130, 16)},
        {"rank": 130, "encoder_hidden": (), "decoder_hidden": (17, 5)},
        {"rank": 130, "encoder_hidden": (), "decoder_hidden": (9,), "fusion": "average"},
    ],
    ids=str,
)
def test_wide_networks(backend, device, sizes):
    inputs = layer_inputs((35,), 17, 12, mask=True, device=device, **sizes)
    testing.assert_same(testing.run(run_layer, inputs, backend=backend), testing.run(plain, inputs))


def test_retain_graph_twice(backend, device):
    inputs = layer_inputs(device=device)
    loss = run_layer(**inputs, dropout=0.3, backend=backend)[1]
    asked = [t for name, t in testing.leaves(inputs).items() if name != "B"]
    first, second = (torch.autograd.grad(loss, asked, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_double_backward_says_no(backend, device):
    if backend == "reference":
        pytest.skip("plain PyTorch differentiates twice")
    inputs = layer_inputs(device=device)
    (grad,) = torch.autograd.grad(run_layer(**inputs, backend=backend)[1], inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=not_interpreted)], ids=str)
def test_autocast_rounds_the_factors_of_products_alone(backend, device, dtype):
    """For the Triton kernels, forward and backward. C++ has no 16-bit products and ignores autocast."""
    if backend == "reference":
        pytest.skip("PyTorch's own matrix products do follow autocast")
    inputs = layer_inputs((12,), 64, dtype=torch.float32, device=device)
    plainly, exact = (testing.run(plain, testing.convert(inputs, t)) for t in (torch.float32, torch.float64))
    with torch.autocast(device, dtype):
        under = testing.run(run_layer, inputs, backend=backend)
        pytorch = testing.run(lambda **args: tuple(out.float() for out in plain(**args)), inputs)
    if backend == "cpp":
        testing.assert_same(under, plainly, rtol=1e-5)
    else:
        testing.assert_no_worse(under, pytorch, exact)
        rounded = [name for name in plainly if not torch.allclose(under[name], plainly[name], rtol=1e-4, atol=1e-5)]
        assert {"out0", "out1", "grad_x", "grad_B", "grad_encoder1[0][0][0]", "grad_decoder[1]"} <= set(rounded)


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=not_interpreted), 0.3])
def test_compiles_in_one_graph(backend, device, dropout):
    torch.compiler.reset()  # else dropout becomes a symbol at its second value
    inputs = layer_inputs(mask=True, device=device)
    compiled = torch.compile(
        lambda **args: run_layer(**args, dropout=dropout, backend=backend), fullgraph=True, backend="aot_eager"
    )
    results = []
    for function in (compiled, lambda **args: run_layer(**args, dropout=dropout, backend=backend)):
        torch.manual_seed(2)
        results.append(testing.run(function, inputs))
    testing.assert_same(*results)


def test_what_nothing_reaches_gets_no_gradient(backend, device):
    inputs = layer_inputs(device=device)
    asked = testing.leaves(inputs)
    delta, _, nll, kl, _ = run_layer(**inputs, backend=backend)
    delta = delta.sum()
    for output, reached in (
        (delta, ("encoder1", "B")),
        (kl, ("encoder1",)),
        (nll, ("encoder1", "encoder2", "decoder")),
    ):
        grads = torch.autograd.grad(output, list(asked.values()), retain_graph=True, allow_unused=True)
        for name, grad in zip(asked, grads, strict=True):
            if name.startswith(("decoder", "B")):
                assert (grad is not None) == name.startswith(reached), name


def test_unnamed_takes_the_kernel_or_the_reference():
    covered, separate = layer_inputs(dtype=torch.float32), layer_inputs(dtype=torch.float32, separate_hidden=True)
    gradient_of_noise = covered | {"noise": tuple(eps.clone().requires_grad_() for eps in covered["noise"])}
    for inputs, kernels in ((covered, 1), (separate, 0), (gradient_of_noise, 0)):
        with testing.Calls() as calls:
            run_layer(**inputs, backend=None)
        assert calls.count("layer_fwd") == (kernels if "cpp" in fk.available_backends() else 0)


def test_explain_says_which_path_and_why(backend):
    if backend != "cpp":
        pytest.skip("it explains every backend; once is enough")
    linear = torch.nn.Linear(8, 8)
    fused = fk.FusedFVAELinear.from_linear(linear, fk.FVAEConfig.preset("paper"))
    separate = fk.FusedFVAELinear.from_linear(linear, fk.FVAEConfig.preset("paper", separate_hidden=True))
    assert explain(fused).startswith("adapter: training runs the fused kernels of 'cpp'")
    assert "the smaller ops of 'cpp'" in explain(separate)
    assert "does not cover separate_hidden=True" in explain(separate)
    separate.adapter.B.data = separate.adapter.B.data.bfloat16()
    assert "reference, plain PyTorch: 'cpp' does not cover" in explain(separate)
    with fk.use_backend("reference"):
        assert "use_backend named it" in explain(fused)
    with fk.use_backend("cpp"):
        assert "will raise BackendUnavailable" in explain(separate)
    assert "no kernels for meta tensors" in explain(fused.to("meta"))
    with pytest.raises(ValueError, match="Linear holds no FVAE adapter"):
        explain(linear)


# errors


@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        ("x", torch.zeros((), dtype=torch.float64), ValueError, "x is 0-dim"),
        ("x", torch.zeros(5, 8).double(), ValueError, r"encoder1 hidden0 weight has shape .*; expected \[out, 8\]"),
        ("noise", (torch.zeros(5, 3), torch.zeros(5, 3)), TypeError, "noise1 is torch.float32 but B is torch.float64"),
        ("noise", (torch.zeros(5, 2).double(),) * 2, ValueError, r"noise1 has shape \(5, 2\); expected \(5, 3\)"),
        ("encoder1[0][0][1]", torch.zeros(4).double(), ValueError, r"encoder1 hidden0 bias has shape \(4,\)"),
        ("encoder2[2]", torch.zeros(3, 4).double(), ValueError, r"encoder2 mean weight has shape \(3, 4\)"),
        ("encoder2[5]", torch.zeros(4).double(), ValueError, r"encoder2 logvar bias has shape \(4,\)"),
        ("decoder[0][0][0]", torch.zeros(6, 5).double(), ValueError, r"decoder hidden0 weight has shape \(6, 5\)"),
        ("decoder[1]", torch.zeros(8, 6).double(), ValueError, r"decoder output weight has shape \(8, 6\)"),
        ("decoder[3]", torch.zeros(1).double(), ValueError, r"scale has shape \(1,\); expected \(7,\)"),
        ("B", torch.zeros(6, 4).double(), ValueError, r"B has shape \(6, 4\); expected \[out, 3\]"),
        (
            "base",
            torch.ones(5, 7),
            ValueError,
            r"base has shape \(5, 7\); expected \(5, 6\), the adapted layer's output",
        ),
        ("mask", torch.ones(4), ValueError, r"mask has shape \(4,\); expected \(5,\)"),
        ("dropout", 1.0, ValueError, "dropout=1.0; expected a probability, at least 0 and below 1"),
    ],
)
def test_errors_say_what_to_do(name, value, error, text):
    inputs = layer_inputs()
    inputs = inputs | {name: value} if name in (*inputs, "dropout", "base") else replaced(inputs, {name: value})
    with pytest.raises(error, match=f"layer: {text}"):
        run_layer(**inputs, backend=None)


def test_arguments_are_checked_before_a_backend_is_chosen():
    with pytest.raises(ValueError, match="layer: x is 0-dim"):
        run_layer(**(layer_inputs() | {"x": torch.zeros((), dtype=torch.float64)}), backend="no such backend")


def test_named_and_not_covered_says_which_option(backend):
    if backend == "reference":
        pytest.skip("it covers everything")
    with pytest.raises(fk.BackendUnavailable, match=f"'{backend}' was asked for to run layer.*separate_hidden=True"):
        run_layer(**layer_inputs(separate_hidden=True), backend=backend)
    with fk.use_backend(backend), pytest.raises(fk.BackendUnavailable, match="separate_hidden=True"):
        run_layer(**layer_inputs(separate_hidden=True), backend=None)
