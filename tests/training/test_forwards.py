"""Each forward owns its masks and terms, with inner calls, checkpoints, second backwards and replicas.

Every case is compared with the loop's loss plus the terms, added by hand with their graph.
"""

import collections
import dataclasses
import gc
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fvae_kernels as fk
from fvae_kernels.training import warn
from fvae_kernels.training.forward import PENDING
from tests.helpers.gradients import OPTIONS, adapted, assert_same, checkpoint_activations, grads, params
from tests.helpers.padded_batches import padded, sequences
from tests.helpers.total_loss import by_hand, fix_noise

pytestmark = pytest.mark.filterwarnings("ignore:FVAE. the auxiliary loss entered:UserWarning")
Loss = Callable[[], Tensor]
CHECKPOINTS = pytest.mark.parametrize("reentrant", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])


@pytest.fixture(autouse=True)
def fixed_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    fix_noise(monkeypatch)
    monkeypatch.setattr(warn, "said", set())


def by_terms(model: nn.Module, loss: Loss, weight: float = 1.0) -> tuple[Tensor, list[Tensor]]:
    """Value and gradient of ``weight * (loss + terms)``, by hand."""
    model.zero_grad()
    with by_hand(model) as terms:
        total = loss() + 0.0
    total = total + torch.stack(terms).sum()
    (weight * total).backward()
    expected = grads(model)
    model.zero_grad()
    return total.detach(), expected


def check(model: nn.Module, loss: Loss, weight: float = 0.25) -> None:
    """`attach_aux_loss` on the loss gives the value and the gradient of the total loss."""
    value, expected = by_terms(model, loss, weight)
    check_against(model, loss, value, expected, weight)


def check_against(model: nn.Module, loss: Loss, value: Tensor, expected: list[Tensor], weight: float = 0.25) -> None:
    total = fk.attach_aux_loss(model, loss())
    torch.testing.assert_close(total.detach(), value, rtol=1e-9, atol=0, check_dtype=False)
    (weight * total).backward()
    assert_same(model, expected, 1e-6)


def inputs(kind: str = "bert") -> dict[str, Tensor]:
    rows = padded(sequences(kind))
    rows.pop("labels")
    return rows


LABELS = torch.tensor([0, 1, 2])


# Calls that bypass the model's own call


@CHECKPOINTS
def test_a_trunk_that_is_called_by_itself(reentrant: bool | None) -> None:
    model = adapted("bert")
    base, given = model.base_model.model, inputs()

    def loss() -> Tensor:
        return F.cross_entropy(base.classifier(base.bert(**given).pooler_output), LABELS)

    value, expected = by_terms(model, loss, 0.25)
    model(**inputs(), labels=LABELS).loss.backward()  # another forward, with other masks
    model.zero_grad()
    if reentrant is not None:
        checkpoint_activations(model, reentrant)
    check_against(model, loss, value, expected)


@CHECKPOINTS
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_forward_method_has_masks_of_attention_alone(side: str, reentrant: bool | None) -> None:
    """Without the hooks of the model, each block begins a forward; its mask is the attention mask."""
    model = adapted("llama")
    rows = padded(sequences("llama"), side)
    keep = rows["attention_mask"][..., None]

    def trunk(called: Any) -> Tensor:
        states = called(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).last_hidden_state
        return (states * keep).square().mean()

    trunk_module = model.base_model.model.model
    value, expected = by_terms(model, lambda: trunk(trunk_module), 0.25)  # through the hooks, with the token mask
    if reentrant is not None:
        checkpoint_activations(model, reentrant)
    check_against(model, lambda: trunk(trunk_module.forward), value, expected)


def test_stacks_of_an_encoder_decoder_that_are_called_apart() -> None:
    model, rows = adapted("t5"), padded(sequences("t5"))
    base = model.base_model.model

    def loss() -> Tensor:
        memory = base.encoder(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).last_hidden_state
        states = base.decoder(
            input_ids=rows["decoder_input_ids"],
            attention_mask=rows["decoder_attention_mask"],
            encoder_hidden_states=memory,
            encoder_attention_mask=rows["attention_mask"],
        ).last_hidden_state
        return (states * rows["decoder_attention_mask"][..., None]).square().mean()

    check(model, loss)
    rows["decoder_input_ids"] = rows["decoder_input_ids"].where(rows["decoder_attention_mask"] > 0, 7)
    before = [p.grad.clone() for p in params(model)]
    model.zero_grad()
    (0.25 * fk.attach_aux_loss(model, loss())).backward()
    assert_same(model, before, 1e-9)  # the content of padding changes nothing


# Several forwards, several backwards


