"""What one call of :func:`moec.compile` shares between its regions: settings, captures,
artifacts.
"""

from __future__ import annotations

import functools
import threading
import time
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from moec import logs, torch_trace
from moec.cache import cache_directory, source_of
from moec.capture.regions import FoundRegion
from moec.codegen.triton.routing import most_few_tokens
from moec.declared_limits import Limits
from moec.errors import CompileError
from moec.exact_gradients import has_smaller_floats
from moec.ir.graph import Graph
from moec.ir.parser import parse
from moec.ir.prove import bounds
from moec.ir.text import show
from moec.ir.verify import verify
from moec.manager import Observer, PassManager, parse_pipeline
from moec.pipeline import pipeline
from moec.reproducer import Emission, Reproducer
from moec.runtime.artifact import Artifact, Once, build
from moec.runtime.captured import Captures, rows_are_alone
from moec.runtime.tapes import Tapes
from moec.surroundings import isolated
from moec.targets import choose_target, has_descriptors, has_gluon
from moec.trace_events import span
from moec.tuning.file import shipped
from moec.watching import Watching, from_environment

# The mode of training artifacts for few tokens.
FEW = "training-few"
# Bytes from which a buffer of a repeated call is the call's own.
LARGE = 64 << 10
# The mode of inference artifacts for few tokens.
DECODING = "inference-few"
# Threads that race for the first call compile once.
_COMPILING = threading.RLock()


