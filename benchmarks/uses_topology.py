"""Does the shape of a layer show a class that is really two? Two classes are merged under one label, and sought.

The rule was chosen with the seeds from 100 on and is reported for others. Each seed draws its own pair of classes.
"""

import itertools
import warnings
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor
from uses_setup import EPOCHS, HELD_OUT, LAYERS, TRAIN, activations, images_of, network, print_table, train

from lightning_neuro.topology import ClassSplit, class_splits, compute_mapper

CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
Guess = tuple[float, np.ndarray]  # how clearly a class splits, and the group of each of its samples


def merged_classes(name: str, data: tuple[Tensor, Tensor], seed: int, part: float) -> tuple[Any, ...]:
    """Train with class b under the label of class a, with a `part` of the samples of b.

    Returns:
        Activations of held-out samples, their labels, whether they are of class b, the label of a and b, and whether
        they are classified correctly.
    """
    images, labels = data
    rng = np.random.default_rng(seed)
    a, b = rng.choice(10, 2, replace=False).tolist()
    kept = (labels != b) | torch.from_numpy(rng.random(len(labels)) < part)
    order = torch.from_numpy(rng.permutation(torch.nonzero(kept).flatten().numpy()))
    # If b is rare, most of the digits are needed to look at, or it would have fewer samples than a group needs.
    count = TRAIN[name] if part == 1 or name != "digits" else TRAIN[name] // 2
    seen, held = order[:count], order[count:][: HELD_OUT[name] * (2 if part < 1 else 1)]
    given = torch.where(labels == b, a, labels)
    given = torch.where(given > b, given - 1, given)  # labels 0 to 8
    torch.manual_seed(seed)
    net = train(network(name, 9), images[seen], given[seen], epochs=EPOCHS[name], seed=seed)
    layers, logits = activations(net, images[held], LAYERS[name])
    hidden = (labels[held] == b).numpy()
    return layers, given[held], hidden, int(given[labels == b][0]), (logits.argmax(1) == given[held]).numpy()


def two_means(points: np.ndarray) -> np.ndarray:
    """The two groups of k-means."""
    from sklearn.cluster import KMeans

    return KMeans(2, n_init=5, random_state=0).fit_predict(points)


def rivals(points: np.ndarray) -> dict[str, Guess]:
    """What a user would try without this package, for one class."""
    from sklearn.cluster import HDBSCAN
    from sklearn.decomposition import PCA
    from sklearn.metrics import silhouette_score
    from sklearn.mixture import GaussianMixture

    groups = two_means(points)
    found = {"2-means, silhouette": (float(silhouette_score(points, groups)), groups)}
    few = PCA(5, random_state=0).fit_transform(points)
    one, two = (GaussianMixture(k, n_init=3, random_state=0).fit(few) for k in (1, 2))
    found["2 Gaussians of 5 components, BIC"] = ((one.bic(few) - two.bic(few)) / len(few), two.predict(few))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dense = HDBSCAN(min_cluster_size=10).fit_predict(points)
    sizes = np.sort(np.bincount(dense[dense >= 0], minlength=2))[::-1]
    return found | {"HDBSCAN, second cluster": (sizes[1] / len(points), dense)}


def by_graph_of_all(points: Tensor, labels: Tensor) -> dict[int, Guess]:
    """The second largest component, in the graph of all samples, of the nodes in which a class is the majority."""
    import networkx as nx

    graph = compute_mapper(points, targets=labels)
    found = {}
    assert graph.class_shares is not None and graph.class_counts is not None
    for column, label in enumerate(graph.classes.tolist()):
        large = (graph.class_shares[:, column] >= 0.5) & (graph.class_counts[:, column] >= 10)
        nodes = graph.to_networkx().subgraph(torch.nonzero(large).flatten().tolist())
        own = torch.nonzero(labels == label).flatten().numpy()
        parts = [
            np.unique(np.concatenate([graph.members[n].numpy() for n in c])) for c in nx.connected_components(nodes)
        ]
        parts = sorted((np.isin(own, part) for part in parts), key=np.sum, reverse=True)
        groups = np.full(len(own), -1)
        for number, part in enumerate(parts):
            groups[part] = number
        found[label] = (float(parts[1].mean()) if len(parts) > 1 else 0.0, groups)
    return found


