"""The public calls: compile a model, explain what became of it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import ScriptObject, nn

from moec.artifact_lines import artifact_lines
from moec.budget.options import read_budget
from moec.budget.scope import Budget, BudgetScope
from moec.capture.disagreement import odd_experts
from moec.capture.regions import Candidate, find_candidates
from moec.compiled import install, model_scope_of, region_of
from moec.declared import Dynamic, declare, show_range
from moec.declared_check import CheckedModel, CheckInputs, check_fixed
from moec.declared_limits import Limits
from moec.errors import CompileError
from moec.manager import parse_pipeline
from moec.model_scope import DEFAULT_BACKEND, ModelScope, check_backend
from moec.region import Region
from moec.session import Session, no_repro
from moec.share import share
from moec.targets import TARGETS
from moec.watching import Watching, from_environment

M = TypeVar("M", bound=nn.Module)
OPTIONS = {
    "cache": "folder of the emitted modules (default: the user's cache folder)",
    "dump": "folder to which the IR after each pass is written, as module.path/mode/07-pass.moe"
    " (default: the environment's MOEC_DUMP)",
    "trace": "file to which the time of compilation is written, as Chrome-trace JSON",
    "gluon": "false: no products in Gluon, which serve Hopper GPUs where they are faster (default:"
    " true)",
    "numerics": "repro: a token has the same bits in whatever batch it comes, forward and backward;"
    " needs the target triton (docs/numerics.md; default: default)",
    "token_rounding": "rows of a tile, say 128: in training, a few tokens go to other experts, so"
    " that these fill whole tiles (docs/routers.md; default: 0, all go where the router says)",
    "tuning": "file of tiles that moec tune measured (docs/tuning.md; default: the one that comes"
    " with moec for the GPU, if any; false: none)",
    "passes": "pipeline text in place of the default one",
    "reserve": "with a memory budget: bytes of it for what moec does not see, the state of an"
    " optimizer above all (default: 0; on a GPU what is allocated at a call, if that is more)",
    "count_others": "with a memory budget: false where it is for a part of a model, so that what"
    " else is allocated on a GPU is no part of it (default: true)",
    "fuse_groups": "with a memory budget: compile groups of light operations with TorchInductor"
    " (default: true on a GPU, false elsewhere)",
    "rates": "with a memory budget: file of what moec calibrate measured of this device, from which"
    " times are modelled (docs/budget.md; default: moec's own guesses)",
    "gradients_of": "with a memory budget: all where other outputs than a scalar one, the loss, get"
    " gradients, as logits in a loss of your own beside the model's (default: loss)",
    "plan_seconds": "with a memory budget: how long to plan at most (default: 20)",
    "model_backend": "scope model: the torch.compile backend of what is not MoE (inductor)",
}
SCOPES = ("region", "model")
MODES = ("default", "reduce-overhead")
NUMERICS = ("default", "repro")
MOST_ROUNDED = 1 << 16


def compile(
    model: M,
    *,
    dynamic: bool | Dynamic = True,
    memory_budget: int | str | None = None,
    target: str | None = None,
    scope: str = "region",
    mode: str = "default",
    strict: bool = False,
    options: Mapping[str, Any] | None = None,
) -> M:
    """A model of the same class over the same parameters, whose MoE regions run compiled code.

    The original model is untouched. ``state_dict()``, ``generate()``, optimizers, autocast and
    ``no_grad`` work as before; each region is compiled once for every number of tokens, at its
    first call in each mode (training or not, dtype, device).

    Args:
        model: any ``nn.Module``; what moec does not understand stays as it was, with one warning.
        dynamic: True: every size of the inputs is free, and one artifact serves all. Or names and
            ranges for some of them, ``{"input_ids": {0: moec.dim("B", max=8), 1: moec.dim("S",
            max=4096)}}``: then calls are checked before they run, a :class:`CallError` names what
            is outside, and compiled code may rely on the ranges. A number says that an axis always
            has that size. See docs/dims.md.
        memory_budget: bytes, or a size such as "40GiB", that a step of training (forward and
            backward) needs at most, parameters, gradients, inputs and outputs included, for any
            routing. The step is captured as one graph; what does not fit is dropped and computed
            again. :class:`BudgetError` at the first call if no plan fits, with the least budget
            that would do. See docs/budget.md.
        target: "triton", "aten", or None for the best one of the device.
        scope: "region": each MoE block by itself, the rest runs as it was. "model": the whole
            forward is one graph of torch.compile with the blocks as ops in it, where it can be
            captured, and as "region" where not (``moec.explain`` says which, and why). The first
            call of each form then takes as long as torch.compile takes.
        mode: "default", or "reduce-overhead": on a GPU, inference calls of up to 512 tokens are
            captured as CUDA graphs, a power of two of rows each, and replayed for any routing.
            Calls of very few tokens are one graph of the driver in either mode.
        strict: raise :class:`MoecError` where the default is to warn and leave code as it was.
        options: see ``moec.api.OPTIONS``.

    Raises:
        CompileError: for a model or an option that cannot be taken.
    """
    _check_arguments(model, dynamic, target, scope)
    if mode not in MODES:
        raise CompileError(f"unknown mode {mode!r}; modes: {', '.join(map(repr, MODES))}")
    settings = _checked_options(options)
    budget = read_budget(memory_budget, settings)
    backend = _model_backend(settings, scope)
    session = _session(target, strict, settings, mode)
    check = None if isinstance(dynamic, bool) else CheckInputs(declare(model, dynamic))
    session.limits = None if check is None else Limits(check)
    compiled = share(model)
    candidates = list(find_candidates(compiled))
    for candidate in candidates:
        _install(session, candidate)
    odd = _warn_of_odd_experts(session, compiled, candidates)
    if not candidates and not odd:
        session.warn(
            f"moec: found no MoE block in {type(model).__name__}; the model is returned unchanged. "
            f"{_quantised_text(model)}See docs/tour.md for what is looked for."
        )
    if budget is not None:
        _install_budget(session, compiled, budget)
    elif backend is not None and region_of(compiled) is None:
        install(compiled, ModelScope(session, type(model).__name__, backend))
    if check is not None:
        _install_check(compiled, check)
    return compiled


def _install_budget(session: Session, compiled: nn.Module, budget: Budget) -> None:
    """Make training calls of the whole model run planned steps."""
    name = type(compiled).__name__
    if region_of(compiled) is not None:
        raise CompileError(
            f"{name} is one MoE block, which is not planned alone; give the memory budget to the"
            " model that holds it"
        )
    install(compiled, BudgetScope(session, name, budget))


def _install_check(compiled: nn.Module, check: CheckInputs) -> None:
    """Make calls of the whole model be checked."""
    region = region_of(compiled)
    if region is not None:
        check_fixed(check.declared, region)
        region.check = check
    elif model_scope_of(compiled) is None:
        install(compiled, CheckedModel(check))


def _model_backend(settings: dict[str, Any], scope: str) -> str | None:
    """The backend for scope "model", taken out of the options; ``None`` in region scope."""
    given = settings.pop("model_backend", None)
    if scope == "model":
        return check_backend(DEFAULT_BACKEND if given is None else given)
    if given is not None:
        raise CompileError("option 'model_backend' is for scope='model'; add that, or leave it out")
    return None


def _quantised_text(model: nn.Module) -> str:
    """What to say of layers whose weights are packed away, if the model has any."""
    packed = (
        name
        for name, module in model.named_modules()
        if any(isinstance(value, ScriptObject) for value in vars(module).values())
    )
    first = next(packed, None)
    return "" if first is None else f"Its layer {first} is quantised, and left alone. "


def _warn_of_odd_experts(
    session: Session, model: nn.Module, candidates: Sequence[Candidate]
) -> bool:
    """Say which blocks are no region because their experts differ; whether there are any."""
    taken = {module for candidate in candidates for module in candidate.module.modules()}
    found = list(odd_experts(model, taken))
    for path, reason in found:
        kind = type(model.get_submodule(path)).__name__
        session.warn(f"moec: {path or 'the model'} ({kind}) stays as it was: {reason}", reason)
    return bool(found)


def _install(session: Session, candidate: Candidate) -> None:
    region = Region(session, candidate, "experts" if candidate.is_experts else "block")
    region.install_inner()
    install(candidate.module, region)
    region.try_capture()


def _check_arguments(model: Any, dynamic: Any, target: str | None, scope: str) -> None:
    if not isinstance(model, nn.Module):
        raise CompileError(
            f"moec.compile takes an nn.Module, got {type(model).__name__}; "
            "for a function use torch.compile(backend='moec')"
        )
    if any("_moec_region" in vars(m) for m in model.modules()):
        raise CompileError(
            "this model is compiled already; compile the original again, or use the compiled one"
        )
    if dynamic is False:
        raise CompileError(
            "dynamic=False: moec has one artifact for every number of tokens and none for a single "
            "one; leave dynamic=True"
        )
    if target is not None and target not in TARGETS:
        raise CompileError(f"unknown target {target!r}; targets: {', '.join(TARGETS)}")
    if scope not in SCOPES:
        raise CompileError(
            f"unknown scope {scope!r}; scopes: 'region' (each MoE block by itself), 'model' (the "
            "whole forward as one graph where it can be captured)"
        )


def _checked_options(options: Any) -> dict[str, Any]:
    if options is not None and not isinstance(options, Mapping):
        raise CompileError(f"options is a mapping of names to values, got {options!r}")
    return {str(k): v for k, v in (options or {}).items()}


def _session(
    target: str | None, strict: bool, options: dict[str, Any], mode: str = "default"
) -> Session:
    unknown = sorted(options.keys() - OPTIONS.keys())
    if unknown:
        known = "; ".join(f"{k}: {v}" for k, v in OPTIONS.items())
        raise CompileError(f"unknown option {', '.join(map(repr, unknown))}. Options are {known}")
    options.setdefault("dump", from_environment().dump)
    for name in ("dump", "cache"):
        if options.get(name) is not None:
            options[name] = _folder(name, options[name])
    passes = options.get("passes")
    if passes is not None:
        if not isinstance(passes, str):
            raise CompileError(f"option 'passes' is a pipeline's text, got {passes!r}")
        parse_pipeline(passes)
    watching = Watching(options["dump"], _file("trace", options.get("trace")))
    gluon = options.get("gluon", True)
    if not isinstance(gluon, bool):
        raise CompileError(f"option 'gluon' is true or false, got {gluon!r}")
    numerics = _numerics(options, target)
    return Session(
        target,
        strict,
        options.get("cache"),
        passes,
        gluon,
        mode=mode,
        numerics=numerics,
        token_rounding=_token_rounding(options, numerics),
        tuning=_tuning(options),
        watching=watching,
    )


def _token_rounding(options: Mapping[str, Any], numerics: str) -> int:
    """The option of that name, if it is a number of rows and fits the others."""
    rows = options.get("token_rounding", 0)
    if isinstance(rows, bool) or not isinstance(rows, int) or not 0 <= rows <= MOST_ROUNDED:
        raise CompileError(
            f"option 'token_rounding' is a number of rows from 0 (off) to {MOST_ROUNDED}, such as"
            f" 128, got {rows!r}"
        )
    if rows > 1 and numerics == "repro":
        raise CompileError(
            "option 'token_rounding' makes a token's experts depend on the batch, which 'numerics'"
            " 'repro' rules out; leave one of them out"
        )
    if rows > 1 and options.get("passes") is not None:
        raise CompileError(
            "option 'token_rounding' is for the default pipeline; with option 'passes', put"
            f" round-tokens{{tile={rows}}} between raise-router and grad"
        )
    return rows if rows > 1 else 0


def _tuning(options: Mapping[str, Any]) -> str | None:
    """The option of that name: a path, "" for none; ``None`` if it was not given."""
    given = options.get("tuning")
    if given is None or given is False:
        return "" if given is False else None
    if not isinstance(given, str | os.PathLike) or set(str(given)) & set("{},#\n") or not given:
        raise CompileError(
            f"option 'tuning' is the path of a file (without braces, commas and #) or false, got"
            f" {given!r}"
        )
    if options.get("passes") is not None:
        raise CompileError(
            f"option 'tuning' is for the default pipeline; with option 'passes', end with"
            f" lower{{tuning={given}}}"
        )
    return str(Path(given).absolute())


def _numerics(options: Mapping[str, Any], target: str | None) -> str:
    """The option of that name, if it is one and fits the others."""
    numerics = options.get("numerics", "default")
    if numerics not in NUMERICS:
        known = " or ".join(map(repr, NUMERICS))
        raise CompileError(f"option 'numerics' is {known}, got {numerics!r}")
    if numerics == "repro" and target == "aten":
        raise CompileError(no_repro("option 'numerics'", "asked for"))
    if numerics == "repro" and options.get("passes") is not None:
        raise CompileError(
            "option 'numerics' is for the default pipeline; with option 'passes', put "
            "batch-invariant before the fuse passes and end with lower{repro=true}"
        )
    return str(numerics)


def _file(option: str, value: Any) -> str | None:
    """A file in a folder that can be written to, or an error that names the option."""
    if value is None:
        return None
    if not isinstance(value, str | os.PathLike) or Path(value).is_dir():
        raise CompileError(f"option {option!r} is a file's path, got {value!r}")
    _folder(option, Path(value).absolute().parent)
    return str(Path(value).absolute())


def _folder(option: str, value: Any) -> str:
    """A folder that exists and can be written to, or an error that names the option."""
    if not isinstance(value, str | os.PathLike):
        raise CompileError(f"option {option!r} is a folder's path, got {value!r}")
    path = Path(value)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CompileError(f"option {option!r}: cannot make the folder {path}: {error}") from error
    if not os.access(path, os.W_OK):
        raise CompileError(f"option {option!r}: the folder {path} cannot be written to")
    return str(path)


def regions(compiled: nn.Module) -> list[Region]:
    """The regions of a compiled model, in module order."""
    found = [region for module in compiled.modules() if (region := region_of(module)) is not None]
    inner = {id(region.inner) for region in found if region.inner is not None}
    return [region for region in found if id(region) not in inner]


@dataclass(frozen=True)
class Explanation:
    """What moec found in a model: its regions and a text for people."""

    regions: Sequence[Region]
    text: str

    def __str__(self) -> str:
        return self.text


def explain(model: nn.Module, dynamic: bool | Dynamic = True) -> Explanation:
    """List the regions of a model (compiled or not): what each became, on which target, and why not
    if not.

    A model that is not compiled is analysed as :func:`compile` would with ``dynamic``, without
    changing it.
    """
    found = regions(model)
    if not found and model_scope_of(model) is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the text says what the warnings say
            found = regions(compile(model, dynamic=dynamic))
    return Explanation(found, _explain_text(model, found))


def _explain_text(model: nn.Module, found: Sequence[Region]) -> str:
    if not found:
        same = "" if _scope_lines(model) else "; compiled and original model are the same."
        head = f"{type(model).__name__}: no MoE block found{same}"
        return "\n".join([head, *_scope_lines(model)])
    counts: dict[str, int] = {}
    for region in found:
        counts[region.status] = counts.get(region.status, 0) + 1
    head = f"{type(model).__name__}: {len(found)} MoE regions: " + ", ".join(
        f"{n} {s}" for s, n in counts.items()
    )
    lines = [head, *_scope_lines(model), *_declared_lines(found[0].session)]
    if found[0].session.is_repro:
        lines.append(
            "  numerics: repro, a token has the same bits in any batch in what is compiled"
        )
    return "\n".join([*lines, *(line for region in found for line in _region_lines(region))])


def _scope_lines(model: nn.Module) -> list[str]:
    scope = model_scope_of(model)
    return [] if scope is None else scope.lines()


def _declared_lines(session: Session) -> list[str]:
    """What is declared of the inputs, and what that says of the tokens of regions."""
    if session.limits is None:
        return []
    tokens = [show_range(name, (0, high)) for name, high in session.limits.tokens.items()]
    return [
        f"  declared: {session.limits.check.declared}",
        f"      so in regions {', '.join(tokens) or 'all sizes are free'}",
    ]


def _region_lines(region: Region) -> list[str]:
    kind = type(region.candidate.module)
    lines = [
        f"  {region.name or '(the model)'}  {kind.__name__}: {region.status}, "
        f"target {region.target}"
    ]
    if region.first is not None and region.first.graph is not None:
        lines.append(
            f"      structure {region.first.fingerprint}, {len(region.first.graph.ops)} ops"
        )
    if region.reason:
        lines.append(f"      why not the whole block: {region.reason}")
        lines.append(f"      what to do: {advice(region)}")
    lines += [f"      {line}" for a in region.artifacts for line in artifact_lines(a)]
    return lines


def advice(region: Region) -> str:
    """What a user can do about a region that is not compiled as a whole."""
    if region.status == "experts only":
        return "nothing is needed: the experts are compiled, the router runs as it was"
    return (
        "write the experts as stacked 3-D weights or as a ModuleList of equal modules called on "
        "slices of the tokens"
    )


__all__ = ["OPTIONS", "Explanation", "compile", "explain", "regions"]
