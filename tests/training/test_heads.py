"""The objective follows what a head does with `num_items_in_batch`: objective / task loss is always the same.

Trainer passes the number to every model that takes it. A head that uses it returns a share of the step's loss; other
heads return a mean. Tested for every family of transformers that has one of four heads and can be built with tiny
sizes.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fvae_kernels as fk
from fvae_kernels.nn.linear import is_linear
from tests.helpers.heads import HEADS, example, families, tiny
from tests.helpers.total_loss import by_hand, fix_noise

pytestmark = pytest.mark.filterwarnings("ignore")
FAMILIES = families()
CERTAIN = {"bert", "roberta", "distilbert", "electra", "gpt2", "gpt_neox", "llama", "mistral", "opt", "qwen2", "vit"}
CONFIG = fk.FVAEConfig(
    rank=2, encoder_hidden=(), decoder_hidden=(4,), kl_weight=10.0, loss_weight=1.0, dropout=0.0
)  # fmt: skip


class Ratio:
    """In place of a log's meter: objective / task loss of the last forward."""

    value: float | None = None

    def add(self, task: Tensor, total: Tensor) -> None:
        self.value = float((total - task).detach() / task.detach())


def adapted(kind: str, head: str) -> nn.Module:
    """A model with one adapted linear layer in its trunk. Skips if transformers cannot build or run it."""
    try:
        model = tiny(kind, head).train()
        assert model(**example(head)).loss.isfinite()
    except Exception as error:
        if kind in CERTAIN:
            raise
        pytest.skip(f"{kind}, {head}: {type(error).__name__}")
    first = next(n for n, m in model.named_modules() if is_linear(m) and type(m).__name__ in ("Linear", "Conv1D"))
    fk.replace_linears(model, CONFIG, [first])
    return model


@pytest.mark.compat("Trainers", "`num_items_in_batch`: all heads for sequences, tokens, images and causal models")
@pytest.mark.parametrize(("kind", "head"), [(kind, head) for kind, heads in FAMILIES.items() for head in heads])
def test_the_objective_follows_the_head(kind: str, head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fix_noise(monkeypatch)
    model: Any = adapted(kind, head)
    meter = model._fvae_hooks.meter = Ratio()
    ratios = []
    for items in (None, torch.tensor(1000), 1000):
        meter.value = None
        model(**example(head), **({} if items is None else {"num_items_in_batch": items}))
        ratios.append(meter.value)
    if ratios[0] is None and kind not in CERTAIN:
        pytest.skip(f"{kind}, {head}: its first linear layer does not run")
    assert ratios[1:] == [pytest.approx(ratios[0], rel=1e-3)] * 2


def test_both_kinds_of_heads_are_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads that divide (Llama's, also under another class name), and heads that do not."""
    from transformers import LlamaForCausalLM

    class Mine(LlamaForCausalLM):
        def forward(self, input_ids: Any = None, labels: Any = None, **rest: Any) -> Any:
            return super().forward(input_ids, labels=labels, **rest)

    fix_noise(monkeypatch)
    for kind, head, cls, divides in (
        ("llama", "causal", None, True),
        ("llama", "causal", Mine, True),
        ("llama", "sequence", None, False),
        ("bert", "sequence", None, False),
    ):
        model = tiny(kind, head)
        model = model if cls is None else cls(model.config)
        given = example(head)
        plain, passed = model(**given).loss, model(**given, num_items_in_batch=torch.tensor(1000)).loss
        assert bool(passed < plain / 10) == divides, kind
        torch.testing.assert_close(float(plain), float(model(**given).loss), msg=kind)
    assert set(HEADS) == {"sequence", "causal", "token", "image"}


def test_a_number_that_is_looked_at_alone_is_not_used() -> None:
    from fvae_kernels.training.token_share import observe_items

    number = observe_items({"num_items_in_batch": torch.tensor(4)})["num_items_in_batch"]
    assert number.dim() == 0
    assert number.device.type == "cpu"
    assert repr(number)
    moved = number.to("cpu").float()
    assert not number.used[0]
    result = torch.ones(2) / moved
    assert number.used[0]
    assert type(result) is Tensor
    assert torch.equal(result, torch.full((2,), 0.25))
    for convert in (int, float, lambda n: n.item()):
        number = observe_items({"num_items_in_batch": 4})["num_items_in_batch"]
        assert convert(number) == 4
        assert number.used[0]


class Head(nn.Module):
    """A head whose code does not say whether its loss divides by the number of items."""

    def __init__(self, divides: bool) -> None:
        super().__init__()
        self.linear, self.divides = nn.Linear(6, 3), divides

    def loss_function(self, logits: Tensor, labels: Tensor, items: Any) -> Tensor:
        return F.cross_entropy(logits, labels)

    def summed(self, logits: Tensor, labels: Tensor, items: Any) -> Tensor:
        if torch.is_tensor(items):
            items = items.to(logits.device)
        return F.cross_entropy(logits, labels, reduction="sum") / items

    def forward(self, x: Tensor, labels: Tensor, num_items_in_batch: Any = None) -> dict[str, Tensor]:
        loss = self.summed if self.divides else self.loss_function
        return {"loss": loss(self.linear(x), labels, num_items_in_batch)}


@pytest.mark.parametrize(("items", "divides"), [(torch.tensor(40), True), (40, False)])
def test_a_compiled_head_is_observed_too(items: Any, divides: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fix_noise(monkeypatch)
    torch.manual_seed(0)
    model, x, labels = Head(divides), torch.randn(5, 6), torch.tensor([0, 1, -100, 2, 1])
    fk.replace_linears(model, CONFIG)
    with by_hand(model) as terms:
        task = model(x, labels, num_items_in_batch=items)["loss"]
    share = 4 / 40 if divides else 1.0
    expected = task + share * torch.stack(terms).sum()
    for called in (model, torch.compile(model, backend="eager", fullgraph=True)):
        torch.testing.assert_close(called(x, labels, num_items_in_batch=items)["loss"], expected)
    torch._dynamo.reset()
