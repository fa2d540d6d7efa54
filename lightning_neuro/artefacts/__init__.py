"""Results in files: every callback's results at every evaluation, and how to read them."""

from lightning_neuro.artefacts.probe_samples import ProbeSamples
from lightning_neuro.artefacts.results_file import SCHEMA
from lightning_neuro.artefacts.save_results import SaveResults
from lightning_neuro.artefacts.saved_run import Problem, SavedCallback, SavedEvaluation, SavedRun, load_run

__all__ = [
    "SCHEMA",
    "ProbeSamples",
    "Problem",
    "SaveResults",
    "SavedCallback",
    "SavedEvaluation",
    "SavedRun",
    "load_run",
]
