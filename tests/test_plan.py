"""Plans are optimal where that can be enumerated, valid everywhere, and bounded from below."""

import math
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from moec.errors import BudgetError, PlanError
from moec.plan import Node, Problem, Progress, make_problem, replay, solve
from moec.plan.bounds import Relaxation
from moec.plan.exact import cheapest_sequence
from moec.plan.gaps import gaps_of
from moec.plan.least import is_excluded
from moec.plan.problem import Source
from moec.plan.retention import prove
from moec.plan.rounding import rounded
from moec.plan.search import LEAST_ROUND, Candidate, Job, Searcher, search
from moec.plan.sequence import (
    LENGTH,
    MOST_RUNS,
    OVER,
    Arrays,
    State,
    arrays_of,
    build,
    empty_state,
    insert,
    move,
    nodes_of,
    remove,
)
from moec.plan.shifts import window
from tests.plan_graphs import (
    gradients,
    joint,
    layered,
    least_time,
    random_graph,
    random_outputs,
    training,
)

PLACED = (918, 1308, 2146)  # seeds of graphs whose gradients must be placed for the bound


def peak_of(problem: Problem) -> int:
    return replay(problem, problem.order).peak


def found_by_search(problem: Problem, budget: int, rounds: int = 3) -> Candidate:
    candidates = search(problem, budget)
    for _ in range(rounds):
        best = next(candidates)
    candidates.close()
    return best


@pytest.mark.parametrize("first", range(0, 300, 25))
def test_small_graphs_are_planned_as_brute_force_does(first: int) -> None:
    for seed in range(first, first + 25):
        problem = random_graph(seed)
        budget = int(peak_of(problem) * random.Random(seed).choice((0.6, 0.7, 0.8, 0.9, 1.0)))
        optimum = least_time(problem, budget)
        if optimum is None:
            with pytest.raises(BudgetError):
                solve(problem, budget, time_limit=0.2)
            continue
        plan = solve(problem, budget)
        assert plan.time == optimum
        assert plan.is_optimal
        assert replay(problem, plan.sequence).peak <= budget


@pytest.mark.parametrize("first", range(0, 120, 20))
def test_operations_with_several_outputs_are_planned_as_brute_force_does(first: int) -> None:
    for seed in range(first, first + 20):
        problem = random_outputs(seed)
        if len(problem.sizes) > 11:
            continue  # Brute force would take too long.
        budget = int(peak_of(problem) * random.Random(seed).choice((0.6, 0.7, 0.8, 0.9)))
        optimum = least_time(problem, budget)
        found = cheapest_sequence(problem, budget)
        assert (found is None) == (optimum is None)
        if optimum is not None and found is not None:
            assert replay(problem, found, budget).time == optimum
            assert Relaxation(gaps_of(problem), budget).solve(5) <= optimum * (1 + 1e-9)
            assert not is_excluded(problem, budget)


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_the_search_finds_the_optimum_with_several_outputs(first: int) -> None:
    for seed in range(first, first + 20):
        problem = random_outputs(seed)
        budget = int(peak_of(problem) * 0.8)
        optimum = cheapest_sequence(problem, budget)
        if optimum is None:
            continue
        candidate = found_by_search(problem, budget)
        assert (candidate.over, candidate.time) == (0, problem.time_of(optimum))


@pytest.mark.parametrize("seed", range(40))
def test_the_search_counts_bytes_as_the_replay_does(seed: int) -> None:
    problem = random_outputs(seed)
    draw = random.Random(seed)
    sequence = list(problem.order)
    state = empty_state(arrays := arrays_of(problem), 100, 5)
    build(arrays, state, np.array(sequence, np.int32))
    for _ in range(60):
        change_at_random(problem, arrays, state, draw)
        found = replay(problem, tuple(map(int, nodes_of(state))))
        length = state.totals[LENGTH] - 1
        assert found.held == tuple(state.memory[:length])
        assert found.time == state.time[0]
        held = state.memory[: length + 1]
        assert state.totals[OVER] == np.maximum(held - 5, 0).sum()


