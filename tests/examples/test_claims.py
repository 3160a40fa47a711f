"""Verdicts on claims: from differences paired by seed, and never from fewer than three."""

from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from benchmarks.pages import block
from examples.compare import claims, records, report
from examples.compare.claims import CANNOT_TELL, CONFIRMED, NOT_CONFIRMED, Claim, Comparison, Measured
from examples.compare.methods import METHODS
from examples.compare.paired import at_one_rate, differences, searched


def rows(method: str, scores: Sequence[float], lr: float = 0.1, **more: Any) -> list[dict[str, Any]]:
    """Runs with these test scores, from seed 0 on."""
    return [
        {
            "task": "t",
            "method": method,
            "seed": i,
            "epochs": 1,
            "lr": lr,
            "weight": None,
            "test": {"average": s},
            **more,
        }
        for i, s in enumerate(scores)
    ]


@pytest.mark.parametrize(
    ("values", "allowed", "verdict"),
    [
        ([0.03, 0.04, 0.05], 0.0, CONFIRMED),  # .04 +- .025
        ([0.03, 0.04], 0.0, CANNOT_TELL),  # two seeds decide nothing
        ([], 0.0, CANNOT_TELL),
        ([-0.03, -0.04, -0.05], 0.0, NOT_CONFIRMED),
        ([0.001, 0.0, -0.001], 0.0, NOT_CONFIRMED),  # no room for a point
        ([0.05, 0.0, -0.05], 0.0, CANNOT_TELL),
        ([0.001, 0.0, -0.001], 0.02, CONFIRMED),  # not so much behind
        ([-0.05, -0.06, -0.055], 0.02, NOT_CONFIRMED),
        ([-0.05, 0.03, 0.0], 0.02, CANNOT_TELL),
    ],
)
def test_verdict_of_a_comparison(values: list[float], allowed: float, verdict: str) -> None:
    assert Measured(Comparison("t", "fvae", allowed=allowed), values).verdict == verdict


def test_a_claim_has_the_verdict_of_its_weakest_comparison() -> None:
    won, lost, open_ = (Measured(Comparison("t", "fvae"), [x, x, x]) for x in (0.1, -0.1, 0.005))
    open_ = Measured(open_.comparison, [0.1, -0.1, 0.0])
    assert claims.verdict([won, won]) == CONFIRMED
    assert claims.verdict([won, open_]) == CANNOT_TELL
    assert claims.verdict([won, open_, lost]) == NOT_CONFIRMED


def test_both_are_compared_at_the_rate_with_most_shared_seeds() -> None:
    found = [*rows("fvae", [0.5, 0.6, 0.7]), *rows("lora", [0.4, 0.4]), *rows("lora", [0.9] * 5, lr=0.2)]
    one, other = at_one_rate(found, "t", "fvae", "lora")
    assert differences(one, other, "average") == pytest.approx([0.1, 0.2])
    assert at_one_rate(found, "t", "fvae", "dora") == ({}, {})


def test_searched_rates_are_those_best_on_validation_and_searched_runs_do_not_count() -> None:
    tried = [
        *rows("lora", [0.99], lr=0.1, search=True, validation={"average": 0.7}),
        *rows("lora", [0.0], lr=0.2, search=True, validation={"average": 0.8}),
        *rows("lora", [1.0], lr=0.3, search=True, validation={"average": 0.9}, failed=True),
    ]
    found = [*tried, *rows("lora", [0.4, 0.5], lr=0.2), *rows("lora", [0.8], lr=0.1)]
    assert [run["test"]["average"] for run in searched(found, "t", "lora").values()] == [0.4, 0.5]
    assert searched(found, "t", "fvae") == {}


def test_nats_are_turned() -> None:
    found = [
        {**row, "test": {"nats": row["test"]["average"]}}
        for row in (*rows("fvae", [3.0, 3.1, 3.2]), *rows("lora", [3.5, 3.6, 3.7]))
    ]
    measured = claims.measure(Comparison("t", "fvae", score="nats"), found)
    assert measured.values == pytest.approx([0.5] * 3)
    assert measured.verdict == CONFIRMED


def test_the_table_has_a_line_for_each_comparison() -> None:
    claim = Claim("It is better", "Table 0", (Comparison("t", "fvae"), Comparison("u", "fvae", searched=True)))
    table = list(claims.lines([*rows("fvae", [0.5] * 3), *rows("lora", [0.4] * 3)], [claim]))
    assert "**It is better** (Table 0)" in table[2]
    assert "**cannot tell**" in table[2]
    assert "+0.100 [+0.100, +0.100] | confirmed" in table[3]
    assert "u, rates searched" in table[4]
    assert "not run" in table[4]


@pytest.mark.parametrize("claim", [*claims.PAPER, *claims.OURS], ids=lambda claim: claim.says)
def test_claims_name_methods_that_exist(claim: Claim) -> None:
    assert {name for one in claim.comparisons for name in (one.better, one.worse)} <= set(METHODS)


def test_the_page_says_what_the_command_prints() -> None:
    found = report.blocks(list(records.read()))
    for (page, mark), lines in found.items():
        assert block(page, mark) == "\n".join(lines).strip("\n").split("\n")
