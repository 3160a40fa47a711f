"""The cost table and the roofline: counts, formula, and that the pages hold what the commands print."""

from pathlib import Path

import pytest
import torch

import fvae_kernels as fk
from benchmarks import cost_table, fused, host_cost, pages, roofline, sides
from benchmarks.cost import Launch
from fvae_kernels.nn.adapter import FVAEAdapter

SMALL = roofline.Shape("small", 24, 12, 10)
DEVICE = roofline.Device("by hand", 1e9, {torch.float32: 1e12, torch.bfloat16: 8e12}, launch=1e-6)


def test_the_formula() -> None:
    launches = [
        Launch("bytes decide", 5000, 10**6),  # 1 us + 5 us
        Launch("FLOPs decide", 1000, 4 * 10**6),  # 1 us + 4 us
        Launch("FLOPs of bfloat16", 1, 8 * 10**6, torch.bfloat16),  # 1 us + 1 us
    ]
    assert roofline.predicted(launches, DEVICE) == pytest.approx(13e-6)


def test_the_slower_of_host_and_device_decides() -> None:
    assert roofline.pace(1.7e-3, 94e-6) == "1,700 host"
    assert roofline.pace(30e-6, 94e-6) == "94 device"


def test_the_host_is_the_one_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {"float32": {"base": 90.0, "lora": 210.0}, "bf16": {"base": 100.0, "lora": 240.0}}
    monkeypatch.setattr(host_cost, "stored", lambda: {"steps": steps})
    assert roofline.host("lora", "bf16") == pytest.approx(140e-6)
    assert roofline.host("lora", "bf16, adapter float32") == pytest.approx(120e-6)


@pytest.mark.parametrize("side", ["base", "lora", "plain"])
def test_tensors_without_memory_count_like_others(side: str) -> None:
    operators = roofline.dispatched(side, SMALL)
    found = sides.layer_sides((side,), SMALL.N, SMALL.D, SMALL.M)[side].cost()
    assert len(operators) == found["launches"]
    assert sum(one.bytes for one in operators) == found["bytes"]
    assert sum(one.flops for one in operators) == found["flops"] > 0


def test_lora_by_hand() -> None:
    """Forward A, B, scaling, sum; backward scaling, grad_B, grad of A x, grad_A, grad_x, sum; without the base's."""
    N, D, M, R = SMALL.N, SMALL.D, SMALL.M, sides.RANK
    moved = 4 * (
        (N * D + R * D + N * R) + (N * R + M * R + N * M) + 2 * N * M + 3 * N * M
        + 2 * N * M + (N * M + N * R + M * R) + (N * M + M * R + N * R) + (N * R + N * D + R * D)
        + (N * R + R * D + N * D) + 3 * N * D
    )  # fmt: skip
    base, lora = (roofline.dispatched(side, SMALL) for side in ("base", "lora"))
    assert (len(base), len(lora)) == (2, 12)
    assert sum(one.bytes for one in lora) - sum(one.bytes for one in base) == moved


def test_precisions_reach_the_operators() -> None:
    def dtypes(precision: str) -> set[torch.dtype]:
        return {one.dtype for one in roofline.dispatched("lora", SMALL, precision)}

    assert dtypes("bf16") == {torch.bfloat16}
    assert dtypes("bf16, adapter float32") == {torch.bfloat16, torch.float32}
    products = {one.dtype for one in roofline.dispatched("lora", SMALL, "bf16, adapter float32, autocast") if one.flops}
    assert products == {torch.bfloat16}


@pytest.mark.parametrize(
    "options", [{}, {"encoder_hidden": ()}, {"encoder_hidden": (5, 4), "decoder_hidden": ()}], ids=str
)
@pytest.mark.parametrize("fusion", ["concat", "average"])
def test_the_fused_layer_knows_its_parameters(options: dict, fusion: str) -> None:
    config = fk.FVAEConfig.preset("paper", rank=3, fusion=fusion, **options)
    layer = fused.Layer(7, 12, 10, config)
    parameters = dict(FVAEAdapter(12, 10, config).named_parameters())
    assert layer.parameters == sum(p.numel() for p in parameters.values())
    of_x = [p for name, p in parameters.items() if p.dim() == 2 and name.startswith("encoder") and p.shape[1] == 12]
    assert layer.entries["input"] == sum(p.numel() for p in of_x)
    assert layer.entries["output"] == parameters["decoder_out_weight"].numel()


def test_ours_grows_with_tokens_as_its_tensors_do() -> None:
    def moved(N: int) -> int:
        return sum(one.bytes for one in fused.launches(fused.Layer(N, 12, 10)))

    assert moved(3200) - moved(1600) == moved(4800) - moved(3200) > 0


def test_the_pages_say_what_the_commands_print() -> None:
    assert pages.block(cost_table.PAGE, "cost") == cost_table.table()
    assert pages.block(roofline.PAGE, "devices") == roofline.devices_table()
    assert pages.block(roofline.PAGE, "predictions") == roofline.table()


def test_blocks_of_a_page(tmp_path: Path) -> None:
    page = tmp_path / "PAGE.md"
    page.write_text("a\n<!-- begin one: make it -->\n<!-- end one -->\nb\n<!-- begin two -->\nold\n<!-- end two -->\n")
    pages.replace_block(page, "one", ["1", "2"])
    pages.replace_block(page, "two", ["new"])
    pages.replace_block(page, "two", ["new"])
    expected = "a\n<!-- begin one: make it -->\n1\n2\n<!-- end one -->\nb\n<!-- begin two -->\nnew\n<!-- end two -->\n"
    assert page.read_text() == expected
    assert pages.block(page, "one") == ["1", "2"]
    with pytest.raises(ValueError, match="has no block 'three'"):
        pages.block(page, "three")
