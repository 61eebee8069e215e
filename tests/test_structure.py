"""When two modules count as equal, and when a compiled form notices that its module has changed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from moec.guards import Guard
from moec.structure import names_read, structure_key


def helper(module: Any, x: torch.Tensor) -> Any:
    """Reads an attribute of the module that calls it."""
    return x * module.factor


class Part(nn.Module):
    """Reads some of its attributes, in several ways."""

    def __init__(self, number: int = 0, **changes: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(4, changes.pop("width", 4))
        self.number = number  # read by no code but this
        self.limit: Any = 1.0
        self.factor = 2.0
        self.pair: Any = (1, [2, 3])
        self.table: Any = {"a": 1}
        vars(self).update(changes)

    @property
    def doubled(self) -> Any:
        return self.limit * 2

    def forward(self, x: torch.Tensor) -> Any:
        y = helper(self, self.linear(x)).clamp(max=self.doubled) + self.pair[0]
        return y * self.table["a"]


class ByName(nn.Module):
    """Reads an attribute whose name cannot be seen in its code."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.scale_1 = number
        self.which = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * getattr(self, f"scale_{self.which}")  # type: ignore[no-any-return]


class Inherited(Part):
    """Code of its own on top."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled: torch.Tensor = super().forward(x) * self.number
        return scaled


TABLE = {"a": 1}


def test_equal_modules_have_equal_keys() -> None:
    assert structure_key(Part(table=TABLE)) == structure_key(Part(table=TABLE))
    assert hash(structure_key(Part(table=TABLE))) == hash(structure_key(Part(table=TABLE)))


def test_an_attribute_that_no_code_reads_does_not_count() -> None:
    assert structure_key(Part(1, table=TABLE)) == structure_key(Part(2, table=TABLE))
    assert structure_key(Inherited(1, table=TABLE)) != structure_key(Inherited(2, table=TABLE))


@pytest.mark.parametrize(
    "change",
    [
        {"limit": 2.0},
        {"limit": 1},  # equal in Python, another type
        {"limit": True},
        {"factor": 3.0},  # read by a function that gets the module
        {"pair": (1, [2, 4])},
        {"pair": [1, [2, 3]]},
        {"table": {"a": 2}},
        {"width": 5},
        {"training": False},
    ],
    ids=str,
)
def test_what_code_reads_counts(change: dict[str, Any]) -> None:
    assert structure_key(Part(**{"table": TABLE, **change})) != structure_key(Part(table=TABLE))


def test_dtype_class_and_names_count() -> None:
    keys = [
        structure_key(module)
        for module in (
            nn.Sequential(nn.Linear(4, 4)),
            nn.Sequential(nn.Linear(4, 4)).double(),
            nn.Sequential(nn.Linear(4, 4, bias=False)),
            nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
            nn.Sequential(nn.Linear(4, 4), nn.GELU()),
            nn.Sequential(nn.Linear(4, 4), nn.GELU(approximate="tanh")),
            nn.ModuleList([nn.Linear(4, 4)]),
        )
    ]
    assert len(set(keys)) == len(keys)


def test_names_that_cannot_be_seen_make_every_attribute_count() -> None:
    assert structure_key(ByName(1)) != structure_key(ByName(2))


def test_names_read_through_properties_and_helpers() -> None:
    names = names_read(Part)
    assert {"limit", "factor", "pair", "table", "linear"} <= names
    assert "number" not in names


def test_identity_is_not_fooled_by_a_reused_address() -> None:
    keys = set()
    for _ in range(50):  # each object is freed before the next is made, often at the same address
        keys.add(structure_key(Part(table=SimpleNamespace())))
    assert len(keys) == 50


def test_guard_holds_until_something_changes() -> None:
    part = Part()
    guard = Guard(part)
    assert guard.holds()
    part.number = 5
    part.linear.weight = nn.Parameter(torch.randn(4, 4))  # weights are looked up at each call
    assert guard.holds()


@pytest.mark.parametrize(
    "change",
    [
        lambda part: setattr(part, "limit", 3.0),
        lambda part: setattr(part, "factor", 3.0),
        lambda part: part.table.update(a=2),
        lambda part: setattr(part, "linear", nn.Linear(4, 4)),
        lambda part: delattr(part, "limit"),
    ],
)
def test_guard_notices(change: Any) -> None:
    part = Part()
    guard = Guard(part)
    change(part)
    assert not guard.holds()


def test_guard_notices_a_setting_below() -> None:
    layers = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4))
    guard = Guard(layers)
    dropout: Any = layers[0]
    dropout.p = 0.0
    assert not guard.holds()


def test_guard_notices_training_only_where_it_is_read() -> None:
    silent, reading = Guard(linear := nn.Linear(4, 4)), Guard(dropout := nn.Dropout())
    linear.eval()
    dropout.eval()
    assert silent.holds()
    assert not reading.holds()
