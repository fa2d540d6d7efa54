"""What must be settled before the first step: phases, memory, how the gradient may be changed on its way."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_neuro.arguments import check_count

_UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


def check_phases(phases: Any) -> None:
    """Refuse what is neither a number of phases nor rising numbers of steps."""
    if not isinstance(phases, (list, tuple)):
        check_count("phases", phases)
        return
    for boundary in phases:
        check_count("phases", boundary)
    if list(phases) != sorted(set(phases)):
        raise MisconfigurationException(f"`phases` must be rising numbers of steps; got {phases!r}.")


def check_patterns(name: str, given: Any) -> str | tuple[str, ...] | None:
    """Names or globs of layers; an error where these are none."""
    if given is None or isinstance(given, str):
        return given
    patterns = tuple(given) if isinstance(given, Sequence) else (given,)
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise MisconfigurationException(f"`{name}` must be a name or glob, or several; got {given!r}.")
    return patterns


def plan_phases(trainer: "pl.Trainer", phases: int | Sequence[int]) -> tuple[int, list[int]]:
    """Number of phases, and after how many optimiser steps each but the last ends."""
    if not isinstance(phases, int):
        return len(phases) + 1, list(phases)
    planned = float(trainer.estimated_stepping_batches)
    if planned == float("inf"):
        rank_zero_info("The number of training steps is not known, so their refinement is one phase.")
        return 1, []
    if not trainer.lightning_module.automatic_optimization:
        planned *= max(1, len(trainer.optimizers))  # the trainer counts the steps of each
    return phases, [round(planned * k / phases) for k in range(1, phases)]


def may_change_elements(trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> bool:
    """Whether the gradient may be changed otherwise than by one factor before the optimiser uses it."""
    if not pl_module.automatic_optimization:
        return True
    theirs = type(pl_module).configure_gradient_clipping.__qualname__ != "LightningModule.configure_gradient_clipping"
    return theirs or (bool(trainer.gradient_clip_val) and trainer.gradient_clip_algorithm == "value")


def parse_bytes(name: str, limit: Any) -> float:
    """The number of bytes in a size such as "500MB"."""
    found = re.fullmatch(r"\s*(\d+\.?\d*)\s*([KMGT]?B)\s*", limit) if isinstance(limit, str) else None
    if found is None:
        raise MisconfigurationException(f"`{name}` must be a size such as '500MB' or '2GB'; got {limit!r}.")
    return float(found[1]) * _UNITS[found[2]]


def megabytes(size: float) -> str:
    """A size in words."""
    return f"{size / 1e6:,.1f} MB"


def check_memory(sizes: Mapping[str, int], limit: float) -> str:
    """Refuse ledgers larger than the limit; their sizes in words."""
    total = sum(sizes.values())
    told = f"{megabytes(total)} ({', '.join(f'{layer}: {megabytes(size)}' for layer, size in sizes.items())})"
    if total > limit:
        raise MisconfigurationException(
            f"The ledgers would take {told}, more than `memory_limit` allows ({megabytes(limit)}). Name fewer or"
            " smaller `layers`, group the `sources`, take fewer `phases`, or raise the limit."
        )
    return told
