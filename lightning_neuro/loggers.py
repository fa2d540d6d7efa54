"""All access to Lightning's loggers: scalars for all of them, figures and text for those that accept them, files."""

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytorch_lightning as pl
from torch import Tensor

from lightning_neuro.figures import free, pixels
from lightning_neuro.keys import Entry, key_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Moment = Literal["epoch", "now", "never"]
Layout = dict[str, dict[str, list[Any]]]


def log_scalars(
    trainer: "pl.Trainer",
    pl_module: "pl.LightningModule",
    scalars: Mapping[str, float],
    *,
    prog_bar: Iterable[str] = (),
    moment: Moment,
) -> None:
    """Log values so that callbacks can monitor them, the progress bar can show them and every logger writes them.

    Args:
        trainer: The trainer.
        pl_module: Its module; called inside one of its hooks that allow logging.
        scalars: Key -> value; the same on every rank.
        prog_bar: Keys or globs of keys to show in the progress bar.
        moment: When the loggers receive them: `"epoch"`: with the values of the epoch that Lightning is about to write;
            `"now"`: immediately, because between epochs Lightning would delay them until its next logging step;
            `"never"`: not at all, because they already have them.
    """
    if not scalars or trainer.barebones:
        return
    patterns = tuple(prog_bar)
    # After a training step only a step's values may be logged, elsewhere only an epoch's.
    after_step = pl_module._current_fx_name == "on_train_batch_end"
    for key, value in scalars.items():
        pl_module.log(
            key,
            value,
            prog_bar=any(fnmatchcase(key, pattern) for pattern in patterns),
            logger=None if moment == "epoch" else False,
            on_step=after_step,
            on_epoch=not after_step,
            batch_size=1,
            add_dataloader_idx=False,
        )
    if moment != "epoch":
        # Reading these properties makes Lightning store the values for EarlyStopping and ModelCheckpoint ...
        trainer.callback_metrics, trainer.progress_bar_metrics  # noqa: B018
        if not after_step and trainer._results is not None:
            # ... and if they were stored as an epoch's, they would overwrite newer ones at the end of the first epoch.
            for key in scalars:
                trainer._results.pop(f"{pl_module._current_fx_name}.{key}", None)
    if moment == "now":
        for logger in trainer.loggers:
            logger.log_metrics({**scalars, "epoch": trainer.current_epoch}, step=logging_step(trainer))
            logger.save()


def unmatched(patterns: Iterable[str], keys: Collection[str]) -> dict[str, str]:
    """The patterns that match no key, each with a string of the nearest keys; empty if there are no keys."""
    missing = [pattern for pattern in patterns if keys and not any(fnmatchcase(key, pattern) for key in keys)]
    return {
        pattern: ", ".join(get_close_matches(pattern, keys, n=5, cutoff=0.3) or list(keys)[:5]) for pattern in missing
    }


def matches(key: str, patterns: Iterable[str]) -> bool:
    """Whether a key is one of some keys or globs."""
    return any(key == pattern or fnmatchcase(key, pattern) for pattern in patterns)


def monitored(trainer: "pl.Trainer") -> list[str]:
    """The keys that callbacks such as EarlyStopping and ModelCheckpoint monitor, or learning rate schedulers."""
    watchers = [*trainer.callbacks, *trainer.lr_scheduler_configs]  # type: ignore[attr-defined]
    found = (getattr(watcher, "monitor", None) for watcher in watchers)
    return [key for key in found if isinstance(key, str)]


def logging_step(trainer: "pl.Trainer") -> int:
    """The step under which Lightning itself writes at this moment, so that all curves have the same x axis."""
    step: int = trainer.fit_loop.epoch_loop._batches_that_stepped
    # Lightning writes what is logged in this hook after it, and uses the previous step for it.
    return step - 1 if trainer.lightning_module._current_fx_name == "on_train_epoch_end" else step


def last_step(trainer: "pl.Trainer") -> int:
    """The step under which Lightning wrote the last values of a training that has ended."""
    return max(0, trainer.fit_loop.epoch_loop._batches_that_stepped - 1)


def log_figures(
    trainer: "pl.Trainer",
    name: str,
    draw: Callable[[], Mapping[str, "Figure"]],
    *,
    step: int | None = None,
    epoch: int | None = None,
) -> None:
    """Draw figures on rank 0 and pass them to the loggers that accept images; without one, nothing is drawn.

    Args:
        trainer: The trainer.
        name: First part of the tags.
        draw: Returns last part of the tag -> figure. The figures are released once they are written.
        step: The step to which they belong; default: this moment's.
        epoch: The epoch to which they belong, for the heading.
    """
    holders = [logger for logger in trainer.loggers if _writer(logger) is not None or hasattr(logger, "log_image")]
    if not holders or not trainer.is_global_zero:
        return
    from lightning_neuro.figure_words import add_heading

    step = logging_step(trainer) if step is None else step
    for tag, figure in draw().items():
        add_heading(figure, f"{name}/{tag}, step {step:,}" + ("" if epoch is None else f", epoch {epoch}"))
        image = pixels(figure)
        for logger in holders:
            writer = _writer(logger)
            if writer is not None:
                writer.add_image(f"{name}/{tag}", image, step, dataformats="HWC")
            else:
                logger.log_image(key=f"{name}/{tag}", images=[image], step=step)  # type: ignore[attr-defined]
        free(figure)


def log_histogram(trainer: "pl.Trainer", tag: str, values: Tensor) -> None:
    """Write the distribution of values to the loggers that accept histograms."""
    if not trainer.is_global_zero or values.numel() == 0:
        return
    for logger in trainer.loggers:
        writer = _writer(logger)
        if writer is not None:
            # Fifty bins instead of the writer's 1,549 (most of them empty) take a tenth of the time.
            writer.add_histogram(tag, values.detach().cpu().numpy(), logging_step(trainer), bins=50)


