"""From the words of a command line to a model: a config.json, an architecture's name, a factory."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moec.capture.shrink import shrunk_config
from moec.errors import CompileError, ParseError
from moec.families.discover import inner_configs
from moec.files import decoded, read_bounded, read_json
from moec.printable import printable

# A larger model is built with its first layers only, and with weights that share memory.
MEMORY_LIMIT = 8_000_000_000
# A model that is only planned is built in full up to this size.
_HELD = 1_000_000_000
# Weights of such a model that have more elements than this share memory.
_LARGE = 1 << 22
# How far the windows of two neighbouring experts (rows of an embedding) are apart, in elements.
_STEP = 97
_FACTORY = re.compile(r"(?P<module>[A-Za-z_][\w.]*):(?P<name>[A-Za-z_][\w.]*)\Z")
_NAME = re.compile(r"[A-Za-z_][\w.-]*\Z")
_EXPERT_LAYER = re.compile(r"\blayers\.(\d+)\..*expert")
# Tried in this order for a configuration that names no architecture.
MAX_CONFIG, MAX_SIZE = 4 << 20, 1 << 48
# Numbers of parts that transformers makes in Python loops, by a part of their keys.
_COUNTS = {"layer": 1024, "depth": 1024, "stage": 1024, "num_blocks": 1024, "num_labels": 1 << 16}
_CODE = {
    *("auto_map", "trust_remote_code", "use_kernels"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
}
_AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel")


@dataclass(frozen=True)
class LoadedModel:
    """A model, and what was changed to be able to hold it (nothing, if ``note`` is empty).

    ``whole`` is the unchanged one on the meta device, where a smaller one stands for it.
    """

    model: torch.nn.Module
    note: str = ""
    whole: torch.nn.Module | None = None


def load_model(spec: str) -> torch.nn.Module:
    """The model that ``spec`` names; see :func:`load`."""
    return load(spec).model


def load(spec: str, dtype: torch.dtype | None = None) -> LoadedModel:
    """The model that ``spec`` names, in evaluation mode unless a factory made it.

    ``spec`` is the path of a Hugging Face ``config.json`` (or of the folder that holds one), the
    name of an architecture (``mixtral``, ``MixtralForCausalLM``; its default configuration), or
    ``module:factory``, where the factory is an ``nn.Module`` or a function without arguments that
    returns one. Weights of the first two are random, in ``dtype`` or the configuration's (float32
    if it names none), on the CPU. Where they would exceed ``MEMORY_LIMIT`` bytes, the model has
    only as many layers as reach the first with experts, and each large weight is a stack of
    overlapping windows into few random numbers: distinct for each expert, but only good to be
    read; :attr:`LoadedModel.whole` is the configuration's own then.

    Raises:
        CompileError: nothing of that name, a file that is no configuration, transformers is not
            installed, or a factory that fails or makes something else.
    """
    return _load(spec, lambda config: _from_config(_in_dtype(config, dtype)), dtype)


def _in_dtype(config: Any, dtype: torch.dtype | None) -> Any:
    for one in (config, *inner_configs(config)) if dtype is not None else ():
        one.dtype = dtype
    return config


def load_small(spec: str) -> LoadedModel:
    """As :func:`load`, but a configuration gives a small model of the same structure, with few
    layers and experts; :attr:`LoadedModel.whole` is the configuration's own, without memory.
    """
    return _load(spec, _small_from_config)


def load_layers(spec: str, dtype: torch.dtype | None = None) -> LoadedModel:
    """As :func:`load`, but a large model has all its layers; its large weights share memory."""
    return _load(spec, lambda config: _all_layers(_in_dtype(config, dtype)), dtype)


def _load(
    spec: str, from_config: Callable[[Any], LoadedModel], dtype: torch.dtype | None = None
) -> LoadedModel:
    path = Path(spec)
    if path.exists() or path.suffix == ".json" or os.sep in spec:
        return from_config(read_config(path))
    if match := _FACTORY.match(spec):
        made = _from_factory(match["module"], match["name"])
        return LoadedModel(made if dtype is None else made.to(dtype))
    if _NAME.match(spec):
        return from_config(_default_config(spec))
    raise CompileError(
        f"{spec!r} names no model: give the path of a config.json, an architecture such as mixtral,"
        " or module:factory"
    )


# factories
def _from_factory(module_name: str, name: str) -> torch.nn.Module:
    where = f"{module_name}:{name}"
    found: Any = _import(module_name)
    for part in name.split("."):
        if not hasattr(found, part):
            near = _near(part, [n for n in dir(found) if not n.startswith("_")])
            raise CompileError(f"{where}: {module_name} has no {part!r}{near}")
        found = getattr(found, part)
    made = found if isinstance(found, torch.nn.Module) else _call(found, where)
    if not isinstance(made, torch.nn.Module):
        raise CompileError(
            f"{where} gives a {type(made).__name__}; it must be, or return, a torch.nn.Module"
        )
    return made


def _import(name: str) -> Any:
    with _current_folder_importable():
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise CompileError(f"{name} cannot be imported: {error}") from error
            raise CompileError(
                f"there is no module {name!r}; modules are looked for in the current folder and"
                " among the installed packages"
            ) from error
        except (
            Exception
        ) as error:  # anything may happen in a user's module; the cause stays chained
            raise CompileError(
                f"{name} cannot be imported: {type(error).__name__}: {error}"
            ) from error


@contextlib.contextmanager
def _current_folder_importable() -> Iterator[None]:
    """A console script's ``sys.path`` lacks the folder that it is run in."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _call(factory: Any, where: str) -> Any:
    if not callable(factory):
        return factory
    _check_takes_nothing(factory, where)
    try:
        return factory()
    except Exception as error:  # anything may happen in a user's factory; the cause stays chained
        raise CompileError(f"{where} raised {type(error).__name__}: {error}") from error


