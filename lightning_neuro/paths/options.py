"""Options of concept paths: their types, their documentation, and the defaults that several functions share."""

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

from lightning_neuro.heads import Layer

Mode = Literal["attribution", "nad"]
Ablation = Literal["zero", "mean"]
Layers = str | Sequence[str] | Mapping[str, Layer] | None
"""Selection of layers: a name or glob, several of them, modules or heads by name, or None for the default layers."""

DEFAULT_DENSITY = 0.3


class PathOptions(TypedDict, total=False):
    """Options of how `ConceptPaths` finds paths.

    Args:
        mode: `"attribution"`, or `"nad"` for the masks of the paper (slow; in one process only). Default:
            `"attribution"`.
        density: Fraction of each layer's units that a path keeps; or `"minimal"` for the smallest fraction that retains
            .9 of the accuracy at an informedness of .5, for each class. Default: .3.
        ablation: What replaces the output of an ablated unit: `"zero"`, or its `"mean"` over samples and positions.
            Default: `"zero"`.
        num_refinement_steps: Number of steps of relative refinement after the attribution; see `refine_paths`.
            Default: 0.
        nad_beta: Weight of the sparsity term in mode `"nad"`; see `NadPaths`. Default: 4.5.
    """

    mode: Mode
    density: float | Literal["minimal"]
    ablation: Ablation
    num_refinement_steps: int
    nad_beta: float
