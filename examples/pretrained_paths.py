"""Concept paths of a trained network, without Lightning.

    python examples/pretrained_paths.py

Trains a small network on scikit-learn's digits for a few seconds, finds the units on which each digit depends,
evaluates the network with only these units and without them, and compares the paths from two halves of the data. It
works in the same way for any torch model that returns logits. Paths run through the activation modules unless `layers`
selects others; in a residual network name the blocks, such as `attribution_scores(net, images, labels,
layers="layer?.?")` for torchvision's ResNets.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_neuro.demo import DigitsNet, digits_loaders
from lightning_neuro.paths import (
    NadPaths,
    attribution_scores,
    concept_paths,
    evaluate_paths,
    path_similarity,
    paths_graph,
)

Batch = tuple[Tensor, Tensor]


def trained_network(epochs: int = 15) -> tuple[nn.Module, Batch, Batch]:
    """Train a network for digits; returns it, and its training and validation images with their labels."""
    torch.manual_seed(0)
    net = DigitsNet()
    train, val = (loader.dataset.tensors for loader in digits_loaders())
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(train[0])).split(64):
            optimizer.zero_grad()
            cross_entropy(net(train[0][rows]), train[1][rows]).backward()
            optimizer.step()
    return net.eval(), train, val


def main() -> dict[str, float]:
    """Find the paths on training images and evaluate them on validation images."""
    net, (images, labels), unseen = trained_network()
    scores = attribution_scores(net, images, labels)  # one forward, one backward pass for all ten digits
    paths = concept_paths(scores, density=0.3)
    found = evaluate_paths(net, *unseen, paths)
    print("Paths of 30 % of the units, on unseen images. A path that predicts its digit for any image has a retention")
    print("and a false positive rate of 1; the AUROC measures whether its margin still separates the digits.\n")
    print("digit  necessity  retention  false positives  AUROC")
    for digit in range(10):
        rates = f"{found.retention[digit]:>9.2f}  {found.fpr[digit]:>15.2f}  {found.auroc[digit]:>5.2f}"
        print(f"{digit:>5}  {found.necessity[digit]:>9.2f}  {rates}")

    halves = [concept_paths(attribution_scores(net, images[half::2], labels[half::2])) for half in (0, 1)]
    print("\nlayer   similarity of digits' paths beyond chance   of two halves of a digit's images")
    for layer, masks in paths.items():
        similarity = path_similarity(masks, masks)
        between = similarity[~torch.eye(10, dtype=torch.bool)].mean()
        same = path_similarity(halves[0][layer], halves[1][layer]).diagonal().mean()
        print(f"{layer:<8}{between:>42.2f}{same:>36.2f}")

    graph = paths_graph(paths)
    print(
        f"\nAs a graph: {graph.number_of_nodes()} units, {graph.number_of_edges()} edges with the digits that use them."
    )
    few = torch.arange(160)
    nad = NadPaths(net, num_passes=5).fit(images[few], labels[few])
    sizes = ", ".join(f"{layer} {masks.double().mean():.2f}" for layer, masks in nad.paths.items())
    print(f"Mode nad (5 passes instead of 21) keeps: {sizes}.")
    return found.scalars()


if __name__ == "__main__":
    main()
