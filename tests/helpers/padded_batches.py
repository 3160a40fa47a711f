"""Sequences of unequal lengths, one by one and padded to a batch, for the tests of padding."""

import pytest
import torch
from torch import Tensor, nn

from fvae_kernels.nn.adapter import FVAEAdapter
from fvae_kernels.training import warn
from tests.helpers.tiny_models import VOCAB

Batch = dict[str, Tensor]
LENGTHS = (7, 4, 5)  # and reversed for a decoder


def sequences(kind: str) -> list[Batch]:
    """Batches of one sequence each, of unequal lengths."""
    generator = torch.Generator().manual_seed(3)

    def ids(length: int) -> Tensor:
        return torch.randint(3, VOCAB, (1, length), generator=generator)

    if kind == "wav2vec2":
        rows = [{"input_values": torch.randn(1, 8 * n, generator=generator).double()} for n in LENGTHS]
    else:
        rows = [{"input_ids": ids(n)} for n in LENGTHS]
    for row, length in zip(rows, LENGTHS, strict=True):
        if kind == "llama":
            labels = row["input_ids"].clone()
            labels[:, 0] = -100  # or padding on the left would have to predict it
            row |= {"labels": labels, "position_ids": torch.arange(length).unsqueeze(0)}
        elif kind == "t5":  # both stacks are as long, so shapes alone do not tell whose mask it is
            other = LENGTHS[::-1][LENGTHS.index(length)]
            row |= {"labels": ids(other), "decoder_input_ids": ids(other)}
        else:
            row["labels"] = torch.tensor([length % 3])
    return rows


FILL = {"labels": -100, "attention_mask": 0, "decoder_attention_mask": 0}


def with_masks(row: Batch) -> Batch:
    first = row.get("input_ids", row.get("input_values"))
    masks = {"attention_mask": torch.ones_like(first, dtype=torch.long)}
    if "decoder_input_ids" in row:
        masks["decoder_attention_mask"] = torch.ones_like(row["decoder_input_ids"])
    return {**row, **masks}


def padded(rows: list[Batch], side: str = "right", fill: int = 1) -> Batch:
    """The rows padded to one batch, as a data collator does."""
    rows = [with_masks(row) for row in rows]

    def pad(name: str) -> Tensor:
        tensors = [row[name] for row in rows]
        longest = max(t.shape[-1] for t in tensors)
        value = FILL.get(name, fill)
        extra = [(longest - t.shape[-1], 0) if side == "left" else (0, longest - t.shape[-1]) for t in tensors]
        return torch.cat([nn.functional.pad(t, e, value=value) for t, e in zip(tensors, extra, strict=True)])

    return {name: torch.cat([r[name] for r in rows]) if rows[0][name].dim() == 1 else pad(name) for name in rows[0]}


def forget_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise that does not depend on the position in a batch; and warnings that come once come again."""

    def draw(self: FVAEAdapter, x: Tensor) -> Tensor:
        return torch.full((*x.shape[:-1], self.config.rank), 0.5, dtype=self.B.dtype)

    monkeypatch.setattr(FVAEAdapter, "draw_noise", draw)
    monkeypatch.setattr(warn, "said", set())
