"""Are paths a guide before pruning or fine-tuning? Compared with the usual criteria and with class-mean activations."""

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from uses_setup import LAYERS, activations, images_of, print_table, train, trained

from lightning_neuro.paths import attribution_scores, concept_paths, evaluate_paths, path_similarity
from lightning_neuro.paths.similarity import cosine
from lightning_neuro.stats import spearman

DENSITIES = (0.3, 0.1, 0.05)
Masks = Mapping[str, Tensor]  # layer -> (units,), True for units that are kept


@contextmanager
def pruned(net: nn.Module, kept: Masks) -> Iterator[None]:
    """Set the other units to zero in every forward pass."""

    def hook(mask: Tensor):
        return lambda _module, _inputs, output: output * mask.reshape(1, -1, *[1] * (output.ndim - 2)).to(output)

    handles = [net.get_submodule(layer).register_forward_hook(hook(mask)) for layer, mask in kept.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def class_accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """(10,) accuracy of each class."""
    correct = (net(images).argmax(1) == labels).double()
    return torch.stack([correct[labels == label].mean() for label in range(10)])


def taylor(net: nn.Module, images: Tensor, labels: Tensor, layers: tuple[str, ...]) -> dict[str, Tensor]:
    """Mean over samples of |sum over positions of a dloss/da|: the criterion of Molchanov et al. (2017)."""
    outputs: dict[str, Tensor] = {}

    def keep(layer: str):
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            output.retain_grad()
            outputs[layer] = output

        return hook

    handles = [net.get_submodule(layer).register_forward_hook(keep(layer)) for layer in layers]
    cross_entropy(net(images), labels, reduction="sum").backward()
    for handle in handles:
        handle.remove()
    net.zero_grad()
    products = {layer: (output * output.grad).detach() for layer, output in outputs.items()}
    return {layer: (p.flatten(2).sum(2) if p.ndim == 4 else p).abs().mean(0) for layer, p in products.items()}


def criteria(net: nn.Module, images: Tensor, labels: Tensor, scores: Masks, seed: int) -> dict[str, dict[str, Tensor]]:
    """Criterion -> layer -> importance of each unit."""
    layers = tuple(scores)
    generator = torch.Generator().manual_seed(seed)
    modules = dict(net.named_modules())
    means = activations(net, images, layers)[0]
    return {
        "weight norm": {name: modules[str(int(name) - 1)].weight.detach().flatten(1).norm(dim=1) for name in layers},
        "mean activation": {name: means[name].mean(0) for name in layers},
        "Taylor, loss": taylor(net, images, labels, layers),
        "mean score of the classes": {name: scores[name].mean(0) for name in layers},
        "random": {name: torch.rand(scores[name].shape[1], generator=generator) for name in layers},
    }


def keep_most_important(importance: Masks, kept: Masks) -> dict[str, Tensor]:
    """As many units of each layer as `kept` has."""
    found = {}
    for layer, values in importance.items():
        found[layer] = torch.zeros(len(values), dtype=torch.bool)
        found[layer][values.argsort(descending=True)[: int(kept[layer].sum())]] = True
    return found


def pruning(name: str, num_seeds: int, first: int) -> None:
    """Prune what no path holds, and as many units of each layer by other criteria."""
    data = images_of(name)
    rows: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    single: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for seed in range(first, first + num_seeds):
        net, images, labels, held, truth = trained(name, data, seed)
        scores = attribution_scores(net, images, labels, list(LAYERS[name]))
        rivals = criteria(net, images, labels, scores, seed)
        full = class_accuracy(net, held, truth)
        for density in DENSITIES:
            kept = {layer: masks.any(0) for layer, masks in concept_paths(scores, density).items()}
            chosen = {"no path": kept} | {what: keep_most_important(values, kept) for what, values in rivals.items()}
            removed = 1 - float(torch.cat(list(kept.values())).double().mean())
            for what, masks in chosen.items():
                into = rows[f"{density}: {what}"]
                into["removed"].append(removed)
                with pruned(net, masks):
                    now = class_accuracy(net, held, truth)
                into["accuracy lost"].append(float((full - now).mean()))
                into["lost by the worst class"].append(float((full - now).max()))
                with pruned(tuned := copy.deepcopy(net), masks):
                    train(tuned, images, labels, epochs=1, seed=seed)
                    now = class_accuracy(tuned, held, truth)
                into["lost, 1 epoch later"].append(float((full - now).mean()))
                if density == 0.1:
                    for layer, mask in masks.items():
                        with pruned(net, {layer: mask}):
                            lost = float((full - class_accuracy(net, held, truth)).mean())
                        single[what][f"layer {layer}"].append(lost)
                        by_paths = single["no path"][f"layer {layer}"][-1]
                        single[what][f"layer {layer}, more than by paths"].append(lost - by_paths)
        for what in rivals:
            for density in DENSITIES:
                ours, theirs = rows[f"{density}: no path"], rows[f"{density}: {what}"]
                theirs["more than by paths"].append(theirs["accuracy lost"][-1] - ours["accuracy lost"][-1])
        for density in DENSITIES:
            rows[f"{density}: no path"]["more than by paths"].append(0.0)
    print(f"\n{name}: pruning, density of the paths: criterion, {num_seeds} seeds")
    print_table(rows, first="density: criterion")
    print(f"\n{name}: accuracy lost if a single layer is pruned, density .1")
    print_table(single, first="criterion")


def relations(net: nn.Module, images: Tensor, labels: Tensor, scores: Masks) -> dict[str, Tensor]:
    """What may tell which classes belong together: (10, 10) each."""
    means = activations(net, images, tuple(scores))[0]
    features = [torch.stack([values[labels == c].mean(0) for c in range(10)]) for values in means.values()]
    with torch.no_grad():
        probabilities = net(images).softmax(1)
    confused = torch.stack([probabilities[labels == c].mean(0) for c in range(10)])
    return {
        "class means, all layers": torch.stack([cosine(one) for one in features]).mean(0),
        "class means, last layer": cosine(features[-1]),
        "confusion": confused + confused.T,
    }


def lost_by_tuning(net: nn.Module, images: Tensor, labels: Tensor, held: Tensor, truth: Tensor) -> Tensor:
    """(10, 10): accuracy that the column's class loses if the network is trained on the row's class alone.

    Training ends when the others have lost .2 on average, or after 200 steps.
    """
    full, found = class_accuracy(net, held, truth), []
    for label in range(10):
        tuned = copy.deepcopy(net).train()
        optimizer = torch.optim.SGD(tuned.parameters(), 0.01)
        own = images[labels == label][:64]
        for step in range(200):
            optimizer.zero_grad()
            cross_entropy(tuned(own), torch.full((len(own),), label)).backward()
            optimizer.step()
            if step % 5 != 4:
                continue
            lost = full - class_accuracy(tuned, held, truth)
            if float(lost[torch.arange(10) != label].mean()) > 0.2:
                break
        found.append(lost)
    return torch.stack(found)


def interference(name: str, num_seeds: int, first: int) -> None:
    """Do classes with similar paths suffer from the ablation of each other's path, or from fine-tuning?"""
    data = images_of(name)
    rows: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    others = ~torch.eye(10, dtype=torch.bool)
    for seed in range(first, first + num_seeds):
        net, images, labels, held, truth = trained(name, data, seed)
        outcomes, by_paths = {}, {}
        for fill in ("mean", "zero"):  # scores and ablation must match
            scores = attribution_scores(net, images, labels, list(LAYERS[name]), ablation=fill)
            found, outcome = concept_paths(scores), f"path ablated ({fill})"
            outcomes[outcome] = evaluate_paths(net, held, truth, found, ablation=fill).drops
            by_paths[outcome] = torch.stack([path_similarity(masks, masks) for masks in found.values()]).mean(0)
        outcomes["trained on the class alone"] = lost_by_tuning(net, images, labels, held[:1000], truth[:1000])
        by_paths["trained on the class alone"] = by_paths["path ablated (zero)"]
        related = relations(net, images, labels, scores)
        for outcome, lost in outcomes.items():
            for what, similar in ({"paths": by_paths[outcome]} | related).items():
                # Within a row, because classes also differ in how much the others lose without their path.
                by_row = [spearman(similar[c][others[c]][None], lost[c][others[c]][None]).item() for c in range(10)]
                rows[what][outcome].append(float(np.nanmean(by_row)))
        for outcome in outcomes:
            for what in related:
                rows[f"paths minus {what}"][outcome].append(rows["paths"][outcome][-1] - rows[what][outcome][-1])
    print(f"\n{name}: Spearman of the similarity of classes with what the others lose, mean over classes")
    print_table(rows, first="similarity by")


def paths(num_seeds: int, first: int = 0) -> None:
    """Print both comparisons for both networks."""
    for name in ("digits", "fashion"):
        pruning(name, num_seeds, first)
        interference(name, num_seeds, first)