@dataclass
class Session:
    """What one call of :func:`moec.compile` shares between its regions: settings, captures,
    artifacts. ``gluon`` allows products in Gluon where a GPU runs them; artifacts for
    ``planned_target`` are looked at and not run here; ``mode`` is one of
    :data:`moec.api.MODES`; ``numerics`` one of :data:`moec.api.NUMERICS`; ``token_rounding``
    the rows of a tile that experts are to fill in training, or 0; ``tuning`` the file of measured
    tiles ("" for none, ``None`` for the one that comes with moec); ``limits`` are those of the
    declared inputs.
    """

    target: str | None = None
    strict: bool = False
    cache: str | None = None
    passes: str | None = None
    gluon: bool = True
    planned_target: str | None = None
    mode: str = "default"
    numerics: str = "default"
    token_rounding: int = 0
    tuning: str | None = None
    observers: Sequence[Observer] = ()
    watching: Watching = field(default_factory=from_environment)
    limits: Limits | None = None
    captures: dict[Hashable, FoundRegion] = field(default_factory=dict)
    artifacts: dict[Hashable, Artifact | None] = field(default_factory=dict)
    demoted: set[str] = field(default_factory=set)
    warned: set[str] = field(default_factory=set)

    def warn(self, text: str, about: str = "") -> None:
        """Warn once about a thing, or raise in strict mode."""
        if self.strict:
            raise CompileError(text)
        if (about or text) not in self.warned:
            self.warned.add(about or text)
            warnings.warn(text, stacklevel=2)

    def artifact(
        self,
        graph: Graph,
        wanted: tuple[bool, ...] | None,
        device: torch.device,
        inputs: Sequence[torch.Tensor] = (),
        name: str = "",
    ) -> Artifact | None:
        """The compiled form of a graph for a device; ``wanted`` says which inputs need gradients.

        ``name`` is the path of the region that asks.

        A new artifact is tried on the first token of ``inputs``, if given: where its kernels do not
        compile, the ``aten`` target takes over, with a warning. ``None`` if a pass or the emitter
        failed: then a reproducer was written, a warning names it, and the module's own code must
        run.
        """
        target = self.planned_target or choose_target(self.target, device)
        target = "aten" if graph.fingerprint in self.demoted else target
        key = (graph.fingerprint, wanted, target)
        with _COMPILING:
            if key not in self.artifacts:
                self._log_again(key, name or graph.name)
            return self._known(key, graph, wanted, device, inputs, name)

    def _known(
        self,
        key: tuple[str, tuple[bool, ...] | None, str],
        graph: Graph,
        wanted: tuple[bool, ...] | None,
        device: torch.device,
        inputs: Sequence[torch.Tensor],
        name: str,
    ) -> Artifact | None:
        if key not in self.artifacts:
            self._make(key, graph, device, inputs, name)
        return self.artifacts[key]

    def _make(
        self,
        key: tuple[str, tuple[bool, ...] | None, str],
        graph: Graph,
        device: torch.device,
        inputs: Sequence[torch.Tensor],
        name: str,
    ) -> None:
        _, wanted, target = key
        exact = has_smaller_floats(graph)
        made = self._compile(graph, wanted, target, device, name, exact)
        if made is not None and target != "aten" and not self._runs(made, inputs):
            if not self._drop_tuning(device):
                self.demoted.add(graph.fingerprint)
            made = self.artifact(graph, wanted, device, inputs, name)
        elif made is not None and self._rounds_apart(made, exact):
            few = self._compile(graph, wanted, target, device, name, True, FEW)
            made = replace(made, few=Once.made_of(few))
        elif made is not None and made.target == "triton" and wanted is None:
            most = 0 if self.passes or self.is_repro else most_few_tokens(made.graph)
            decode = functools.partial(self._decoding, graph, target, device, name)
            made = replace(made, few=Once(decode), few_tokens=most) if most else made
            made = replace(made, captures=self._captures(made.graph))
            repeats = made.captures is None and not self.is_repro
            made = replace(made, tapes=Tapes(_varying(graph), large=LARGE)) if repeats else made
        self.artifacts[key] = made

    def _tuning(self, device: torch.device) -> str:
        """The file of measured tiles for a device, if any."""
        return shipped(device) if self.tuning is None else self.tuning

    def _drop_tuning(self, device: torch.device) -> bool:
        """Choose tiles by rule from now on; whether some were chosen otherwise."""
        was, self.tuning = self._tuning(device), ""
        return bool(was) and not self.is_repro

    @property
    def is_repro(self) -> bool:
        """Whether a token's bits must not depend on the other tokens."""
        return self.numerics == "repro"

    def _captures(self, graph: Graph) -> Captures | None:
        """Where calls are to be CUDA graphs: those of an artifact."""
        if self.mode != "reduce-overhead":
            return None
        _, most = bounds(graph.inputs[0].type.shape[0], graph.ranges)
        return Captures(_varying(graph), rows_are_alone(graph), most)

    def _decoding(
        self,
        graph: Graph,
        target: str,
        device: torch.device,
        name: str,
        inputs: Sequence[torch.Tensor],
    ) -> Artifact | None:
        """The artifact for inference with few tokens; ``None`` if it does not run here."""
        made = self._compile(graph, None, target, device, name, False, DECODING)
        if made is None or not self._runs(made, inputs):
            return None
        return replace(made, tapes=Tapes(_varying(graph)))

    def _log_again(self, key: tuple[str, tuple[bool, ...] | None, str], name: str) -> None:
        """Log what is new about a graph that was compiled before."""
        before = [k for k in self.artifacts if isinstance(k, tuple) and k[0] == key[0]]
        if before:
            logs.RECOMPILES.info("%s: compiled again: %s", name, _what_is_new(key, before[-1]))

    def _rounds_apart(self, artifact: Artifact, exact: bool) -> bool:
        """Whether an artifact's gradients round otherwise than eager's, and could do as eager's."""
        is_default = self.passes is None and not exact and not self.token_rounding
        return is_default and artifact.target == "aten" and artifact.mode == "training"

    def _runs(self, artifact: Artifact, inputs: Sequence[torch.Tensor]) -> bool:
        """Whether an artifact's kernels compile and launch, forward and backward."""
        try:
            with (
                self.watching.recording(),
                span("try kernels", "kernels", module=artifact.path.name),
            ):
                if inputs:
                    isolated(lambda: artifact.try_out(inputs), inputs[0].device)
        except torch.OutOfMemoryError:
            return True  # says nothing about the kernels; the real call reports it
        except Exception as error:  # a kernel compiler raises errors of many kinds
            reproducer = Reproducer(self.cache or cache_directory())
            reproducer.emits(artifact.graph, Emission(artifact.target, trial=True))
            reproducer.write(error)
            if self.strict:
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            self.warn(
                f"moec: the kernels of @{artifact.graph.name} do not compile here ({reason}); "
                f"{self._next(artifact)}. Emitted module: {artifact.path}. {reproducer.text}"
            )
            return False
        return True

    def _next(self, artifact: Artifact) -> str:
        """What takes over from an artifact that does not run, in words."""
        was_tuned = any(step.call.options.get("tuning") for step in artifact.history)
        return "tiles by rule take over" if was_tuned else "the aten target takes over"

    def _compile(
        self,
        graph: Graph,
        wanted: tuple[bool, ...] | None,
        target: str,
        device: torch.device,
        name: str,
        exact: bool,
        mode: str = "",
    ) -> Artifact | None:
        if self.is_repro and target == "aten":
            raise CompileError(no_repro(name or graph.name, f"on {device}"))
        named = _with_unique_hints(graph)
        mode = mode or ("inference" if wanted is None else "training")
        reproducer = Reproducer(self.cache or cache_directory())
        try:
            with (
                self.watching.recording(),
                span(name or graph.name, "region", mode=mode),
                reproducer,
            ):
                text = self._pipeline(named, wanted, target, device, exact)
                text += ", lower{few=true}" if mode == DECODING else ""
                calls = parse_pipeline(text)
                watching = [*self.observers, *self.watching.observers(name, mode), reproducer]
                manager = PassManager(calls, watching)
                return self._built(manager, named, target, mode, name, reproducer)
        except Exception as error:  # a compiler's own fault must never stop the user's model
            if self.strict or self.is_repro:  # the module's own code promises nothing
                raise
            self.warn(
                f"moec: @{graph.name} could not be compiled ({type(error).__name__}: {error}); "
                f"it stays as it was. {reproducer.text}"
            )
            return None

    def _built(
        self,
        manager: PassManager,
        graph: Graph,
        target: str,
        mode: str,
        name: str,
        reproducer: Reproducer,
    ) -> Artifact:
        start = time.perf_counter()
        try:
            lowered = verify(manager.run(graph), after="the whole pipeline")
        except Exception:
            reproducer.verify(manager.history)  # an earlier pass may be the cause
            raise
        reproducer.emits(lowered, Emission(target))
        with span("emit", "emit", target=target):
            artifact = build(lowered, target, mode, manager.history, self.cache)
        path, seconds = artifact.path, time.perf_counter() - start
        logs.log_artifact(artifact, name or graph.name, seconds)
        torch_trace.artifact(f"{name or graph.name}_{mode}_module", lambda: source_of(path))
        return artifact

    def _pipeline(
        self,
        graph: Graph,
        wanted: tuple[bool, ...] | None,
        target: str,
        device: torch.device,
        exact: bool,
    ) -> str:
        text = self.passes or pipeline(
            target,
            wanted is not None,
            has_descriptors(device),
            exact,
            self.gluon and has_gluon(device),
            self.is_repro,
            self.token_rounding,
            self._tuning(device),
        )
        if wanted is None:
            return text
        names = "+".join(
            v.hint for v, w in zip(graph.inputs, wanted, strict=True) if w and v.type.is_float
        )
        text = text.replace("grad{exact=true},", f"grad{{exact=true,wanted={names}}},", 1)
        return text.replace("grad,", f"grad{{wanted={names}}},", 1)


