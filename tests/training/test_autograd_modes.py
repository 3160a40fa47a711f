"""Backward hooks, recomputation without the generator, torch.func, double backward, frozen adapters, eval mode."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fvae_kernels as fk
from fvae_kernels.training import warn
from tests.helpers.forwards import LABELS, SEEN, assert_unused_or_same, branches, by_terms, inputs
from tests.helpers.gradients import adapted, assert_same, grads
from tests.helpers.padded_batches import padded, sequences
from tests.helpers.total_loss import by_hand

pytestmark = [
    pytest.mark.usefixtures("fixed_noise", "nothing_said"),
    pytest.mark.filterwarnings("ignore:FVAE. the auxiliary loss entered:UserWarning"),
]


def test_full_backward_hooks_on_every_module() -> None:
    model = adapted("bert")
    _, expected = by_terms(model, lambda: model(**inputs(), labels=LABELS).loss)
    for module in model.modules():
        module.register_full_backward_hook(lambda *_: None)
    model(**inputs(), labels=LABELS).loss.backward()
    assert_same(model, expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_recomputation_without_the_generator(kind: str, reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # real noise
    model, rows = adapted(kind, dropout=0.2), padded(sequences(kind))

    def step() -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(5)
        model(**rows).loss.backward()
        return grads(model)

    expected = step()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant, "preserve_rng_state": False})
    model.base_model.model.enable_input_require_grads()
    step()
    assert_same(model, expected, 1e-6)


def test_torch_func_grad_is_the_gradient() -> None:
    model, call = branches("alone")
    call().backward()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, values, (SEEN,), {"labels": LABELS})

    found = torch.func.grad(loss)({name: p.detach() for name, p in named.items()})
    model.zero_grad()
    call().backward()
    for name, p in named.items():
        torch.testing.assert_close(found[name], torch.zeros_like(p) if p.grad is None else p.grad, msg=name)


def test_torch_func_without_a_loss_counts_with_weight_one() -> None:
    model, _ = branches("mapping")
    layer, x = model.twice, torch.randn(3, 6).double()
    named = {name: p.detach() for name, p in layer.named_parameters()}
    found = torch.func.grad(lambda values: torch.func.functional_call(layer, values, (x,)).square().sum())(named)
    layer(x).square().sum().backward()
    for name, p in layer.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(found[name], p.grad, msg=name)


def test_a_double_backward_is_right_in_the_reference_and_refused_by_kernels() -> None:
    model, call = branches("alone")
    first = model.twice.adapter.B

    def penalty(total: Callable[[], Tensor]) -> Tensor:
        (gradient,) = torch.autograd.grad(total(), first, create_graph=True)
        return gradient.square().sum()

    with fk.use_backend("reference"):
        with by_hand(model) as terms:
            penalty(lambda: call() + torch.stack(terms).sum()).backward()
        expected = grads(model)
        model.zero_grad()
        penalty(call).backward()
    assert_unused_or_same(model, expected)
    if "cpp" in fk.available_backends():
        with fk.use_backend("cpp"), pytest.raises(RuntimeError, match="differentiable"):
            penalty(call).backward()


def test_a_frozen_adapter_has_no_objective_and_draws_nothing() -> None:
    model, call = branches("alone")
    for layer in (model.twice, model.unused):
        layer.adapter.requires_grad_(False)
    model.head.requires_grad_(True)
    in_training = call()
    in_training.backward()
    assert model.twice.adapter.B.grad is None
    model.eval()
    assert torch.equal(in_training, call())


def test_training_in_eval_mode_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warn, "said", set())
    model, call = branches("alone")
    model.eval()
    with pytest.warns(UserWarning, match=r"eval mode.*model\.train\(\)"):
        call().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call().backward()