def change_at_random(problem: Problem, graph: Arrays, state: State, draw: random.Random) -> None:
    """Insert, remove or move an execution where that is allowed."""
    place = draw.randrange(int(state.totals[LENGTH]) - 1)
    run = state.at[place]
    node = int(state.node[run])
    kind = draw.choice(("insert", "remove", "move"))
    if kind == "insert" and problem.nodes[node].rematable and state.count[node] < MOST_RUNS:
        insert(graph, state, node, draw.randrange(place + 1, int(state.totals[LENGTH])))
    elif kind == "remove" and run != state.runs[node, 0]:
        remove(graph, state, run)
    elif kind == "move":
        first, final = window(graph, state, run)
        if first <= final:
            move(graph, state, run, draw.randint(first, final))


@pytest.mark.parametrize("fixed", (False, True))
@pytest.mark.parametrize("make", (random_graph, random_outputs))
def test_the_integer_relaxation_is_a_lower_bound_that_is_often_met(
    make: Callable[[int, int], Problem], fixed: bool
) -> None:
    met = []
    for seed in range(40):
        problem = make(seed, 6)
        budget = int(peak_of(problem) * 0.8)
        optimum = cheapest_sequence(problem, budget, fixed)
        relaxation = Relaxation(gaps_of(problem, fixed), budget)
        linear = relaxation.solve(5)
        if optimum is None:
            continue
        bound, spent = relaxation.integer().solve(5), problem.time_of(optimum)
        assert linear <= bound * (1 + 1e-6)
        assert bound <= spent * (1 + 1e-9)
        met.append(bound >= spent * (1 - 1e-6))
        for ahead in (None, 0, 4):
            replay(problem, rounded(relaxation.gaps, relaxation.solution, 0.5, ahead))
    assert sum(met) > 0.9 * len(met)


def test_the_integer_relaxation_places_what_nothing_reads() -> None:
    for seed in (*range(60), *PLACED):
        problem = gradients(seed)
        budget = int(peak_of(problem) * random.Random(seed).choice((0.7, 0.8, 0.9, 0.95)))
        optimum = cheapest_sequence(problem, budget)
        relaxation = Relaxation(gaps_of(problem), budget)
        relaxation.solve(5)
        if optimum is None:
            continue
        bound, spent = relaxation.integer().solve(5), problem.time_of(optimum)
        assert bound <= spent * (1 + 1e-9)
        # the bound is 20, 14 and 30 without
        assert seed not in PLACED or bound == pytest.approx(spent)


@pytest.mark.parametrize(("share", "gap"), [(0.8, 0.1), (0.6, 0.1), (0.5, 0.1)])
def test_joint_graphs_are_planned_near_the_bound(share: float, gap: float) -> None:
    problem = joint(12)
    budget = int(share * peak_of(problem))
    plan = solve(problem, budget, time_limit=4)
    assert replay(problem, plan.sequence, budget).time == plan.time
    assert plan.extra > 0
    assert plan.gap <= gap


def test_the_search_ends_at_the_gap_that_is_asked_for() -> None:
    problem = joint(12)
    seen: list[Progress] = []
    budget = int(0.6 * peak_of(problem))
    plan = solve(problem, budget, gap=2.0, time_limit=60, progress=seen.append)
    assert 0 < plan.gap <= 2.0
    assert seen[-1].seconds < 30


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_the_relaxation_is_a_lower_bound_and_the_search_finds_the_optimum(first: int) -> None:
    for seed in range(first, first + 20):
        problem = random_graph(seed)
        budget = int(peak_of(problem) * 0.8)
        optimum = least_time(problem, budget)
        bound = Relaxation(gaps_of(problem), budget).solve(5)
        if optimum is None:
            continue
        assert bound <= optimum * (1 + 1e-9)
        candidate = found_by_search(problem, budget)
        assert (candidate.over, candidate.time) == (0, optimum)


@pytest.mark.parametrize("make", (random_graph, random_outputs))
def test_constraint_programming_proves_the_optimum(make: Callable[[int, int], Problem]) -> None:
    for seed in range(12):
        problem = make(seed, 6)
        budget = int(peak_of(problem) * 0.8)
        optimum = cheapest_sequence(problem, budget)
        runs = max(Counter(optimum or problem.order).values())
        proof = prove(problem, budget, False, optimum, time.monotonic() + 20, copies=runs)
        assert proof.complete
        assert (proof.sequence is None) == (optimum is None)
        if optimum is not None and proof.sequence is not None:
            assert replay(problem, proof.sequence, budget).time == problem.time_of(optimum)
            assert proof.bound == pytest.approx(problem.time_of(optimum))


