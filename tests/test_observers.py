"""Observers see every pass; Check finds wrong ones; a failure leaves a file that fails again."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moec.errors import DimError, IRError, PassError
from moec.inputs import default_dims, random_inputs
from moec.interp import run
from moec.ir import Builder, Graph, parse, show
from moec.manager import PassCall, PassDef, PassManager
from moec.observers import Check, Dump, Print, PrintBefore, Stats, Time, Verify, difference
from moec.pipeline import pipeline
from moec.reproducer import Reproducer, pipeline_of

BLOCK = """
graph @block(%x: f32[T, 8], %router: f32[4, 8], %up: f32[4, 12, 8], %down: f32[4, 8, 6]) where 0 <= T <= 4096 {
  %logits = t.linear(%x, %router) : f32[T, 4]
  %scores = t.softmax(%logits) {dim=-1} : f32[T, 4]
  %picked, %idx = t.topk(%scores) {dim=-1, k=2} : f32[T, 2], i64[T, 2]
  %chosen = t.cast(%idx) {dtype="i32"} : i32[T, 2]
  %perm, %offsets, %inverse = moe.dispatch(%chosen) {experts=4} : i32[2*T], i32[5], i32[T, 2]
  %rows = moe.gather(%x, %perm, %inverse) : f32[2*T, 8]
  %hidden = moe.grouped_mm(%rows, %up, %offsets) : f32[2*T, 12]
  %gate, %value = t.split(%hidden) {parts=2} : f32[2*T, 6], f32[2*T, 6]
  %act = t.silu(%gate) : f32[2*T, 6]
  %inner = t.mul(%act, %value) : f32[2*T, 6]
  %out = moe.grouped_mm(%inner, %down, %offsets) : f32[2*T, 8]
  %y = moe.combine(%out, %perm, %inverse, %picked) : f32[T, 8]
  return %y
}
"""  # noqa: E501


@pytest.fixture
def block() -> Graph:
    return parse(BLOCK)


def call_of(name: str, function: Callable[[Graph], Graph], *leaves: str) -> PassCall:
    return PassCall(PassDef(name, function, frozenset(leaves or ("t", "moe", "kern"))))


def without_weights(graph: Graph) -> Graph:
    """A wrong pass: the combine at the end forgets the routing weights."""
    builder = Builder(graph.ranges)
    builder.ops.extend(graph.ops[:-1])
    result = builder("moe.combine", *graph.ops[-1].operands[:3], hint="y")
    return replace(graph, ops=tuple(builder.ops), outputs=(result,))


def undefined_output(graph: Graph) -> Graph:
    return graph.with_ops(graph.ops[:-1])


def broken(graph: Graph) -> Graph:
    raise KeyError("a bug")


def test_the_default_pipeline_passes_every_check(block: Graph) -> None:
    observers = [Verify(), Check()]
    for training in (False, True):
        PassManager(pipeline("triton", training), observers).run(block)


def test_verify_names_the_pass_that_broke_a_rule(block: Graph) -> None:
    with pytest.raises(IRError, match=r"never defined(.|\n)*after pass lose"):
        PassManager([call_of("lose", undefined_output)], [Verify()]).run(block)


def test_verify_does_not_blame_a_pass_for_its_input(block: Graph) -> None:
    with pytest.raises(IRError) as raised:
        PassManager("dce", [Verify()]).run(undefined_output(block))
    assert "after pass" not in str(raised.value)


def test_verify_holds_a_pass_to_its_dialects(block: Graph) -> None:
    same = call_of("same", lambda graph: graph, "t")
    with pytest.raises(IRError, match="only t ops may be left"):
        PassManager([same], [Verify()]).run(block)


def test_print_writes_the_graph_after_the_named_pass(block: Graph) -> None:
    written: list[str] = []
    PassManager("cse, raise-router, dce", [Print({"raise-router"}, written.append)]).run(block)
    (text,) = written
    assert text.startswith("// after raise-router (pass 2): 12 -> ")
    assert "moe.select" in show(parse(text))


def test_print_of_all_skips_passes_that_changed_nothing(block: Graph) -> None:
    written: list[str] = []
    PassManager("cse, raise-router", [Print(None, written.append)]).run(block)
    assert [text.split(" ")[2] for text in written] == ["raise-router"]


def test_print_before_writes_what_a_pass_gets(block: Graph) -> None:
    written: list[str] = []
    PassManager("cse, raise-router", [PrintBefore({"raise-router"}, written.append)]).run(block)
    (text,) = written
    assert text.startswith("// before raise-router (pass 2): 12 ops\n")
    assert parse(text) == block
    PassManager("cse, raise-router", [PrintBefore(None, written.append)]).run(block)
    assert len(written) == 3


def test_dump_writes_what_changed_and_it_reads_back(block: Graph, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "steps"
    manager = PassManager("cse, raise-router, simplify", [Dump(folder)])
    result = manager.run(block)
    assert [p.name for p in sorted(folder.iterdir())] == [
        "00-input.moe",
        "02-raise-router.moe",
        "03-simplify.moe",
    ]
    text = (folder / "03-simplify.moe").read_text()
    step = manager.history[-1]
    head = f"// {len(step.before.ops)} -> {len(step.after.ops)} ops, 1 rewrite, "
    assert text.startswith(head)
    assert parse(text) == result
    assert parse((folder / "00-input.moe").read_text()) == block


def test_time_and_stats_have_a_row_for_each_pass(block: Graph) -> None:
    time, stats = Time(), Stats()
    PassManager("cse, fuse-gemm{max-ops=3}, dce", [time, stats]).run(block)
    assert [row[0] for row in time.rows()] == ["cse", "fuse-gemm{max-ops=3}", "dce", "all passes"]
    assert stats.rows()[1][1:] == ("2", "12", stats.rows()[1][3])
    assert "rewrites" in str(stats).splitlines()[0]
    assert len({len(line) for line in str(time).splitlines()}) == 1


def test_time_of_no_pass_is_a_table_too() -> None:
    assert "0.00" in str(Time())


def test_check_names_pass_value_and_sizes(block: Graph) -> None:
    wrong = call_of("forget", without_weights)
    with pytest.raises(PassError, match=r"pass forget changed .* %y differs(.|\n)*T=5, seed 3"):
        PassManager([wrong], [Check(seed=3)]).run(block)


def test_check_takes_sizes(block: Graph) -> None:
    wrong = call_of("forget", without_weights)
    with pytest.raises(PassError, match="T=17"):
        PassManager([wrong], [Check({"T": 17, "unused": 3})]).run(block)
    PassManager([wrong], [Check({"T": 0})]).run(block)  # without tokens both are the same


def test_check_compares_gradients_with_autograd(block: Graph) -> None:
    def doubled(graph: Graph) -> Graph:
        joint = PassManager("grad").run(graph)
        builder = Builder(graph.ranges)
        builder.ops.extend(joint.ops)
        first = builder("t.mul", joint.returned[1], other=2.0)
        return replace(joint, ops=tuple(builder.ops), gradients=(first, *joint.gradients[1:]))

    PassManager("grad", [Check()]).run(block)
    with pytest.raises(PassError, match="differs"):
        PassManager([call_of("doubled", doubled)], [Check()]).run(block)


def test_check_of_a_gradient_that_is_zero() -> None:
    graph = parse("graph @one(%x: f32[T], %z: f32[T]) { %y = t.sign(%x) : f32[T] return %y }")
    PassManager("grad, dce", [Verify(), Check()]).run(graph)


@pytest.mark.parametrize(
    ("expected", "got", "words"),
    [
        ([1.0, float("nan")], [1.0, float("nan")], ""),
        ([1.0, float("inf")], [1.0, float("inf")], ""),
        ([1.0], [1.0 + 1e-12], ""),
        ([1.0], [1.001], "differs by 0.001"),
        ([1.0], [float("nan")], "differs"),
        ([1, 2], [1, 3], "differs in 1 of 2"),
        ([], [], ""),
        ([1.0], [1.0, 2.0], "has shape"),
    ],
)
def test_difference(expected: list[float], got: list[float], words: str) -> None:
    found = difference(torch.tensor(expected), torch.tensor(got))
    assert found.startswith(words) if words else not found


@pytest.mark.parametrize(("function", "error"), [(broken, KeyError), (undefined_output, IRError)])
def test_a_failure_leaves_a_reproducer(
    block: Graph, tmp_path: Path, function: Callable[[Graph], Graph], error: type[Exception]
) -> None:
    calls = [call_of("first", lambda graph: graph), call_of("bad", function)]
    reproducer = Reproducer(tmp_path)
    with pytest.raises(error) as raised, reproducer:
        PassManager(calls, [Verify(), reproducer]).run(block)
    assert reproducer.path is not None
    text = reproducer.path.read_text()
    assert pipeline_of(text) == "bad"
    assert parse(text) == block
    assert error.__name__ in text
    assert str(tmp_path.parent) not in text
    assert any(reproducer.path.name in note for note in raised.value.__notes__)


def test_the_same_failure_gives_the_same_file(block: Graph, tmp_path: Path) -> None:
    for _ in range(2):
        reproducer = Reproducer(tmp_path)
        with pytest.raises(KeyError), reproducer:
            PassManager([call_of("bad", broken)], [reproducer]).run(block)
    assert len(list(tmp_path.iterdir())) == 1


def test_success_leaves_nothing(block: Graph, tmp_path: Path) -> None:
    reproducer = Reproducer(tmp_path)
    with reproducer:
        PassManager("dce", [reproducer]).run(block)
    assert reproducer.path is None
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_does_not_hide_the_error(
    block: Graph, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    reproducer = Reproducer(tmp_path / "file")
    with pytest.raises(KeyError) as raised, reproducer:
        PassManager([call_of("bad", broken)], [reproducer]).run(block)
    assert any("no reproducer could be written" in note for note in raised.value.__notes__)


# inputs
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_generated_inputs_run_at_every_stage(block: Graph, tokens: int) -> None:
    joint = PassManager(pipeline("triton", training=True)).run(block)
    for graph in (block, joint, *(op.body for op in joint.ops if op.body is not None)):
        results = run(graph, random_inputs(graph, {"T": tokens}), dims={"T": tokens})
        assert all(r.isfinite().all() for r in results if r.is_floating_point())


def test_inputs_are_the_same_before_and_after_optimisation(block: Graph) -> None:
    joint = PassManager(pipeline("triton", training=True)).run(block)
    before, after = (random_inputs(g, {"T": 7}, seed=2) for g in (block, joint))
    for one, other in zip(before, after, strict=False):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert not torch.equal(before[0], random_inputs(block, {"T": 7}, seed=3)[0])


def test_permutation_inputs_belong_to_one_dispatch() -> None:
    graph = parse(
        "graph @rows(%x: f32[T, 8], %w: f32[6, 4, 8], %perm: i32[3*T], %inverse: i32[T, 3],"
        " %offsets: i32[7]) {"
        " %rows = moe.gather(%x, %perm, %inverse) : f32[3*T, 8]"
        " %y = moe.grouped_mm(%rows, %w, %offsets) : f32[3*T, 4] return %y }"
    )
    _, _, perm, inverse, offsets = random_inputs(graph, {"T": 5})
    assert sorted(perm.tolist()) == list(range(15))
    assert inverse.flatten()[perm.long()].tolist() == list(range(15))
    assert offsets[0] == 0
    assert offsets[-1] == 15
    assert (offsets.diff() >= 0).all()


def test_expert_indices_are_valid_and_distinct_within_a_token() -> None:
    graph = parse(
        "graph @d(%idx: i64[B, S, 2]) { %flat = t.reshape(%idx) {shape=[B*S, 2]} : i64[B*S, 2]"
        ' %i = t.cast(%flat) {dtype="i32"} : i32[B*S, 2] %p, %o, %v = moe.dispatch(%i)'
        " {experts=3} : i32[2*B*S], i32[4], i32[B*S, 2] return %p }"
    )
    (idx,) = random_inputs(graph, {"B": 4, "S": 9})
    assert idx.dtype == torch.int64
    assert set(idx.flatten().tolist()) == {0, 1, 2}
    assert (idx[..., 0] != idx[..., 1]).all()


def test_float64_inputs_and_default_dims() -> None:
    graph = parse("graph @g(%x: bf16[T, S], %i: i32[S]) where 1 <= T <= 2 { return %x, %i }")
    sizes = default_dims(graph)
    assert sizes["T"] == 2
    assert default_dims(graph, size=0) == {"T": 1, "S": 0}
    dtypes = [t.dtype for t in random_inputs(graph, sizes, float64=True)]
    assert dtypes == [torch.float64, torch.int32]


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({}, "needs sizes for T; say for example T=33"),
        ({"T": 5000}, "T=5000 is outside 0 <= T <= 4096"),
    ],
)
def test_bad_sizes_are_explained(block: Graph, sizes: dict[str, int], words: str) -> None:
    with pytest.raises(DimError, match=words):
        random_inputs(block, sizes)


def test_inputs_that_cannot_fit_are_refused() -> None:
    graph = parse("graph @big(%x: f32[T, T]) { return %x }")
    with pytest.raises(DimError, match="give smaller dims"):
        random_inputs(graph, {"T": 10**9})
