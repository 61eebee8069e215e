"""What fuzzing found once stays mended: each file says which question failed on its graph."""

from pathlib import Path

import pytest

from moec.fuzz.saving import problem_of_file

FILES = sorted((Path(__file__).parent / "regressions").glob("*.moe"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.stem))
def test_is_mended(path: Path) -> None:
    assert problem_of_file(path) == ""
