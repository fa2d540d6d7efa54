"""Which training samples made the representation of an input what it is.

Training sample i, met at step t, changed a linear layer by D_i = -rate d_i a_i^T (its input a_i, the gradient d_i of
its output), and so the layer's output for an input h by c_i = D_i h = -rate d_i <a_i, h>. Its influence is the part of
c_i along a unit direction u: positive where it pushed the output that way. Two directions are of use: the refinement
p = W_T h - W_0 h, all that training made of this output; and a class contrast (e_y - e_k) / sqrt(2) between a class and
its strongest rival. What momentum and adaptive optimisers make of a step later is not followed, and nothing is said of
what would have happened without the sample.

Source: L. Pfahler, K. Morik, *Explaining Deep Learning Representations by Tracing the Training Process*,
arXiv 2109.05880 (2021), for c and p; the single sample's part of a step is this project's own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_neuro.ranks import over_ranks
from lightning_neuro.refinement.batch import TrainBatch
from lightning_neuro.refinement.samples import reduced

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIRECTIONS = ("refinement", "contrast")
_CHUNK_NUMBERS = 2**24


@dataclass(frozen=True, eq=False)
class Influence:
    """The training samples that pushed each of Q inputs most in a direction; tensors on the CPU.

    With a class contrast at the classifier head, samples of the same class are favoured by construction: their share
    among the first is no evidence of anything.

    Attributes:
        sample_ids: (Q, k) int64, the strongest first.
        scores: (Q, k) float64, in units of the layer's output.
        targets: (Q, k) int64, the samples' classes, -1 where unknown.
        total: (Q,) float64, the sum of the scores of all samples.
        num_samples: How many training samples were scored.
        direction: "refinement", "contrast" or "given".
    """

    sample_ids: Tensor
    scores: Tensor
    targets: Tensor
    total: Tensor
    num_samples: int
    direction: str = "refinement"

    def same_class_rate(self, targets: Tensor) -> float:
        """The share of the samples that are of the inputs' own classes, (Q,)."""
        return float((self.targets == targets.cpu()[:, None]).double().mean())

    def plot(self, inputs: Any, images: Any, **options: Any) -> "Figure":
        """A row an input, with its strongest training samples beside it: see `plot_influence`."""
        from lightning_neuro.refinement.sample_plot import plot_influence

        return plot_influence(self, inputs, images, **options)