@CHECKPOINTS
def test_a_loss_on_hidden_states_of_two_forwards(reentrant: bool | None) -> None:
    model = adapted("bert")
    first = inputs()
    second = {**first, "attention_mask": first["attention_mask"].flip(0)}

    def embed(given: dict[str, Tensor]) -> Tensor:
        states = model(**given, output_hidden_states=True).hidden_states[-1]
        return (states * given["attention_mask"][..., None]).sum(1)

    def loss() -> Tensor:
        return F.cross_entropy(embed(first) @ embed(second).T / 10, LABELS)

    value, expected = by_terms(model, loss, 0.25)
    if reentrant is not None:
        checkpoint_activations(model, reentrant)
    check_against(model, loss, value, expected)


def test_a_forward_that_the_loss_does_not_depend_on_is_left_out() -> None:
    model = adapted("bert")
    one, other = inputs(), {**inputs(), "input_ids": inputs()["input_ids"].flip(0)}

    def loss() -> Tensor:
        return F.cross_entropy(model(**one).logits, LABELS)

    value, expected = by_terms(model, loss, 0.25)
    metric = model(**other).logits  # has a graph and is kept
    with torch.no_grad():
        model(**other)
    check_against(model, loss, value, expected)
    assert metric.requires_grad


def test_a_second_backward_brings_no_term_again() -> None:
    model = adapted("bert")
    output = model(**inputs(), labels=LABELS)
    output.loss.backward(retain_graph=True)
    decoder = [p for name, p in model.named_parameters() if "decoder_out" in name]
    found = torch.autograd.grad(output.logits.sum(), decoder, allow_unused=True)
    assert not any(g is not None and g.abs().max() > 0 for g in found)


@pytest.mark.parametrize("order", ["loss first", "logits first"])
def test_two_losses_of_one_forward(order: str) -> None:
    model = adapted("bert")

    def parts(model: nn.Module) -> tuple[Tensor, Tensor]:
        output = model(**inputs(), labels=LABELS)
        return output.loss, output.logits.square().mean()

    _, expected = by_terms(model, lambda: sum(parts(model)))  # type: ignore[arg-type,return-value]
    losses = parts(model)
    for loss in losses if order == "loss first" else losses[::-1]:
        loss.backward(retain_graph=True)
    assert_same(model, expected)


@CHECKPOINTS
def test_labels_given_and_another_loss_used_counts_once_and_says_so(reentrant: bool | None) -> None:
    model = adapted("bert")
    _, expected = by_terms(model, lambda: F.cross_entropy(model(**inputs()).logits, LABELS))
    if reentrant is not None:
        checkpoint_activations(model, reentrant)
    output = model(**inputs(), labels=LABELS)
    with pytest.warns(UserWarning, match="attach_aux_loss"):
        F.cross_entropy(output.logits, LABELS).backward()
    assert_same(model, expected)


def test_gradient_cache() -> None:
    """Embed without a graph, then again in chunks inside the backward, each with its own backward."""
    model, rows = adapted("bert"), inputs()
    chunks = [{name: value[part] for name, value in rows.items()} for part in (slice(0, 2), slice(2, 3))]

    def embed(given: dict[str, Tensor]) -> Tensor:
        states = model(**given, output_hidden_states=True).hidden_states[-1]
        return (states * given["attention_mask"][..., None]).sum(1)

    def similarity(embedded: Tensor) -> Tensor:
        return F.cross_entropy(embedded @ embedded.T / 9, LABELS)

    def cached() -> Tensor:
        with torch.no_grad():
            embedded = torch.cat([embed(chunk) for chunk in chunks])
        loss = similarity(embedded.requires_grad_())
        (gradient,) = torch.autograd.grad(loss, embedded)
        loss = loss.detach().requires_grad_()

        def again(grad: Tensor) -> None:
            with torch.enable_grad():
                for chunk, part in zip(chunks, gradient.split([2, 1]), strict=True):
                    ((embed(chunk) * part).sum() * grad).backward()

        loss.register_hook(again)
        return loss

    value, expected = by_terms(model, lambda: similarity(torch.cat([embed(chunk) for chunk in chunks])), 0.25)
    for _ in range(2):  # a second step is like the first
        model.zero_grad()
        check_against(model, cached, value, expected)


