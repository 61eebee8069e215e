"""The MoE families of the installed transformers, found by the fields of their configurations."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# How configurations say how many experts there are.
EXPERT_FIELDS = frozenset(
    {
        "num_experts",
        "num_local_experts",
        "n_routed_experts",
        "moe_num_experts",
        "num_routed_experts",
        "n_experts",
    }
)
# Auto classes that build a model with a head, in the order in which they are tried.
AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoModelForTokenClassification",
    "AutoBackbone",
    "AutoModel",
)
# Families that take any language model inside; each is shown around a MoE one.
BACKBONES = {"internvl": "gpt_oss", "lfm2_vl": "lfm2_moe"}


@dataclass(frozen=True)
class Family:
    """A folder of transformers' models that has MoE layers.

    ``config`` is the configuration class to build, ``backbone`` the model type of the language
    model inside where the family takes any.
    """

    name: str
    config: type
    backbone: str = ""


def transformers() -> Any:
    """The library; imported late, since ``import moec`` must stay light."""
    return importlib.import_module("transformers")


@functools.cache
def families() -> tuple[Family, ...]:
    """Every family with MoE layers, by name."""
    by_folder: dict[str, list[type]] = {}
    mapping = transformers().CONFIG_MAPPING
    for model_type in mapping:
        found: type = mapping[model_type]
        by_folder.setdefault(found.__module__.split(".")[-2], []).append(found)
    return tuple(_in_order(by_folder))


def _in_order(by_folder: dict[str, list[type]]) -> Iterator[Family]:
    for name, configs in sorted(by_folder.items()):
        sparse = [c for c in configs if has_experts(c)]
        if name in BACKBONES:
            outer = next(c for c in configs if getattr(c, "sub_configs", {}))
            yield Family(name, outer, BACKBONES[name])
        elif sparse:
            yield Family(name, _to_build(sparse))


def has_experts(config: type) -> bool:
    """Whether a configuration class declares a number of experts, or has one inside by default."""
    return bool(EXPERT_FIELDS & field_names(config)) or any(
        getattr(inner, name, None) for inner in _inner_configs(config) for name in EXPERT_FIELDS
    )


def field_names(config: type) -> frozenset[str]:
    """The fields that a configuration class declares."""
    declared = dataclasses.is_dataclass(config)
    return frozenset(f.name for f in dataclasses.fields(config)) if declared else frozenset()


def _inner_configs(config: type) -> Iterator[Any]:
    """The configurations inside a default one."""
    if not getattr(config, "sub_configs", None):
        return
    try:
        outer = config()
    except Exception:  # some families have no default; a config.json is their only source
        return
    yield from inner_configs(outer)


def inner_configs(config: Any) -> Iterator[Any]:
    """The configurations inside one, at any depth."""
    for value in vars(config).values():
        if isinstance(value, transformers().PreTrainedConfig):
            yield value
            yield from inner_configs(value)


def _to_build(configs: list[type]) -> type:
    """The configuration with the simplest model: one that counts experts itself, with a head."""
    configs = sorted(configs, key=lambda c: not EXPERT_FIELDS & field_names(c))
    for auto in AUTO_CLASSES:
        known = getattr(transformers(), auto)._model_mapping
        for config in configs:
            if config in known:
                return config
    return configs[0]


def model_class(config: type) -> type | None:
    """The model with a head that goes with a configuration class, if there is one."""
    for auto in AUTO_CLASSES:
        known = getattr(transformers(), auto)._model_mapping
        if config in known:
            found = known[config]
            first: type = found[0] if isinstance(found, tuple) else found
            return first
    return None
