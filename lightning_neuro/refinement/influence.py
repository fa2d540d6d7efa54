"""Influence: how far each training sample moved the output of a linear layer for an input, along a direction.

Training sample i, met at step t, changed the weights of a linear layer by D_i = -rate d_i a_i^T, where a_i is its
input of the layer and d_i the gradient of its output. So it changed the output for an input h by c_i = D_i h = -rate
d_i <a_i, h>. Its influence is the component of c_i along a unit direction u: positive if it pushed the output that
way (a proponent), negative if it pushed against it (an opponent). Three directions are useful: a class contrast (e_y
- e_k) / sqrt(2) between the predicted class y and its strongest rival k, for the classifier head; the refinement p =
W_T h - W_0 h, which is all that training changed in this output; and what of it sets the input apart, (W_T - W_0) (h
- mean h). The effect of a step on later steps, through momentum or adaptive learning rates, is not included, and
influence does not predict what would have happened without the sample.

Source: L. Pfahler, K. Morik, *Explaining Deep Learning Representations by Tracing the Training Process*,
arXiv 2109.05880 (2021), for c and p. The part of a step that a single sample caused is a contribution of this project.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_neuro.checks import ArgumentError, require
from lightning_neuro.refinement.options import DIRECTIONS, Direction

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CHUNK_NUMBERS = 2**24


@dataclass(frozen=True, eq=False)
class Influence:
    """The training samples that pushed each of Q inputs most in a direction. All tensors are on the CPU.

    With a class contrast at the classifier head, samples of the same class are favoured by construction, so their
    fraction among the strongest samples is not evidence.

    Attributes:
        sample_ids: (Q, k) int64, the strongest first.
        scores: (Q, k) float64, in units of the output of the layer.
        targets: (Q, k) int64, classes of the samples, -1 where unknown.
        opponent_ids: (Q, k) int64, the samples that pushed most against the direction, the strongest first.
        opponent_scores: (Q, k) float64.
        opponent_targets: (Q, k) int64.
        total: (Q,) float64, the sum of the scores of all samples.
        num_samples: Number of training samples that were scored.
        direction: The direction, or "given".
        predictions: (Q,) int64, the predicted class of each input, if the layer is the classifier head.
    """

    sample_ids: Tensor
    scores: Tensor
    targets: Tensor
    opponent_ids: Tensor
    opponent_scores: Tensor
    opponent_targets: Tensor
    total: Tensor
    num_samples: int
    direction: str = "refinement"
    predictions: Tensor | None = None

    def same_class_rate(self, targets: Tensor) -> float:
        """The fraction of the samples that have the class of their input.

        Args:
            targets: (Q,) classes of the inputs.

        Returns:
            A number between 0 and 1.
        """
        return float((self.targets == targets.cpu()[:, None]).double().mean())

    def plot(self, inputs: Any, images: Any, **options: Any) -> "Figure":
        """Draw one row per input, with its strongest training samples next to it; see `plot_influence`."""
        from lightning_neuro.refinement.sample_figures import plot_influence

        return plot_influence(self, inputs, images, **options)


def influence_scores(
    inputs: Tensor, gradients: Tensor, probe_inputs: Tensor, direction: Tensor, *, bias: bool = False
) -> Tensor:
    """How far the update of each sample, at rate 1, moves the output for each probe input along a direction.

    Args:
        inputs: Input of a linear layer for N training samples, (N, in) or (N, ..., in) over positions.
        gradients: Gradient of the loss with respect to its output, in the same layout.
        probe_inputs: Its input for Q probe samples, (Q, in) or (Q, ..., in).
        direction: A direction in the output for each of them, (Q, out) or (Q, ..., out), not normalised: unit vectors
            give scores in units of the output.
        bias: Whether the layer has a bias, which is a weight with a constant input of 1.

    Returns:
        (N, Q), float32 (float64 for float64 inputs): -sum over positions of <d_i, u> <a_i, h>.

    Raises:
        ArgumentError: If the shapes do not fit together.

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
        raise ArgumentError(
            "`inputs`, `gradients`, `probe_inputs` and `direction` must have the shapes (N, in), (N, out), (Q, in) and"
            f" (Q, out), or the same with positions in the middle; got {', '.join(map(str, shapes))}."
        )
    a, d, h, u = (_positions(tensor) for tensor in (inputs, gradients, probe_inputs, direction))
    per_sample = a.shape[1] * h.shape[0] * h.shape[1]
    chunk = max(1, _CHUNK_NUMBERS // max(1, per_sample))
    parts = zip(torch.split(a, chunk), torch.split(d, chunk), strict=True)
    return torch.cat([_scores(a_part, d_part, h, u, bias) for a_part, d_part in parts])


def output_changes(inputs: Tensor, gradients: Tensor, probe_inputs: Tensor, *, bias: bool = False) -> Tensor:
    """How the update of each sample, at rate 1, changes the output of the layer for each probe input.

    Args:
        inputs: As in `influence_scores`.
        gradients: As in `influence_scores`.
        probe_inputs: As in `influence_scores`.
        bias: As in `influence_scores`.

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
    """Unit vectors along the refinement p of each input, (Q, ..., out); 0 where p is 0."""
    lengths = refinement.flatten(1).norm(dim=1).view(-1, *[1] * (refinement.ndim - 1))
    return refinement / torch.where(lengths > 0, lengths, 1)


def contrast_directions(outputs: Tensor, targets: Tensor | None = None) -> Tensor:
    """Unit vectors from the strongest rival class to the class of each input.

    Args:
        outputs: Logits, (Q, classes).
        targets: (Q,) class of each input; default: the predicted class.

    Returns:
        (Q, classes), (e_y - e_k) / sqrt(2) for each input.

    Raises:
        ArgumentError: If there are not at least two classes, or a target is not one of them.

    Example:
        >>> import torch
        >>> from lightning_neuro.refinement.influence import contrast_directions
        >>> (contrast_directions(torch.tensor([[5.0, 1.0, 3.0]])) * 2**0.5).round().tolist()
        [[1.0, 0.0, -1.0]]
    """
    logits = outputs.ndim == 2 and outputs.shape[1] >= 2
    require(logits, "outputs", "be logits of shape (Q, classes) with at least two classes for a contrast", outputs)
    own = outputs.argmax(1) if targets is None else targets.to(outputs.device)
    known = bool(((own >= 0) & (own < outputs.shape[1])).all())
    require(known, "targets", f"be classes from 0 to {outputs.shape[1] - 1}", own.tolist())
    others = outputs.scatter(1, own[:, None], -torch.inf)
    directions = torch.zeros_like(outputs).scatter(1, own[:, None], 1.0)
    return directions.scatter(1, others.argmax(1)[:, None], -1.0) / 2**0.5


def directions(
    inputs: Tensor,
    weights: Sequence[Tensor],
    initial: Sequence[Tensor],
    direction: Direction | Tensor,
    targets: Tensor | None = None,
    centre: Tensor | None = None,
) -> Tensor:
    """The direction in the output of a linear layer along which the influence on each input is measured.

    Args:
        inputs: Inputs of the layer, (Q, ..., in).
        weights: Its weight and, if there is one, its bias.
        initial: The same before training.
        direction: "contrast": from the strongest rival class to the class of the input, for the classifier head;
            "refinement": along W h - W_0 h; "centred": along (W - W_0) (h - centre); or a tensor, (Q, ..., out), which
            is not normalised.
        targets: (Q,) classes of the inputs, for "contrast"; default: the predicted classes.
        centre: (in,) mean input of the layer, for "centred"; default: that of the inputs.

    Returns:
        (Q, ..., out).
    """
    outputs = nn.functional.linear(inputs, *weights)
    if isinstance(direction, Tensor):
        require(direction.shape == outputs.shape, "direction", f"have the shape {tuple(outputs.shape)}", direction)
        return direction
    if direction == "contrast":
        return contrast_directions(outputs, targets)
    before = [part.to(outputs) for part in initial]
    if direction == "centred":
        mean = inputs.flatten(0, -2).mean(0) if centre is None else centre.to(inputs)
        return refinement_directions(nn.functional.linear(inputs - mean, weights[0] - before[0]))
    return refinement_directions(outputs - nn.functional.linear(inputs, *before))


def check_direction(direction: Any) -> None:
    """Require a known direction or a tensor."""
    known = isinstance(direction, Tensor) or direction in DIRECTIONS
    require(known, "direction", "be 'contrast', 'centred', 'refinement' or a tensor", direction)


def direction_name(direction: str | Tensor) -> str:
    """The name of a direction in results."""
    return direction if isinstance(direction, str) else "given"


def strongest(
    scores: Tensor, sample_ids: Tensor, targets: Tensor, *, top_k: int = 10, direction: str = "refinement"
) -> Influence:
    """The `top_k` samples with the highest, and those with the lowest, of (N, Q) scores; ids and targets are (N,)."""
    best = scores.topk(min(top_k, len(scores)), dim=0)
    worst = scores.topk(min(top_k, len(scores)), dim=0, largest=False)
    return Influence(
        sample_ids=sample_ids[best.indices].T.cpu(),
        scores=best.values.T.cpu().double(),
        targets=targets[best.indices].T.cpu(),
        opponent_ids=sample_ids[worst.indices].T.cpu(),
        opponent_scores=worst.values.T.cpu().double(),
        opponent_targets=targets[worst.indices].T.cpu(),
        total=scores.sum(0).cpu().double(),
        num_samples=len(scores),
        direction=direction,
    )
