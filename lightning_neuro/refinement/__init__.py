"""Who shaped a layer: exact ledgers of classes and phases, and the part of every training sample."""

from lightning_neuro.refinement.explanation import RefinementExplanation
from lightning_neuro.refinement.influence import Influence, LiveInfluence, influence_scores
from lightning_neuro.refinement.ledger import RefinementLedger
from lightning_neuro.refinement.metric import RefinementSummary
from lightning_neuro.refinement.norms import gradient_norms
from lightning_neuro.refinement.operators import Sources, source_gradients
from lightning_neuro.refinement.pfahler2021 import ClassBatchSampler, StepScores
from lightning_neuro.refinement.plot import plot_explanation, plot_refinement
from lightning_neuro.refinement.result import RefinementResult
from lightning_neuro.refinement.samples import SampleTable, gini
from lightning_neuro.refinement.trace import Trace, TraceWriter, load_trace

__all__ = [
    "ClassBatchSampler",
    "Influence",
    "LiveInfluence",
    "RefinementExplanation",
    "RefinementLedger",
    "RefinementResult",
    "RefinementSummary",
    "SampleTable",
    "Sources",
    "StepScores",
    "Trace",
    "TraceWriter",
    "gini",
    "gradient_norms",
    "influence_scores",
    "load_trace",
    "plot_explanation",
    "plot_refinement",
    "source_gradients",
]
