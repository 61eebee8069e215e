"""The packaging facts that no other test would notice: the list of packages, the two links."""

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKED = {"moec.passes": ROOT / "passes", "moec.codegen": ROOT / "codegen"}


def packages_under(folder: Path, name: str) -> set[str]:
    """The dotted names of `folder` and of every package below it, links not followed."""
    found = {name}
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink() and (entry / "__init__.py").exists():
            found |= packages_under(entry, f"{name}.{entry.name}")
    return found


def test_every_package_is_installed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = packages_under(ROOT / "moec", "moec")
    for name, folder in LINKED.items():
        found |= packages_under(folder, name)
    assert set(settings["packages"]) == found


@pytest.mark.parametrize("name", LINKED)
def test_linked_folder_is_inside_the_package(name: str) -> None:
    link = ROOT / name.replace(".", "/")
    assert link.is_symlink()
    assert not link.readlink().is_absolute()
    assert link.resolve() == LINKED[name].resolve()
