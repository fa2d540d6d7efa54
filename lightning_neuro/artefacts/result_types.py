"""The dataclasses that a results file may name. Nothing else is created on reading, whatever the file says."""

from importlib import import_module
from typing import Any

_MODULES = {
    "CommunityResult": "lightning_neuro.communities.result",
    "EntropyResult": "lightning_neuro.entropy.result",
    "ObserverResult": "lightning_neuro.observers.result",
    "Denotation": "lightning_neuro.observers.denotation",
    "TopologyResult": "lightning_neuro.topology.result",
    "MapperGraph": "lightning_neuro.topology.mapper_graph",
    "Persistence": "lightning_neuro.topology.persistence",
    "PathResult": "lightning_neuro.paths.result",
    "RefinementResult": "lightning_neuro.refinement.result",
    "SampleSpread": "lightning_neuro.refinement.result",
    "ProbeSamples": "lightning_neuro.artefacts.probe_samples",
}


def result_type(name: str) -> type[Any] | None:
    """The dataclass of a name; None if it is not one of this package."""
    module = _MODULES.get(name)
    return None if module is None else getattr(import_module(module), name)
