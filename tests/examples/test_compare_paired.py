"""Runs paired by seed: what is never compared with what, and at which rates."""

from typing import Any

import pytest

pytest.importorskip("matplotlib")

from examples.compare import figures, records, report
from examples.compare.paired import at_one_rate, at_searched_rates, by_setting, differences
from tests.helpers.compare_rows import rows, tried

OTHERS: list[dict[str, Any]] = [
    {"epochs": 2},
    {"lr": 0.2},
    {"batch_size": 8},
    {"quick": True},
    {"task": "u"},
]


def averages(pair: tuple[Any, Any]) -> list[list[float]]:
    return [[run["test"]["average"] for run in runs.values()] for runs in pair]


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_runs_of_other_settings_are_in_no_common_table(other: dict[str, Any]) -> None:
    found = [*rows("lora", [0.5, 0.6]), *rows("lora", [0.9, 0.9, 0.9], **other), *rows("fvae", [0.7, 0.7])]
    assert [[len(runs) for runs in methods.values()] for methods in by_setting(found).values()] == [[2, 2], [3]]
    headings = [line for line in report.tables(found) if "95 %" in line]
    assert len(set(headings)) == 2
    assert averages(at_one_rate(found, "t", "fvae", "lora")) == [[0.7, 0.7], [0.5, 0.6]]
    drawn = figures._shares(found, "t", ["lora", "fvae"], least=2)
    assert averages((drawn["lora"], drawn["fvae"])) == [[0.5, 0.6], [0.7, 0.7]]


def test_a_search_and_other_weights_are_in_no_row_of_the_default() -> None:
    found = [
        *rows("fvae", [0.5]),
        *rows("fvae", [0.6], weight=10.0),
        *rows("fvae", [0.9], search=True),
        *rows("fvae", [0.7], does_not_apply="no place"),
    ]
    del found[-1]["test"]
    (methods,) = by_setting(found).values()
    assert averages((methods["fvae", None], methods["fvae", 10.0])) == [[0.5], [0.6]]


def test_runs_under_one_name_are_one_cell_apart_from_the_seed() -> None:
    for setting, methods in by_setting(records.read()).items():
        for (method, weight), runs in methods.items():
            for seed, run in runs.items():
                (cell,) = records.cells(setting, method, seed, [(run["lr"], weight)])
                assert records.cell(cell) == records.cell(run)


def test_both_are_compared_at_the_rate_with_most_shared_seeds() -> None:
    found = [*rows("fvae", [0.5, 0.6, 0.7]), *rows("lora", [0.4, 0.4]), *rows("lora", [0.9] * 5, lr=0.2)]
    one, other = at_one_rate(found, "t", "fvae", "lora")
    assert differences(one, other, "average") == pytest.approx([0.1, 0.2])
    assert at_one_rate(found, "t", "fvae", "dora") == ({}, {})


FVAE = (tried("fvae", {1e-3: 0.9, 5e-3: 0.8}), rows("fvae", [0.7, 0.8], lr=1e-3))
LORA = (tried("lora", {1e-3: 0.7, 5e-3: 0.8}), [*rows("lora", [0.4, 0.5], lr=5e-3), *rows("lora", [0.9], lr=1e-3)])


def at_searched(*parts: list[dict[str, Any]], early_stopping: bool = False) -> list[list[float]]:
    found = [row for part in parts for row in part]
    return averages(at_searched_rates(found, "t", "fvae", "lora", early_stopping))


def test_searched_rates_are_those_best_on_validation_and_searched_runs_do_not_count() -> None:
    assert at_searched(*FVAE, *LORA) == [[0.7, 0.8], [0.4, 0.5]]
    failed = [{**row, "failed": row["lr"] == 5e-3, "test": {"average": 1.0}} for row in LORA[0]]
    assert at_searched(*FVAE, failed, LORA[1]) == [[0.7, 0.8], [0.9]]


@pytest.mark.parametrize(
    "other", [{"epochs": 2}, {"batch_size": 8}, {"task": "u"}, {"seed": 0, "search": False}], ids=str
)
def test_without_a_finished_search_of_the_same_setting_there_are_no_searched_rates(other: dict[str, Any]) -> None:
    none: list[list[float]] = [[], []]
    assert at_searched(*FVAE, LORA[1]) == none
    assert at_searched(*FVAE, LORA[0][:1], LORA[1]) == none
    assert at_searched(*FVAE, LORA[0][:1], [{**row, **other} for row in LORA[0]], LORA[1]) == none


def test_the_searches_of_both_have_one_budget() -> None:
    more = [*tried("lora", {2e-3: 0.99, 5e-4: 0.1}), *rows("lora", [1.0], lr=2e-3)]
    assert at_searched(*FVAE, *LORA, more) == [[0.7, 0.8], [0.4, 0.5]]  # of LoRA's four the two that FVAE has too
    four = tried("fvae", {1e-3: 0.0, 5e-3: 0.0}, weight=10.0)  # two rates by two weights
    assert at_searched(*FVAE, *LORA, more, four) == [[0.7, 0.8], [1.0]]


def test_a_search_is_judged_where_the_runs_are_scored() -> None:
    best = [{**row, "validation_best": {"average": 1 - row["validation"]["average"]}} for row in LORA[0]]
    assert at_searched(*FVAE, best, LORA[1]) == [[0.7, 0.8], [0.4, 0.5]]
    assert at_searched(*FVAE, best, LORA[1], early_stopping=True) == [[0.7, 0.8], [0.9]]


def test_early_stopping_scores_the_best_epoch_of_runs_that_looked() -> None:
    one, other, again = (
        dict(enumerate(rows("lora", scores))) for scores in ([0.5, 0.6, 0.7], [0.1, 0.1, 0.1], [0.0] * 3)
    )
    for run in (one[0], other[0], other[1], one[2], other[2]):
        run["curve"] = [{"epoch": 1}]
    one[0]["test_best"], other[0]["test_best"], other[2]["test_best"] = ({"average": s} for s in (0.9, 0.2, 0.3))
    # seed 1 did not look, seed 2 diverged before its first look
    assert differences(one, other, "average", early_stopping=True) == pytest.approx([0.7, 0.4])
    assert differences(one, other, "average") == pytest.approx([0.4, 0.5, 0.6])
    assert differences(one, again, "average", early_stopping=True) == []
