"""Mode "pfahler2021": the scores of Pfahler and Morik, from the whole change of the weights in each step.

For an input of the layer in the final network, h, the change of the layer's weights in step t, D_t = W_t - W_{t-1},
gives c_t = D_t h, and all steps together the refinement p = W_T h - W_0 h = sum_t c_t, under any optimiser. A step's
score is its cosine with p, cos_t = <c_t, p> / (|p| |c_t|), or its share of p's length, |c_t| cos_t; it is given to all
training samples, or the class, of the step's batch. So it is a score of single samples only where a batch holds one
sample, and of classes only where it holds one class: `ClassBatchSampler` makes such batches. Every D_t is kept, so this
is for small runs; the ledgers and the scores of single samples need neither.

Source: L. Pfahler, K. Morik, *Explaining Deep Learning Representations by Tracing the Training Process*,
arXiv 2109.05880 (2021). `form="projection"` is the authors' form of 2022. Ours: the bias counts, as a weight on a
constant input of 1, so that W_T h is the layer's whole output.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from lightning_neuro.refinement.batch import TrainBatch
from lightning_neuro.refinement.influence import Influence, strongest

FORMS = ("cosine", "projection")
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_EPSILON = 1e-14

Parameters = list[Tensor]


@dataclass(frozen=True, eq=False)
class StepScore:
    """What each of T steps did to the layer's output for Q inputs; float64, on the CPU.

    Attributes:
        cosine: (T, Q), <c_t, p> / (|p| |c_t| + 1e-14), in -1 ... 1.
        norm: (T, Q), |c_t|, in units of the layer's output.
        length: (Q,), |p|. The projections norm x cosine of an input's steps sum to it.
    """

    cosine: Tensor
    norm: Tensor
    length: Tensor

    @property
    def projection(self) -> Tensor:
        """(T, Q), <c_t, p> / |p|: each step's share of |p|."""
        return self.norm * self.cosine


def step_score(changes: Tensor) -> StepScore:
    """The scores of the steps from what each made of the output.

    Args:
        changes: c_t, (T, Q, ...), floating.

    Returns:
        Cosine, norm and the length of the whole.

    Raises:
        ValueError: If the shape is another.

    Example:
        >>> import torch
        >>> score = step_score(torch.tensor([[[3.0, 0.0]], [[0.0, 4.0]]]))
        >>> score.length.tolist(), [round(part, 6) for part in score.projection.flatten().tolist()]
        ([5.0], [1.8, 3.2])
    """
    if changes.ndim < 3 or not changes.is_floating_point():
        raise ValueError(f"changes must be a floating (T, Q, ...) tensor; got {changes.dtype} {tuple(changes.shape)}.")
    c = changes.cpu().double().flatten(2)
    p = c.sum(0)
    norm, length = c.norm(dim=2), p.norm(dim=1)
    return StepScore(cosine=(c * p).sum(2) / (length * norm + _EPSILON), norm=norm, length=length)


