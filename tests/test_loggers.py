"""Scalars to every logger, pictures to those that can hold them."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin

from lightning_neuro.loggers import (
    artefact_folder,
    file_name,
    log_figures,
    log_histogram,
    log_layout,
    log_scalars,
    log_text,
    logging_step,
    markdown_table,
)
from tests.models import MemoryLogger, Module, fit, loader, mlp


class At(pl.Callback):
    """Calls a function in one of Lightning's hooks."""

    def __init__(self, hook: str, call: Any) -> None:
        setattr(self, hook, lambda trainer, pl_module, *args: call(trainer, pl_module))


def figure(color: str = "red") -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(0.4, 0.2), dpi=100, facecolor=color)


def read(folder: Any) -> EventAccumulator:
    return EventAccumulator(str(folder)).Reload()


@pytest.mark.parametrize("hook", ["on_train_start", "on_train_epoch_end", "on_validation_epoch_end"])
def test_chosen_keys_stand_in_the_progress_bar_and_all_can_be_monitored(hook: str) -> None:
    def log(trainer: Any, pl_module: Any) -> None:
        log_scalars(trainer, pl_module, {"a/b": 1.5, "a/b/c": 2.5, "d": 3.5}, prog_bar=["a/*c", "d"], moment="never")

    trainer = fit(mlp(), At(hook, log), max_epochs=1, num_sanity_val_steps=0)
    assert {k: float(v) for k, v in trainer.callback_metrics.items() if "loss" not in k} == {
        "a/b": 1.5,
        "a/b/c": 2.5,
        "d": 3.5,
    }
    shown = {key: value for key, value in trainer.progress_bar_metrics.items() if key != "v_num"}
    assert shown == {"a/b/c": 2.5, "d": 3.5}


@pytest.mark.parametrize(("when", "steps"), [("now", [0]), ("never", [])])
def test_when_the_loggers_get_what_is_logged_before_training(when: Any, steps: list[int]) -> None:
    logger, monitored = MemoryLogger(), []

    def log(trainer: Any, pl_module: Any) -> None:
        log_scalars(trainer, pl_module, {"a": 1.0}, moment=when)
        monitored.append(trainer.callback_metrics["a"].item())

    fit(mlp(), At("on_train_start", log), logger=logger, max_epochs=1)
    assert monitored == [1.0]
    assert [step for step, _ in logger.curves.get("a", [])] == steps


