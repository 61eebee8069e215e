"""One compilation serves every number of tokens; `python -m benchmarks.token_counts` asks 200."""

from __future__ import annotations

import pytest

from benchmarks.token_counts import MOST, SHORT, Outcome, measure, split, token_counts
from tests.models import FAMILIES


def test_the_counts_are_those_that_are_asked_for() -> None:
    counts = token_counts()
    assert len(counts) == len(set(counts)) == 200
    assert {0, 1, 2, 127, 128, 129, 65_537, 131_071, MOST} < set(counts)
    assert all(b * s == count for count in counts for b, s in [split(count)])


def assert_well(outcome: Outcome) -> None:
    assert outcome.is_well, outcome
    assert outcome.calls == 2 * (len(SHORT) + 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_at_all_counts(family: str) -> None:
    outcome = measure(family, "model", SHORT, "eager")
    assert_well(outcome)
    assert outcome.compiled == {
        "inference": "1 captures, 1 artifacts (inference)",
        "training": "2 captures, 2 artifacts (inference, training, training-few)",
    }


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_blocks_in_one_graph_at_all_counts(family: str) -> None:
    outcome = measure(family, "block", SHORT, "aot_eager")
    assert_well(outcome)
    assert outcome.compiled["inference"].endswith("1 graphs")
    assert outcome.compiled["training"].endswith("2 graphs")
