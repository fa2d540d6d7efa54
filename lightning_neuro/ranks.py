"""Agreement between the processes of a distributed run: every function here must be called on all ranks."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn.functional import pad
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_neuro.checks import ArgumentError, NothingToDoError
from lightning_neuro.compat import MISCONFIGURATIONS

T = TypeVar("T")


class FailedOnAnotherRankError(RuntimeError):
    """Raised on this rank because an operation failed on another rank; the message says on which, and why."""


def explain(error: Exception) -> str:
    """Describe an error: its type and message, or the message of the rank on which it occurred."""
    return str(error) if isinstance(error, FailedOnAnotherRankError) else f"{type(error).__name__}: {error}"


def on_any_rank(trainer: "pl.Trainer", condition: bool) -> bool:
    """Whether a condition holds on at least one rank."""
    return condition if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(condition, all=False)


def of_rank_zero(trainer: "pl.Trainer", condition: bool) -> bool:
    """Whether a condition holds on rank 0, for what depends on a clock."""
    return on_any_rank(trainer, condition and trainer.global_rank == 0)


def raise_on_all_ranks(trainer: "pl.Trainer", error: Exception | None) -> None:
    """Raise on every rank if there is an error on at least one of them.

    Raises:
        Exception: The error of this rank.
        ArgumentError: If it is only on another rank, and a wrong argument there; a `NothingToDoError` if it is one.
        FailedOnAnotherRankError: If it is only on another rank, and anything else.
    """
    if not on_any_rank(trainer, error is not None):
        return
    words = "" if error is None else explain(error)
    wrong_argument = on_any_rank(trainer, isinstance(error, MISCONFIGURATIONS))
    nothing_to_do = on_any_rank(trainer, isinstance(error, NothingToDoError))
    # Rank 0 alone can warn the user, so it must know what happened elsewhere.
    found = gather_texts(trainer, words)
    if error is not None:
        raise error
    elsewhere = "; ".join(f"on rank {rank}, {text}" for rank, text in enumerate(found) if text)
    if nothing_to_do:
        raise NothingToDoError(elsewhere)
    raise ArgumentError(elsewhere) if wrong_argument else FailedOnAnotherRankError(elsewhere)


def agreed(trainer: "pl.Trainer", compute: Callable[[], T]) -> T:
    """Compute something on every rank, or raise on every rank if it fails on one of them.

    Without this, the ranks that succeeded would wait forever in the next collective operation.

    Args:
        trainer: The trainer.
        compute: The computation.

    Returns:
        What `compute` returned on this rank.

    Raises:
        Exception: As `raise_on_all_ranks`.
    """
    error: Exception | None = None
    try:
        value = compute()
    except Exception as failure:
        error = failure
    raise_on_all_ranks(trainer, error)
    return value


def gather_texts(trainer: "pl.Trainer", text: str) -> list[str]:
    """A text of every rank, in the order of the ranks."""
    if trainer.world_size == 1:
        return [text]
    parts = gather(trainer, torch.tensor([0, *text.encode()], dtype=torch.uint8))
    return [bytes(part[1:].tolist()).decode() for part in parts]


def names_on_all_ranks(trainer: "pl.Trainer", names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The names that every rank has, in one order for all of them, and those that only some ranks have."""
    if trainer.world_size == 1:
        return list(names), []
    lists = [text.split("\n") if text else [] for text in gather_texts(trainer, "\n".join(names))]
    every = dict.fromkeys(name for found in lists for name in found)
    common = [name for name in every if all(name in found for found in lists)]
    return common, [name for name in every if name not in common]


def over_ranks(trainer: "pl.Trainer", value: int, reduce_op: Literal["sum", "max"]) -> int:
    """The sum or the maximum of an integer over all ranks."""
    return value if trainer.world_size == 1 else int(reduced(trainer, torch.tensor(value), reduce_op))


def reduced(trainer: "pl.Trainer", tensor: Tensor, reduce_op: Literal["sum", "max", "mean"]) -> Tensor:
    """The sum, maximum or mean of a tensor over all ranks, as a new tensor on the device of the strategy."""
    # A copy, because the reduction works in place.
    copy = tensor.to(trainer.strategy.root_device, copy=True)
    result: Tensor = trainer.strategy.reduce(copy, reduce_op=reduce_op)
    return result


def gather(trainer: "pl.Trainer", tensor: Tensor) -> list[Tensor]:
    """The tensors of all ranks on the CPU, in the order of the ranks; their shapes may differ."""
    if trainer.world_size == 1:
        return [tensor]
    device = trainer.strategy.root_device
    return [part.cpu() for part in gather_all_tensors(tensor.to(device))]


def stack_padded(parts: Sequence[Tensor]) -> Tensor:
    """Stack tensors with the same number of dimensions but different sizes, padded with zeros at their ends."""
    sizes = [max(part.shape[axis] for part in parts) for axis in range(parts[0].ndim)]

    def padded(part: Tensor) -> Tensor:
        # `pad` takes the last dimension first.
        missing = [(0, size - length) for size, length in zip(sizes, part.shape, strict=True)]
        return pad(part, [amount for pair in reversed(missing) for amount in pair])

    return torch.stack([padded(part) for part in parts])


def gather_padded(state: Tensor, group: Any | None = None) -> list[Tensor]:
    """The `dist_sync_fn` of metrics whose states grow: the state of every rank, tables padded with zeros to one size.

    Numbers and vectors are not padded: vectors are lists of samples, which are concatenated.
    """
    parts = gather_all_tensors(state, group)
    return parts if state.ndim < 2 else list(stack_padded(parts))
