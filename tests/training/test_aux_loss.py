"""The auxiliary loss enters the gradient exactly once, in any training loop.

Every case is compared with a direct computation of the total loss (6): the layers' terms are collected with their graph
and added to the task loss by hand, with the weights that the loop should give them.
"""

import warnings

import pytest
import torch
from torch import Tensor, nn

import fvae_kernels as fk
from fvae_kernels.training import warn
from fvae_kernels.training.aux_loss import aux_loss_layers
from tests.helpers.gradients import (
    CAUSAL,
    EXACT,
    OPTIONS,
    adapted,
    assert_same,
    checkpoint_activations,
    direct,
    grads,
    own_criterion,
    params,
)
from tests.helpers.tiny_models import batch
from tests.helpers.total_loss import by_hand

pytestmark = [
    pytest.mark.usefixtures("fixed_noise"),
    pytest.mark.filterwarnings("ignore:FVAE. the auxiliary loss entered:UserWarning"),
]


def test_the_measure_sees_a_missing_auxiliary_loss() -> None:
    model, inputs = adapted("bert"), batch("bert")
    expected = direct(model, [(inputs, 1.0, 1.0)])
    for weight in (0.0, 0.99):
        with pytest.raises(AssertionError, match="relative error"):
            assert_same(model_with(model, direct(model, [(inputs, 1.0, weight + 1e-30)])), expected)


def model_with(model: nn.Module, gradient: list[Tensor]) -> nn.Module:
    for p, g in zip(params(model), gradient, strict=True):
        p.grad = g
    return model


@pytest.mark.compat("Training loops", "plain, with gradient accumulation")
@pytest.mark.parametrize("kind", ["bert", "vit", "llama", "gpt2"])
@pytest.mark.parametrize("steps", [1, 4])
def test_plain_loop(kind: str, steps: int) -> None:
    model = adapted(kind)
    batches = [batch(kind, seed=k, dtype=torch.float64) for k in range(steps)]
    expected = direct(model, [(b, 1 / steps, 1 / steps) for b in batches])
    for inputs in batches:
        (model(**inputs).loss / steps).backward()
    assert_same(model, expected, CAUSAL if kind in ("llama", "gpt2") else EXACT)


@pytest.mark.parametrize("task", [None, "SEQ_CLS", "FEATURE_EXTRACTION"])
def test_every_task_type_and_tuple_outputs(task: str | None) -> None:
    model, inputs = adapted("bert", task=task), batch("bert")
    expected = direct(model, [(inputs, 1.0, 1.0)])
    if task != "FEATURE_EXTRACTION":  # its PeftModel does not pass labels on in a tuple
        model(**inputs, return_dict=False)[0].backward()
        assert_same(model, expected)
        model.zero_grad()
    model(**inputs).loss.backward()
    assert_same(model, expected)


def test_reported_loss_is_the_total_and_eval_loss_is_the_task() -> None:
    model, inputs = adapted("bert"), batch("bert")
    with by_hand(model) as terms:
        task = model(**inputs).loss
    total = model(**inputs).loss
    torch.testing.assert_close(total, task + torch.stack(terms).sum(), rtol=1e-12, atol=0)
    logged = sum(t["loss"] for t in fk.collect_terms(model).values())
    assert logged * OPTIONS["loss_weight"] == pytest.approx((total - task).item(), rel=1e-9)
    model.eval()
    evaluated = model(**inputs)
    expected = nn.functional.cross_entropy(evaluated.logits, inputs["labels"])
    torch.testing.assert_close(evaluated.loss, expected)


