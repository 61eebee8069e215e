"""moec: a compiler for Mixture-of-Experts models in PyTorch.

``moec.compile(model)`` returns the same model with compiled MoE blocks; ``moec.explain(model)``
says what became of each, ``moec.bisect_model(model, inputs)`` what makes one wrong.
"""

from __future__ import annotations

from typing import Any

from moec.errors import MoecError

__version__ = "0.1.0"
__all__ = [
    "MoecError",
    "__version__",
    "bisect_model",
    "compile",
    "dim",
    "explain",
    "history",
    "regions",
]


def __getattr__(name: str) -> Any:
    """Load the compiler at first use, so that ``import moec`` costs little more than ``import
    torch``.
    """
    if name in ("compile", "explain", "regions"):
        from moec import api

        return getattr(api, name)
    if name == "bisect_model":
        from moec.model_bisect import bisect_model

        return bisect_model
    if name == "dim":
        from moec.declared import dim

        return dim
    if name == "history":
        from moec.compilations import history

        return history
    raise AttributeError(f"module 'moec' has no attribute {name!r}")
