"""A step as a node of autograd: the compiled library's own does what `PlannedLayer` does, and costs the host less."""

import gc
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fvae_kernels.ops import _host
from fvae_kernels.ops._layer_plan import Gradients, PlannedLayer


class Scaled:
    """A step: y = base + the sum of its entries, and twice that sum in the first of four terms."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.calls = error, []

    def forward(self, base, *entries):
        there = [e.sum() for e in entries if e is not None]
        total = torch.stack(there).sum()
        return base + total, torch.stack([2 * total, total, total, total]), total.reshape(1)

    def backward(self, needed, saved, grad_y, grad_loss):
        if self.error is not None:
            raise self.error
        self.calls.append((needed, [s is not None for s in saved], grad_y is not None, grad_loss is not None))
        _, *entries = saved
        grad = sum(g for g in (None if grad_y is None else grad_y.sum(), grad_loss and 2 * grad_loss) if g is not None)
        grads = [grad.expand_as(e).clone() if flag else None for flag, e in zip(needed[1:], entries, strict=True)]
        x, *parameters = grads
        return Gradients(grad_y if needed[0] else None, x, parameters, range(1, len(parameters) + 1))


@pytest.fixture
def node(_way):
    return lambda step, *tensors: _host.run_step(PlannedLayer, step, *tensors)


def leaves(*flags):
    """Base and entries; None for a flag that is None, else a tensor that requires grad or does not."""
    return [None if f is None else torch.full((2, 3), 1.0 + i, requires_grad=f) for i, f in enumerate(flags)]


@pytest.mark.usefixtures("compiled_library")
@given(
    flags=st.lists(st.sampled_from([None, False, True]), min_size=1, max_size=4),
    base=st.booleans(),
    used=st.sampled_from(["y", "loss", "both"]),
)
def test_both_nodes_do_the_same(flags, base, used):
    flags = base, True, *flags
    found = []
    for run in (lambda *a: _host.compiled().run_step(*a), PlannedLayer.apply):
        step, tensors = Scaled(), leaves(*flags)
        y, loss, terms = run(step, *tensors)
        assert (y.requires_grad, loss.requires_grad, terms.requires_grad) == (True, True, False)
        assert not any(t._is_view() for t in (y, terms))
        sum(t.sum() for t in {"y": [y], "loss": [loss], "both": [y, loss]}[used]).backward()
        found.append((y.detach(), loss.detach(), terms, [t if t is None else t.grad for t in tensors], step.calls))
    (*values, grads, calls), (*others, other_grads, other_calls) = found
    assert all(map(torch.equal, values, others))
    assert calls == other_calls, "flags of the gradients, what was saved, and what arrived"
    for one, other in zip(grads, other_grads, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def test_without_a_gradient_there_is_no_graph(node):
    y, loss, _ = node(Scaled(), *leaves(False, False))
    assert y.grad_fn is None
    assert loss.grad_fn is None
    with torch.no_grad():
        assert node(Scaled(), *leaves(True, True))[0].grad_fn is None


def test_hooks_get_what_the_general_op_saves(node):
    """The state, then the entries: a checkpoint may run forward by one node and recompute by another."""
    packed = []
    tensors = leaves(True, True, None, False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        y, *_ = node(Scaled(), *tensors)
    assert [t.shape for t in packed] == [(1,), (2, 3), (2, 3)]
    assert packed[1].data_ptr() == tensors[1].data_ptr()
    assert packed[2].data_ptr() == tensors[3].data_ptr()
    y.sum().backward()


def test_what_autograd_refuses(node):
    base, x = leaves(True, True)
    y, loss, _ = node(Scaled(), base, x)
    (y.sum() + loss).backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()
    y, *_ = node(Scaled(), base, x)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_kept_graph_runs_again(node):
    base, x = leaves(True, True)
    y, *_ = node(Scaled(), base, x)
    y.sum().backward(retain_graph=True)
    first = x.grad.clone()
    y.sum().backward()
    assert torch.equal(x.grad, 2 * first)


def test_errors_of_a_step_are_its_own(node):
    class OwnError(Exception):
        pass

    y, *_ = node(Scaled(OwnError("of the backward")), *leaves(True, True))
    with pytest.raises(OwnError, match="of the backward"):
        y.sum().backward()

    class Broken(Scaled):
        def forward(self, base, *entries):
            raise OwnError("of the forward")

    with pytest.raises(OwnError, match="of the forward"):
        node(Broken(), *leaves(True, True))


def test_anomaly_mode_shows_the_forward(node):
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        y, *_ = node(Scaled(ValueError("of the backward")), *leaves(True, True))
        with pytest.warns(UserWarning, match="forward call"), pytest.raises(ValueError, match="of the backward"):
            y.sum().backward()


class Changed(Scaled):
    """A step with mistakes in what its backward returns."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def backward(self, *arguments):
        return self.change(super().backward(*arguments))


