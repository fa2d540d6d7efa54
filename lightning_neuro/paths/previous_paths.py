"""The comparison of the paths with those of the previous evaluation."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from lightning_neuro.paths.result import PathResult
from lightning_neuro.paths.similarity import stability

Previous = dict[str, dict[str, Tensor]]
"""Layer -> `paths`, bool (concepts, units), and `gates` (2, concepts, units) if they are learned."""


def with_stability(results: Mapping[str, PathResult], previous: Previous) -> dict[str, PathResult]:
    """The results with their stability, if the layer had paths of the same shape at the previous evaluation."""
    compared = dict(results)
    for layer, result in results.items():
        before = previous.get(layer, {}).get("paths")
        if before is not None and before.shape == result.masks.shape:
            left = stability(result.masks, before, result.overlap, result.self_overlap)
            compared[layer] = replace(result, stability=left)
    return compared


def to_remember(results: Mapping[str, PathResult]) -> Previous:
    """The paths and gates that the next evaluation needs."""
    found = {layer: {"paths": result.masks, "gates": result.gates} for layer, result in results.items()}
    return {layer: {name: part for name, part in parts.items() if part is not None} for layer, parts in found.items()}


def previous_gates(previous: Previous) -> dict[str, Tensor]:
    """Layer -> gate logits of the previous evaluation, if there are any."""
    return {layer: known["gates"] for layer, known in previous.items() if "gates" in known}
