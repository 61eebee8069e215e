"""Peak memory of compiled graphs, as expressions of the token dims."""

from moec.memory.prediction import Peak, Prediction, predict

__all__ = ["Peak", "Prediction", "predict"]
