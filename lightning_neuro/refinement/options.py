"""Options of refinement: the choices, the checks of arguments, and sizes in bytes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lightning_neuro.batches import BatchField, check_field
from lightning_neuro.checks import ArgumentError, check_choice, check_int, check_patterns, require

Mode = Literal["exact", "pfahler2021"]
MODES: tuple[str, ...] = get_args(Mode)
Direction = Literal["contrast", "centred", "refinement"]
DIRECTIONS: tuple[str, ...] = get_args(Direction)
Form = Literal["cosine", "projection"]
FORMS: tuple[str, ...] = get_args(Form)

MEMORY_LIMIT = "1GB"
"""The default of `memory_limit`."""

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True, eq=False)
class RunOptions:
    """Holds the options of `RepresentationRefinement` (documented there) and checks them at construction.

    Raises:
        ArgumentError: If an option is invalid.
    """

    layers: str | Sequence[str] | None
    mode: Mode
    phases: int | Sequence[int]
    source_fn: BatchField | None
    num_sources: int | None
    track_samples: bool | str | Sequence[str]
    sample_every_n_steps: int
    sample_id_fn: BatchField | None
    influence_every_n_steps: int | None
    update_log: bool | str | Path
    update_log_limit: int | str
    memory_limit: int | str

    def __post_init__(self) -> None:
        check_patterns("layers", self.layers)
        check_choice("mode", self.mode, MODES)
        _check_phases(self.phases)
        check_field("source_fn", self.source_fn)
        if self.num_sources is not None:
            check_int("num_sources", self.num_sources, minimum=1)
        elif self.source_fn is not None:
            raise ArgumentError("`num_sources`, the number of sources, must be given with `source_fn`; got None.")
        if not isinstance(self.track_samples, bool):
            layers = check_patterns("track_samples", self.track_samples)
            require(layers is not None, "track_samples", "be True, False, or names or globs of layers", layers)
        check_int("sample_every_n_steps", self.sample_every_n_steps, minimum=1)
        check_field("sample_id_fn", self.sample_id_fn)
        if self.influence_every_n_steps is not None:
            check_int("influence_every_n_steps", self.influence_every_n_steps, minimum=1)
        folder = isinstance(self.update_log, (bool, str, Path))
        require(folder, "update_log", "be True, False or a folder", self.update_log)
        parse_bytes("update_log_limit", self.update_log_limit)
        parse_bytes("memory_limit", self.memory_limit)

    @property
    def memory_bytes(self) -> int:
        """Maximum memory of the ledgers, of the tables of samples and of the records of steps, each, in bytes."""
        return parse_bytes("memory_limit", self.memory_limit)

    @property
    def num_phases(self) -> int:
        """Number of phases of training; fewer if the length of the training is not known."""
        return self.phases if isinstance(self.phases, int) else len(self.phases) + 1

    @property
    def are_defaults(self) -> bool:
        """Whether no option is given that a run may not be able to meet; `track_samples` and `phases` always can."""
        given = (self.layers, self.source_fn, self.num_sources, self.influence_every_n_steps)
        named = isinstance(self.track_samples, bool) and not self.update_log and self.mode == "exact"
        return all(value is None for value in given) and named and self.memory_limit == MEMORY_LIMIT

    @property
    def tracks_influence(self) -> bool:
        """Whether influence is tracked."""
        return self.influence_every_n_steps is not None

    @property
    def needs_sample_ids(self) -> bool:
        """Whether anything is recorded for single samples."""
        return bool(self.track_samples or self.tracks_influence or self.update_log or self.mode == "pfahler2021")


def _check_phases(phases: Any) -> None:
    if not isinstance(phases, (list, tuple)):
        check_int("phases", phases, minimum=1)
        return
    for boundary in phases:
        check_int("phases", boundary, minimum=1)
    require(list(phases) == sorted(set(phases)), "phases", "be increasing numbers of steps", phases)


def parse_bytes(name: str, limit: Any) -> int:
    """A limit in bytes, given as an integer or as a size such as "500MB" or "1.5 GB"."""
    found = re.fullmatch(r"\s*(\d+\.?\d*)\s*([KMGT]?B)\s*", limit) if isinstance(limit, str) else None
    if found is not None:
        return int(float(found[1]) * _UNITS[found[2]])
    positive = isinstance(limit, int) and not isinstance(limit, bool) and limit > 0
    require(positive, name, "be a positive number of bytes, or a size such as '500MB' or '2GB'", limit)
    return int(limit)


def megabytes(size: float) -> str:
    """Format a number of bytes, such as "12.3 MB"."""
    return f"{size / 1e6:,.1f} MB"


def check_memory(sizes: dict[str, int], limit: float) -> str:
    """Require ledgers to fit into `memory_limit`; returns a description of their sizes.

    Args:
        sizes: Layer -> bytes of its ledger.
        limit: Bytes that all of them may take together.
    """
    total = sum(sizes.values())
    in_words = f"{megabytes(total)} ({', '.join(f'{layer}: {megabytes(size)}' for layer, size in sizes.items())})"
    if total > limit:
        raise ArgumentError(
            f"`memory_limit` must be at least {in_words}, which the ledgers need; got {megabytes(limit)}. Raise it,"
            " name fewer or smaller `layers`, use fewer `phases`, or group the sources with `source_fn`."
        )
    return in_words
