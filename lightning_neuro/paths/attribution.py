"""How much each unit contributes to each class: scores of all classes from one forward and one backward pass."""

from typing import Any, get_args

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_neuro.checks import check_choice, finite_rows
from lightning_neuro.paths.gates import GatedModel, evaluating
from lightning_neuro.paths.layer_outputs import check_same_length, integer_labels, modules_of
from lightning_neuro.paths.options import Ablation, Layers


def attribution_scores(
    model: nn.Module,
    inputs: Any,
    targets: Tensor,
    layers: Layers = None,
    *,
    concepts: Tensor | None = None,
    ablation: Ablation = "zero",
) -> dict[str, Tensor]:
    """Compute by how much ablating each unit would lower each class's logit, to first order.

    For a unit with activation a, a sample of class y and the logit z_y, a unit's contribution is the sum over positions
    of a dz_y/da; its score for a class is the mean contribution over the samples of the class, with its sign. One
    forward and one backward pass compute it for all classes: the logits of the samples' own classes are summed, and the
    gradient with respect to a sample's activations depends on its own logit only. The logit is used and not the loss,
    whose gradient vanishes on samples that the model classifies with confidence.

    The model runs in evaluation mode and is restored afterwards; the gradients of its parameters are not touched.
    Samples with NaN or infinite activations or logits are left out, with a warning.

    Args:
        model: Any model that returns logits, (N, classes), or a mapping or tuple that holds them.
        inputs: The model's input, for N samples.
        targets: (N,) class labels, integers.
        layers: Names or globs as for `Probe(layers=...)`, modules by name, or None for the default layers. Name
            residual blocks to follow paths through their outputs, such as `"layer?.?"` for torchvision's ResNets.
        concepts: (N,) integers by which the samples are grouped; negative for no group. Default: the classes.
        ablation: What replaces the output of an ablated unit: `"zero"`, or its `"mean"` over samples and positions; in
            that case, a is replaced by a - mean in the score.

    Returns:
        Layer -> float64 (classes, units); a row of NaN for a class without samples.

    Raises:
        ArgumentError: If the model returns no logits, a layer is not called, or a target is not a class of the model.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
        >>> for layer in (net[0], net[2]):
        ...     _ = nn.init.eye_(layer.weight)
        >>> attribution_scores(net, torch.eye(2), torch.tensor([0, 1]))["1"].tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    check_choice("ablation", ablation, get_args(Ablation))
    targets = integer_labels(targets)
    groups = targets if concepts is None else integer_labels(concepts, name="concepts")
    check_same_length(groups, targets)
    with evaluating(model):
        gated = GatedModel(model, modules_of(model, layers))
        seen = gated.attribute(inputs, targets, gradients=ablation == "mean")
        gated.require_all_layers()
    num_groups = int(groups.max()) + 1 if concepts is not None else seen.logits.shape[1]
    everything = [*seen.contributions.values(), *seen.features.values()]
    finite = torch.stack([finite_rows(values) for values in everything]).all(0)
    if not finite.all():
        lost = int((~finite).sum())
        rank_zero_warn(f"{lost} of {len(finite)} samples have NaN or infinite activations or logits and are left out.")
    groups = groups.to(finite.device)[finite]
    scores = {}
    for site, contributions in seen.contributions.items():
        sums, counts = group_sums(contributions[finite], groups, num_groups)
        if ablation == "mean":
            mean = seen.features[site][finite].double().mean(0)
            slopes = group_sums(seen.gradients[site][finite], groups, num_groups)[0]
            sums = sums - summed_over_channels(mean * slopes, sums.shape[1])
        scores[site] = sums / counts[:, None]
    return scores


def group_sums(values: Tensor, groups: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Sum of the rows of each group.

    Args:
        values: (N, units), finite.
        groups: (N,) integers below `num_groups`; negative for no group.
        num_groups: K.

    Returns:
        float64 (K, units) sums, and float64 (K,) numbers of rows.
    """
    # A matrix product, because `index_add` sums in an arbitrary order on a GPU.
    member = membership(groups.to(values.device), num_groups)
    return member.T @ values.double(), member.sum(0)


def summed_over_channels(values: Tensor, num_units: int) -> Tensor:
    """(..., channels) -> (..., units): the sum over the channels of each head; unchanged if the units are channels."""
    return values.reshape(*values.shape[:-1], num_units, -1).sum(-1)


def membership(groups: Tensor, num_groups: int) -> Tensor:
    """float64 (N, K): 1 where the sample of the row is in the group of the column."""
    return (groups[:, None] == torch.arange(num_groups, device=groups.device)).double()