def test_values_of_an_epoch_stand_at_the_step_of_the_others_of_this_epoch() -> None:
    logger, steps = MemoryLogger(), []

    def log(trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            steps.append(trainer.global_step)
            log_scalars(trainer, pl_module, {"ours": float(trainer.global_step)}, moment="epoch")

    fit(mlp(), At("on_validation_epoch_end", log), logger=logger, val_check_interval=2)
    assert steps == [2, 4, 6, 8]
    assert [value for _, value in logger.curves["ours"]] == [2, 4, 6, 8]
    assert [step for step, _ in logger.curves["ours"]] == [step for step, _ in logger.curves["val_loss"]]


def test_values_of_a_step_stand_at_the_step_at_which_lightning_writes_its_own() -> None:
    class Steps(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("theirs", float(self.global_step), on_step=True)
            return loss

    def log(trainer: Any, pl_module: Any) -> None:
        log_scalars(trainer, pl_module, {"ours": float(trainer.global_step)}, moment="now")
        assert trainer.callback_metrics["ours"] == trainer.global_step

    logger = MemoryLogger()
    fit(Steps(mlp().net), At("on_train_batch_end", log), logger=logger, log_every_n_steps=1, max_epochs=1)
    assert logger.curves["ours"] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert [step for step, _ in logger.curves["theirs"]] == [0, 1, 2, 3]
    assert len({key for key in logger.curves if key.startswith("ours")}) == 1


@pytest.mark.parametrize(("hook", "val"), [("on_validation_epoch_end", True), ("on_train_epoch_end", False)])
def test_pictures_stand_at_the_step_of_the_scalars_of_their_epoch(hook: str, val: bool) -> None:
    logger, steps = MemoryLogger(), []

    def log(trainer: Any, pl_module: Any) -> None:
        steps.append(logging_step(trainer))
        log_scalars(trainer, pl_module, {"ours": 1.0}, moment="epoch")

    fit(mlp(), At(hook, log), logger=logger, val=val, num_sanity_val_steps=0)
    assert steps == [step for step, _ in logger.curves["ours"]] == [3, 7]


def test_two_loggers_both_get_the_values(tmp_path: Path) -> None:
    one, two = MemoryLogger(), CSVLogger(str(tmp_path))

    def log(trainer: Any, pl_module: Any) -> None:
        log_scalars(trainer, pl_module, {"a": 1.0}, moment="now")

    fit(mlp(), At("on_train_start", log), logger=[one, two], max_epochs=1)
    assert one.curves["a"] == [(0, 1.0)]
    assert "a" in (Path(two.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")


def test_nothing_to_log_and_nowhere_to_log_to() -> None:
    def log(trainer: Any, pl_module: Any) -> None:
        log_scalars(trainer, pl_module, {}, moment="now")
        log_scalars(trainer, pl_module, {"a": 1.0}, moment="now")
        log_figures(trainer, "f", lambda: pytest.fail("drawn for nobody"))
        log_histogram(trainer, "h", torch.ones(3))
        log_layout(trainer, {"f": {"c": ["Multiline", ["a"]]}})

    trainer = fit(mlp(), At("on_train_start", log), max_epochs=1, logger=False)
    assert trainer.callback_metrics["a"] == 1


def test_pictures_in_tensorboard(tmp_path: Path) -> None:
    layout = {"family": {"chart": ["Multiline", ["^family/a$"]]}}

    def log(trainer: Any, pl_module: Any) -> None:
        log_figures(trainer, "f", lambda: {"red": figure(), "blue": figure("blue")})
        log_histogram(trainer, "f/h", torch.arange(100.0, requires_grad=True))
        log_histogram(trainer, "f/empty", torch.zeros(0))
        log_layout(trainer, layout)
        log_layout(trainer, {})

    logger = TensorBoardLogger(str(tmp_path))
    fit(mlp(), At("on_train_epoch_end", log), logger=logger, max_epochs=1)
    logger.experiment.flush()
    events = read(logger.log_dir)
    assert events.Tags()["images"] == ["f/red", "f/blue"]
    assert events.Tags()["histograms"] == ["f/h"]
    (image,) = events.Images("f/red")
    assert (image.width, image.height, image.step) == (40, 37, 3)  # with a line that says where it is from
    (histogram,) = events.Histograms("f/h")
    value = histogram.histogram_value
    assert (value.min, value.max, value.num, value.sum, histogram.step) == (0, 99, 100, 4950, 3)
    assert len(value.bucket) <= 52
    charts = read(str(Path(logger.log_dir) / "charts"))
    assert b"^family/a$" in charts.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_epoch_end"])
def test_tensorboard_shows_the_layout_of_the_user_too(hook: str, tmp_path: Path) -> None:
    def own(trainer: Any, pl_module: Any) -> None:
        trainer.logger.experiment.add_custom_scalars({"mine": {"losses": ["Multiline", ["train_loss"]]}})

    def log(trainer: Any, pl_module: Any) -> None:
        log_layout(trainer, {"family": {"chart": ["Multiline", ["^family/a$"]]}})

    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    fit(mlp(), At(hook, own), At("on_train_start", log), logger=logger, max_epochs=1)
    assert {category["title"] for category in shown(tmp_path)["category"]} == {"mine", "family"}


def shown(folder: Path) -> Any:
    """The page that TensorBoard's own plugin shows for a log directory."""
    runs = EventMultiplexer()
    runs.AddRunsFromDirectory(str(folder))
    runs.Reload()
    provider = MultiplexerDataProvider(runs, str(folder))
    plugin = CustomScalarsPlugin(TBContext(logdir=str(folder), multiplexer=runs, data_provider=provider))
    return json.loads(plugin.layout_impl(RequestContext(), ""))


class Pictures(MemoryLogger):
    """A logger with `log_image`, as those of Weights & Biases and Comet."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[tuple[str, Any, int]] = []

    def log_image(self, key: str, images: list[Any], step: int | None = None, **options: Any) -> None:
        assert step is not None
        self.images.append((key, images[0], step))


def test_loggers_that_take_images_get_pixels() -> None:
    logger, plain = Pictures(), MemoryLogger()
    drawn = []

    def draw() -> Any:
        drawn.append(1)
        return {"red": figure()}

    def log(trainer: Any, pl_module: Any) -> None:
        log_figures(trainer, "f", draw)
        log_histogram(trainer, "f/h", torch.arange(3.0))
        log_layout(trainer, {"f": {"c": ["Multiline", ["a"]]}})

    fit(mlp(), At("on_train_epoch_end", log), logger=[plain, logger, logger], max_epochs=1)
    assert len(drawn) == 1
    assert [(key, step) for key, _, step in logger.images] == [("f/red", 3)] * 2
    pixels = logger.images[0][1]
    assert pixels.shape == (37, 40, 3) and pixels.dtype == np.uint8
    assert (pixels[17:].reshape(-1, 3) == [255, 0, 0]).all()


def test_loggers_without_images_draw_nothing(tmp_path: Path) -> None:
    def log(trainer: Any, pl_module: Any) -> None:
        log_figures(trainer, "f", lambda: pytest.fail("drawn for nobody"))

    fit(mlp(), At("on_train_start", log), logger=[MemoryLogger(), CSVLogger(str(tmp_path))], max_epochs=1)


def test_a_barebones_trainer_is_logged_nothing() -> None:
    def log(trainer: Any, pl_module: Any) -> None:
        log_scalars(trainer, pl_module, {"a": 1.0}, moment="now")

    trainer = pl.Trainer(barebones=True, max_epochs=1, accelerator="cpu", callbacks=[At("on_train_start", log)])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*barebones")
        trainer.fit(Quiet(mlp().net), loader())
    assert "a" not in trainer.callback_metrics


class Quiet(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])


def test_text_and_tables_reach_tensorboard_and_nothing_else_breaks(tmp_path: Path) -> None:
    table = markdown_table(["layer", "score"], [["fc|1", 0.12345], ["fc2", float("nan")], ["fc3", 7]])
    assert table == "| layer | score |\n| --- | --- |\n| fc\\|1 | 0.123 |\n| fc2 | - |\n| fc3 | 7 |"
    loggers = [TensorBoardLogger(tmp_path), CSVLogger(tmp_path), MemoryLogger()]
    fit(mlp(), At("on_train_epoch_end", lambda t, m: log_text(t, "a/table", table)), logger=loggers, max_epochs=1)
    (event,) = read(loggers[0].log_dir).Tensors("a/table/text_summary")
    assert event.tensor_proto.string_val[0].decode() == table


def test_files_lie_beside_the_logs_and_nowhere_without_a_logger(tmp_path: Path) -> None:
    found: list[Any] = []
    call = At("on_train_epoch_end", lambda t, m: found.append(artefact_folder(t, "topology")))
    logger = CSVLogger(tmp_path)
    fit(mlp(), call, logger=logger, max_epochs=1)
    fit(mlp(), call, logger=False, max_epochs=1)
    fit(mlp(), call, logger=MemoryLogger(), max_epochs=1)
    assert found == [Path(logger.log_dir) / "lightning_neuro" / "topology", None, None]
    assert found[0].is_dir()


@pytest.mark.parametrize(
    ("name", "file"),
    [("../x", "_x"), ("a/b", "a_b"), ("...", "_"), ("relu.1", "relu.1"), ("label==3", "label==3"), ("größe", "größe")],
)
def test_a_name_cannot_leave_its_folder(name: str, file: str) -> None:
    assert file_name(name) == file
