"""Writes the results of a fit: one file per callback and evaluation, and one per probe set, by rank 0."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import pytorch_lightning as pl
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_neuro.artefacts import locations
from lightning_neuro.artefacts.probe_samples import collect_samples
from lightning_neuro.artefacts.results_file import packed
from lightning_neuro.artefacts.run_files import MEGABYTE, RunFiles
from lightning_neuro.artefacts.save_results import SaveResults, options_of
from lightning_neuro.loggers import local_folder, logging_step
from lightning_neuro.probe_pass import ProbePass
from lightning_neuro.probe_set import ProbeSet
from lightning_neuro.ranks import explain, of_rank_zero

if TYPE_CHECKING:
    from lightning_neuro.callback import MetricCallback


class ResultsWriter:
    """Writes the results of one fit, or of one `trainer.validate`. A failure is reported once and ends nothing."""

    def __init__(self) -> None:
        self._is_on: bool | None = None
        self._files: RunFiles | None = None
        self._options = SaveResults()
        self._samples: WeakKeyDictionary[ProbeSet, str | None] = WeakKeyDictionary()
        self._warned = False

    def save(
        self,
        trainer: "pl.Trainer",
        pl_module: "pl.LightningModule",
        callback: "MetricCallback[Any]",
        scalars: Mapping[str, float],
    ) -> None:
        """Write the latest results of a callback. Call it on all ranks.

        Args:
            trainer: The trainer.
            pl_module: The model.
            callback: Its results are written.
            scalars: Key -> value of this evaluation.
        """
        if self._is_on is None:
            self._open(trainer)
        if not self._is_on:
            return
        samples = self._samples_id(trainer, pl_module, callback.probe_pass)
        if self._files is None:  # not rank 0
            return
        try:
            self._files.write_results(_header(trainer, callback, scalars, samples), packed(dict(callback.result)))
        except Exception as error:
            self._warn(error)

    def _open(self, trainer: "pl.Trainer") -> None:
        """Find the folder on rank 0, and agree on whether there is one."""
        self._options = options_of(trainer)
        wanted = bool(trainer.loggers) and self._options.max_megabytes > 0 and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if wanted and trainer.is_global_zero:
            try:
                folder = local_folder(trainer)
                if folder is None:
                    rank_zero_info("The results are not saved in files, because no logger has a local directory.")
                else:
                    budget = self._options.max_megabytes * MEGABYTE
                    self._files = RunFiles(folder / locations.FOLDER, int(budget))
            except Exception as error:
                self._warn(error)
        self._is_on = wanted and of_rank_zero(trainer, self._files is not None)

    def _samples_id(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", probe_pass: ProbePass) -> str | None:
        """The name of the file of the probe set, which is written when it is first asked for; None if that failed."""
        samples = probe_pass.samples
        assert samples is not None
        if samples not in self._samples:
            identity = None
            try:
                found = collect_samples(trainer, pl_module, probe_pass, self._options.describe_fn)
                identity = None if self._files is None else self._files.write_samples(packed(found), len(found))
            except Exception as error:
                self._warn(error)
            self._samples[samples] = identity
        return self._samples[samples]

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            rank_zero_warn(f"Results could not be saved in files; the training goes on. {explain(error)}")


def _header(
    trainer: "pl.Trainer", callback: "MetricCallback[Any]", scalars: Mapping[str, float], samples: str | None
) -> dict[str, Any]:
    assert callback.event is not None
    return {
        "name": callback.name,
        "callback": type(callback).__name__,
        "family": callback.family,
        "event": callback.event.kind,
        "step": logging_step(trainer),
        "epoch": callback.event.epoch,
        "global_step": callback.event.step,
        "layers": list(callback.result),
        "scalars": dict(scalars),
        "meanings": dict(callback.meanings),
        "charts": {title: list(measures) for title, measures in callback.charts.items()},
        "samples": samples,
    }
