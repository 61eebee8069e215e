"""``Trainer`` and ``accelerate``: the losses of the uncompiled model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import moec
from tests.models import VOCABULARY, build

accelerate = pytest.importorskip("accelerate")
from transformers import Trainer, TrainingArguments  # noqa: E402 (needs accelerate)

pytestmark = pytest.mark.filterwarnings("ignore")  # of loaders and checkpoints, on a machine alone
STEPS = 20


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows of one length."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(5)
        self.ids = torch.randint(3, VOCABULARY, (count, 9), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def settings(folder: Path, **changes: Any) -> TrainingArguments:
    """Twenty steps with evaluation and checkpoints."""
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=4,
        learning_rate=1e-3,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=10,
        save_steps=10,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
        **changes,
    )


def losses(model: Any, folder: Path, *, resume: bool | str = False, **changes: Any) -> list[float]:
    """Every training and evaluation loss of a run."""
    trainer = Trainer(
        model=model,
        args=settings(folder, **changes),
        train_dataset=Rows(64),
        eval_dataset=Rows(8),
    )
    trainer.train(resume_from_checkpoint=resume)
    history = trainer.state.log_history
    return [v for entry in history for k, v in entry.items() if k in ("loss", "eval_loss")]


def test_trainer_with_evaluation_checkpoints_and_resumption(tmp_path: Path) -> None:
    def run(name: str, model: Any) -> tuple[list[float], list[float]]:
        whole = losses(model(), tmp_path / name)
        checkpoint = str(tmp_path / name / "checkpoint-10")
        return whole, losses(model(), tmp_path / f"{name} resumed", resume=checkpoint)

    def compiled() -> Any:
        return moec.compile(build("deepseek_v3").double(), strict=True)

    expected = run("plain", lambda: build("deepseek_v3").double())
    found = run("compiled", compiled)
    assert len(found[0]) == STEPS + 2
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_trainer_with_activation_checkpointing(tmp_path: Path) -> None:
    import moec.integrations.hf

    expected = losses(build("mixtral").double(), tmp_path / "plain")
    for name, model in (
        ("compiled", moec.compile(build("mixtral").double(), strict=True)),
        ("interface", build("mixtral", experts_implementation="moec").double()),
    ):
        found = losses(model, tmp_path / name, gradient_checkpointing=True)
        assert found == pytest.approx(expected, rel=1e-6)


def test_accelerate() -> None:
    def run(model: Any) -> list[float]:
        machine = accelerate.Accelerator(cpu=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        loader = torch.utils.data.DataLoader(Rows(2 * STEPS), batch_size=2)
        model, optimizer, loader = machine.prepare(model, optimizer, loader)
        found = []
        for rows in loader:
            loss = model(**rows).loss
            machine.backward(loss)
            machine.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        plain = machine.unwrap_model(model)
        assert set(machine.get_state_dict(model)) == set(plain.state_dict())
        return found

    expected = run(build("olmoe").double())
    found = run(moec.compile(build("olmoe").double(), strict=True))
    assert len(found) == STEPS
    assert found == pytest.approx(expected, rel=1e-6)
