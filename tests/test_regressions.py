"""What fuzzing found once stays mended: each file holds a graph or a module, and what was asked."""

from pathlib import Path

import pytest

from moec.fuzz.modules import problem_of_saved
from moec.fuzz.saving import problem_of_file

FOLDER = Path(__file__).parent / "regressions"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.moe")), ids=lambda path: str(path.stem))
def test_graph_is_mended(path: Path) -> None:
    assert problem_of_file(path) == ""


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: str(path.stem))
def test_module_is_mended(path: Path) -> None:
    assert problem_of_saved(path) == ""