def log_embedding(
    trainer: "pl.Trainer",
    tag: str,
    points: Tensor,
    labels: Sequence[object] | None = None,
    images: Tensor | None = None,
) -> None:
    """Write points for TensorBoard's projector, with (N, 3, height, width) images in 0 .. 1 if each has one."""
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        writer = _writer(logger)
        if writer is not None:
            metadata = None if labels is None else list(labels)
            label_img = images if images is not None and len(images) == len(points) else None
            writer.add_embedding(points.float(), metadata, label_img, logging_step(trainer), tag)


def log_text(trainer: "pl.Trainer", tag: str, text: str, *, step: int | None = None) -> None:
    """Write Markdown to the loggers that accept text, under a step; default: this moment's."""
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        writer = _writer(logger)
        if writer is not None:
            writer.add_text(tag, text, logging_step(trainer) if step is None else step)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table as Markdown; floats with three decimals, NaN as a dash."""

    def line(cells: Iterable[object]) -> str:
        return f"| {' | '.join(_cell(cell) for cell in cells)} |"

    return "\n".join([line(header), line("---" for _ in header), *(line(row) for row in rows)])


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value).replace("|", "\\|").replace("\n", " ")
    return "-" if isnan(value) else f"{value:.3f}"


def artefact_folder(trainer: "pl.Trainer", name: str) -> Path | None:
    """The folder for a callback's files next to the logs, created on the first call; None if nothing is logged.

    Call it on all ranks, because Lightning synchronises its log directory between them; only rank 0 may write.
    """
    folder = trainer.log_dir
    if not trainer.loggers or folder is None:
        return None
    path = Path(folder) / "lightning_neuro" / name
    if trainer.is_global_zero:
        path.mkdir(parents=True, exist_ok=True)
    return path


def local_folder(trainer: "pl.Trainer") -> Path | None:
    """The local folder of a run: of the first logger that has a folder for each run, or else of one that saves at all.

    Unlike `artefact_folder`, it needs no other rank; call it on rank 0 only, because other ranks may not know it.
    """
    folders = [getattr(logger, "log_dir", None) or _version_folder(logger) for logger in trainer.loggers]
    # TensorBoard finds what is next to its own files.
    preferred = [folder for logger, folder in zip(trainer.loggers, folders, strict=True) if _writer(logger) is not None]
    for folder in (*preferred, *folders):
        if isinstance(folder, (str, os.PathLike)) and "://" not in str(folder):
            return Path(folder)
    return None


def _version_folder(logger: Any) -> Path | None:
    """The folder in which Lightning saves a run's checkpoints, for loggers that name only the folder of all runs."""
    folder, name, version = (getattr(logger, fact, None) for fact in ("save_dir", "name", "version"))
    if not isinstance(folder, (str, os.PathLike)) or "://" in str(folder):
        return None
    last = version if isinstance(version, str) else f"version_{version}"
    return Path(folder) / file_name(str(name)) / file_name(last)


def file_name(name: str) -> str:
    """A layer's or attribute's name as a file name that cannot leave its folder."""
    return re.sub(r"[^\w.=-]", "_", name).lstrip(".") or "_"


def multiline_charts(
    family: str, charts: Mapping[str, Sequence[str]], layers_of: Callable[[str], Iterable[str]]
) -> dict[str, list[Any]]:
    """Charts for TensorBoard's Custom Scalars tab, which show related measures together.

    Args:
        family: The first part of the keys.
        charts: Title -> the measures in one chart; the first measure is also shown for all layers in one chart.
        layers_of: Returns the layers for which a measure is logged; each has its own chart.

    Returns:
        Title of the chart -> `["Multiline", tag patterns]`.
    """

    def tags(measures: Iterable[str], layer: str | None = None) -> list[str]:
        return [f"^{re.escape(key_of(family, Entry(measure, layer)))}$" for measure in measures]

    found: dict[str, list[Any]] = {}
    for title, measures in charts.items():
        found[f"{title}: mean over layers"] = ["Multiline", tags(measures)]
        every_layer = f"^{re.escape(key_of(family, Entry(measures[0])))}/[^/]*$"
        found[f"{measures[0]}: each layer"] = ["Multiline", [every_layer]]
        for layer in layers_of(measures[0]):
            found[f"{title}: {layer}"] = ["Multiline", tags(measures, layer)]
    return found


def log_layout(trainer: "pl.Trainer", layout: Layout) -> None:
    """Write the layout of TensorBoard's Custom Scalars tab: family -> chart title -> ["Multiline", tag patterns].

    It is written to a run of its own, the folder `charts` in the log directory. TensorBoard shows the layouts of all
    runs, but of each run only the last one, and the user may write one, too.
    """
    layout = {family: charts for family, charts in layout.items() if charts}
    if not trainer.is_global_zero or not layout:
        return
    for logger in trainer.loggers:
        writer = _writer(logger)
        if writer is None:
            continue
        folder: str | None = getattr(logger, "log_dir", None)
        if folder is None:
            writer.add_custom_scalars(layout)
        else:
            charts = type(writer)(os.path.join(folder, "charts"))  # noqa: PTH118  (it may be a URL)
            charts.add_custom_scalars(layout)
            charts.close()


def _writer(logger: Any) -> Any:
    """The logger's TensorBoard writer, recognised by its methods, so that loggers of both Lightning namespaces work."""
    writer = getattr(logger, "experiment", None)
    # Of its type: the dummy of `fast_dev_run` has every attribute.
    return writer if hasattr(type(writer), "add_image") and hasattr(type(writer), "add_custom_scalars") else None