def test_constraint_programming_keeps_a_fixed_order() -> None:
    problem = training(4)
    plan = solve(problem, int(0.7 * peak_of(problem)), time_limit=3, fixed_order=True, exact=True)
    assert plan.proven_runs >= 2 or plan.is_optimal
    assert tuple(dict.fromkeys(plan.sequence)) == problem.order


def test_the_rounded_relaxation_is_a_valid_sequence() -> None:
    problem = training(6)
    relaxation = Relaxation(gaps_of(problem), int(0.6 * peak_of(problem)))
    relaxation.solve(5)
    sequence = rounded(relaxation.gaps, relaxation.solution, 0.5)
    assert len(sequence) > len(problem.nodes)
    assert replay(problem, sequence).peak < peak_of(problem)


def test_rounding_looks_for_relief_until_its_deadline() -> None:
    problem = layered(6, 8)
    relaxation = Relaxation(gaps_of(problem), int(0.6 * peak_of(problem)))
    in_turn, ahead, late = (
        rounded(relaxation.gaps, relaxation.solution, 0.5, *limits)
        for limits in ((), (4,), (4, 0.0))
    )
    assert in_turn == late != ahead


@pytest.mark.parametrize("make", (random_graph, random_outputs))
def test_a_budget_is_excluded_only_if_nothing_fits(make: Callable[[int, int], Problem]) -> None:
    excluded = 0
    for seed in range(60):
        problem = make(seed, 7)
        budget = int(peak_of(problem) * 0.7)
        if is_excluded(problem, budget):
            assert cheapest_sequence(problem, budget) is None
            excluded += 1
    assert excluded > 10


@pytest.fixture
def published() -> Problem:
    """a -> b -> c -> e -> d and a -> d, of sizes 4, 1, 4, 1, 1, in unit times."""
    nodes = [Node(name, size, 1) for name, size in zip("abced", (4, 1, 4, 1, 1), strict=True)]
    return make_problem("published", nodes, [(0, 1), (1, 2), (2, 3), (3, 4), (0, 4)])


def test_the_published_example(published: Problem) -> None:
    assert peak_of(published) == 9
    plan = solve(published, 6)
    assert (plan.time, plan.peak) == (6, 6)
    assert [published.nodes[v].name for v in plan.sequence] == list("abcead")
    with pytest.raises(BudgetError, match="least budget known to suffice is 6"):
        solve(published, 5)


@pytest.mark.parametrize("share", (0.6, 0.8, 1.0))
@pytest.mark.parametrize("problem", (layered(6, 8), training(5)), ids=lambda p: p.name)
def test_plans_of_larger_graphs_fit_and_do_not_beat_their_bound(
    problem: Problem, share: float
) -> None:
    budget = int(share * peak_of(problem))
    plan = solve(problem, budget, time_limit=3)
    assert replay(problem, plan.sequence, budget).time == plan.time
    assert problem.least_time <= plan.bound <= plan.time


def test_a_tight_budget_takes_chains_of_repetitions() -> None:
    problem = layered(12, 12)
    budget = int(0.6 * peak_of(problem))
    plan = solve(problem, budget, time_limit=10, gap=math.inf)
    assert replay(problem, plan.sequence, budget).time == plan.time
    assert max(Counter(plan.sequence).values()) > 2


@pytest.mark.parametrize("fixed", [False, True])
def test_what_does_not_fit_descends(fixed: bool) -> None:
    """The peak falls, in small steps, below what the annealing before reached."""
    problem = layered(12, 12)
    budget = int(0.45 * peak_of(problem))
    searcher = Searcher(problem, budget, fixed)
    moves = LEAST_ROUND * len(problem.nodes)
    job = Job(searcher.given, 3.0, 30 * searcher.price, 0.5)
    first = searcher.run(job, 1, moves)
    lower = searcher.run(replace(job, least=peak_of(problem)), 1, moves)
    assert 0 < first.over == replay(problem, first.sequence).peak - budget
    assert lower.over < first.over
    assert lower.over == max(replay(problem, lower.sequence).peak - budget, 0)
    assert not fixed or tuple(dict.fromkeys(lower.sequence)) == problem.order
    assert searcher.run(replace(job, least=peak_of(problem)), 1, moves) == lower
    searcher.stop[0] = True
    assert searcher.run(replace(job, least=peak_of(problem)), 1, moves).over >= lower.over


