"""The benchmark of serving: every form is there, and serves what it should."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import serving
from benchmarks.pages import block
from examples.compare.methods import METHODS
from tests.helpers.calibration import batches
from tests.helpers.peft_models import LINEAR, adapted, logits
from tests.helpers.tiny_models import build

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
EXACT = ["as it is", "`export_for_inference`"]


@pytest.mark.parametrize(("options", "exact"), [(LINEAR, [*EXACT, "stock LoRA", "merged"]), ({}, EXACT)])
def test_every_form_serves_the_adapter(options: dict[str, Any], exact: list[str], tmp_path: Path) -> None:
    model = adapted("bert", **options).eval()
    expected = logits(model)
    found = list(serving.forms(model, lambda: build("bert"), batches(), tmp_path))
    assert [form.name for form in found if form.lost == 0 and "tolerance" not in form.name] == exact
    for form in found:
        close = {"rtol": 1e-5, "atol": 1e-6} if form.name in exact else {"rtol": 0.5, "atol": 0.05}
        torch.testing.assert_close(logits(form.model.eval()), expected, **close)
    sizes = {form.name: form.bytes for form in found}
    assert sizes["as it is"] > sizes["`export_for_inference`"] >= sizes["stock LoRA"] > 0


def test_it_trains_methods_that_there_are() -> None:
    assert set(serving.METHODS) <= set(METHODS)


def test_the_pages_have_its_tables() -> None:
    for page, rows in ((serving.README, 5), (serving.PAGE, 11)):
        lines = block(page, "serving")
        assert lines[:2] == serving.table([])
        assert len(lines) == 2 + rows
        assert all(line.count("|") == lines[0].count("|") for line in lines)
