"""The demo's data: splits, correlation of label and source, duplicates."""

import random
from collections import Counter

import pytest

from examples import assets, data
from examples.data import GROUPS, Snippet


def made_up(reviews: int = 400) -> list[Snippet]:
    """Reviews of one to five sentences, with both labels if there are several sentences."""
    snippets = []
    for review in range(reviews):
        source = review % 2
        for sentence in range(1 + review % 5):
            label = (review + sentence + review // 7) % 2
            snippets.append(Snippet(f"text {review} {sentence}", label, source, f"{source} {review}"))
    return snippets


@pytest.fixture(scope="module")
def real(files: assets.Assets) -> data.Splits:
    return data.split(data.load(files.sdist))


def check_splits(splits: data.Splits, test: int, validation: int) -> None:
    parts = (splits.train, splits.validation, splits.test)
    reviews = [{s.review for s in part} for part in parts]
    texts = [{" ".join(s.text.casefold().split()) for s in part} for part in parts]
    for seen in (reviews, texts):
        assert sum(map(len, seen)) == len(set().union(*seen))
    assert Counter(s.group for s in splits.test) == dict.fromkeys(GROUPS, test)
    assert Counter(s.group for s in splits.validation) == dict.fromkeys(GROUPS, validation)


def test_splits_share_no_review_and_are_balanced() -> None:
    splits = data.split(made_up(), test=40, validation=20)
    check_splits(splits, 40, 20)
    assert len(splits.train) > 200


def test_splits_of_the_real_data(real: data.Splits) -> None:
    check_splits(real, data.TEST_PER_GROUP, data.VALIDATION_PER_GROUP)
    assert len({s.text for s in real.train}) == len(real.train)


def test_split_depends_on_the_snippets_alone() -> None:
    first = data.split(made_up(), 40, 20)
    random.seed(7)
    assert data.split(made_up(), 40, 20) == first


def test_too_few_snippets_for_a_group() -> None:
    with pytest.raises(ValueError, match=r"the test group \(.*\) wants 5000 snippets, there are \d+"):
        data.split(made_up(), test=5000, validation=1)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.8, 1.0])
def test_correlation_is_as_asked(rho: float) -> None:
    pool = data.split(made_up(800), test=10, validation=10).train
    chosen = data.training_set(pool, 200, rho, seed=3)
    counts = Counter(s.group for s in chosen)
    assert sum(counts.values()) == 200 == len({s.text for s in chosen})
    assert counts[(1, 0)] == counts[(0, 1)] == round(100 * rho)
    assert counts[(1, 1)] == counts[(0, 0)] == 100 - round(100 * rho)


def test_odd_training_sizes_are_filled() -> None:
    assert sum(data.training_counts(101, 0.8).values()) == 101


def test_training_set_follows_the_seed() -> None:
    pool = made_up()
    assert data.training_set(pool, 100, 0.8, 0) == data.training_set(pool, 100, 0.8, 0)
    assert data.training_set(pool, 100, 0.8, 0) != data.training_set(pool, 100, 0.8, 1)


def test_training_set_too_large() -> None:
    with pytest.raises(ValueError, match=r"wants 4000 snippets .* choose a smaller --train-size or another --rho"):
        data.training_set(made_up(), 10_000, 0.8, 0)


def test_duplicates_keep_their_first() -> None:
    twice = [Snippet("Good  film.", 1, 0, "a"), Snippet("good film. ", 0, 1, "b"), Snippet("other", 0, 1, "b")]
    assert data.without_duplicates(twice) == [twice[0], twice[2]]


def test_lines_of_the_data_set() -> None:
    raw = "7_2\t-1.5\tno good,\tat all\r\n8_1\t0.4\tso so\n9\t2\tgreat\n"
    assert list(data.parse(raw, 1)) == [
        Snippet("no good,\tat all", 0, 1, "Amazon 7"),
        Snippet("great", 1, 1, "Amazon 9"),
    ]


def test_batches_go_through_everything_in_each_pass() -> None:
    examples = made_up()[:64]
    stream = list(data.batches(examples, 32, 5, seed=1))
    assert [len(b) for b in stream] == [32] * 5
    assert (
        {s.text for s in stream[0] + stream[1]} == {s.text for s in examples} == {s.text for s in stream[2] + stream[3]}
    )
    assert stream[0] != stream[2]
    assert stream == list(data.batches(examples, 32, 5, seed=1))