class StepScores:
    """Records a layer's weights after each step, and who was in the batch; scores inputs at the end.

    Memory: one copy of the layer's weights a step, on the CPU.

    Args:
        module: `nn.Linear`, `nn.Conv1d`, `Conv2d` or `Conv3d`, before training.
        steps: How many steps will be recorded, for the check of the memory.
        memory_limit: Bytes that the records may take.

    Raises:
        ValueError: If the layer is of another type or the records would not fit.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> recorder = StepScores(layer, steps=1)
        >>> with torch.no_grad():
        ...     layer.weight += torch.tensor([[1.0, 0.0]])
        >>> recorder.record(ids=torch.tensor([7]), classes=torch.tensor([2]))
        >>> recorder.scores(torch.tensor([[3.0, 5.0]])).projection.round().tolist()
        [[3.0]]
    """

    def __init__(self, module: nn.Module, steps: int, *, memory_limit: int = 10**9) -> None:
        if not isinstance(module, _LAYERS):
            raise ValueError(f"module must be nn.Linear, nn.Conv1d, Conv2d or Conv3d; got {type(module).__name__}.")
        size = steps * sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
        if size > memory_limit:
            raise ValueError(
                f"{steps:,} steps of {module} take {size:,} bytes, more than memory_limit={memory_limit:,}. Record a"
                " smaller layer or fewer steps, raise the limit, or use the ledgers, which need no record of the steps."
            )
        self.module, self.steps = module, steps
        self._before = self._weights()
        self._changes: list[Parameters] = []
        self._ids: list[Tensor] = []
        self._classes: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._changes)

    def record(self, ids: Tensor, classes: Tensor) -> None:
        """Take in one optimiser step, after it.

        Args:
            ids: (B,) the batch's samples, ghosts left out.
            classes: (B,) their classes.

        Raises:
            ValueError: If more steps are recorded than were announced.
        """
        if len(self) >= self.steps:
            raise ValueError(f"{self.steps} steps were announced and are recorded; this is one more.")
        after = self._weights()
        self._changes.append([new - old for new, old in zip(after, self._before, strict=True)])
        self._before = after
        self._ids.append(ids.to("cpu", torch.int64, copy=True))
        self._classes.append(classes.to("cpu", torch.int64, copy=True))

    def scores(self, inputs: Tensor) -> StepScore:
        """The scores of all steps for Q inputs of the layer, (Q, ...), taken in the final network, eval mode."""
        return step_score(self._outputs(inputs))

    def influence(self, inputs: Tensor, top_k: int = 10, *, form: str = "projection") -> Influence:
        """The strongest training samples, each with the sum of the scores of the steps whose batch held it.

        Args:
            inputs: As for `scores`.
            top_k: How many for each input.
            form: "cosine": sums of max(cos, 0) (2021), or "projection": sums of |c_t| cos (2022).

        Raises:
            ValueError: If the form is another or nothing is recorded.
        """
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}; got {form!r}.")
        score = self.scores(inputs)
        by_step = score.cosine.clamp(min=0) if form == "cosine" else score.projection
        members, place = torch.unique(torch.cat(self._ids), return_inverse=True)
        step = torch.repeat_interleave(torch.tensor([len(ids) for ids in self._ids]))
        summed = torch.zeros(len(members), by_step.shape[1], dtype=torch.float64).index_add_(0, place, by_step[step])
        classes = torch.full_like(members, -1).index_copy_(0, place, torch.cat(self._classes))
        return strongest(summed, members, classes, top_k=top_k, direction="refinement")

    def by_class(self, inputs: Tensor) -> list[dict[int, Tensor]]:
        """The data of the paper's ridge plot, for each of Q inputs: class -> (steps, 2) pairs (cosine, norm).

        Raises:
            ValueError: If a batch held more than one class.
        """
        mixed = [number for number, classes in enumerate(self._classes) if len(set(classes.tolist())) != 1]
        if mixed:
            raise ValueError(
                f"{len(mixed)} of {len(self)} steps had samples of several classes (first: step {mixed[0]}), so that"
                " their scores are no class's. Train with the batches of `ClassBatchSampler`."
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
            raise ValueError("no step is recorded.")
        inputs = inputs.detach().cpu().double()
        changes = [[part.double() for part in parts] for parts in self._changes]
        return torch.stack([_forward(self.module, inputs, parts[0], (*parts, None)[1]) for parts in changes])

    def _weights(self) -> Parameters:
        weights = (self.module.weight, self.module.bias)
        return [weight.detach().to("cpu", copy=True) for weight in weights if weight is not None]

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {"before": self._before, "changes": [*self._changes], "ids": [*self._ids], "classes": [*self._classes]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state."""
        self._before, self._changes = list(state["before"]), list(state["changes"])
        self._ids, self._classes = list(state["ids"]), list(state["classes"])


class StepWatch:
    """Has each optimiser step recorded; an `Observer` of training steps.

    Args:
        scores: Layer -> its record.
    """

    def __init__(self, scores: Mapping[str, StepScores]) -> None:
        self.scores = dict(scores)
        self._pending: dict[str, list[TrainBatch]] = {}

    def see(self, layer: str, module: nn.Module, inputs: Tensor, gradients: Tensor, batch: TrainBatch) -> None:
        """Note whose samples the coming step is of."""
        batches = self._pending.setdefault(layer, [])
        if batch not in batches:
            batches.append(batch)

    def commit(self, layer: str, rate: Tensor) -> None:
        """Record the step; samples without an id or a class count as -1."""
        batches = self._pending.pop(layer, [])
        known = [tensor for batch in batches for tensor in (batch.ids, batch.targets) if tensor is not None]
        if layer in self.scores and known:
            ids, classes = (
                torch.cat([_or_none(getattr(batch, name), batch) for batch in batches]) for name in ("ids", "targets")
            )
            self.scores[layer].record(ids, classes)

    def drop(self, layer: str) -> None:
        """Forget what was noted."""
        self._pending.pop(layer, None)


def _or_none(values: Tensor | None, batch: TrainBatch) -> Tensor:
    if values is not None:
        return values
    other = batch.targets if batch.ids is None else batch.ids
    assert other is not None
    return torch.full_like(other, -1)


class ClassBatchSampler(Sampler[list[int]]):
    """Batches of one class each, as the paper trains: pass it as `DataLoader(batch_sampler=...)`.

    A network with BatchNorm cannot be trained so: every batch would be normalised to itself, classes and all. The paper
    adds ghosts: `ghosts` samples of all classes at the end of each batch, whose only use is BatchNorm's statistics.
    Leave them out of the loss, and of what is recorded: `logits[:-ghosts]`, `targets[:-ghosts]`. (On CIFAR-10 the paper
    takes 88 samples and 40 ghosts.)

    Args:
        labels: The class of each sample of the dataset.
        batch_size: Samples of the class in a batch; the last batches of the classes may be smaller.
        ghosts: Samples of all classes that are added to each batch.
        seed: Of the order, which changes from epoch to epoch. The global generators are left alone.
        drop_last: Whether to leave out batches that are not full.

    Raises:
        ValueError: If a size is not possible.

    Example:
        >>> list(ClassBatchSampler([0, 1, 0, 1, 1], batch_size=2, seed=1))
        [[4, 3], [1], [0, 2]]
    """

    def __init__(
        self,
        labels: Tensor | Sequence[int],
        batch_size: int,
        *,
        ghosts: int = 0,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        self.labels = torch.as_tensor(labels)
        if self.labels.ndim != 1 or not len(self.labels) or self.labels.is_floating_point():
            raise ValueError(f"labels must be one whole number per sample; got {tuple(self.labels.shape)}.")
        if batch_size < 1 or not 0 <= ghosts <= len(self.labels):
            raise ValueError(
                f"batch_size must be at least 1 and ghosts between 0 and the {len(self.labels)} samples; got"
                f" {batch_size} and {ghosts}."
            )
        self.batch_size, self.ghosts, self.seed, self.drop_last = batch_size, ghosts, seed, drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order. Epochs follow each other by themselves; call this after a resume."""
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
            ghosts = torch.randperm(len(self.labels), generator=generator)[: self.ghosts]
            yield torch.cat([batches[number], ghosts]).tolist()

    def __len__(self) -> int:
        counts = torch.unique(self.labels, return_counts=True)[1].tolist()
        return sum(count // self.batch_size if self.drop_last else -(-count // self.batch_size) for count in counts)


def _forward(module: nn.Module, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's own forward pass with other weights: any padding and stride, and no hooks."""
    if isinstance(module, nn.Linear):
        return nn.functional.linear(inputs, weight, bias)
    output: Tensor = module._conv_forward(inputs, weight, bias)  # type: ignore[operator]
    return output