@pytest.mark.compat("Training loops", "gradient checkpointing, reentrant and not")
@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("steps", [1, 4])
def test_gradient_checkpointing(kind: str, reentrant: bool, steps: int) -> None:
    model = adapted(kind)
    batches = [batch(kind, seed=k) for k in range(steps)]
    expected = direct(model, [(b, 1 / steps, 1 / steps) for b in batches])
    checkpoint_activations(model, reentrant)
    ran: list[int] = []
    aux_loss_layers(model)[0].base_layer.register_forward_hook(lambda *_: ran.append(1))
    for inputs in batches:
        (model(**inputs).loss / steps).backward()
    assert len(ran) == 2 * steps, "no recomputation happened"
    assert_same(model, expected, CAUSAL if kind == "llama" else EXACT)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_with_the_same_noise(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # real noise
    model, inputs = adapted("bert", dropout=0.2), batch("bert")
    torch.manual_seed(3)
    model(**inputs).loss.backward()
    expected = grads(model)
    model.zero_grad()
    checkpoint_activations(model, reentrant)
    torch.manual_seed(3)
    model(**inputs).loss.backward()
    assert_same(model, expected)


@pytest.mark.compat("Precision", "`GradScaler`")
@pytest.mark.parametrize("checkpoint", [None, True, False])
def test_grad_scaler(checkpoint: bool | None) -> None:
    model, inputs = adapted("bert"), batch("bert")
    expected = direct(model, [(inputs, 1.0, 1.0)])
    if checkpoint is not None:
        checkpoint_activations(model, checkpoint)
    optimizer = torch.optim.SGD(params(model), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    scaler.scale(model(**inputs).loss).backward()
    assert_same(model, [65536 * e for e in expected])
    scaler.unscale_(optimizer)
    assert_same(model, expected)


@pytest.mark.compat("Precision", "autocast")
def test_autocast_bfloat16_gradient_has_the_auxiliary_part() -> None:
    model, inputs = adapted("bert", torch.float32), batch("bert")
    expected = direct(model, [(inputs, 1.0, 1.0)])
    without = direct(model, [(inputs, 1.0, 1e-30)])
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs).loss
    loss.backward()
    got = torch.cat([g.flatten() for g in grads(model)])
    full, task = (torch.cat([g.flatten() for g in side]) for side in (expected, without))
    share = float((got - task) @ (full - task) / (full - task).square().sum())
    assert share == pytest.approx(1.0, abs=0.02)  # bfloat16 has 8 bits


def test_two_forwards_of_different_weight_before_one_backward() -> None:
    model, first, second = adapted("bert"), batch("bert", seed=1), batch("bert", seed=2)
    expected = direct(model, [(first, 0.3, 0.3), (second, 0.7, 0.7)])
    (0.3 * model(**first).loss + 0.7 * model(**second).loss).backward()
    assert_same(model, expected)


def test_own_criterion_counts_once_and_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = adapted("bert"), batch("bert")
    expected = direct(model, [(inputs, 1.0, 1.0)])
    monkeypatch.setattr(warn, "said", set())
    with pytest.warns(UserWarning, match="attach_aux_loss"):
        own_criterion(model, inputs).backward()
    assert_same(model, expected)
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own_criterion(model, inputs).backward()
    assert_same(model, expected)


@pytest.mark.compat("Training loops", "a loss of your own, with `attach_aux_loss`")
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_own_criterion_with_attach(reentrant: bool | None) -> None:
    model = adapted("bert")
    batches = [batch("bert", seed=k) for k in range(4)]
    expected = direct(model, [(b, 1024 / 4, 1024 / 4) for b in batches])
    if reentrant is not None:
        checkpoint_activations(model, reentrant)
    for inputs in batches:
        (1024 * fk.attach_aux_loss(model, own_criterion(model, inputs)) / 4).backward()
    assert_same(model, expected)


def test_attach_refuses_what_it_cannot_do() -> None:
    model, inputs = adapted("bert"), batch("bert")
    loss = model(**inputs).loss
    with pytest.raises(ValueError, match="not for a loss that the model computed itself"):
        fk.attach_aux_loss(model, loss)
    with pytest.raises(ValueError, match="expected a scalar"):
        fk.attach_aux_loss(model, loss.expand(2))


def test_nothing_is_injected_in_eval_mode_or_without_grad() -> None:
    model, inputs = adapted("bert").eval(), batch("bert")
    model(**inputs).loss.backward()
    names = [
        n for n, p in model.named_parameters() if p.requires_grad and p.grad is not None and p.grad.abs().sum() > 0
    ]
    assert names
    assert not any("decoder" in n or "encoder2" in n for n in names)
    model.train()
    with torch.no_grad():
        assert not model(**inputs).loss.requires_grad


def test_inplace_change_of_the_output_is_allowed() -> None:
    layer = fk.FusedFVAELinear.from_linear(nn.Linear(24, 4), fk.FVAEConfig(rank=3, **OPTIONS))
    layer(torch.randn(5, 24)).relu_().sum().backward()


def test_second_backward_through_a_kept_graph_is_the_first_again() -> None:
    model, inputs = adapted("bert"), batch("bert")
    loss = model(**inputs).loss
    loss.backward(retain_graph=True)
    first = grads(model)
    model.zero_grad()
    (2 * loss).backward()
    assert_same(model, [2 * g for g in first])
