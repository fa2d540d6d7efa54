"""The options of the results files."""

from math import isfinite
from typing import Any

import pytorch_lightning as pl

from lightning_neuro.batches import BatchField, check_field
from lightning_neuro.checks import check_number
from lightning_neuro.compat import Callback


class SaveResults(Callback):
    """Sets how the results of all callbacks of this package are saved; without it, they are saved with the defaults.

    At every evaluation, each callback's full results are written to a file in `<log_dir>/lightning_neuro/`, if a logger
    has a directory. `lightning_neuro.load_run` reads them. List this callback anywhere in the trainer.

    Args:
        max_megabytes: Space that the files of a run may take. If they take more, evaluations are removed such that the
            rest is spread evenly over the training; the first and the last always stay. 0: nothing is saved.
        describe_fn: Where a batch holds a short text for each sample, to be shown where samples cannot be shown as
            images: a key, an index, or a function of the batch that returns a list of strings, such as
            `lambda batch: tokenizer.batch_decode(batch["input_ids"])`. Texts are cut after 200 characters.

    Raises:
        ArgumentError: If an argument is invalid.

    Example:
        >>> from lightning_neuro import NeuronCommunities
        >>> callbacks = [NeuronCommunities(), SaveResults(max_megabytes=200)]
    """

    def __init__(self, max_megabytes: float = 50, *, describe_fn: BatchField | None = None) -> None:
        check_number("max_megabytes", max_megabytes, "be at least 0 and finite", lambda x: x >= 0 and isfinite(x))
        check_field("describe_fn", describe_fn)
        self.max_megabytes = max_megabytes
        self.describe_fn: Any = describe_fn


def options_of(trainer: "pl.Trainer") -> SaveResults:
    """The options in a trainer's callbacks, or the defaults."""
    given = (one for one in trainer.callbacks if isinstance(one, SaveResults))  # type: ignore[attr-defined]
    return next(given, SaveResults())
