"""Padded tokens stay out of the objective: a padded batch has the gradient of its sequences without the padding."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments

import fvae_kernels as fk
from fvae_kernels.training.aux_loss import aux_loss_layers
from tests.helpers.compiled import with_checkpointing
from tests.helpers.gradients import (
    CAUSAL,
    EXACT,
    OPTIONS,
    adapted,
    assert_same,
    checkpoint_activations,
    direct,
    grads,
    params,
)
from tests.helpers.padded_batches import LENGTHS, Batch, forget_position, padded, sequences
from tests.helpers.tiny_models import TARGETS, build

pytestmark = pytest.mark.compat("Training loops", "padded batches, left and right: padding stays out of the objective")


@pytest.fixture(autouse=True)
def _draw(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_position(monkeypatch)


def shares(counts: list[float]) -> list[float]:
    return [count / sum(counts) for count in counts]


def without_padding(model: nn.Module, kind: str, rows: list[Batch], tokens: str = "input_ids") -> list[Tensor]:
    """Gradient of the padded batch's total loss, from single sequences: means over rows, labels and tokens."""
    counts = [float(row[tokens].shape[1]) if tokens in row else frames(row["input_values"].shape[1]) for row in rows]
    labels = {"llama": [n - 1.0 for n in LENGTHS], "t5": [float(n) for n in LENGTHS]}.get(kind, [1.0] * len(rows))
    if kind == "t5":
        labels.reverse()
    return direct(model, list(zip(rows, shares(labels), shares(counts), strict=True)))


def frames(samples: int) -> float:
    """Number of frames in the tiny Wav2Vec2: kernels 4 and 3, both with stride 2."""
    return float(((samples - 4) // 2 + 1 - 3) // 2 + 1)


@pytest.mark.parametrize(
    ("kind", "side"), [("bert", "right"), ("llama", "right"), ("llama", "left"), ("wav2vec2", "right")]
)
def test_a_padded_batch_is_its_sequences_without_padding(kind: str, side: str) -> None:
    model, rows = adapted(kind), sequences(kind)
    expected = without_padding(model, kind, rows)
    inputs = padded(rows, side)
    assert inputs["attention_mask"].sum() < inputs["attention_mask"].numel()
    model(**inputs).loss.backward()
    assert_same(model, expected, CAUSAL if kind == "llama" else EXACT)
    model.zero_grad()
    inputs.pop("attention_mask")
    model(**inputs).loss.backward()
    with pytest.raises(AssertionError, match="relative error"):
        assert_same(model, expected, 1e-3)


@pytest.mark.parametrize(
    ("targets", "tokens"),
    [
        (r"encoder.*\.(q|v)", "input_ids"),
        (r"decoder.*SelfAttention\.(q|v)", "decoder_input_ids"),
        (r"decoder.*EncDecAttention\.(q|o)", "decoder_input_ids"),
        (r"decoder.*EncDecAttention\.(k|v)", "input_ids"),
    ],
)
def test_encoder_and_decoder_have_their_own_masks(targets: str, tokens: str) -> None:
    model, rows = adapted("t5", target_modules=targets), sequences("t5")
    expected = without_padding(model, "t5", rows, tokens)
    model(**padded(rows)).loss.backward()
    assert_same(model, expected)


# What happens to the mask on the way


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("attach", [False, True])
def test_a_recomputation_sees_the_mask_of_its_forward(reentrant: bool, attach: bool) -> None:
    """Two forwards with different masks of one shape, then one backward."""
    model, rows = adapted("bert"), sequences("bert")
    batches = [padded(rows), padded([rows[1], rows[2], rows[0]])]
    expected = direct(model, [(batches[0], 0.3, 0.3), (batches[1], 0.7, 0.7)])
    checkpoint_activations(model, reentrant)
    ran: list[int] = []
    aux_loss_layers(model)[0].base_layer.register_forward_hook(lambda *_: ran.append(1))
    losses = []
    for inputs in batches:
        labels = inputs.pop("labels") if attach else None
        output = model(**inputs)
        if attach:
            output["loss"] = fk.attach_aux_loss(model, nn.functional.cross_entropy(output.logits, labels))
        losses.append(output.loss)
    (0.3 * losses[0] + 0.7 * losses[1]).backward()
    assert len(ran) == 4, "no recomputation happened"
    assert_same(model, expected)


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_model(recompute: bool) -> None:
    model, rows = adapted("bert"), sequences("bert")
    expected = without_padding(model, "bert", rows)
    if recompute:
        checkpoint_activations(model, False)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=not recompute)  # recomputing, transformers logs
    with with_checkpointing():
        compiled(**padded(rows)).loss.backward()
    assert_same(model, expected)
    torch._dynamo.reset()


class BreaksTheGraph(nn.Module):
    """A checkpointed layer between two graph breaks: it and its recomputation are compiled alone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 4).double()

    def forward(self, x: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        torch._dynamo.graph_break()
        y = checkpoint(self.block, x, use_reentrant=False)
        torch._dynamo.graph_break()
        return {"loss": y.square().mean()}

    def block(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return self.linear(x)


def test_compiled_in_pieces_with_checkpointing() -> None:
    model = BreaksTheGraph()
    fk.replace_linears(model, fk.FVAEConfig(rank=3, **OPTIONS))
    with torch.no_grad():
        for p in params(model):
            p.add_(0.1 * torch.randn_like(p))
    x, mask = torch.randn(2, 5, 24).double(), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    model(x, mask)["loss"].backward()
    expected = grads(model)
    model.zero_grad()
    with with_checkpointing():
        torch.compile(model, backend="aot_eager")(x, mask)["loss"].backward()
    assert_same(model, expected)
    torch._dynamo.reset()


def test_trainer_with_unequal_batches(tmp_path: Path) -> None:
    """Two micro-batches; SGD with learning rate 1 subtracts the gradient of the step."""
    rows = sequences("llama")
    rows += [{name: value.clone() for name, value in row.items()} for row in (rows[1], rows[0], rows[1])]
    model, trained = adapted("llama"), adapted("llama")
    batches = [padded(rows[:3]), padded(rows[3:])]
    weights = shares([float(b["labels"][:, 1:].ne(-100).sum()) for b in batches])
    expected = direct(model, list(zip(batches, weights, weights, strict=True)))
    args = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=3, gradient_accumulation_steps=2, max_steps=1,
        optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0.0, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, train_sampling_strategy="sequential",
    )  # fmt: skip
    Trainer(model=trained, args=args, train_dataset=rows, data_collator=padded).train()
    for before, after in zip(params(model), params(trained), strict=True):
        before.grad = before.detach() - after.detach()
    assert_same(model, expected, 1e-6)


def test_replaced_linears() -> None:
    torch.manual_seed(0)
    model, rows = build("bert").double().train(), sequences("bert")
    fk.replace_linears(model, fk.FVAEConfig(rank=3, **OPTIONS), TARGETS["bert"])
    with torch.no_grad():
        for p in params(model):
            p.add_(0.1 * torch.randn_like(p))
    expected = without_padding(model, "bert", rows)
    model(**padded(rows)).loss.backward()
    assert_same(model, expected)


@pytest.mark.parametrize("kind", ["bert", "llama", "wav2vec2", "t5"])
def test_what_stands_in_padding_changes_nothing(kind: str) -> None:
    model, rows = adapted(kind), sequences(kind)
    gradients = []
    for fill in (1, 2):
        model.zero_grad()
        model(**padded(rows, fill=fill)).loss.backward()
        gradients.append(grads(model))
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-15)