def guesses(points: Tensor, labels: Tensor) -> tuple[dict[str, dict[int, Guess]], dict[int, bool]]:
    """Method -> class -> guess; and the classes whose second group is above its null."""
    found: dict[str, dict[int, Guess]] = defaultdict(dict)
    above = {}
    for split in class_splits(points, labels):
        own = torch.nonzero(labels == split.label).flatten()
        groups = np.full(len(own), -1)
        for number, members in enumerate(split.groups):
            groups[torch.isin(own, members).numpy()] = number
        found["class_splits"][split.label] = (split.second_share, groups)
        above[split.label] = split.second_share > split.second_share_null
        for method, guess in rivals(points[own].double().numpy()).items():
            found[method][split.label] = guess
    found["graph of all samples"] = by_graph_of_all(points, labels)
    return found, above


def rank(guess: dict[int, Guess], planted: int) -> float:
    """The place of the planted class among all, ties sharing their mean place."""
    scores = {label: score for label, (score, _) in guess.items()}
    higher = sum(score > scores[planted] for score in scores.values())
    return 1 + higher + (sum(score == scores[planted] for score in scores.values()) - 1) / 2


def real_groups(num_seeds: int, first: int) -> None:
    """Do networks trained on other samples from other weights find the same groups in the ten classes as they are?"""
    from sklearn.metrics import adjusted_rand_score

    images, labels = images_of("fashion")
    looked_at, known = images[-2000:], labels[-2000:]
    splits = []
    for seed in range(first, first + num_seeds):
        order = torch.randperm(18_000, generator=torch.Generator().manual_seed(seed))[: TRAIN["fashion"]]
        torch.manual_seed(seed)
        net = train(network("fashion"), images[order], labels[order], epochs=EPOCHS["fashion"], seed=seed)
        points = activations(net, looked_at, ["8"])[0]["8"]
        splits.append({split.label: split for split in class_splits(points, known)})

    def groups(split: ClassSplit) -> np.ndarray:
        found = np.full(len(known), -1)
        for number, members in enumerate(split.groups[:2]):
            found[members.numpy()] = number
        return found

    agreement, common = defaultdict(list), []
    for a, b in itertools.combinations(splits, 2):
        common.append(len(set(list(a)[:3]) & set(list(b)[:3])) / 3)
        for label in a:
            both = np.stack([groups(a[label]), groups(b[label])])
            both = both[:, (both >= 0).all(0)]
            if both.shape[1] >= 20 and min(len(a[label].groups), len(b[label].groups)) > 1:
                agreement[label].append(adjusted_rand_score(*both))
    print(f"\nfashion, ten classes, {num_seeds} networks: common among the first three of two networks")
    print(
        f"{np.mean(common):.2f} (chance .30). Class: how often among the first three, ARI of the groups of two networks"
    )
    for label in range(10):
        often = np.mean([label in list(one)[:3] for one in splits])
        found = agreement[label]
        print(f"{CLASSES[label]}: {often:.2f}, {np.mean(found) if found else np.nan:.2f} ({len(found)} pairs)")


def topology(num_seeds: int, first: int = 0) -> None:
    """Print where each method ranks the planted class, and how well its groups are the hidden classes."""
    from sklearn.metrics import adjusted_rand_score

    for name, part in (("digits", 1.0), ("digits", 1 / 3), ("fashion", 1.0), ("fashion", 0.2)):
        data = images_of(name)
        rows: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        flagged: dict[str, list[float]] = defaultdict(list)
        rng = np.random.default_rng(0)
        for seed in range(first, first + num_seeds):
            layers, labels, hidden, planted, correct = merged_classes(name, data, seed, part)
            own = (labels == planted).numpy()
            for layer in LAYERS[name][-2:]:
                found, above = guesses(layers[layer], labels)
                flagged[f"{layer} planted"].append(above[planted])
                flagged[f"{layer} others"].append(float(np.mean([above[c] for c in above if c != planted])))
                for method, guess in found.items():
                    place, groups = rank(guess, planted), guess[planted][1]
                    into = rows[f"{layer}: {method}"]
                    into["place of 9"].append(place)
                    into["minus class_splits"].append(place - rank(found["class_splits"], planted))
                    into["first"].append(float(place == 1))
                    into["ARI"].append(adjusted_rand_score(hidden[own], groups))
                    into["less than class_splits"].append(rows[f"{layer}: class_splits"]["ARI"][-1] - into["ARI"][-1])
                    into["ARI, permuted"].append(adjusted_rand_score(rng.permutation(hidden[own]), groups))
            flagged["error of hidden class"].append(1 - correct[hidden].mean())
            flagged["error of others under the label"].append(1 - correct[own & ~hidden].mean())
        print(f"\n{name}, hidden class at {part:.2f} of its samples, {num_seeds} seeds")
        print_table(rows, first="layer: method", digits=2)
        print({what: round(float(np.mean(values)), 3) for what, values in flagged.items()})
    real_groups(num_seeds // 2, first)