def test_a_search_may_begin_with_many_runs_of_one_node() -> None:
    problem = layered(6, 8)
    start = [problem.order[0]] * (2 * MOST_RUNS) + list(problem.order)
    best = next(iter(search(problem, peak_of(problem), starts=[start])))
    assert best.over == 0


def test_a_fixed_order_is_kept() -> None:
    problem = training(6)
    plan = solve(problem, int(0.7 * peak_of(problem)), time_limit=2, fixed_order=True)
    assert len(plan.sequence) > len(problem.nodes)
    assert tuple(dict.fromkeys(plan.sequence)) == problem.order


def test_a_seed_gives_one_result() -> None:
    problem = layered(6, 8, seed=3)
    budget = int(0.7 * peak_of(problem))
    assert found_by_search(problem, budget, 2) == found_by_search(problem, budget, 2)


def test_progress_and_bound_are_reported() -> None:
    problem = training(6)
    seen: list[Progress] = []
    solve(problem, int(0.6 * peak_of(problem)), time_limit=2, progress=seen.append)
    assert {step.phase for step in seen} >= {"search", "bound"}
    assert seen[-1].bound > problem.least_time
    assert 0 <= seen[-1].gap < math.inf


def test_an_interrupt_gives_the_best_plan_so_far() -> None:
    problem = training(6)

    def interrupt(step: Progress) -> None:
        if step.time < math.inf:
            raise KeyboardInterrupt

    plan = solve(problem, int(0.6 * peak_of(problem)), progress=interrupt)
    assert plan.peak <= 0.6 * peak_of(problem)


@pytest.mark.parametrize("count", (0, 1))
def test_degenerate_graphs(count: int) -> None:
    problem = make_problem("tiny", [Node("only", 0, 0)] * count, [])
    assert solve(problem, 0).sequence == tuple(range(count))


def test_an_impossible_budget_names_the_least_known_and_the_largest_tensors() -> None:
    problem = training(6)
    with pytest.raises(BudgetError) as caught:
        solve(problem, 20, time_limit=1)
    assert caught.value.least_known >= caught.value.least_possible > 20
    assert solve(problem, caught.value.least_known, time_limit=3).peak <= caught.value.least_known
    assert "up0" in str(caught.value)


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        ((1, 0, 2), "needs first"),
        ((0, 1), "never runs"),
        ((0, 1, 9), "names node 9"),
        ((0, 1, 0, 2), "may run only once"),
    ],
)
def test_the_replay_refuses(sequence: tuple[int, ...], message: str) -> None:
    nodes = [Node("first", 2, 1, rematable=False), Node("second", 1, 1), Node("third", 1, 1)]
    problem = make_problem("chain", nodes, [(0, 1), (0, 2)])
    with pytest.raises(PlanError, match=message):
        replay(problem, sequence)


def test_outputs_have_lifetimes_of_their_own() -> None:
    nodes = [Node("both", (4, 2), 1), Node("first", 1, 1), Node("sink", (), 1), Node("last", 1, 1)]
    edges: list[tuple[Source, int]] = [((0, 0), 1), ((1, 0), 2), ((0, 1), 3), (1, 3)]
    problem = make_problem("outputs", nodes, edges)
    assert replay(problem, (0, 1, 2, 3)).held == (6, 7, 3, 4)
    # The second output of the first run is of no use beside that of the second.
    assert replay(problem, (0, 1, 2, 0, 3)).held == (6, 5, 1, 7, 4)
    with pytest.raises(PlanError, match=r"needs both \(output 0\)"):
        replay(problem, (1, 0, 2, 3))


def test_the_replay_refuses_what_exceeds_the_budget() -> None:
    with pytest.raises(PlanError, match="the budget is 3"):
        replay(make_problem("one", [Node("only", 4, 1)], []), [0], budget=3)


def test_the_plan_of_an_error_is_one_for_its_budget() -> None:
    problem = layered(5, 6)
    with pytest.raises(BudgetError) as caught:
        solve(problem, 1, time_limit=0.5)
    known = caught.value
    assert replay(problem, known.sequence).peak == known.least_known
    plan = solve(problem, known.least_known, time_limit=0.0, starts=[known.sequence])
    assert plan.peak <= known.least_known
