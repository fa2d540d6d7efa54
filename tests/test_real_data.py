"""On Fashion-MNIST: what the curves must show where the truth is known from the data."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_neuro import ActivationEntropy, ActivationTopology, ConceptPaths, NeuronCommunities, Probe
from tests.models import Module, fit

DATA = os.environ.get("LIGHTNING_NEURO_DATA")
pytestmark = pytest.mark.skipif(DATA is None, reason="LIGHTNING_NEURO_DATA does not say where the real data are")


def fashion(part: str, count: int) -> TensorDataset:
    folder = Path(DATA or "") / "fashion_mnist" / "raw"
    images = np.frombuffer(gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    x = torch.tensor(images.reshape(-1, 1, 28, 28)[:count], dtype=torch.float32) / 255
    return TensorDataset(x, torch.tensor(labels[:count], dtype=torch.long))


@pytest.mark.slow
def test_a_trained_network_has_groups_beyond_chance_and_tells_the_class() -> None:
    torch.manual_seed(0)
    hidden = (nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
    net = Module(nn.Sequential(nn.Flatten(), *hidden, nn.Linear(64, 10)))
    net.configure_optimizers = lambda: torch.optim.Adam(net.parameters(), lr=1e-3)
    probe = Probe(source=fashion("t10k", 2000))
    communities, entropy = NeuronCommunities(probe), ActivationEntropy(probe)
    fit(net, communities, entropy, train=DataLoader(fashion("train", 6000), batch_size=64, shuffle=True), val=False)
    for layer in ("net.2", "net.4"):
        assert communities.scalars[f"communities/modularity_z/{layer}"] > 5
        before, after = (entropy.initial, entropy.scalars)
        assert after[f"entropy/class_information/{layer}"] > before[f"entropy/class_information/{layer}"] + 0.05
        result = entropy.result[layer]
        # No unit can tell more than the class has to tell, nor more than it says.
        assert result.class_information.max() < np.log2(10)
        assert (result.class_information <= result.total + 1e-9).all()


@pytest.mark.slow
def test_training_pulls_the_classes_apart_in_the_mapper_graph() -> None:
    torch.manual_seed(0)
    hidden = (nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
    net = Module(nn.Sequential(nn.Flatten(), *hidden, nn.Linear(64, 10)))
    net.configure_optimizers = lambda: torch.optim.Adam(net.parameters(), lr=1e-3)
    topology = ActivationTopology(Probe(source=fashion("t10k", 2000)))
    fit(net, topology, train=DataLoader(fashion("train", 6000), batch_size=64, shuffle=True), val=False)
    for layer in ("net.2", "net.4"):
        values = {key.split("/")[1]: value for key, value in topology.scalars.items() if key.endswith(f"/{layer}")}
        assert values["majority_share"] > 2 * values["majority_share_null"]
        assert values["purity"] > 2 * values["purity_null"]
        # Grouped points merge sooner than Gaussian ones of the same covariance.
        assert values["h0_total"] < 0.9 * values["h0_total_null"]
        assert values["coverage"] > 0.8


@pytest.mark.slow
def test_each_class_needs_a_path_of_its_own() -> None:
    torch.manual_seed(0)
    hidden = (nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
    net = Module(nn.Sequential(nn.Flatten(), *hidden, nn.Linear(64, 10)))
    net.configure_optimizers = lambda: torch.optim.Adam(net.parameters(), lr=1e-3)
    # Tops, trousers, dress and coat; shoes; bag.
    paths = ConceptPaths(Probe(source=fashion("t10k", 2000)), hierarchy=[[0, 1, 2, 3, 4, 6], [5, 7, 9], 8])
    fit(net, paths, train=DataLoader(fashion("train", 6000), batch_size=64, shuffle=True), val=False)
    after = paths.scalars
    assert after["paths/auroc"] > 0.8 > paths.initial["paths/auroc"]
    assert after["paths/necessity"] > 0.2 > paths.initial["paths/necessity"]
    for layer in ("net.2", "net.4"):
        assert after[f"paths/self_overlap/{layer}"] > 0.8
        assert after[f"paths/overlap/{layer}"] < after[f"paths/self_overlap/{layer}"] - 0.4
        assert after[f"paths/hierarchy_correlation/{layer}"] > 0.5
        assert after[f"paths/confusion_top3/{layer}"] > 1.5 * after[f"paths/confusion_top3_null/{layer}"]
    assert (paths.evaluation.necessity > 0).sum() >= 9
