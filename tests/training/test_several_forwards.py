"""Each forward owns its masks and terms: several forwards, several backwards, forwards in a backward, replicas."""

import gc
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fvae_kernels as fk
from fvae_kernels.training.forward import PENDING
from tests.helpers.forwards import CHECKPOINTS, LABELS, by_terms, check, check_against, inputs
from tests.helpers.gradients import adapted, assert_same, checkpoint_activations, grads
from tests.helpers.padded_batches import padded, sequences
from tests.helpers.total_loss import by_hand

pytestmark = [
    pytest.mark.usefixtures("fixed_noise", "nothing_said"),
    pytest.mark.filterwarnings("ignore:FVAE. the auxiliary loss entered:UserWarning"),
]


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


def test_an_output_that_a_second_forward_passes_on_keeps_its_terms() -> None:
    """The decoder's forward returns the encoder's states, of a forward before it."""
    model, rows = adapted("t5"), padded(sequences("t5"))
    labels = rows.pop("labels")

    def loss() -> Tensor:
        encoder = model.base_model.model.encoder
        memory = encoder(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"])
        given = {name: value for name, value in rows.items() if name != "input_ids"}
        logits = model(**given, encoder_outputs=memory).logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    check(model, loss)


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


@CHECKPOINTS
@pytest.mark.parametrize("attached", [True, False])
def test_gradient_cache(attached: bool, reentrant: bool | None) -> None:
    """Embed without a graph, then again in chunks inside the backward, each with its own backward.

    Nothing tells the weight of those forwards, if their loss is not handed over.
    """
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
    if reentrant is not None:
        checkpoint_activations(model, reentrant)
    if not attached:
        with pytest.raises(RuntimeError, match=r"attach_aux_loss\(model, loss\)"):
            cached().backward()
        return
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
