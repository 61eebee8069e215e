"""The command line: results on stdout, one message for each mistake, exit codes 0, 1 and 2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from moec.capture import model_spec
from moec.capture.model_spec import load, load_model
from moec.cli import app
from moec.cli.console import print_table
from moec.errors import CompileError
from moec.ir import parse, parse_file
from moec.manager import all_passes
from moec.reproducer import pipeline_of

BLOCK = """\
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
TWICE = """\
graph @twice(%x: f32[N]) {
  %a = t.silu(%x) : f32[N]
  %b = t.silu(%x) : f32[N]
  %y = t.add(%a, %b) : f32[N]
  return %y
}
"""
TINY = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 4,
    "vocab_size": 32,
}
FACTORY = """
import torch

number = 3
layer = torch.nn.Linear(2, 2)


def build():
    return torch.nn.Linear(2, 3)


def with_arguments(size):
    return torch.nn.Linear(size, size)


def failing():
    raise OSError("the disk is on fire")


def plain():
    return torch.sin
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in an empty folder that holds the two graphs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "block.moe").write_text(BLOCK)
    (tmp_path / "both.moe").write_text(BLOCK + TWICE)
    return tmp_path


def moec(*words: str, stdin: str | None = None) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(app, list(words), input=stdin, prog_name="moec")


def succeed(*words: str, stdin: str | None = None) -> str:
    """Run a command that must succeed; its stdout."""
    result = moec(*words, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result.stdout


def fail(*words: str) -> str:
    """Run a command that must fail with one message on stderr; the message."""
    result = moec(*words)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert "internal error" not in result.stderr
    return result.stderr


# opt
def test_opt_runs_passes_and_prints_the_result() -> None:
    text = succeed("opt", "block.moe", "-p", "raise-router, simplify, dce")
    assert "moe.select" in text
    assert parse(text).name == "block"


def test_opt_takes_options_of_passes() -> None:
    whole = parse(succeed("opt", "block.moe", "-p", "fuse-gemm, dce"))
    single = parse(succeed("opt", "block.moe", "-p", "fuse-gemm{max-ops=1}, dce"))
    assert len(whole.ops) < len(single.ops)


@pytest.mark.parametrize("training", [False, True])
def test_opt_default_pipeline_ends_in_kernels(training: bool) -> None:
    graph = parse(succeed("opt", "block.moe", *(["--training"] if training else [])))
    assert any(op.kind == "kern.grouped_gemm" for op in graph.ops)
    assert bool(graph.cotangents) == training


def test_opt_for_aten_fuses_row_work_only() -> None:
    graph = parse(succeed("opt", "block.moe", "--target", "aten"))
    kernels = {op.kind for op in graph.ops if op.kind.startswith("kern.")}
    assert kernels == {"kern.pointwise"}
    assert any(op.kind == "moe.grouped_mm" for op in graph.ops)


def test_opt_writes_a_file_and_keeps_all_graphs() -> None:
    assert succeed("opt", "both.moe", "-p", "cse", "-o", "out.moe") == ""
    graphs = parse_file(Path("out.moe").read_text())
    assert [g.name for g in graphs] == ["block", "twice"]
    assert len(graphs[1].ops) == 2
    assert {p.name for p in Path().iterdir()} == {"block.moe", "both.moe", "out.moe"}


def test_opt_of_one_graph_of_a_file() -> None:
    assert parse(succeed("opt", "both.moe", "-p", "cse", "--graph", "@twice")).name == "twice"


def test_opt_reads_stdin() -> None:
    assert parse(succeed("opt", "-", "-p", "", stdin=TWICE)) == parse(TWICE)


def test_opt_prints_after_a_pass_on_stderr() -> None:
    result = moec("opt", "block.moe", "-p", "cse, raise-router", "--print-after", "raise-router")
    assert result.exit_code == 0
    assert result.stderr.startswith("// after raise-router (pass 2)")
    assert "// after" not in result.stdout


def test_opt_time_and_stats_go_to_stderr() -> None:
    result = moec("opt", "block.moe", "-p", "cse, dce", "--time", "--stats")
    assert "share" in result.stderr
    assert "rewrites" in result.stderr
    assert parse(result.stdout) == parse(BLOCK)


def test_opt_dumps_a_folder_for_each_graph_of_several() -> None:
    succeed("opt", "both.moe", "-p", "cse, raise-router", "--dump", "steps", "-o", "out.moe")
    names = sorted(str(p.relative_to("steps")) for p in Path("steps").glob("*/*.moe"))
    assert names == [
        "block/00-input.moe",
        "block/02-raise-router.moe",
        "twice/00-input.moe",
        "twice/01-cse.moe",
    ]


def test_opt_checks_each_pass() -> None:
    succeed("opt", "block.moe", "--training", "--check-each", "-o", "out.moe")


def test_opt_replays_the_run_line_of_a_file() -> None:
    Path("repro.moe").write_text("// run: cse, dce\n" + TWICE)
    assert len(parse(succeed("opt", "repro.moe")).ops) == 2
    assert len(parse(succeed("opt", "repro.moe", "-p", "dce")).ops) == 3


def test_a_failing_pass_leaves_a_reproducer_that_fails_again() -> None:
    Path("unslice.moe").write_text(
        "graph @c(%x: f32[T]) {\n"
        "  %y = t.unslice(%x) {dim=0, start=0, stop=T, size=2*T} : f32[2*T]\n  return %y }"
    )
    message = fail("opt", "unslice.moe", "-p", "dce, grad")
    (file,) = Path().glob("moec-repro-*.moe")
    assert file.name in message
    assert "t.unslice has no gradient" in message
    assert pipeline_of(file.read_text()) == "grad"
    assert "t.unslice has no gradient" in fail("opt", str(file))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing.moe"], "missing.moe: No such file or directory"),
        (["."], ".: Is a directory"),
        (["block.moe", "-p", "cse,nonsense"], "unknown pass 'nonsense'; passes: adjoint, batch-"),
        (["block.moe", "-p", "cse{depth=3}"], "pass cse has no option 'depth'; options: none"),
        (["block.moe", "-p", "fuse-gemm{max-ops=x}"], "'x' is no int"),
        (["block.moe", "-p", "cse}"], "cannot read the pipeline at 'cse}'"),
        (["block.moe", "--print-after", "nonsense"], "unknown pass 'nonsense'"),
        (["block.moe", "-p", "cse", "--print-after", "dce"], "does not run it; it runs cse"),
        (["block.moe", "--graph", "other"], "has no graph 'other'; it holds @block"),
        (["block.moe", "-o", "no/such/out.moe"], "No such file or directory"),
    ],
)
def test_opt_explains_mistakes(words: list[str], message: str) -> None:
    assert message in fail("opt", *words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "bad.moe:1:1: holds no graph"),
        ("// only a comment\n", "bad.moe:1:1: holds no graph"),
        ("hello", "bad.moe:1:1: expected 'graph', found 'hello'"),
        (BLOCK[:-3], "bad.moe:14:12: expected '}', found 'end of text'"),
        (BLOCK.replace("t.silu", "t.sliu"), "bad.moe:10:10: unknown op 't.sliu'"),
        (BLOCK.replace("t.silu(%gate)", "t.silu(%gat)"), "%gat is not defined before its use"),
        (BLOCK.replace("f32[4, 8]", "f33[4, 8]"), "unknown dtype 'f33'; known: f64"),
        (BLOCK.replace("f32[4, 12, 8]", "f32[4, 12, 9]"), "inner dimensions differ: 8 and 9"),
    ],
)
def test_malformed_text_is_reported_with_its_place(text: str, message: str) -> None:
    Path("bad.moe").write_text(text)
    for command in (["opt"], ["run"], ["emit"]):
        assert message in fail(*command, "bad.moe")


def test_binary_file_is_reported() -> None:
    Path("bad.moe").write_bytes(b"graph \xff\xfe")
    assert "bad.moe:1:7: not text in UTF-8 (byte 6)" in fail("opt", "bad.moe")


def test_a_failed_run_does_not_touch_the_output() -> None:
    Path("out.moe").write_text("precious")
    fail("opt", "block.moe", "-p", "nonsense", "-o", "out.moe")
    assert Path("out.moe").read_text() == "precious"


def test_debug_shows_the_traceback_wherever_it_stands() -> None:
    for words in (["--debug", "opt", "missing.moe"], ["opt", "missing.moe", "--debug"]):
        result = moec(*words)
        assert result.exit_code == 1
        assert "Traceback" in result.stderr


def test_a_bug_is_one_message_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def buggy(*arguments: object, **options: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr("moec.cli.graphs.graphs_in", buggy)
    result = moec("opt", "block.moe")
    assert result.exit_code == 1
    assert "internal error: KeyError: 'surprise'" in result.stderr
    assert "Traceback" not in result.stderr


# run
def test_run_prints_shape_norm_and_checksum() -> None:
    lines = succeed("run", "block.moe", "T=33").splitlines()
    assert lines[0] == "@block"
    assert lines[1].split()[:5] == ["y", "f32[T,", "8]", "shape", "(33,"]


def test_run_is_deterministic_and_obeys_the_seed() -> None:
    first, second = (succeed("run", "block.moe", "T=5") for _ in range(2))
    assert first == second
    assert first != succeed("run", "block.moe", "T=5", "--seed", "1")


def test_run_gives_the_same_before_and_after_optimisation() -> None:
    succeed("opt", "block.moe", "--training", "-o", "out.moe")
    for size in ("T=0", "T=1", "T=33"):
        before = norms(succeed("run", "block.moe", size, "--float64"))
        after = norms(succeed("run", "out.moe", size, "--float64"))
        assert after["y"] == before["y"]
        assert set(after) == {"y", "grad x", "grad router", "grad up", "grad down"}


def norms(output: str) -> dict[str, str]:
    """Name and norm of each result."""
    lines = [line.strip() for line in output.splitlines()[1:]]
    return {line.split("  ")[0].strip(): line.split("norm ")[1].split("  ")[0] for line in lines}


def test_run_of_several_graphs_takes_the_dims_of_all() -> None:
    assert succeed("run", "both.moe", "T=3", "N=4").count("checksum") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["block.moe"], "@block needs sizes for T; say for example T=33"),
        (["block.moe", "T=3", "S=4"], "block.moe has no dim S; its dims: T"),
        (["block.moe", "T=9999"], "T=9999 is outside 0 <= T <= 4096"),
        (["both.moe", "T=3"], "@twice needs sizes for N"),
        (["both.moe", "--graph", "twice", f"N={10**15}"], "give smaller dims"),
        (["missing.moe", "T=3"], "missing.moe: No such file"),
    ],
)
def test_run_explains_mistakes(words: list[str], message: str) -> None:
    assert message in fail("run", *words)


@pytest.mark.parametrize("word", ["T", "T=", "=3", "T=three", "T=-1", "T=1.5", "T=" + "9" * 30])
def test_a_malformed_size_is_wrong_usage(word: str) -> None:
    result = moec("run", "block.moe", word)
    assert result.exit_code == 2
    assert "write a dim and a number, as in T=33" in " ".join(result.stderr.split())


# lists and help
def test_passes_lists_every_pass_with_its_options() -> None:
    lines = succeed("passes").splitlines()
    assert [line.split("\t")[0] for line in lines] == list(all_passes())
    assert any(line.endswith("\tmax-ops=64") for line in lines)


def test_ops_of_a_dialect() -> None:
    text = succeed("ops", "moe")
    assert all(line.startswith("moe.") for line in text.splitlines())
    assert "moe.dispatch\t" in text
    assert "there is no dialect 'mo'; dialects: t, moe, kern" in fail("ops", "mo")


def test_tables_on_a_terminal_do_not_read_brackets_as_markup(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    print_table(("op", "attributes"), [("t.amax", "dims, [keepdim]")])
    assert "[keepdim]" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["explain", "trace", "opt", "run", "emit", "passes", "ops"])
def test_help_of_every_command_has_an_example(command: str) -> None:
    assert f"moec {command} " in succeed(command, "--help").replace("\n", " \n")


def test_help_and_version() -> None:
    assert "moec trace mixtral -o a.moe" in succeed("--help")
    assert succeed("--version").startswith("moec ")


@pytest.mark.parametrize(
    "words",
    [["nonsense"], ["opt"], ["opt", "block.moe", "--nonsense"], ["emit", "a", "--target", "cobol"]],
)
def test_wrong_usage_exits_with_2(words: list[str]) -> None:
    result = moec(*words)
    assert result.exit_code == 2
    assert "Usage" in result.stderr


def test_the_command_starts_as_a_module_and_says_errors_on_stderr() -> None:
    command = [sys.executable, "-m", "moec", "run", "missing.moe"]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "moec: missing.moe: No such file or directory\n"


def test_import_moec_needs_no_cli_solver_or_plotting() -> None:
    check = "import sys, moec; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["typer", "rich", "ortools", "matplotlib", "transformers"]
    result = subprocess.run(
        [sys.executable, "-c", check, *heavy],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert result.stdout.strip() == "[]"


# models
def write_config(**changes: object) -> str:
    Path("config.json").write_text(json.dumps({**TINY, **changes}))
    return "config.json"


def test_trace_writes_one_graph_for_equal_blocks() -> None:
    result = moec("trace", write_config(), "-o", "a.moe")
    assert result.exit_code == 0, result.output
    assert "1 distinct of 2 regions" in result.stderr
    text = Path("a.moe").read_text()
    assert text.startswith("// model.layers.0.mlp and 1 equal: model.layers.1.mlp\n")
    (graph,) = parse_file(text)
    assert any(op.kind == "moe.dispatch" for op in graph.ops)
    assert "checksum" in succeed("run", "a.moe", "T=3")


def test_trace_of_training_is_a_joint_graph() -> None:
    assert parse_file(succeed("trace", write_config(), "--training"))[0].cotangents


def test_trace_of_a_model_without_experts_is_an_error() -> None:
    message = fail_to_load("trace", "torch.nn:Identity")
    assert "no MoE block that could be captured" in message


def test_explain_names_the_regions() -> None:
    assert "model.layers.1.mlp" in succeed("explain", write_config())


@pytest.mark.parametrize("target", ["triton", "aten"])
def test_emit_writes_a_python_module(target: str) -> None:
    succeed("emit", "block.moe", "--target", target, "-o", "kernels.py")
    text = Path("kernels.py").read_text()
    compile(text, "kernels.py", "exec")
    assert "def forward(" in text
    assert ("@triton.jit" in text) == (target == "triton")


def test_emit_asks_which_of_several_graphs() -> None:
    assert "choose one with --graph: block, twice" in fail("emit", "both.moe")


def fail_to_load(*words: str) -> str:
    """As `fail`, without the lines that tell what is being done; one message stays."""
    lines = [line for line in fail(*words).splitlines() if not line.endswith(" ...")]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mixtrl", "no model type or architecture 'mixtrl'; did you mean mixtral"),
        ("MixtralForCasualLM", "did you mean MixtralForCausalLM"),
        ("missing.json", "missing.json: no such file"),
        ("no/such/folder", "no/such/folder: no such file"),
        ("what is this", "names no model: give the path of a config.json"),
        ("nomodule:build", "there is no module 'nomodule'"),
        ("factory:biuld", "factory has no 'biuld'; did you mean build?"),
        ("factory:number", "factory:number gives a int; it must be, or return"),
        ("factory:plain", "gives a builtin_function_or_method; it must be, or return"),
        ("factory:with_arguments", "needs the arguments size; give a function that needs none"),
        ("factory:failing", "factory:failing raised OSError: the disk is on fire"),
        ("faulty:build", "faulty cannot be imported: SyntaxError"),
    ],
)
@pytest.mark.parametrize("command", ["trace", "explain"])
def test_an_unknown_model_is_explained(command: str, spec: str, message: str) -> None:
    Path("factory.py").write_text(FACTORY)
    Path("faulty.py").write_text("def build(:\n")
    said = fail_to_load(command, spec)
    assert message in said
    assert len(said.splitlines()) == 1
    sys.modules.pop("factory", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json:1:2: Expecting property name"),
        ("[1]", 'config.json:1:1: has no "model_type"'),
        ('{"hidden_size": 4}', 'config.json:1:1: has no "model_type"'),
        ('{"model_type": "mixtrall"}', "knows no model_type 'mixtrall'; did you mean mixtral"),
        ('{"model_type": "mixtral", "hidden_size": "x"}', "not a valid mixtral configuration"),
    ],
)
def test_a_bad_configuration_is_explained(text: str, message: str) -> None:
    Path("config.json").write_text(text)
    with pytest.raises(CompileError) as raised:
        load_model("config.json")
    assert message in str(raised.value)


@pytest.mark.parametrize("name", ["build", "layer"])
def test_a_factory_in_the_current_folder(name: str) -> None:
    Path("factory.py").write_text(FACTORY)
    assert isinstance(load_model(f"factory:{name}"), torch.nn.Linear)
    assert str(Path.cwd()) not in sys.path
    sys.modules.pop("factory", None)


def test_missing_transformers_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'moec[hf]'" in fail_to_load("trace", "mixtral")


def test_a_folder_with_a_configuration_is_a_model() -> None:
    write_config()
    assert type(load_model(".")).__name__ == "MixtralForCausalLM"


def test_a_model_that_is_too_large_is_cut_and_shares_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model_spec, "MEMORY_LIMIT", 1000)
    monkeypatch.setattr(model_spec, "_LARGE", 100)
    loaded = load(write_config(model_type="olmoe", architectures=None, num_experts=4))
    assert "of 2 layers the first 1 are built" in loaded.note
    weights = dict(loaded.model.named_parameters())["model.layers.0.mlp.experts.gate_up_proj"]
    assert weights.untyped_storage().nbytes() < weights.nbytes
    assert not torch.equal(weights[0], weights[1])
    assert weights.device.type == "cpu"
