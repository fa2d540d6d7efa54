"""Options of concept paths: their types, their documentation, and the defaults that several functions share."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from torch import nn

Mode = Literal["attribution", "nad"]
Ablation = Literal["zero", "mean"]
Layers = str | Sequence[str] | Mapping[str, nn.Module] | None
"""Which layers: a name or glob, several of them, modules by name, or None for the default layers."""

DEFAULT_DENSITY = 0.3


class PathOptions(TypedDict, total=False):
    """Options of `LayerPaths`, which `ConceptPaths` accepts as well.

    Args:
        ablation: What replaces the output of a unit outside of the path: `"zero"`, or its `"mean"` over samples and
            positions. Default: `"zero"`.
        hierarchy: A tree of the classes, as nested sequences of class numbers, such as `[[0, 2, [4, 6]], [5, 7, 9]]`;
            see `tree_kinship`. With it, `hierarchy_correlation` is computed. Default: none.
    """

    ablation: Ablation
    hierarchy: Sequence[Any] | None