def no_repro(name: str, where: str) -> str:
    """Why there is no ``numerics="repro"`` where the target is ``aten``."""
    return (
        f'{name}: numerics "repro" needs the target triton. The target {where} is aten: its '
        "products are library calls, which choose the order of additions by the number of tokens. "
        'Use a GPU of compute capability 8.0 or more, or numerics "default"'
    )


def _varying(graph: Graph) -> list[int]:
    """The inputs whose sizes differ between calls."""
    return [i for i, v in enumerate(graph.inputs) if not isinstance(v.type.elements, int)]


def _with_unique_hints(graph: Graph) -> Graph:
    """The graph with distinct names of inputs, so that options can refer to them."""
    hints = [v.hint for v in graph.inputs]
    return graph if len(set(hints)) == len(hints) else parse(show(graph))


def _what_is_new(key: tuple[Any, ...], before: tuple[Any, ...]) -> str:
    """How the key of an artifact differs from that of an earlier one of the same graph."""
    (_, wanted, target), (_, had_wanted, had_target) = key, before
    if target != had_target:
        return f"target {target}, not {had_target}"
    if wanted is None or had_wanted is None:
        return "without gradients" if wanted is None else "with gradients"
    new = [str(i) for i, (a, b) in enumerate(zip(wanted, had_wanted, strict=True)) if a != b]
    return f"gradients of other inputs are wanted (numbers {', '.join(new)})"
