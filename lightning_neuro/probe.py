"""Probe: the selection of samples and layers, and the schedule of evaluations."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_neuro.batches import BatchField, check_field
from lightning_neuro.checks import check_choice, check_int, check_patterns, require
from lightning_neuro.units import REDUCTIONS, Reduction


@dataclass(frozen=True, eq=False, repr=False)
class Probe:
    """Selects the samples and the layers that callbacks use, and the schedule of evaluations.

    The samples (the *probe set*) are chosen once and kept in memory on the CPU. On schedule the model runs over them in
    evaluation mode, without gradients or autocast, and its state is restored afterwards. Callbacks with equal probes
    share these forward passes.

    A probe is immutable. Two probes are equal if their arguments are; functions, datasets and loaders are compared by
    identity.

    Args:
        layers: Layer names or globs. A full name matches this layer; any other pattern is compared, segment by segment,
            with the end of the names (`"conv*"`, `"encoder.*.linear1"`). `"attn.heads"` makes the heads of the
            attention layer `attn` the units, and `"heads"` those of all attention layers; the value of a head is the
            norm of its output before the projection. Default: the activation modules or, if there are none, the linear
            and convolution layers without the last; at most eight.
        num_samples: Size of the probe set over all ranks. It is spread evenly over the classes if the dataset has class
            labels; from an `IterableDataset` the first samples are taken.
        source: `"val"` (the validation data, or the training data if there is none), `"train"`, a `Dataset`, a
            `DataLoader` or an iterable of batches. If there are several validation loaders, the first is used.
        every_n_epochs: Evaluate at the end of every n-th epoch.
        every_n_steps: Evaluate after every n-th optimizer step instead; `every_n_epochs` is then ignored.
        reduction: How the positions (pixels, tokens) in a layer's output are reduced: `"mean"`, `"max"`, `"random"`
            (one position per sample, the same throughout the run), `"tokens"` (each position is a sample), `"cls"` (the
            first position), `"flatten"` (each unit at each position is a unit).
        input_fn: Where the model's input is found in a batch: a function of the batch, or the key or index of a field.
            Default: the batch itself, its first element, or an entry of a usual name (`"image"`, `"x"`, ...).
        target_fn: Where the target is found in a batch, in the same form. Default: the second element, or a field of a
            usual name (`"label"`, `"y"`, ...).
        mask_fn: Where the padding mask is found in a batch, in the same form: bool (N, positions), True where there is
            data. Padding is left out of all reductions. Default: a mask of a usual name in the batch
            (`"attention_mask"`, ...), or the one that attention layers of `torch.nn` are called with.
        forward_fn: Runs the model: `forward_fn(pl_module, inputs)`. Default: `pl_module(inputs)`.
        classes: Labels of the classes of which the probe set is to hold samples, and of which class-based measures
            speak; samples of other classes fill the rest of the set. Default: all classes or, if there are more than
            the set can hold 16 samples each of (32 with 512 samples), so many of them, drawn by the seed.
        class_names: Names of the classes, in the order of their labels, for figures, tables and messages. Default: the
            dataset's `classes`, or the datamodule's `class_names` or `classes`, if they exist.
        seed: Seed for the choice of samples and positions.

    Raises:
        ArgumentError: If an argument is invalid, at construction. For a pattern that matches no layer, an empty source
            or a batch in which the input cannot be found, before the first training step.

    Example:
        >>> probe = Probe(layers=["conv*", "fc1"], num_samples=256, every_n_epochs=2)
        >>> probe
        Probe(layers=('conv*', 'fc1'), num_samples=256, every_n_epochs=2)
        >>> probe == Probe(("conv*", "fc1"), num_samples=256, every_n_epochs=2)
        True
    """

    layers: str | Sequence[str] | None = None
    _: KW_ONLY
    num_samples: int = 512
    source: str | Dataset[Any] | DataLoader[Any] | Iterable[Any] = "val"
    every_n_epochs: int = 1
    every_n_steps: int | None = None
    reduction: Reduction = "mean"
    input_fn: BatchField | None = None
    target_fn: BatchField | None = None
    mask_fn: BatchField | None = None
    forward_fn: Callable[[Any, Any], Any] | None = None
    classes: Sequence[int] | None = None
    class_names: Sequence[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", check_patterns("layers", self.layers))
        check_int("num_samples", self.num_samples, minimum=1)
        check_int("every_n_epochs", self.every_n_epochs, minimum=1)
        if self.every_n_steps is not None:
            check_int("every_n_steps", self.every_n_steps, minimum=1)
        check_choice("reduction", self.reduction, REDUCTIONS)
        check_field("input_fn", self.input_fn)
        check_field("target_fn", self.target_fn)
        check_field("mask_fn", self.mask_fn)
        require(self.forward_fn is None or callable(self.forward_fn), "forward_fn", "be a function", self.forward_fn)
        check_int("seed", self.seed)
        known = self.source in ("val", "train") if isinstance(self.source, str) else not isinstance(self.source, Tensor)
        known = known and isinstance(self.source, (Dataset, Iterable))
        require(known, "source", "be 'val', 'train', a Dataset, a DataLoader or an iterable of batches", self.source)
        if self.classes is not None:
            labels = self.classes if isinstance(self.classes, Sequence) else ()
            valid = len(set(labels)) >= 2 and all(type(label) is int and label >= 0 for label in labels)
            require(valid, "classes", "be a sequence of at least two labels, which are not negative", self.classes)
            object.__setattr__(self, "classes", tuple(self.classes))
        if self.class_names is not None:
            named = not isinstance(self.class_names, str) and isinstance(self.class_names, Sequence)
            named = named and all(isinstance(name, str) for name in self.class_names)
            require(named, "class_names", "be a sequence of strings", self.class_names)
            object.__setattr__(self, "class_names", tuple(self.class_names))

    def __repr__(self) -> str:
        given = ((field.name, getattr(self, field.name), field.default) for field in fields(self))
        return f"Probe({', '.join(f'{name}={value!r}' for name, value, default in given if not _same(value, default))})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Probe) and all(
            _same(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)
        )

    def __hash__(self) -> int:
        return hash((self.layers, self.num_samples, self.every_n_epochs, self.every_n_steps, self.reduction, self.seed))

    def due_at_epoch(self, epoch: int) -> bool:
        """Whether to evaluate at the end of this epoch, counted from 0."""
        return self.every_n_steps is None and (epoch + 1) % self.every_n_epochs == 0

    def due_at_step(self, global_step: int, last_step: int) -> bool:
        """Whether to evaluate after `global_step` optimizer steps, if the last evaluation was after `last_step`."""
        return self.every_n_steps is not None and interval_passed(self.every_n_steps, global_step, last_step)


def _same(one: object, other: object) -> bool:
    # Compared by identity if an argument is not a plain value, because comparing datasets could load or broadcast them.
    plain = isinstance(one, (str, int, tuple)) and isinstance(other, (str, int, tuple))
    return one is other or (plain and one == other)


def interval_passed(every_n_steps: int, global_step: int, last_step: int) -> bool:
    """Whether a multiple of `every_n_steps` lies after `last_step` and not after `global_step`.

    The remainder is not used, because with several optimizers the count rises by more than one at a time.
    """
    return global_step // every_n_steps > max(last_step, 0) // every_n_steps