def test_replicas_in_threads() -> None:
    """As torch.nn.DataParallel: each replica's loss has its own terms; their mean has the weight of one."""
    model, rows = adapted("bert"), {**inputs(), "labels": LABELS}
    halves = [{name: value[part] for name, value in rows.items()} for part in (slice(0, 2), slice(2, 3))]
    model.zero_grad()
    losses = []
    for half in halves:
        with by_hand(model) as terms:
            losses.append(model(**half).loss + 0.0)
        losses[-1] = losses[-1] + torch.stack(terms).sum()
    torch.stack(losses).mean().backward()
    expected = grads(model)
    model.zero_grad()
    found: dict[int, Tensor] = {}

    def run(i: int, replica: nn.Module, half: dict[str, Tensor]) -> None:
        found[i] = replica(**half).loss

    threads = [
        threading.Thread(target=run, args=(i, replica, half))
        for i, (replica, half) in enumerate(zip(replicas(model, 2), halves, strict=True))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.stack([found[0], found[1]]).mean().backward()
    assert_same(model, expected)


def replicas(model: nn.Module, count: int) -> list[nn.Module]:
    """As torch.nn.parallel.replicate, on one device."""
    modules = list(model.modules())
    index = {module: i for i, module in enumerate(modules)}
    made = []
    for _ in range(count):
        copies = [module._replicate_for_data_parallel() for module in modules]
        for module, copy in zip(modules, copies, strict=True):
            copy._former_parameters = {}
            for name, child in module._modules.items():
                setattr(copy, name, None if child is None else copies[index[child]])
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    setattr(copy, name, parameter.view_as(parameter))
        made.append(copies[0])
    return made


def test_forwards_that_no_backward_follows_are_freed() -> None:
    """Outputs in the middle of the graph (hidden states) must not keep the terms that come after them."""
    model = adapted("bert")
    gc.collect()
    gc.disable()
    try:
        for attach in (False, True):
            output = model(**inputs(), output_hidden_states=True)
            if attach:
                fk.attach_aux_loss(model, output.hidden_states[1].square().mean())
            assert len(PENDING) == 1
            del output
            assert not PENDING
    finally:
        gc.enable()


# Around the layers


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


class Branches(nn.Module):
    """A layer outside the graph of the loss, a layer that is called twice, and any form of output."""

    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.form, self.twice, self.unused, self.head = form, nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        x = self.twice(self.twice(x).tanh())
        self.unused(x)
        logits = self.head(x)
        return self.form(F.cross_entropy(logits, labels), logits)


Named = collections.namedtuple("Named", "logits loss")


@dataclasses.dataclass(frozen=True)
class Output:
    loss: Tensor
    logits: Tensor


FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Tensor]]] = {
    "mapping": (lambda loss, logits: {"loss": loss, "logits": logits}, lambda o: o["loss"]),
    "named tuple": (lambda loss, logits: Named(logits, loss), lambda o: o.loss),
    "dataclass": (lambda loss, logits: Output(loss, logits), lambda o: o.loss),
    "loss first": (lambda loss, logits: (loss, logits), lambda o: o[0]),
    "loss last": (lambda loss, logits: (logits, loss), lambda o: o[1]),
    "list": (lambda loss, logits: [loss, logits], lambda o: o[0]),
    "alone": (lambda loss, logits: loss, lambda o: o),
    "shape [1]": (lambda loss, logits: {"loss": loss[None]}, lambda o: o["loss"].sum()),
    "shape [1], tuple": (lambda loss, logits: (loss[None], logits), lambda o: o[0].sum()),
}


SEEN = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)).double()


def branches(form: str) -> tuple[nn.Module, Callable[[], Any]]:
    torch.manual_seed(0)
    model = Branches(FORMS[form][0]).double()
    fk.replace_linears(model, fk.FVAEConfig(rank=3, **OPTIONS), ["twice", "unused"])
    with torch.no_grad():
        for p in params(model):
            p.add_(0.1 * torch.randn_like(p))
    return model, lambda: model(SEEN, labels=LABELS)


@pytest.mark.parametrize("form", list(FORMS))
def test_every_form_of_output(form: str) -> None:
    """No warning: the loss is found. The layer outside its graph is in the loss and in the gradient."""
    model, call = branches(form)
    value, expected = by_terms(model, lambda: FORMS[form][1](call()), 0.5)
    assert all(g.abs().sum() > 0 for n, g in zip(trained(model), expected, strict=True) if n != "unused.adapter.B")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = call()
        loss = FORMS[form][1](output)
        (0.5 * loss).backward()
    assert type(output) is type(FORMS[form][0](torch.zeros(()), torch.zeros(3)))
    torch.testing.assert_close(loss.detach(), value)
    assert_unused_or_same(model, expected)


def trained(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def assert_unused_or_same(model: nn.Module, expected: list[Tensor]) -> None:
    for name, g, e in zip(
        [n for n, p in model.named_parameters() if p.requires_grad], grads(model), expected, strict=True
    ):
        assert (g - e).norm() <= 1e-9 * max(float(e.norm()), 1e-12), name


def test_terms_of_a_layer_that_is_called_twice_add_up() -> None:
    model, call = branches("mapping")
    with by_hand(model) as terms:
        call()
    call()
    logged = sum(values["loss"] for values in fk.collect_terms(model).values())
    assert logged * OPTIONS["loss_weight"] == pytest.approx(float(torch.stack(terms).sum()), rel=1e-9)
    assert len(terms) == 3


# torch.func, double backward, frozen adapters, eval mode


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
