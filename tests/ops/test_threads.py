"""Training in two Python threads at once, and the same training twice: the same bits."""

import threading

import peft
import pytest
import torch

import fvae_kernels as fk
from fvae_kernels import collect_terms
from tests.helpers.tiny_models import TARGETS, batch, build
from tests.helpers.total_loss import fix_noise

STEPS = 12
KINDS = {"bert": 1.0, "vit": 0.25}  # the layers have to find the weight of the loss


@pytest.fixture(autouse=True)
def fixed_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has one generator per process, so threads that draw from it share its numbers."""
    fix_noise(monkeypatch)


def prepared(kind: str) -> torch.nn.Module:
    """A model whose auxiliary loss is large enough to be seen in the gradients."""
    torch.manual_seed(0)
    config = fk.FVAELoraConfig(
        r=3, target_modules=TARGETS[kind], encoder_hidden=(5,), decoder_hidden=(7,), dropout=0.0, loss_weight=0.1
    )
    return peft.get_peft_model(build(kind), config).train()


def trained(kind: str, model: torch.nn.Module) -> list[torch.Tensor]:
    """Parameters after some steps, and the terms of each."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    found = []
    for step in range(STEPS):
        optimizer.zero_grad()
        model(**batch(kind, size=4, seed=step)).loss.mul(KINDS[kind]).backward()
        optimizer.step()
        found += [torch.tensor(list(terms.values())) for terms in collect_terms(model).values()]
    return [*(p.detach().clone() for p in parameters), *found]


def assert_same_bits(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_two_trainings_at_once_are_two_in_a_row() -> None:
    alone = {kind: trained(kind, prepared(kind)) for kind in KINDS}
    models = {kind: prepared(kind) for kind in KINDS}
    together: dict[str, list[torch.Tensor]] = {}
    threads, start = torch.get_num_threads(), threading.Barrier(len(KINDS))

    def work(kind: str) -> None:
        torch.set_num_threads(threads)  # a new thread starts with torch's default
        start.wait()
        together[kind] = trained(kind, models[kind])

    workers = [threading.Thread(target=work, args=(kind,)) for kind in KINDS]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for kind in KINDS:
        assert_same_bits(together[kind], alone[kind])


@pytest.mark.parametrize("threads", [1, 2])
def test_a_training_repeats_itself(threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert_same_bits(*(trained("bert", prepared("bert")) for _ in range(2)))
    finally:
        torch.set_num_threads(before)
