"""How much each unit does for each class: scores of all classes from one forward and one backward pass."""

from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_neuro.paths.gates import GatedModel, still
from lightning_neuro.paths.sites import Layers, path_layers

ABLATIONS = ("zero", "mean")


def attribution_scores(
    model: nn.Module,
    inputs: Any,
    targets: Tensor,
    layers: Layers = None,
    *,
    concepts: Tensor | None = None,
    ablation: str = "zero",
) -> dict[str, Tensor]:
    """What ablating each unit would take from each class's logit, to first order.

    For a unit with activation a, a sample of class y and the logit z_y it is sum over positions of a dz_y/da; the score
    is the mean over the samples of a class, with its sign. One forward and one backward pass give it for all classes:
    the logits of the samples' own classes are summed, and each sample's part of the gradient is its own. The logit and
    not the loss, whose gradient vanishes on samples that the model is sure of.

    The model runs in evaluation mode and is left as it was; the gradients of its parameters are not touched. Samples
    with NaN or infinite activations or logits are left out, with a warning.

    Args:
        model: Any model that returns logits, (N, classes), or a mapping or tuple that holds them.
        inputs: What the model takes, for N samples.
        targets: (N,) class labels.
        layers: Which layers; see `path_layers`.
        concepts: (N,) whole numbers, what the samples are grouped by; default: the classes. Negative: in no group.
        ablation: What stands for an ablated unit: `"zero"`, or its `"mean"` over samples and positions, for which the
            score is that of a - mean.

    Returns:
        Layer -> float64 (classes, units); a row of NaN for a class without samples.

    Raises:
        ValueError: If the model returns no logits, a layer does not run, or a target is no class.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
        >>> for layer in (net[0], net[2]):
        ...     _ = nn.init.eye_(layer.weight)
        >>> attribution_scores(net, torch.eye(2), torch.tensor([0, 1]))["1"].tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    check_ablation(ablation)
    groups = targets if concepts is None else concepts
    with still(model):
        gated = GatedModel(model, path_layers(model, layers), model)
        seen = gated.watch(inputs, targets, gradients=ablation == "mean")
        explain_silent(gated)
    num_groups = int(groups.max()) + 1 if concepts is not None else seen.logits.shape[1]
    everything = [*seen.contributions.values(), *seen.features.values()]
    finite = torch.stack([values.isfinite().all(1) for values in everything]).all(0)
    if not finite.all():
        lost = int((~finite).sum())
        rank_zero_warn(f"{lost} of {len(finite)} samples have NaN or infinite activations or logits and are left out.")
    groups = groups.to(finite.device)[finite]
    scores = {}
    for site, contributions in seen.contributions.items():
        sums, counts = group_sums(contributions[finite], groups, num_groups)
        if ablation == "mean":
            mean = seen.features[site][finite].double().mean(0)
            sums = sums - mean * group_sums(seen.gradients[site][finite], groups, num_groups)[0]
        scores[site] = sums / counts[:, None]
    return scores


def group_sums(values: Tensor, groups: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Sum of the rows of each group.

    Args:
        values: (N, units), finite.
        groups: (N,) whole numbers below `num_groups`; negative: in no group.
        num_groups: K.

    Returns:
        float64 (K, units) and the float64 number of rows, (K,).
    """
    # A product and not `index_add`, which sums in any order on a GPU.
    member = (groups.to(values.device)[:, None] == torch.arange(num_groups, device=values.device)).double()
    return member.T @ values.double(), member.sum(0)


def check_ablation(ablation: str) -> None:
    """Refuse an unknown ablation.

    Raises:
        ValueError: Saying which there are.
    """
    if ablation not in ABLATIONS:
        raise ValueError(f"ablation must be 'zero' or 'mean', got {ablation!r}.")


def explain_silent(gated: GatedModel) -> None:
    """Refuse layers that did not run or have no units.

    Raises:
        ValueError: Naming them and saying why.
    """
    why = "the forward pass does not call it"
    if reasons := [f"layer '{name}': {gated.failures.get(name, why)}" for name in gated.silent()]:
        raise ValueError("Paths cannot run through " + "; ".join(reasons) + ".")
