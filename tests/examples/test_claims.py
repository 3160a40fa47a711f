"""Verdicts on claims: from differences paired by seed, and never from fewer than five."""

import pytest

pytest.importorskip("matplotlib")

from benchmarks.pages import block
from examples.compare import claims, records, report, statements
from examples.compare.claims import CANNOT_TELL, CONFIRMED, NOT_CONFIRMED, Claim, Comparison, Measured
from examples.compare.methods import METHODS
from tests.helpers.compare_rows import rows, tried


@pytest.mark.parametrize(
    ("values", "allowed", "verdict"),
    [
        ([0.03, 0.04, 0.05, 0.04, 0.03], 0.0, CONFIRMED),
        ([0.03, 0.04, 0.05, 0.04], 0.0, CANNOT_TELL),  # four seeds decide nothing
        ([], 0.0, CANNOT_TELL),
        ([-0.03, -0.04, -0.05, -0.04, -0.03], 0.0, NOT_CONFIRMED),
        ([0.001, 0.0, -0.001, 0.0, 0.001], 0.0, NOT_CONFIRMED),  # no room for a point
        ([0.05, 0.0, -0.05, 0.03, 0.0], 0.0, CANNOT_TELL),
        ([0.001, 0.0, -0.001, 0.0, 0.001], 0.02, CONFIRMED),  # not so much behind
        ([-0.05, -0.06, -0.055, -0.05, -0.06], 0.02, NOT_CONFIRMED),
        ([-0.05, 0.03, 0.0, 0.0, 0.02], 0.02, CANNOT_TELL),
    ],
)
def test_verdict_of_a_comparison(values: list[float], allowed: float, verdict: str) -> None:
    assert Measured(Comparison("t", "fvae", allowed=allowed), values).verdict == verdict


def test_a_claim_has_the_verdict_of_its_weakest_comparison() -> None:
    won, lost, open_ = (Measured(Comparison("t", "fvae"), [x] * 5) for x in (0.1, -0.1, 0.0))
    open_ = Measured(open_.comparison, [0.1, -0.1, 0.0, 0.1, -0.1])
    assert claims.verdict([won, won]) == CONFIRMED
    assert claims.verdict([won, open_]) == CANNOT_TELL
    assert claims.verdict([won, open_, lost]) == NOT_CONFIRMED


def test_nats_are_turned() -> None:
    found = [
        {**row, "test": {"nats": row["test"]["average"]}}
        for row in (*rows("fvae", [3.0, 3.1, 3.2, 3.3, 3.4]), *rows("lora", [3.5, 3.6, 3.7, 3.8, 3.9]))
    ]
    measured = claims.measure(Comparison("t", "fvae", score="nats"), found)
    assert measured.values == pytest.approx([0.5] * 5)
    assert measured.verdict == CONFIRMED


def test_the_table_has_a_line_for_each_comparison_that_has_runs() -> None:
    claim = Claim("It is better", "Table 0", (Comparison("t", "fvae"), Comparison("u", "fvae")))
    table = list(claims.lines([*rows("fvae", [0.5] * 5), *rows("lora", [0.4] * 5)], [claim]))
    assert "**It is better** (Table 0)" in table[2]
    assert "**cannot tell**" in table[2]
    assert "| average | 0.1 | 5 | +0.100 [+0.100, +0.100] | confirmed" in table[3]
    assert len(table) == 4
    assert len(list(claims.lines([], [claim]))) == 2


def test_a_line_says_the_rates_and_where_runs_are_scored() -> None:
    found = [
        *tried("lora", {1e-3: 0.7, 5e-3: 0.8}),
        *tried("fvae", {1e-3: 0.9, 5e-3: 0.8}),
        *rows("fvae", [0.5] * 5, lr=1e-3, curve=[{}], test_best={"average": 0.8}),
        *rows("lora", [0.4] * 5, lr=5e-3, curve=[{}], test_best={"average": 0.5}),
    ]
    claim = Claim("It is better", "searched", (Comparison("t", "fvae", searched=True, early_stopping=True),))
    assert list(claims.lines(found, [claim]))[3] == (
        "| | t | FVAE-LoRA, the default - LoRA | average, early stopping | searched: 0.001, 0.005 | 5 "
        "| +0.300 [+0.300, +0.300] | confirmed |"
    )


@pytest.mark.parametrize("claim", [*statements.PAPER, *statements.LONG, *statements.OURS], ids=lambda claim: claim.says)
def test_claims_name_methods_that_exist(claim: Claim) -> None:
    assert {name for one in claim.comparisons for name in (one.better, one.worse)} <= set(METHODS)


def test_the_page_says_what_the_command_prints() -> None:
    found = report.blocks(list(records.read()))
    for (page, mark), lines in found.items():
        assert block(page, mark) == "\n".join(lines).strip("\n").split("\n")
