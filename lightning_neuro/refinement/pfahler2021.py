"""Mode "pfahler2021": the scores of Pfahler and Morik, from the change of all weights in each step.

For an input h of the layer in the final network, the change of the weights in step t, D_t = W_t - W_{t-1}, contributes
c_t = D_t h, and the contributions of all steps sum to the refinement p = W_T h - W_0 h, under any optimizer. The score
of a step is its cosine with p, cos_t = <c_t, p> / (|p| |c_t|), or its part of the length of p, |c_t| cos_t. It is
assigned to all training samples of the batch, or to its class. So it is a score of single samples only if a batch holds
one sample, and of classes only if a batch holds one class: `ClassBatchSampler` makes such batches. Every D_t is kept,
so this mode is for small runs; ledgers and per-sample tables need no D_t.

Source: L. Pfahler, K. Morik, *Explaining Deep Learning Representations by Tracing the Training Process*,
arXiv 2109.05880 (2021). `form="projection"` is the form that the authors used in 2022. In contrast to the paper, the
bias counts as a weight with a constant input of 1, so that W_T h is the whole output of the layer.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from lightning_neuro.checks import ArgumentError, check_choice, check_int, require
from lightning_neuro.refinement.influence import Influence, strongest
from lightning_neuro.refinement.layer_gradients import (
    Operator,
    layer_output,
    parameters_of,
    weights_on_cpu,
    why_unsupported,
)
from lightning_neuro.refinement.options import FORMS, Form, parse_bytes
from lightning_neuro.refinement.training_steps import TrainBatch

_EPSILON = 1e-14

Parameters = list[Tensor]


@dataclass(frozen=True, eq=False)
class StepScore:
    """What each of T steps contributed to the output of the layer for Q inputs; float64, on the CPU.

    Attributes:
        cosine: (T, Q), <c_t, p> / (|p| |c_t| + 1e-14), in -1 ... 1.
        norm: (T, Q), |c_t|, in units of the output of the layer.
        length: (Q,), |p|. The projections norm x cosine of all steps sum to it.
    """

    cosine: Tensor
    norm: Tensor
    length: Tensor

    @property
    def projection(self) -> Tensor:
        """(T, Q), <c_t, p> / |p|: the part of |p| that each step contributed."""
        return self.norm * self.cosine


def step_score(changes: Tensor) -> StepScore:
    """The scores of the steps from what each contributed to the output.

    Args:
        changes: c_t, (T, Q, ...), floating.

    Returns:
        Cosine and norm of each step, and the length of the refinement.

    Raises:
        ArgumentError: If the tensor has another shape or is not floating.

    Example:
        >>> import torch
        >>> score = step_score(torch.tensor([[[3.0, 0.0]], [[0.0, 4.0]]]))
        >>> score.length.tolist(), [round(part, 6) for part in score.projection.flatten().tolist()]
        ([5.0], [1.8, 3.2])
    """
    require(changes.ndim >= 3 and changes.is_floating_point(), "changes", "be a floating (T, Q, ...) tensor", changes)
    c = changes.cpu().double().flatten(2)
    p = c.sum(0)
    norm, length = c.norm(dim=2), p.norm(dim=1)
    return StepScore(cosine=(c * p).sum(2) / (length * norm + _EPSILON), norm=norm, length=length)


class StepScores:
    """Keeps the change of the weights of a layer in each step and the samples of its batch, and scores inputs later.

    It is a `StepListener` of training steps. Memory: one copy of the weights per step, on the CPU.

    Args:
        module: `nn.Linear`, `nn.Conv1d`, `Conv2d` or `Conv3d`, with its weights before training.
        num_steps: Number of steps that will be recorded; it determines the memory.
        layer: Name of the layer, as `see` is given it.
        memory_limit: What the records may take: bytes, or a size such as "500MB".

    Raises:
        ArgumentError: If the layer is of another type, or the records would take more than `memory_limit`.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> scores = StepScores(layer, num_steps=1)
        >>> with torch.no_grad():
        ...     layer.weight += torch.tensor([[1.0, 0.0]])
        >>> scores.record(ids=torch.tensor([7]), classes=torch.tensor([2]))
        >>> scores.scores(torch.tensor([[3.0, 5.0]])).projection.round().tolist()
        [[3.0]]
    """

    def __init__(self, module: nn.Module, num_steps: int, *, layer: str = "", memory_limit: int | str = "1GB") -> None:
        if reason := why_unsupported(module):
            raise ArgumentError(f"`module` must be nn.Linear, nn.Conv1d, Conv2d or Conv3d; {reason}.")
        check_int("num_steps", num_steps, minimum=1)
        limit = parse_bytes("memory_limit", memory_limit)
        size = num_steps * sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
        if size > limit:
            raise ArgumentError(
                f"`memory_limit` must be at least {size:,} bytes for {num_steps:,} steps of {module}; got {limit:,}."
                " Raise it, use a smaller layer or fewer steps, or use `mode='exact'`, which keeps no steps."
            )
        self.module: Operator = module  # type: ignore[assignment]
        self.num_steps = num_steps
        self.layer = layer
        self._before = weights_on_cpu(module)
        self._changes: list[Parameters] = []
        self._ids: list[Tensor] = []
        self._classes: list[Tensor] = []
        self._pending: list[TrainBatch] = []

    def __len__(self) -> int:
        return len(self._changes)

    def record(self, ids: Tensor, classes: Tensor) -> None:
        """Record the optimizer step that has just been made.

        Args:
            ids: (B,) ids of the samples of the batch, without ghosts.
            classes: (B,) their classes.

        Raises:
            ArgumentError: If there are more steps than `num_steps`.
        """
        if len(self) >= self.num_steps:
            raise ArgumentError(f"`num_steps` must be at least the number of steps; got {self.num_steps} and one more.")
        after = weights_on_cpu(self.module)
        self._changes.append([new - old for new, old in zip(after, self._before, strict=True)])
        self._before = after
        self._ids.append(ids.to("cpu", torch.int64, copy=True))
        self._classes.append(classes.to("cpu", torch.int64, copy=True))

    def see(self, layer: str, module: nn.Module, inputs: Tensor, gradients: Tensor, batch: TrainBatch) -> None:
        """Remember the samples of the coming step."""
        if layer == self.layer and batch not in self._pending:
            self._pending.append(batch)

    def commit(self, layer: str, rate: Tensor) -> None:
        """Record the step. Samples whose id or class is not known are recorded with -1."""
        if layer != self.layer:
            return
        batches = [batch for batch in self._pending if batch.ids is not None or batch.targets is not None]
        self._pending = []
        if batches:
            ids = [_known_or(batch.ids, batch.targets) for batch in batches]
            classes = [_known_or(batch.targets, batch.ids) for batch in batches]
            self.record(torch.cat(ids), torch.cat(classes))

    def drop(self, layer: str) -> None:
        """Discard the samples of the coming step."""
        if layer == self.layer:
            self._pending = []

    def scores(self, inputs: Tensor) -> StepScore:
        """The scores of all steps for Q inputs of the layer, (Q, ...), in the final network in evaluation mode."""
        return step_score(self._outputs(inputs))

    def influence(self, inputs: Tensor, top_k: int = 10, *, form: Form = "projection") -> Influence:
        """The strongest training samples; the score of a sample is the sum over the steps whose batch held it.

        Args:
            inputs: As in `scores`.
            top_k: Number of samples for each input.
            form: "cosine": sums of max(cos_t, 0) (2021), or "projection": sums of |c_t| cos_t (2022).

        Returns:
            The strongest samples, their scores and classes.

        Raises:
            ArgumentError: If the form is unknown, or no step is recorded.
        """
        check_choice("form", form, FORMS)
        score = self.scores(inputs)
        by_step = score.cosine.clamp(min=0) if form == "cosine" else score.projection
        members, place = torch.unique(torch.cat(self._ids), return_inverse=True)
        step = torch.repeat_interleave(torch.tensor([len(ids) for ids in self._ids]))
        summed = torch.zeros(len(members), by_step.shape[1], dtype=torch.float64).index_add_(0, place, by_step[step])
        classes = torch.full_like(members, -1).index_copy_(0, place, torch.cat(self._classes))
        return strongest(summed, members, classes, top_k=top_k, direction="refinement")

    def by_class(self, inputs: Tensor) -> list[dict[int, Tensor]]:
        """The data of the ridge plot in the paper.

        Args:
            inputs: As in `scores`.

        Returns:
            For each of Q inputs: class -> (steps, 2), the cosine and norm of each step.

        Raises:
            ArgumentError: If a batch held more than one class.
        """
        mixed = [number for number, classes in enumerate(self._classes) if len(set(classes.tolist())) != 1]
        if mixed:
            raise ArgumentError(
                f"`by_class` must be used with batches of one class each; got several classes in {len(mixed)} of"
                f" {len(self)} steps (first: step {mixed[0]}). Train with the batches of `ClassBatchSampler`."
            )
        score = self.scores(inputs)
        pairs = torch.stack([score.cosine, score.norm], 2)
        own = torch.stack([classes[0] for classes in self._classes])
        return [
            {label: pairs[own == label, q] for label in sorted(set(own.tolist()))} for q in range(len(score.length))
        ]

    def _outputs(self, inputs: Tensor) -> Tensor:
        """c_t of each step, (T, Q, ...)."""
        if not self._changes:
            raise ArgumentError("`inputs` can only be scored once at least one step is recorded; got no step.")
        inputs = inputs.detach().cpu().double()
        names = list(parameters_of(self.module))
        outputs = []
        for change in self._changes:
            parts = dict(zip(names, (part.double() for part in change), strict=True))
            outputs.append(layer_output(self.module, inputs, parts["weight"], parts.get("bias")))
        return torch.stack(outputs)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"before": self._before, "changes": [*self._changes], "ids": [*self._ids], "classes": [*self._classes]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self._before = list(state["before"])
        self._changes = list(state["changes"])
        self._ids = list(state["ids"])
        self._classes = list(state["classes"])


def _known_or(values: Tensor | None, other: Tensor | None) -> Tensor:
    """The values; if they are not known, -1 for each element of `other`."""
    if values is not None:
        return values
    assert other is not None
    return torch.full_like(other, -1)


class ClassBatchSampler(Sampler[list[int]]):
    """Draws batches of one class each, as in the paper: `DataLoader(batch_sampler=ClassBatchSampler(...))`.

    A network with BatchNorm cannot be trained on such batches, because the statistics would be those of one class. The
    paper therefore adds ghosts: samples of all classes at the end of each batch, which are only used for the statistics
    of BatchNorm. Leave them out of the loss and of what is recorded: `logits[:-num_ghosts]`, `targets[:-num_ghosts]`.
    On CIFAR-10 the paper uses 88 samples and 40 ghosts.

    Args:
        labels: (N,) class of each sample of the dataset.
        batch_size: Number of samples of the class in a batch; the last batch of each class may be smaller.
        num_ghosts: Number of samples of all classes that are added to each batch.
        seed: Seed of the order, which changes from epoch to epoch. Global random generators are not used.
        drop_last: Whether to leave out batches that are not full.

    Raises:
        ArgumentError: If the labels are not integers, or an option is out of range.

    Example:
        >>> list(ClassBatchSampler([0, 1, 0, 1, 1], batch_size=2, seed=1))
        [[4, 3], [1], [0, 2]]
    """

    def __init__(
        self,
        labels: Tensor | Sequence[int],
        batch_size: int,
        *,
        num_ghosts: int = 0,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        self.labels = torch.as_tensor(labels)
        integers = self.labels.ndim == 1 and len(self.labels) > 0 and not self.labels.is_floating_point()
        require(integers, "labels", "be one integer for each sample", self.labels)
        check_int("batch_size", batch_size, minimum=1)
        check_int("num_ghosts", num_ghosts, minimum=0)
        require(num_ghosts <= len(self.labels), "num_ghosts", f"be at most {len(self.labels)}", num_ghosts)
        self.batch_size = batch_size
        self.num_ghosts = num_ghosts
        self.seed = seed
        self.drop_last = drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next epoch. It advances by itself; call this only after a resume."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        self.epoch += 1
        order = torch.randperm(len(self.labels), generator=generator)
        batches = [
            batch
            for label in torch.unique(self.labels)
            for batch in torch.split(order[self.labels[order] == label], self.batch_size)
            if len(batch) == self.batch_size or not self.drop_last
        ]
        for number in torch.randperm(len(batches), generator=generator).tolist():
            ghosts = torch.randperm(len(self.labels), generator=generator)[: self.num_ghosts]
            yield torch.cat([batches[number], ghosts]).tolist()

    def __len__(self) -> int:
        counts = torch.unique(self.labels, return_counts=True)[1].tolist()
        return sum(count // self.batch_size if self.drop_last else -(-count // self.batch_size) for count in counts)