def _check_takes_nothing(factory: Any, where: str) -> None:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return  # a built-in without a signature; calling it will tell
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in optional]
    if needed:
        raise CompileError(
            f"{where} needs the arguments {', '.join(needed)}; give a function that needs none"
        )


# Hugging Face configurations
def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise CompileError(
            "transformers is needed for Hugging Face models: pip install 'moec[hf]'"
        ) from error


def read_config(path: Path) -> Any:
    """The configuration in a ``config.json``, or in the folder that holds one.

    Raises:
        CompileError: with line and column, where a file was there to read.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        text = decoded(read_bounded(file, MAX_CONFIG), str(file), MAX_CONFIG)
        data = read_json(text, printable(str(file)))
    except FileNotFoundError as error:
        raise CompileError(f"{file}: no such file") from error
    except OSError as error:
        raise CompileError(f"{file}: {error.strerror}") from error
    except ParseError as error:
        raise CompileError(str(error)) from error
    if not isinstance(data, dict) or not isinstance(data.get("model_type"), str):
        raise CompileError(
            f'{file}:1:1: has no "model_type"; it must be the config.json of a Hugging Face model'
        )
    _check_counts(file, data)
    return _config_from(file, _without_code(data))


def _check_counts(file: Path, data: Any, key: str = "") -> None:
    """Refuse counts of parts that would be made one by one for hours."""
    if isinstance(data, dict):
        for name, value in data.items():
            _check_counts(file, value, name)
    elif isinstance(data, list):
        for value in data:
            _check_counts(file, value)
    elif isinstance(data, int | float):
        most = next((most for word, most in _COUNTS.items() if word in key), MAX_SIZE)
        if (isinstance(data, int) and abs(data) > most) or data > most:
            raise CompileError(f"{file}:1:1: {key[:80]!r} is {data}; at most {most} is taken")


def _without_code(data: Any) -> Any:
    """The configuration without what would name code to fetch and run."""
    if isinstance(data, dict):
        return {k: _without_code(v) for k, v in data.items() if k not in _CODE}
    return [_without_code(v) for v in data] if isinstance(data, list) else data


def _config_from(file: Path, data: dict[str, Any]) -> Any:
    known = _transformers().CONFIG_MAPPING
    if data["model_type"] not in known:
        near = _near(data["model_type"], list(known.keys()))
        named = data["model_type"][:80]
        raise CompileError(f"{file}:1:1: transformers knows no model_type {named!r}{near}")
    try:
        return known[data["model_type"]].from_dict(data)
    except Exception as error:  # each configuration checks its fields in its own way
        raise CompileError(
            f"{file}:1:1: not a valid {data['model_type']} configuration: {str(error)[:600]}"
        ) from error


def _default_config(name: str) -> Any:
    transformers = _transformers()
    known = transformers.CONFIG_MAPPING
    for model_type in (name, name.replace("-", "_"), name.replace("_", "-")):
        if model_type in known:
            return known[model_type]()
    found: Any = getattr(transformers, name, None) if name in dir(transformers) else None
    base = transformers.PreTrainedModel
    is_model = isinstance(found, type) and issubclass(found, base)
    if is_model and found.config_class is not None:
        config = found.config_class()
        config.architectures = [name]
        return config
    architectures = [
        n for n in dir(transformers) if n.endswith(("Model", "CausalLM", "Generation"))
    ]
    raise CompileError(
        f"transformers has no model type or architecture {name!r}"
        f"{_near(name, [*known.keys(), *architectures])}"
    )


def _near(name: str, names: Collection[str]) -> str:
    lower = {n.lower(): n for n in names}
    found = difflib.get_close_matches(name.lower(), lower, n=4, cutoff=0.5)
    return "; did you mean " + ", ".join(lower[n] for n in found) + "?" if found else ""


def _from_config(config: Any) -> LoadedModel:
    whole = _build(config, "meta")
    size = sum(p.numel() * p.element_size() for p in whole.parameters())
    if size <= MEMORY_LIMIT:
        return LoadedModel(_build(config, "cpu"))
    note = f"{size / 1e9:.0f} GB of weights are not held in full: large ones share memory"
    layers = _layers_to_first_experts(whole)
    if layers is None:
        return LoadedModel(_with_weights(whole), note, _build(config, "meta"))
    total = config.get_text_config().num_hidden_layers
    part = _with_weights(_build(_with_layers(config, layers), "meta"))
    note = f"{note}, and of {total} layers the first {layers} are built"
    return LoadedModel(part, note, whole)


def _all_layers(config: Any) -> LoadedModel:
    whole = _build(config, "meta")
    size = sum(p.numel() * p.element_size() for p in whole.parameters())
    if size <= _HELD:
        return LoadedModel(_build(config, "cpu"))
    return LoadedModel(_with_weights(whole))


def _small_from_config(config: Any) -> LoadedModel:
    whole = _build(config, "meta")
    size = sum(p.numel() * p.element_size() for p in whole.parameters())
    try:
        small = _with_weights(_build(shrunk_config(config, whole), "meta"))
    except Exception as error:  # a configuration may check sizes in ways of its own
        loaded = _from_config(config)
        return LoadedModel(loaded.model, f"not made smaller ({error}); {loaded.note}".strip("; "))
    note = f"a small model of the same structure stands for {size / 1e9:.1f} GB of weights"
    return LoadedModel(small, note, whole)


def _build(config: Any, device: str) -> torch.nn.Module:
    try:
        return _built(_transformers(), config, device)
    except CompileError:
        raise
    except Exception as error:  # sizes that do not fit fail in each model's own way
        raise CompileError(
            f"transformers cannot build a model from this {type(config).__name__}:"
            f" {type(error).__name__}: {str(error)[:600]}"
        ) from error


def _architectures(transformers: Any, names: Any) -> list[Any]:
    """The models among the names that a configuration gives; any other name is passed over."""
    there = dir(transformers)
    known = [n for n in names if n in there] if isinstance(names, list | tuple) else []
    found = [getattr(transformers, n) for n in known]
    base = transformers.PreTrainedModel
    return [f for f in found if isinstance(f, type) and issubclass(f, base)]


def _built(transformers: Any, config: Any, device: str) -> torch.nn.Module:
    named = _architectures(transformers, config.architectures)
    with torch.device(device):
        if named:
            model: torch.nn.Module = named[0]._from_config(config)
            return model.eval()
        for auto in _AUTO_CLASSES:
            with contextlib.suppress(ValueError):  # this family has no such class; try the next
                found: torch.nn.Module = getattr(transformers, auto).from_config(config)
                return found.eval()
    raise CompileError(f"transformers cannot build a model from a {type(config).__name__}")


def _with_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Replace the parameters and buffers of a model on the meta device by random ones."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            weight = torch.nn.Parameter(_random(parameter), requires_grad=parameter.requires_grad)
            setattr(module, name, weight)
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = _random(buffer)
    return model


def _random(like: torch.Tensor) -> torch.Tensor:
    """A CPU tensor of that shape: random floats of the scale of weights; integers are zeros."""
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype)
    if like.numel() <= _LARGE:
        return torch.randn(like.shape).mul_(0.02).to(like.dtype)
    inner = like[0].numel()
    numbers = torch.randn((like.shape[0] - 1) * _STEP + inner).mul_(0.02).to(like.dtype)
    strides = torch.empty(like.shape[1:], device="meta").stride()
    return numbers.as_strided(like.shape, (_STEP, *strides))


def _layers_to_first_experts(model: torch.nn.Module) -> int | None:
    """How many layers there are up to the first with experts; ``None`` if none has."""
    found = (_EXPERT_LAYER.search(name) for name, _ in model.named_parameters())
    return min((int(match[1]) + 1 for match in found if match), default=None)


def _with_layers(config: Any, layers: int) -> Any:
    """The configuration with fewer layers, also in the lists that have an entry a layer."""
    text = config.get_text_config()
    lists = {k: v[:layers] for k, v in vars(text).items() if _is_per_layer(v, text)}
    for name, value in {"num_hidden_layers": layers, **lists}.items():
        setattr(text, name, value)
    return config


def _is_per_layer(value: Any, config: Any) -> bool:
    return isinstance(value, list) and len(value) == config.num_hidden_layers