def influence_scores(
    inputs: Tensor, gradients: Tensor, probe_inputs: Tensor, direction: Tensor, *, bias: bool = False
) -> Tensor:
    """How far each sample's own update, at rate 1, moves the layer's output for each probe input along a direction.

    Args:
        inputs: A linear layer's input for N training samples, (N, in) or (N, ..., in) over positions.
        gradients: The gradient of the loss with respect to its output, laid out the same way.
        probe_inputs: Its input for Q probe samples, (Q, in) or (Q, ..., in).
        direction: Directions in its output for each of them, (Q, out) or (Q, ..., out), as long as they are: unit
            vectors give a length in units of the output.
        bias: Whether the layer has a bias, a weight on a constant input of 1.

    Returns:
        (N, Q), float32 (float64 for float64 inputs): -sum over positions of <d_i, u> <a_i, h>.

    Raises:
        ValueError: If the shapes do not belong together.

    Example:
        >>> import torch
        >>> from lightning_neuro.refinement.influence import influence_scores
        >>> inputs, gradients = torch.tensor([[1.0, 0.0], [2.0, 2.0]]), torch.tensor([[-1.0], [0.5]])
        >>> influence_scores(inputs, gradients, torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0]])).tolist()
        [[3.0], [-4.0]]
    """
    fits = inputs.shape[:-1] == gradients.shape[:-1] and probe_inputs.shape[:-1] == direction.shape[:-1]
    fits = fits and (inputs.shape[-1], gradients.shape[-1]) == (probe_inputs.shape[-1], direction.shape[-1])
    if not fits or inputs.ndim < 2 or probe_inputs.ndim < 2:
        shapes = [tuple(tensor.shape) for tensor in (inputs, gradients, probe_inputs, direction)]
        raise ValueError(
            "inputs, gradients, probe_inputs and direction must be (N, in), (N, out), (Q, in) and (Q, out), or the same"
            f" over positions; got the shapes {', '.join(map(str, shapes))}."
        )
    a, d, h, u = (_positions(tensor) for tensor in (inputs, gradients, probe_inputs, direction))
    per_sample = a.shape[1] * h.shape[0] * h.shape[1]
    chunk = max(1, _CHUNK_NUMBERS // max(1, per_sample))
    parts = zip(torch.split(a, chunk), torch.split(d, chunk), strict=True)
    return torch.cat([_scores(a_part, d_part, h, u, bias) for a_part, d_part in parts])


def output_changes(inputs: Tensor, gradients: Tensor, probe_inputs: Tensor, *, bias: bool = False) -> Tensor:
    """What each sample's own update, at rate 1, makes of the layer's output for each probe input.

    Args:
        inputs: As for `influence_scores`.
        gradients: Likewise.
        probe_inputs: Likewise.
        bias: Likewise.

    Returns:
        (N, Q, ..., out): -sum over positions of d_i <a_i, h>.

    Example:
        >>> import torch
        >>> from lightning_neuro.refinement.influence import output_changes
        >>> output_changes(torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, -1.0]]), torch.tensor([[3.0, 0.0]])).tolist()
        [[[-6.0, 6.0]]]
    """
    a, d, h = (_positions(tensor) for tensor in (inputs, gradients, probe_inputs))
    alike = a @ h.flatten(0, 1).T
    changes = -torch.bmm((alike + 1 if bias else alike).mT, d)
    return changes.view(len(a), *probe_inputs.shape[:-1], d.shape[2])


def _positions(tensor: Tensor) -> Tensor:
    """(N, in) or (N, ..., in) -> (N, positions, in), at least float32."""
    tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return tensor.unsqueeze(1) if tensor.ndim == 2 else tensor.flatten(1, -2)


def _scores(a: Tensor, d: Tensor, h: Tensor, u: Tensor, bias: bool) -> Tensor:
    shape = (*a.shape[:2], *h.shape[:2])
    along = d.flatten(0, 1) @ u.flatten(0, 1).T
    alike = a.flatten(0, 1) @ h.flatten(0, 1).T
    products = along * (alike + 1 if bias else alike)
    return -products.view(shape).sum((1, 3))


def refinement_directions(refinement: Tensor) -> Tensor:
    """Unit vectors along the refinement p of each input, (Q, ..., out); zero where p is."""
    lengths = refinement.flatten(1).norm(dim=1).view(-1, *[1] * (refinement.ndim - 1))
    return refinement / torch.where(lengths > 0, lengths, 1)


def contrast_directions(outputs: Tensor, targets: Tensor | None = None) -> Tensor:
    """Unit vectors from the strongest rival class to each input's class.

    Args:
        outputs: Class scores, (Q, classes).
        targets: (Q,) the class of each; by default the one with the highest score.

    Raises:
        ValueError: If there are not at least two classes, or a target is none of them.

    Example:
        >>> import torch
        >>> from lightning_neuro.refinement.influence import contrast_directions
        >>> (contrast_directions(torch.tensor([[5.0, 1.0, 3.0]])) * 2**0.5).round().tolist()
        [[1.0, 0.0, -1.0]]
    """
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        raise ValueError(f"a contrast needs outputs of shape (Q, classes), classes >= 2; got {tuple(outputs.shape)}.")
    own = outputs.argmax(1) if targets is None else targets.to(outputs.device)
    if targets is not None and not bool(((own >= 0) & (own < outputs.shape[1])).all()):
        raise ValueError(f"targets must be classes 0 ... {outputs.shape[1] - 1}; got {targets.tolist()}.")
    others = outputs.scatter(1, own[:, None], -torch.inf)
    directions = torch.zeros_like(outputs).scatter(1, own[:, None], 1.0)
    return directions.scatter(1, others.argmax(1)[:, None], -1.0) / 2**0.5


def strongest(
    scores: Tensor, sample_ids: Tensor, targets: Tensor, *, top_k: int = 10, direction: str = "refinement"
) -> Influence:
    """The `top_k` highest of (N, Q) scores for each of Q inputs; ids and targets are (N,)."""
    best = scores.topk(min(top_k, len(scores)), dim=0)
    return Influence(
        sample_ids=sample_ids[best.indices].T.cpu(),
        scores=best.values.T.cpu().double(),
        targets=targets[best.indices].T.cpu(),
        total=scores.sum(0).cpu().double(),
        num_samples=len(scores),
        direction=direction,
    )


class LiveInfluence:
    """Influence of each training sample on a few fixed inputs, added up while the network trains.

    It watches training steps of one linear layer as an `Observer`. `refresh` is told the layer's current input h_t for
    the probe samples, every few steps; all that is seen until the next time is scored against it. Before the first
    `refresh` nothing is scored.

    What is added up is the whole c_i, a vector of the layer's outputs, and the direction is chosen when the scores are
    asked for. Along the direction of the moment they would be of little use: it turns far during training (on digits
    the rank correlation with scores along the final direction is .65 to .74, and .98 to .99 this way).

    Args:
        layer: The layer's name.
        module: The `nn.Linear` itself, before training: its weights are where the refinement begins.
        num_samples: Samples in the dataset: ids are 0 ... num_samples - 1. Others are left out.
        direction: "refinement" or "contrast", for `scores` and `top` where they are not told another. Or directions,
            (Q, ..., out), along which alone to add up, where the vectors of a wide layer would take too much memory.

    Raises:
        ValueError: If the layer is not linear or the direction unknown.
    """

    def __init__(
        self, layer: str, module: nn.Module, num_samples: int, *, direction: str | Tensor = "refinement"
    ) -> None:
        check_direction(direction)
        self.layer, self.module, self.num_samples, self.direction = layer, linear(layer, module), num_samples, direction
        self._initial = [parameter.detach().clone() for parameter in self._weights()]
        self._probe: Tensor | None = None
        self._sums: Tensor | None = None
        self._classes = torch.full((num_samples + 1,), -1, dtype=torch.int64)
        self._seen = torch.zeros(num_samples + 1, dtype=torch.bool)
        self._pending: list[tuple[TrainBatch, Tensor]] = []

    def num_bytes(self, num_inputs: int) -> int:
        """Memory on the device for Q inputs at one position each."""
        return (self.num_samples + 1) * (
            8 * num_inputs * (1 if isinstance(self.direction, Tensor) else self.module.out_features) + 9
        )

    def refresh(self, probe_inputs: Tensor) -> None:
        """Score against these inputs of the layer, (Q, in) or (Q, ..., in), from now on."""
        self._probe = probe_inputs.detach().to(self.module.weight, copy=True)

    def see(self, layer: str, module: nn.Module, inputs: Tensor, gradients: Tensor, batch: TrainBatch) -> None:
        """Score the samples, and wait for the step."""
        if layer != self.layer or self._probe is None or batch.ids is None or len(batch.ids) != len(inputs):
            return
        bias = self.module.bias is not None
        if isinstance(self.direction, Tensor):
            moved = influence_scores(inputs, gradients, self._probe, self.direction.to(self._probe), bias=bias)
        else:
            moved = output_changes(inputs, gradients, self._probe, bias=bias).flatten(1)
        self._pending.append((batch, moved))

    def commit(self, layer: str, rate: Tensor) -> None:
        """Add what is pending, times `rate`."""
        if layer != self.layer:
            return
        for batch, moved in self._pending:
            sums = self._table(moved)
            rows = batch.rows(self.num_samples, sums.device)
            values = moved.to(sums.dtype) * rate
            sums.index_add_(0, rows, torch.where(values.isfinite(), values, 0.0))
            self._seen.index_fill_(0, rows, True)
            if batch.targets is not None:
                self._classes.index_copy_(0, rows, batch.targets)
        self._pending = []

    def drop(self, layer: str) -> None:
        """Forget what is pending."""
        self._pending = [] if layer == self.layer else self._pending

    def scores(self, direction: str | Tensor | None = None, *, targets: Tensor | None = None) -> Tensor:
        """The scores so far.

        Args:
            direction: "refinement": along W_t h_t - W_0 h_t with the present weights and the latest inputs; "contrast":
                between each input's class and its strongest rival at present, where the layer is the classifier head;
                or a tensor, (Q, ..., out), taken as long as it is; default: the one given at construction. One that
                was given there as a tensor is the only one there is.
            targets: (Q,) the inputs' classes, for "contrast"; by default those predicted at present.

        Returns:
            (num_samples, Q) float64, 0 for samples not seen; (num_samples, 0) before anything was.

        Raises:
            ValueError: If the direction is unknown or does not belong to the layer.
        """
        direction = self.direction if direction is None or isinstance(self.direction, Tensor) else direction
        check_direction(direction)
        if self._sums is None or self._probe is None:
            return torch.zeros(self.num_samples, 0, dtype=torch.float64)
        if isinstance(self.direction, Tensor):
            return self._sums[:-1]
        with torch.no_grad():
            along = self._along(self._probe, direction, targets).to(self._sums).flatten(1)
        return (self._sums[:-1].view(self.num_samples, *along.shape) * along).sum(2)

    def top(
        self, top_k: int = 10, direction: str | Tensor | None = None, *, targets: Tensor | None = None
    ) -> Influence | None:
        """The strongest of the samples seen so far, as for `scores`; None before there are any."""
        seen = self._seen[:-1].nonzero().flatten()
        if self._sums is None or not len(seen):
            return None
        scores = self.scores(direction, targets=targets)[seen]
        direction = self.direction if direction is None or isinstance(self.direction, Tensor) else direction
        name = direction if isinstance(direction, str) else "given"
        return strongest(scores, seen, self._classes[seen], top_k=top_k, direction=name)

    def over_ranks(self, trainer: "pl.Trainer") -> "LiveInfluence":
        """The scores of all ranks, the same on each; every rank must ask."""
        if trainer.world_size == 1:
            return self
        # A rank that has seen nothing yet must take part all the same, or the others would wait for it for ever.
        width = over_ranks(trainer, 0 if self._sums is None else self._sums.shape[1], "max")
        if not width:
            return self
        sums = torch.zeros(self.num_samples + 1, width, dtype=torch.float64) if self._sums is None else self._sums
        whole = LiveInfluence(self.layer, self.module, self.num_samples, direction=self.direction)
        whole._initial, whole._probe = self._initial, self._probe
        whole._sums, whole._classes = reduced(trainer, sums, "sum"), reduced(trainer, self._classes, "max")
        whole._seen = reduced(trainer, self._seen.long(), "sum") > 0
        return whole

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, on the CPU."""
        tensors = {"classes": self._classes, "seen": self._seen}
        tensors |= {} if self._sums is None else {"sums": self._sums}
        tensors |= {} if self._probe is None else {"probe_inputs": self._probe}
        tensors |= {f"initial{number}": parameter for number, parameter in enumerate(self._initial)}
        return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state.

        Raises:
            ValueError: If it is of another number of samples or another layer.
        """
        initial = [state[f"initial{number}"] for number in range(len(self._initial)) if f"initial{number}" in state]
        same = [part.shape for part in initial] == [part.shape for part in self._initial]
        if not same or len(state["seen"]) != self.num_samples + 1:
            raise ValueError(f"the saved scores are not those of layer '{self.layer}' and {self.num_samples} samples.")
        device = self.module.weight.device
        moved = {name: tensor.to(device, copy=True) for name, tensor in state.items()}
        self._initial = [moved[f"initial{number}"] for number in range(len(initial))]
        self._classes, self._seen, self._sums = moved["classes"], moved["seen"], moved.get("sums")
        self._probe, self._pending = moved.get("probe_inputs"), []

    def _along(self, h: Tensor, direction: str | Tensor, targets: Tensor | None) -> Tensor:
        # Not by the module itself, which others watch.
        outputs = nn.functional.linear(h, *self._weights())
        if isinstance(direction, Tensor):
            if direction.shape != outputs.shape:
                raise ValueError(f"direction must be {tuple(outputs.shape)}; got {tuple(direction.shape)}.")
            return direction
        if direction == "contrast":
            return contrast_directions(outputs, targets)
        initial = [parameter.to(outputs) for parameter in self._initial]
        return refinement_directions(outputs - nn.functional.linear(h, *initial))

    def _weights(self) -> list[Tensor]:
        return [self.module.weight] if self.module.bias is None else [self.module.weight, self.module.bias]

    def _table(self, moved: Tensor) -> Tensor:
        device, number = moved.device, torch.float32 if moved.device.type == "mps" else torch.float64
        if self._sums is None:
            self._sums = torch.zeros(self.num_samples + 1, moved.shape[1], dtype=number, device=device)
        if self._classes.device != device or self._sums.device != device:
            self._sums = self._sums.to(device, number)
            self._classes, self._seen = self._classes.to(device), self._seen.to(device)
        return self._sums


def linear(layer: str, module: nn.Module) -> nn.Linear:
    """The layer, if its samples' updates are d a^T.

    Raises:
        ValueError: If they are not.
    """
    if not isinstance(module, nn.Linear):
        raise ValueError(
            f"influence is for linear layers; '{layer}' is a {type(module).__name__}. Name a linear layer, such as the"
            " classifier head."
        )
    return module


def check_direction(direction: Any) -> None:
    """Refuse what is neither a known direction nor a tensor."""
    if not isinstance(direction, Tensor) and direction not in DIRECTIONS:
        raise ValueError(f"direction must be 'refinement', 'contrast' or a tensor; got {direction!r}.")