def test_a_wrong_number_of_gradients_is_refused(node):
    y, *_ = node(Changed(lambda found: found._replace(places=(1, 0, 1, 1))), *leaves(True, True, True))
    with pytest.raises(RuntimeError, match="returned"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda found: found[:-1], "3 entries; expected 4"),
        (lambda found: found._replace(places=(2,)), "1 gradients and place 2"),
        (lambda found: found._replace(made=["text"]), "str; expected a tensor or None"),
    ],
)
def test_wrong_gradients_are_refused(compiled_library, change, error):
    y, *_ = compiled_library.run_step(Changed(change), *leaves(True, True, True))
    with pytest.raises((RuntimeError, TypeError), match=error):
        y.sum().backward()


@pytest.mark.usefixtures("compiled_library")
def test_a_list_of_gradients_is_taken_as_it_is():
    """Of the parameters in any order; the leaves get the tensors of the list and no copies."""
    made = _host.empties_like([torch.ones(2, 3)] * 3, (True,) * 3)
    addresses = [t.fill_(number).data_ptr() for number, t in enumerate(made)]

    class Listed(Scaled):
        def backward(self, *arguments):
            nonlocal made
            found = super().backward(*arguments)._replace(made=made, places=(3, 0, 1))
            made = None
            return found

    tensors = leaves(True, True, True, True, True)
    y, *_ = _host.compiled().run_step(Listed(), *tensors)
    y.sum().backward()
    third, none, first = (t.grad for t in tensors[2:])
    assert none is None
    assert (third == 2).all()
    assert (first == 0).all()
    assert [third.data_ptr(), first.data_ptr()] == [addresses[2], addresses[0]]


def test_no_step_outlives_its_graph(node):
    step, tensors = Scaled(), leaves(True, True)
    gone = weakref.ref(step)
    y, loss, _ = node(step, *tensors)
    del step
    gc.collect()
    assert gone() is not None
    (y.sum() + loss).backward()
    del y, loss, _
    gc.collect()
    assert gone() is None
    assert sys.getrefcount(tensors[1]) <= 3


def test_a_backward_on_another_thread(node):
    base, x = leaves(True, True)
    y, *_ = node(Scaled(), base, x)
    thread = threading.Thread(target=lambda: y.sum().backward())
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert x.grad is not None


def test_nodes_of_two_results_are_one(node):
    """`hooks` tells by the node that an output is a layer's own."""
    y, loss, _ = node(Scaled(), *leaves(True, True))
    assert y.grad_fn in {loss.grad_fn}
    y.grad_fn.metadata["mark"] = 1
    assert loss.grad_fn.metadata["mark"] == 1


def test_compiled_autograd(node):
    compiled_autograd = pytest.importorskip("torch._dynamo.compiled_autograd")
    base, x = leaves(True, True)
    with compiled_autograd._enable(torch.compile(backend="eager")):
        y, loss, _ = node(Scaled(), base, x)
        (y.sum() + loss).backward()
    assert torch.equal(x.grad, torch.full((2, 3), 8.0))
    y, *_ = node(Scaled(), base, x)
    if y.grad_fn.name() != "PlannedLayerBackward":
        with (
            compiled_autograd._enable(torch.compile(backend="eager")),
            pytest.raises(RuntimeError, match="switch it on around both"),
        ):
            y.sum().backward()


@pytest.mark.usefixtures("compiled_library")
def test_a_graph_may_live_until_the_interpreter_ends():
    program = (
        "import torch; from tests.ops.test_step import Scaled, leaves; from fvae_kernels.ops import _host;"
        "y, *_ = _host.compiled().run_step(Scaled(), *leaves(True, True)); torch.kept = y"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_other_arguments_are_refused(compiled_library):
    run = compiled_library.run_step
    for arguments in ((), (Scaled(),), (Scaled(), None), (Scaled(), torch.ones(2), "text")):
        with pytest.raises(TypeError, match="expected"):
            run(*arguments)
