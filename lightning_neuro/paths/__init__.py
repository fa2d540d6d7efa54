"""Paths of concepts through a network: the units that each concept depends on, layer by layer."""

from lightning_neuro.paths.attribution import attribution_scores
from lightning_neuro.paths.callback import ConceptPaths
from lightning_neuro.paths.class_tree import hierarchy_correlation, tree_kinship
from lightning_neuro.paths.evaluation import PathEvaluation, evaluate_paths
from lightning_neuro.paths.gate_learning import refine_paths
from lightning_neuro.paths.metric import LayerPaths
from lightning_neuro.paths.minimal_density import minimal_paths
from lightning_neuro.paths.nad2020 import NadPaths
from lightning_neuro.paths.networkx_export import paths_graph
from lightning_neuro.paths.options import PathOptions
from lightning_neuro.paths.plot import plot_flow, plot_overlap, plot_reuse
from lightning_neuro.paths.result import PathResult
from lightning_neuro.paths.similarity import chance_iou, confusion_top3, iou, path_similarity, stability
from lightning_neuro.paths.top_units import concept_paths

__all__ = [
    "ConceptPaths",
    "LayerPaths",
    "NadPaths",
    "PathEvaluation",
    "PathOptions",
    "PathResult",
    "attribution_scores",
    "chance_iou",
    "concept_paths",
    "confusion_top3",
    "evaluate_paths",
    "hierarchy_correlation",
    "iou",
    "minimal_paths",
    "path_similarity",
    "paths_graph",
    "plot_flow",
    "plot_overlap",
    "plot_reuse",
    "refine_paths",
    "stability",
    "tree_kinship",
]
