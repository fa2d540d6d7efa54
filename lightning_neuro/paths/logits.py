"""The logits in a model's output, and the check that they are logits."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_neuro.checks import ArgumentError, NothingToDoError, describe


def class_scores(output: Any, num_samples: int, num_classes: int | None = None) -> Tensor:
    """The logits in a model's output: its entry `logits`, else its first tensor.

    A single logit z per sample becomes the two columns -z/2 and z/2, whose softmax is the sigmoid of z.

    Args:
        output: A tensor, or nested containers (tuples, mappings, dataclasses) of tensors.
        num_samples: N.
        num_classes: Number of classes of the labels. A tensor that is not named `logits` must then have as many
            columns, or a few more, because the largest labels may be missing from the samples: at most a tenth, or
            one. Otherwise it is an embedding or a reconstruction. None: every table of numbers is accepted.

    Returns:
        (N, classes), at least two classes.

    Raises:
        ArgumentError: If the output holds no logits; a `NothingToDoError` if `num_classes` is given.
    """
    found, named = _find(output)
    error = ArgumentError if num_classes is None else NothingToDoError
    is_table = found is not None and found.is_floating_point() and found.ndim in (1, 2)
    if found is None or not is_table or found.shape[0] != num_samples or found.numel() == 0:
        raise error(
            f"The model must return logits of shape (N, classes), or (N,) for two classes; for {num_samples} samples it"
            f" returned {describe(output if found is None else found)}."
        )
    scores = found if found.ndim == 2 and found.shape[1] > 1 else _two_columns(found.reshape(num_samples))
    if num_classes is not None and not named and not _may_be_classes(scores.shape[1], num_classes):
        raise error(
            f"The model's output of shape {tuple(found.shape)} is not taken for logits, because the labels have"
            f" {num_classes} classes. If it holds logits, pass `Probe(class_names=...)` with the names of all classes."
        )
    return scores


def require_no_probabilities(logits: Tensor) -> None:
    """Require that the logits of attributes are none of their probabilities, all of which lie above a threshold of 0.

    Raises:
        NothingToDoError: If all of them lie between 0 and 1.
    """
    if bool(((logits >= 0) & (logits <= 1)).all()):
        raise NothingToDoError(
            "The model's output lies between 0 and 1, so it holds probabilities and no logits. Pass"
            " `Probe(forward_fn=lambda module, inputs: torch.logit(module(inputs), eps=1e-6))`."
        )


def decides(logits: Tensor, own: Tensor, *, independent: bool = False) -> Tensor:
    """Whether a network predicts one of some classes: the highest logit is theirs or, of attributes, theirs is above 0.

    Args:
        logits: (N, classes).
        own: bool (N, classes).
        independent: Whether the logits are those of attributes; see `GatedModel`.

    Returns:
        bool (N,).

    Example:
        >>> decides(torch.tensor([[1.0, 2.0]]), torch.tensor([[True, False]])).tolist()
        [False]
        >>> decides(torch.tensor([[1.0, 2.0]]), torch.tensor([[True, False]]), independent=True).tolist()
        [True]
    """
    if independent:
        return ((logits > 0) & own).any(1)
    return own.gather(1, logits.argmax(1)[:, None]).flatten()


def margins(logits: Tensor, own: Tensor, *, independent: bool = False) -> Tensor:
    """By how much some classes are preferred: logsumexp of their logits, minus that of the others for a softmax.

    Args:
        logits: (N, classes).
        own: bool (N, classes).
        independent: Whether the logits are those of attributes; see `GatedModel`.

    Returns:
        (N,).
    """
    inside = logits.masked_fill(~own, float("-inf")).logsumexp(1)
    return inside if independent else inside - logits.masked_fill(own, float("-inf")).logsumexp(1)


def _find(output: Any) -> tuple[Tensor | None, bool]:
    """The tensor that may hold the logits, and whether the output calls it so."""
    if isinstance(output, Tensor):
        return output, False
    parts = _parts(output)
    if isinstance(parts.get("logits"), Tensor):
        return parts["logits"], True
    candidates = (_find(part) for part in parts.values())
    return next((candidate for candidate in candidates if candidate[0] is not None), (None, False))


def _parts(output: Any) -> Mapping[Any, Any]:
    if isinstance(output, Mapping):
        return output
    if is_dataclass(output) and not isinstance(output, type):
        return {field.name: getattr(output, field.name) for field in fields(output)}
    if isinstance(output, (tuple, list)):
        return dict(zip(getattr(output, "_fields", range(len(output))), output, strict=True))
    return {}


def _two_columns(logit: Tensor) -> Tensor:
    return torch.stack([-logit / 2, logit / 2], dim=1)


def _may_be_classes(columns: int, num_classes: int) -> bool:
    return 0 <= columns - num_classes <= max(1, columns // 10)
