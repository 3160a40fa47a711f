"""sentence-transformers with an adapter: the step is that of the total loss (6), with plain and with cached losses."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sentence_transformers")
pytest.importorskip("datasets")

from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    losses,
)
from sentence_transformers.models import Pooling, Transformer
from torch.utils.data import BatchSampler, SequentialSampler

import fvae_kernels as fk
from tests.helpers.peft_models import SMALL
from tests.helpers.texts import tokenizer, words
from tests.helpers.tiny_models import build
from tests.helpers.total_loss import by_hand, fix_noise
from tests.helpers.trainer_tools import ONE_STEP, params, step_of

STEPS, SIZE, CHUNK = 2, 4, 3  # the cached losses embed 3 texts and then 1
PAIRS = [{"anchor": words(i, 2 + i % 4), "positive": words(i + 1, 1 + i % 5)} for i in range(STEPS * SIZE)]
ROWS = {
    "pairs": PAIRS,
    "scores": [{"a": row["anchor"], "b": row["positive"], "score": i % 3 / 2} for i, row in enumerate(PAIRS)],
}


class InOrder(SentenceTransformerTrainer):
    def get_batch_sampler(self, dataset: Any, batch_size: int, drop_last: bool, **_: Any) -> BatchSampler:
        return BatchSampler(SequentialSampler(dataset), batch_size, drop_last)


def embedder(folder: Path, targets: Any) -> Any:
    trunk = build("bert").bert
    trunk.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    word = Transformer(str(folder))
    model = SentenceTransformer(modules=[word, Pooling(word.get_embedding_dimension(), "mean")], device="cpu")
    model.add_adapter(fk.FVAELoraConfig(target_modules=targets, init_weights=False, **SMALL))
    return model.double()


def trainer_of(model: Any, loss: Any, rows: str, folder: Path, **options: Any) -> Any:
    arguments = ONE_STEP | {"gradient_accumulation_steps": STEPS, "per_device_train_batch_size": SIZE} | options
    return InOrder(
        model=model,
        args=SentenceTransformerTrainingArguments(str(folder / "out"), **arguments),
        train_dataset=Dataset.from_list(ROWS[rows]),
        loss=loss,
    )


def chunked(model: Any, features: dict[str, Any], size: int) -> torch.Tensor:
    """Embeddings of chunks of a batch, each without the columns that are padding in all of its texts."""
    chunks = [{k: v[i : i + size] for k, v in features.items() if torch.is_tensor(v)} for i in range(0, SIZE, size)]
    widths = [int(chunk["attention_mask"].sum(1).max()) for chunk in chunks]
    cut = [{k: v[:, :width] for k, v in chunk.items()} for chunk, width in zip(chunks, widths, strict=True)]
    return torch.cat([model(chunk)["sentence_embedding"] for chunk in cut])


LOSSES: dict[str, tuple[str, Any, Any, int]] = {
    "ranking": ("pairs", losses.MultipleNegativesRankingLoss, losses.MultipleNegativesRankingLoss, SIZE),
    "cosine": ("scores", losses.CosineSimilarityLoss, losses.CosineSimilarityLoss, SIZE),
    "cached ranking": (
        "pairs",
        lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=CHUNK),
        losses.MultipleNegativesRankingLoss,
        CHUNK,
    ),
}


@pytest.mark.compat("Trainers", "sentence-transformers: plain and cached losses, `add_adapter`, `prepare_trainer`")
@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.parametrize("targets", [["query", "value"], ".*(query|value|pooler.dense)"], ids=["", "with pooler"])
def test_step(name: str, targets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fix_noise(monkeypatch)
    rows, make, plain, size = LOSSES[name]
    model = embedder(tmp_path, targets).train()
    direct = plain(model)
    trainer = fk.prepare_trainer(trainer_of(model, make(model), rows, tmp_path))
    total = torch.zeros((), dtype=torch.float64)
    for batch in trainer.get_train_dataloader():
        features, labels = trainer.collect_features(batch)
        with by_hand(model) as terms:
            embedded = [chunked(model, column, size) for column in features]
        kept = [term for i, term in enumerate(terms) if not _of_pooler(targets, i)]
        task = direct.compute_loss_from_embeddings(embedded, labels)
        total = total + (task + torch.stack(kept).sum()) / STEPS
    pooler = {n: p.requires_grad_(False) for n, p in model.named_parameters() if "pooler" in n and p.requires_grad}
    gradients = torch.autograd.grad(total, list(params(model).values()))
    expected = dict(zip(params(model), gradients, strict=True))
    for p in pooler.values():
        p.requires_grad_(True)
    got = step_of(trainer)
    assert all(not got.pop(n).any() for n in pooler), "mean pooling does not use it"
    for n, gradient in expected.items():
        assert gradient.norm() > 0, n
        assert (got[n] - gradient).norm() <= 1e-6 * gradient.norm(), n
    if not pooler:
        logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
        assert logged == pytest.approx(float(total.detach()), rel=1e-5)


def _of_pooler(targets: Any, i: int) -> bool:
    return isinstance(targets, str) and i % 5 == 4  # two blocks of two layers, then the pooler


def test_a_cached_loss_without_prepare_trainer_is_refused(tmp_path: Path) -> None:
    rows, make, *_ = LOSSES["cached ranking"]
    model = embedder(tmp_path, ["query"])
    with pytest.raises(RuntimeError, match=r"prepare_trainer\(trainer\)"):
        trainer_of(model, make(model), rows, tmp_path).train()
