"""When figures are drawn."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator

from lightning_neuro import ActivationEntropy, ArgumentError, Probe
from lightning_neuro import drawing_callback as drawing_file
from lightning_neuro.figure_schedule import draws_in_between, progress_of
from tests.models import fit, loader, mlp


def test_drawing_stays_below_its_share_of_the_time() -> None:
    def draws(drawn: float, expected: float) -> bool:
        return draws_in_between(elapsed=100.0, drawn=drawn, expected=expected, progress=0.5, last_progress=0.0)

    assert draws(1.0, 1.0)
    assert not draws(1.5, 1.0)
    assert not draws(0.0, 2.1)


def test_not_more_figures_than_the_logger_keeps() -> None:
    drawn, last = 0, 0.0
    for epoch in range(1, 1001):
        if draws_in_between(elapsed=1e9, drawn=0.0, expected=0.0, progress=epoch / 1000, last_progress=last):
            drawn, last = drawn + 1, epoch / 1000
    assert 9 <= drawn <= 10


@pytest.mark.parametrize(
    ("max_steps", "max_epochs", "expected"), [(200, None, 0.25), (-1, 10, 0.55), (100, 10, 0.55), (-1, -1, 5.0)]
)
def test_progress_counts_what_ends_first(max_steps: int, max_epochs: int | None, expected: float) -> None:
    current = SimpleNamespace(completed=5)
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(current=current)))
    trainer: Any = SimpleNamespace(
        global_step=50,
        max_steps=max_steps,
        max_epochs=max_epochs,
        current_epoch=5,
        num_training_batches=10,
        fit_loop=loop,
    )
    assert progress_of(trainer) == pytest.approx(expected)


def test_each_of_ten_epochs_is_a_tenth() -> None:
    tenths = [epoch / 10 for epoch in range(11)]
    for last, now in pairwise(tenths):
        assert draws_in_between(elapsed=1.0, drawn=0.0, expected=0.0, progress=now, last_progress=last)


def steps_of_images(folder: Any) -> list[int]:
    events = EventAccumulator(str(folder), size_guidance={IMAGES: 0})
    events.Reload()
    return [event.step for event in events.Images("entropy/units/net.2")] if events.Tags()["images"] else []


@pytest.mark.parametrize(
    ("figures", "share", "expected"),
    [
        ("auto", 0.0, [0, 23]),  # no time for figures in between
        ("auto", 1e9, [0, 3, 7, 11, 15, 19, 23]),
        ("always", 0.0, [0, 3, 7, 11, 15, 19, 23]),
        ("never", 1e9, []),
    ],
)
def test_the_first_and_the_last_evaluation_are_drawn(
    figures: Any, share: float, expected: list[int], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_neuro.figure_schedule.SHARE", share)
    logger = TensorBoardLogger(tmp_path)
    fit(mlp(), ActivationEntropy(Probe(num_samples=16), figures=figures), logger=logger, max_epochs=6)
    assert steps_of_images(logger.log_dir) == expected


def test_what_was_drawn_last_is_not_drawn_again_at_the_end(tmp_path: Any) -> None:
    logger = TensorBoardLogger(tmp_path)
    callback = ActivationEntropy(Probe(num_samples=16, every_n_epochs=100))
    fit(mlp(), callback, logger=logger, max_epochs=3)
    assert steps_of_images(logger.log_dir) == [0]


def test_a_validation_after_the_fit_is_drawn(tmp_path: Any) -> None:
    callback, logger = ActivationEntropy(Probe(num_samples=16)), TensorBoardLogger(tmp_path)
    module = mlp()
    trainer = fit(module, callback, logger=logger, max_epochs=2)
    drawn: list[int] = []
    callback.log_figures = lambda trainer: drawn.append(1)  # type: ignore[method-assign]
    trainer.validate(module, loader(32), verbose=False)
    assert drawn == [1]


def test_the_time_of_all_callbacks_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    seen: list[float] = []

    def note(**numbers: float) -> bool:
        seen.append(numbers["drawn"])
        return False

    monkeypatch.setattr(drawing_file, "draws_in_between", note)
    one, other = ActivationEntropy(Probe(num_samples=16)), ActivationEntropy(Probe(num_samples=16), name="other")
    fit(mlp(), one, other, logger=TensorBoardLogger(tmp_path), max_epochs=1)
    both = one.cost.seconds["draw"] + other.cost.seconds["draw"]
    # Before the last figures, those of the first evaluation.
    assert len(seen) == 2 and 0 < seen[0] < both


def test_an_unknown_choice_is_an_error() -> None:
    with pytest.raises(ArgumentError, match="`figures` must be"):
        ActivationEntropy(figures="sometimes")  # type: ignore[arg-type]
