"""Does a small drift of the shape tell that the predictions have settled? Compared with CKA and with the past."""

from collections import defaultdict
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from uses_setup import HELD_OUT, LAYERS, TRAIN, activations, images_of, network, print_table, train

from lightning_neuro.stats import row_ranks
from lightning_neuro.topology import topological_drift

NUM_EPOCHS = {"digits": 40, "fashion": 20}


def cka_distance(a: Tensor, b: Tensor) -> float:
    """1 minus linear centred kernel alignment."""
    a, b = (points.double() - points.double().mean(0) for points in (a, b))
    return 1 - float((a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm()))


def partial(x: list[float], y: list[float]) -> float:
    """Rank correlation of x and y with the epoch's rank taken out by regression, because everything falls with time."""
    ranks = row_ranks(torch.tensor([x, y, list(range(len(x)))], dtype=torch.float64))
    ranks = ranks - ranks.mean(1, keepdim=True)
    time = ranks[2]
    rest = ranks[:2] - (ranks[:2] @ time / (time @ time))[:, None] * time
    return float(rest[0] @ rest[1] / (rest[0].norm() * rest[1].norm()))


def drift(num_seeds: int, first: int = 0) -> None:
    """Print how measures of change since the last epoch go with predictions that change in the next two."""
    for name in ("digits", "fashion"):
        images, labels = images_of(name)
        rows: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for seed in range(first, first + num_seeds):
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
            seen, held = order[: TRAIN[name]], order[TRAIN[name] :][: HELD_OUT[name]]
            torch.manual_seed(seed)
            net, clouds, predictions = network(name), [], []
            for epoch in range(NUM_EPOCHS[name] + 1):
                if epoch:
                    train(net, images[seen], labels[seen], epochs=1, seed=1000 * seed + epoch)
                layers, logits = activations(net, images[held], LAYERS[name])
                clouds.append({layer: points[:256] for layer, points in layers.items()})
                predictions.append(logits.argmax(1))
            steps = range(1, NUM_EPOCHS[name] - 1)
            changed = [float((a != b).double().mean()) for a, b in pairwise(predictions)]
            future = [float((predictions[t] != predictions[t + 2]).double().mean()) for t in steps]
            found = {"predictions changed": [changed[t - 1] for t in steps]}
            for layer in LAYERS[name]:
                pairs = [(clouds[t - 1][layer], clouds[t][layer]) for t in steps]
                found[f"drift, layer {layer}"] = [topological_drift(a, b) for a, b in pairs]
                found[f"1 - CKA, layer {layer}"] = [cka_distance(a, b) for a, b in pairs]
            for what, values in found.items():
                rank = row_ranks(torch.tensor([values, future]))
                rows[what]["rank correlation"].append(float(np.corrcoef(rank.numpy())[0, 1]))
                rows[what]["given the epoch"].append(partial(values, future))
                # A rule that needs no other run: stop when it has fallen to a fifth of its first value.
                at = next((t for t in steps if values[t - 1] < 0.2 * values[0]), steps[-1])
                rows[what]["stops after"].append(at)
                later = (predictions[at] != predictions[-1]).double().mean()
                rows[what]["predictions that still change"].append(float(later))
        print(f"\n{name}: {num_seeds} seeds, {NUM_EPOCHS[name]} epochs")
        print_table(rows, first="change since the last epoch")
