"""Writes the results of a fit: one file per callback and evaluation, and one per probe set, by rank 0."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_neuro.artefacts import locations
from lightning_neuro.artefacts.encoding import FormatError
from lightning_neuro.artefacts.probe_samples import collect_samples
from lightning_neuro.artefacts.results_file import packed, read_header, write_file
from lightning_neuro.artefacts.save_results import SaveResults, options_of
from lightning_neuro.artefacts.thinning import steps_to_remove
from lightning_neuro.loggers import local_folder, logging_step
from lightning_neuro.probe_pass import ProbePass
from lightning_neuro.probe_set import ProbeSet
from lightning_neuro.ranks import explain, of_rank_zero

if TYPE_CHECKING:
    from lightning_neuro.callback import MetricCallback

MEGABYTE = 1_000_000


class ResultsWriter:
    """Writes the results of one fit, or of one `trainer.validate`. A failure is reported once and ends nothing."""

    def __init__(self) -> None:
        self._is_on: bool | None = None
        self._files: _RunFiles | None = None
        self._options = SaveResults()
        self._samples: dict[int, tuple[ProbeSet, str | None]] = {}
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
            except Exception as error:
                self._warn(error)
            else:
                if folder is None:
                    rank_zero_info("The results are not saved in files, because no logger has a local directory.")
                else:
                    budget = self._options.max_megabytes * MEGABYTE
                    self._files = _RunFiles(folder / locations.FOLDER, int(budget))
        self._is_on = wanted and of_rank_zero(trainer, self._files is not None)

    def _samples_id(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", probe_pass: ProbePass) -> str | None:
        """The name of the file of the probe set, which is written when it is first asked for; None if that failed."""
        samples = probe_pass.samples
        assert samples is not None
        if id(samples) not in self._samples:
            identity = None
            try:
                found = collect_samples(trainer, pl_module, probe_pass, self._options.describe_fn)
                identity = None if self._files is None else self._files.write_samples(packed(found), len(found))
            except Exception as error:
                self._warn(error)
            self._samples[id(samples)] = samples, identity  # with the set, so that its id stays taken
        return self._samples[id(samples)][1]

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


class _RunFiles:
    """The files of a run: it knows their sizes, and removes some if they take too much space.

    Args:
        folder: The folder `lightning_neuro` in the log directory.
        budget: Number of bytes.
    """

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder = folder
        self.budget = budget
        self._sizes: dict[str, dict[int, int]] = {}  # name of the callback's folder -> step -> bytes
        self._samples_size = 0
        self._begun: set[str] = set()
        self._told = False
        self._find_files()

    def _find_files(self) -> None:
        for path in sorted(self.folder.glob(f"{locations.RESULTS}/*/*{locations.SUFFIX}")):
            if (step := locations.step_of(path)) is not None:
                self._sizes.setdefault(path.parent.name, {})[step] = path.stat().st_size
        self._samples_size = sum(path.stat().st_size for path in (self.folder / locations.SAMPLES).glob("*.zip"))

    def write_samples(self, parts: tuple[bytes, bytes], num_samples: int) -> str:
        """Write a probe set, unless a file holds it already; returns the name of the file."""
        identity = hashlib.sha256(b"".join(parts)).hexdigest()[:16]
        path = locations.samples_path(self.folder, identity)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._samples_size += write_file(path, "samples", {"id": identity, "num_samples": num_samples}, parts)
        return identity

    def write_results(self, header: Mapping[str, Any], parts: tuple[bytes, bytes]) -> None:
        """Write the results of an evaluation, and remove older ones if there is too little space."""
        path = locations.result_path(self.folder, header["name"], header["step"])
        sizes = self._sizes.setdefault(path.parent.name, {})
        if header["event"] == "validate":
            if header["step"] in sizes and not _is_of_validate(path):
                return  # the results of a fit are not replaced by those of other data or weights
        elif path.parent.name not in self._begun:
            self._begun.add(path.parent.name)
            for step in [step for step in sizes if step > header["step"]]:
                self._remove(path.parent.name, step)  # of an earlier fit, which began anew or from a checkpoint
        if not sizes:
            path.parent.mkdir(parents=True, exist_ok=True)
        sizes[header["step"]] = write_file(path, "results", dict(header), parts)
        self._thin()

    def _thin(self) -> None:
        total: dict[int, int] = {}
        for sizes in self._sizes.values():
            for step, size in sizes.items():
                total[step] = total.get(step, 0) + size
        budget = self.budget - self._samples_size
        # A step is removed for all callbacks, so that they can be compared at the steps that stay.
        ends = {end(sizes) for sizes in self._sizes.values() if sizes for end in (min, max)}
        for step in steps_to_remove(total, budget, keep=ends):
            del total[step]
            for folder, sizes in self._sizes.items():
                if step in sizes:
                    self._remove(folder, step)
        if sum(total.values()) > budget and not self._told:
            self._told = True
            rank_zero_warn(
                f"The results of the first and the last evaluation take {sum(total.values()) / MEGABYTE:.3g} MB, which is"
                f" more than `SaveResults(max_megabytes={self.budget / MEGABYTE:g})` allows. They are kept."
            )

    def _remove(self, folder: str, step: int) -> None:
        (self.folder / locations.RESULTS / folder / locations.step_name(step)).unlink(missing_ok=True)
        del self._sizes[folder][step]


def _is_of_validate(path: Path) -> bool:
    try:
        return bool(read_header(path, "results").get("event") == "validate")
    except FormatError:
        return True  # a damaged file may be replaced
