"""Reads the results of a run from its files."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_neuro.artefacts import locations
from lightning_neuro.artefacts.encoding import FormatError
from lightning_neuro.artefacts.probe_samples import ProbeSamples
from lightning_neuro.artefacts.results_file import Header, read_header, read_values
from lightning_neuro.checks import ArgumentError


@dataclass(frozen=True)
class Problem:
    """A file that is not read.

    Attributes:
        path: The file.
        reason: Why it is not read.
    """

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}."


class SavedEvaluation(Mapping[str, Any]):
    """The results of a callback at one step: layer -> result. The file is read when a result is first asked for.

    Attributes:
        path: The file.
        step: The training step, as on the horizontal axis of the curves.
        epoch: The epoch.
        event: When it was: `"start"`, `"step"`, `"validation"`, `"epoch"` or `"validate"`.
        scalars: Key -> value.
        samples: The samples of the probe set; None if they could not be saved or read.
    """

    def __init__(self, path: Path, header: Header, samples: ProbeSamples | None) -> None:
        self.path = path
        self.step: int = header["step"]
        self.epoch: int = header["epoch"]
        self.event: str = header["event"]
        self.scalars: dict[str, float] = header["scalars"]
        self.samples = samples
        self._layers: list[str] = header["layers"]

    @cached_property
    def _results(self) -> dict[str, Any]:
        try:
            values = read_values(self.path)
        except FormatError as error:
            raise FormatError(f"{self.path}: {error}") from error
        if not isinstance(values, dict) or values.keys() != set(self._layers):
            raise FormatError(f"{self.path}: it does not hold the layers that its header names")
        return values

    def __getitem__(self, layer: str) -> Any:
        return self._results[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        return f"SavedEvaluation(step={self.step}, epoch={self.epoch}, layers={self._layers})"


class SavedCallback(Mapping[int, SavedEvaluation]):
    """The evaluations of a callback, by step, in their order.

    Attributes:
        name: Its name, the first part of its keys.
        callback: Name of its class.
        family: The family of its class; empty for a method of the user's.
        meanings: Measure -> its meaning.
        charts: Title -> the measures that are shown together, such as a value and its null.
    """

    def __init__(self, header: Header) -> None:
        self.name: str = header["name"]
        self.callback: str = header["callback"]
        self.family: str = header["family"]
        self.meanings: dict[str, str] = header["meanings"]
        self.charts: dict[str, list[str]] = header["charts"]
        self._evaluations: dict[int, SavedEvaluation] = {}

    @property
    def history(self) -> dict[str, list[tuple[int, float]]]:
        """Key -> step and value at each evaluation, as in the attribute `history` of a callback, for all measures."""
        found: dict[str, list[tuple[int, float]]] = {}
        for step, evaluation in self.items():
            for key, value in evaluation.scalars.items():
                found.setdefault(key, []).append((step, value))
        return found

    def __getitem__(self, step: int) -> SavedEvaluation:
        return self._evaluations[step]

    def __iter__(self) -> Iterator[int]:
        return iter(self._evaluations)

    def __len__(self) -> int:
        return len(self._evaluations)

    def __repr__(self) -> str:
        return f"SavedCallback({self.name!r}, {self.callback}, steps={list(self)})"


@dataclass(frozen=True, eq=False, repr=False)
class SavedRun(Mapping[str, SavedCallback]):
    """The results of a run: name of the callback -> step -> layer -> result.

    Attributes:
        folder: The folder `lightning_neuro` of the run.
        problems: The files in it that are not read, and why.
    """

    folder: Path
    problems: tuple[Problem, ...]
    _callbacks: dict[str, SavedCallback] = field(default_factory=dict)

    def __getitem__(self, name: str) -> SavedCallback:
        return self._callbacks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._callbacks)

    def __len__(self) -> int:
        return len(self._callbacks)

    def __repr__(self) -> str:
        names = ", ".join(f"{name}: {len(found)} evaluations" for name, found in self.items())
        problems = f", {len(self.problems)} problems" if self.problems else ""
        return f"SavedRun({str(self.folder)!r}, {names or 'no results'}{problems})"


def load_run(folder: str | Path) -> SavedRun:
    """Read the results that the callbacks saved in a run.

    Only the headers are read now, and the results of an evaluation when they are asked for. Nothing in the files is
    executed. A file that is truncated, foreign or of a newer version is named in `problems`; all others are read.

    Args:
        folder: The log directory of the run, such as `lightning_logs/version_0`, or the folder `lightning_neuro` in it.

    Returns:
        The results: `run["communities"][step]["relu3"]` is the `CommunityResult` of the layer relu3 at a step, equal to
        `callback.result["relu3"]` at that step up to the precision in which it is stored.

    Raises:
        ArgumentError: If there are no results in the folder.

    Example:
        >>> run = load_run("lightning_logs/version_0")  # doctest: +SKIP
        >>> for step, evaluation in run["communities"].items():  # doctest: +SKIP
        ...     print(step, evaluation["relu3"].modularity)
    """
    given = Path(folder)
    candidates = [given / locations.FOLDER, *([given] if given.name == locations.FOLDER else [])]
    run = next((path for path in candidates if (path / locations.RESULTS).is_dir()), None)
    if run is None:
        raise ArgumentError(
            f"`folder` must be the log directory of a run in which callbacks of lightning_neuro saved results; there is"
            f" no folder {given / locations.FOLDER / locations.RESULTS}."
        )
    problems: list[Problem] = []
    samples = _read_samples(run, problems)
    headers = sorted(_read_headers(run, problems), key=lambda found: (found[1]["name"], found[1]["step"]))
    callbacks: dict[str, SavedCallback] = {}
    for path, header in headers:
        callback = callbacks.setdefault(header["name"], SavedCallback(header))
        callback._evaluations[header["step"]] = SavedEvaluation(path, header, samples.get(header["samples"]))
    return SavedRun(run, tuple(problems), callbacks)


def _read_headers(run: Path, problems: list[Problem]) -> Iterator[tuple[Path, Header]]:
    for path in _files(run / locations.RESULTS, "*/*"):
        try:
            header = _checked(read_header(path, "results"))
            if path != locations.result_path(run, header["name"], header["step"]):
                raise FormatError(f"it holds {header['name']!r} at step {header['step']}, which belongs elsewhere")
            yield path, header
        except FormatError as error:
            problems.append(Problem(path, str(error)))


def _read_samples(run: Path, problems: list[Problem]) -> dict[str | None, ProbeSamples]:
    found: dict[str | None, ProbeSamples] = {}
    for path in _files(run / locations.SAMPLES, "*"):
        try:
            header = read_header(path, "samples")
            samples = read_values(path)
            if not isinstance(samples, ProbeSamples) or not isinstance(header.get("id"), str):
                raise FormatError("it does not hold samples")
            found[header["id"]] = samples
        except FormatError as error:
            problems.append(Problem(path, str(error)))
    return found


def _files(folder: Path, pattern: str) -> list[Path]:
    """The files in a folder but those that are being written."""
    return sorted(path for path in folder.glob(pattern) if path.is_file() and not path.name.startswith("."))


_TYPES: dict[str, type | tuple[type, ...]] = {
    **{"name": str, "callback": str, "family": str, "event": str, "step": int, "epoch": int, "layers": list},
    **{"scalars": dict, "meanings": dict, "charts": dict, "samples": (str, type(None))},
}


def _checked(header: Header) -> Header:
    for name, expected in _TYPES.items():
        if not isinstance(header.get(name), expected):
            raise FormatError(f"its header has no valid {name!r}")
    return header
