"""The way each concept takes through the network: which units its samples need, layer by layer."""

from lightning_neuro.paths.attribution import attribution_scores
from lightning_neuro.paths.evaluation import PathEvaluation, evaluate_paths
from lightning_neuro.paths.graph import paths_graph
from lightning_neuro.paths.measures import (
    auroc,
    chance_iou,
    confusion_top3,
    hierarchy_correlation,
    iou,
    path_similarity,
    stability,
    tree_kinship,
)
from lightning_neuro.paths.metric import LayerPaths
from lightning_neuro.paths.minimal import minimal_paths
from lightning_neuro.paths.nad2020 import NadPaths
from lightning_neuro.paths.plot import plot_flow, plot_overlap, plot_reuse, plot_stability
from lightning_neuro.paths.refinement import refine_paths
from lightning_neuro.paths.result import PathResult
from lightning_neuro.paths.selection import concept_paths
from lightning_neuro.paths.sites import path_layers

__all__ = [
    "LayerPaths",
    "NadPaths",
    "PathEvaluation",
    "PathResult",
    "attribution_scores",
    "auroc",
    "chance_iou",
    "concept_paths",
    "confusion_top3",
    "evaluate_paths",
    "hierarchy_correlation",
    "iou",
    "minimal_paths",
    "path_layers",
    "path_similarity",
    "paths_graph",
    "plot_flow",
    "plot_overlap",
    "plot_reuse",
    "plot_stability",
    "refine_paths",
    "stability",
    "tree_kinship",
]
