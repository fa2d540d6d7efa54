"""Does a community of units serve certain classes? Each group of units is ablated to its mean, held-out samples run."""

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor, nn
from uses_setup import LAYERS, activations, images_of, print_table, trained

from lightning_neuro.communities import NeuronModularity

NUM_RANDOM = 5


@torch.no_grad()
def outcome(net: nn.Module, images: Tensor, labels: Tensor, layer: str, group: Tensor, fill: Tensor) -> Tensor:
    """(2, 10): accuracy, and mean probability of the right class, with the units of the group replaced by `fill`."""

    def hook(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, group] = fill[group].reshape(1, -1, *[1] * (output.ndim - 2)).to(output)
        return output

    handle = net.get_submodule(layer).register_forward_hook(hook)
    logits = net(images)
    handle.remove()
    right = torch.stack([(logits.argmax(1) == labels).double(), logits.softmax(1).double()[range(len(labels)), labels]])
    return torch.stack([right[:, labels == label].mean(1) for label in range(10)], dim=1)


def groupings(values: Tensor, labels: Tensor, seed: int) -> dict[str, list[list[Tensor]]]:
    """Kind -> several partitions of the live units; the communities first, the others with as many groups."""
    from sklearn.cluster import KMeans

    metric = NeuronModularity(num_null_samples=1)
    metric.update(values)
    result = metric.compute()
    units, own = result.units, result.labels
    number = int(own.max()) + 1
    standard = (values - values.mean(0)) / values.std(0).clamp(min=1e-9)
    profile = torch.stack([standard[labels == c].mean(0) for c in range(10)])[:, units].T.numpy()
    by_samples = KMeans(number, n_init=5, random_state=seed).fit_predict(standard[:, units].T.numpy())
    by_profile = KMeans(number, n_init=5, random_state=seed).fit_predict(profile)
    generator = torch.Generator().manual_seed(seed)
    shuffled = [own[torch.randperm(len(own), generator=generator)] for _ in range(NUM_RANDOM)]

    def split(assigned: Tensor) -> list[Tensor]:
        return [units[assigned == group] for group in range(number)]

    return {
        "communities": [split(own)],
        "random, same sizes": [split(assigned) for assigned in shuffled],
        "k-means of the units": [split(torch.from_numpy(by_samples))],
        "k-means of class means": [split(torch.from_numpy(by_profile))],
    }


def concentration(drops: Tensor) -> float:
    """Fraction of what all groups cost that falls on the class hit most by its group; .1 if spread evenly."""
    lost = drops.clamp(min=0)
    return float(lost.max(dim=1).values.sum() / lost.sum()) if lost.sum() > 0 else float("nan")


def measure(
    net: nn.Module, held: Tensor, truth: Tensor, layer: str, values: Tensor, labels: Tensor, groups: list[Tensor]
) -> dict[str, float]:
    """How specific the groups of a partition are."""
    fill, profile = values.mean(0), torch.stack([values[labels == c].mean(0) for c in range(10)])
    full = outcome(net, held, truth, layer, torch.zeros(0, dtype=torch.long), fill)
    drops = torch.stack([full - outcome(net, held, truth, layer, group, fill) for group in groups])
    spread = (profile - profile.mean(0)) / values.std(0).clamp(min=1e-9)
    active = torch.stack([spread[:, group].mean(1) for group in groups])
    return {
        "groups": len(groups),
        "probability lost": float(drops[:, 1].mean()),
        "concentration": concentration(drops[:, 1]),
        "accuracy lost": float(drops[:, 0].mean()),
        "concentration, accuracy": concentration(drops[:, 0]),
        "most active is most hit": float((active.argmax(1) == drops[:, 1].argmax(1)).double().mean()),
    }


def communities(num_seeds: int, first: int = 0) -> None:
    """Print the comparison for every layer of both networks."""
    for name in ("digits", "fashion"):
        data = images_of(name)
        rows: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for seed in range(first, first + num_seeds):
            net, images, labels, held, truth = trained(name, data, seed)
            layers, _ = activations(net, images, LAYERS[name])
            for layer, values in layers.items():
                found = {}
                for kind, partitions in groupings(values, labels, seed).items():
                    each = [measure(net, held, truth, layer, values, labels, groups) for groups in partitions]
                    found[kind] = {what: float(np.nanmean([one[what] for one in each])) for what in each[0]}
                for kind, numbers in found.items():
                    for what, value in numbers.items():
                        rows[f"{layer}: {kind}"][what].append(value)
                    more = found["communities"]["concentration"] - numbers["concentration"]
                    rows[f"{layer}: {kind}"]["communities' concentration minus this"].append(more)
        print(f"\n{name}: {num_seeds} seeds")
        print_table(dict(sorted(rows.items(), key=lambda row: row[0].split(":")[0])), first="layer: groups")
