"""Representation refinement: which training samples shaped a layer, exactly by class, and sample by sample."""

from lightning_neuro.refinement.callback import RepresentationRefinement
from lightning_neuro.refinement.influence import Influence, influence_scores
from lightning_neuro.refinement.influence_table import InfluenceTable
from lightning_neuro.refinement.layer_gradients import source_gradients
from lightning_neuro.refinement.ledger import RefinementLedger
from lightning_neuro.refinement.metric import RefinementSummary
from lightning_neuro.refinement.options import Direction, Form, Mode
from lightning_neuro.refinement.pfahler2021 import ClassBatchSampler, StepScore, StepScores
from lightning_neuro.refinement.plot import plot_explanation, plot_refinement
from lightning_neuro.refinement.predictions import PredictionTable
from lightning_neuro.refinement.result import RefinementExplanation, RefinementResult
from lightning_neuro.refinement.sample_figures import plot_influence, plot_samples
from lightning_neuro.refinement.sample_ids import Indexed
from lightning_neuro.refinement.sample_norms import gradient_norms
from lightning_neuro.refinement.sample_origins import sample_origins
from lightning_neuro.refinement.sample_table import SampleTable, gini
from lightning_neuro.refinement.sources import Sources
from lightning_neuro.refinement.update_log import UpdateLog, UpdateLogWriter, load_update_log

__all__ = [
    "ClassBatchSampler",
    "Direction",
    "Form",
    "Indexed",
    "Influence",
    "InfluenceTable",
    "Mode",
    "PredictionTable",
    "RefinementExplanation",
    "RefinementLedger",
    "RefinementResult",
    "RefinementSummary",
    "RepresentationRefinement",
    "SampleTable",
    "Sources",
    "StepScore",
    "StepScores",
    "UpdateLog",
    "UpdateLogWriter",
    "gini",
    "gradient_norms",
    "influence_scores",
    "load_update_log",
    "plot_explanation",
    "plot_influence",
    "plot_refinement",
    "plot_samples",
    "sample_origins",
    "source_gradients",
]
