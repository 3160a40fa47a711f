"""The host time of the context: both models compute the same, and the context is all that differs."""

from typing import Any

import pytest
import torch

pytest.importorskip("peft")

import fvae_kernels as fk
from benchmarks.host_cost import context


def test_both_models_compute_the_same() -> None:
    x, mask = torch.randn(2, 3, 4), torch.ones(2, 3, dtype=torch.long)
    outputs: list[Any] = []
    for with_context in (True, False):
        torch.manual_seed(0)
        model = context.model_of(2, with_context)
        outputs.append(model(x, attention_mask=mask, labels=x))
        assert bool(fk.collect_terms(model)) == with_context
    assert torch.equal(outputs[0]["logits"], outputs[1]["logits"])
    torch.testing.assert_close(outputs[0]["loss"], outputs[1]["loss"])  # the stubs' terms are zero


def test_every_part_is_measured() -> None:
    found = context.measured(steps=3)
    assert {(name, kind) for name, values in found.items() for kind in values} == {
        (name, kind) for name in ("forward", "backward") for kind in ("a layer", "once")
    }
