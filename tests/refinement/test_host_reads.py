"""No training step away from the schedule reads a tensor on the host, so a GPU never waits."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_neuro import Probe, RepresentationRefinement
from lightning_neuro.refinement import training_hooks
from lightning_neuro.refinement.backward_passes import BackwardPasses
from lightning_neuro.refinement.layer_gradients import add_by_sample, source_gradients
from lightning_neuro.refinement.sources import Sources
from lightning_neuro.refinement.training_steps import TrainingSteps
from tests.models import Module, convnet, fit, images, mlp
from tests.refinement.host_reads import no_host_reads


@pytest.fixture
def counted(monkeypatch):
    """Every method of ours that runs in a training step, with reads forbidden; returns how often each was called."""
    calls: dict[str, int] = {}

    def guard(owner, name):
        method = getattr(owner, name)

        def guarded(self, *args, **kwargs):
            calls[name] = calls.get(name, 0) + 1
            with no_host_reads():
                return method(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, guarded)

    guard(training_hooks.TrainingHooksCallback, "on_train_batch_start")
    guard(training_hooks.RefinementRun, "end_batch")
    guard(TrainingSteps, "see")
    guard(TrainingSteps, "_stepped")
    guard(BackwardPasses, "hold")
    guard(BackwardPasses, "_added")
    return calls


def many_classes() -> Module:
    torch.manual_seed(0)
    return Module(nn.Sequential(nn.Flatten(), nn.Linear(64, 200)))


OPTIONS = {
    "default": (mlp, {}, {}),
    "ledgers of linear layers": (mlp, {"layers": "*"}, {}),
    "samples of all layers": (convnet, {"track_samples": "*"}, {}),
    "some steps": (convnet, {"track_samples": "*", "sample_every_n_steps": 3}, {}),
    "accumulation": (mlp, {}, {"accumulate_grad_batches": 2}),
    "clipping": (mlp, {}, {"gradient_clip_val": 0.1}),
    "many classes": (many_classes, {}, {}),
    "sources": (mlp, {"source_fn": lambda batch: batch[1] % 2, "num_sources": 2}, {}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_training_step_reads_nothing(name, counted):
    make, options, trainer = OPTIONS[name]
    data = images(96)
    if name == "many classes":
        data = TensorDataset(data.tensors[0], torch.arange(96) * 3 % 200)
    # At the end of a phase the ledgers are copied to the CPU.
    probe = Probe(num_samples=16, every_n_epochs=2)
    callback = RepresentationRefinement(probe, phases=1, on_error="raise", **options)
    fit(make(), callback, train=DataLoader(data, batch_size=16), val=False, max_epochs=1, **trainer)
    assert counted["see"] >= 6 and counted["_stepped"] >= 3
    assert callback.run.num_steps >= 3


def test_the_guard_catches_a_read():
    value = torch.ones(3)
    for read in (
        lambda: value.sum().item(),
        lambda: bool(value.any()),
        lambda: value[value > 0],
        lambda: value.cpu(),
        lambda: torch.nonzero(value),
        lambda: float(value.sum()),
        lambda: value.tolist(),
        lambda: torch.unique(value),
    ):
        with pytest.raises(AssertionError, match="the host reads"), no_host_reads():
            read()


LAYERS = {
    "linear": (nn.Linear(5, 4), (5,)),
    "tokens": (nn.Linear(5, 4), (3, 5)),
    "conv": (nn.Conv2d(4, 6, 3, padding=1, stride=2), (4, 7, 6)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2, padding_mode="circular", padding=1), (4, 7, 6)),
    "conv1d": (nn.Conv1d(4, 6, 3, dilation=2), (4, 9)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_by_source_without_reads(name):
    """The form for a GPU, which is not taken on a CPU, where reading is free."""
    module, shape = LAYERS[name]
    inputs = torch.randn(7, *shape)
    gradients = torch.randn(module(inputs).shape)
    sources = Sources(torch.tensor([0, 2, 2, 4, 0, 1, 2]), 5)
    truth = source_gradients(module, inputs, gradients, sources)["weight"]
    found = torch.zeros_like(truth, dtype=torch.float64)
    linear = isinstance(module, nn.Linear)
    a, d = (part.reshape(7, -1, part.shape[-1]) for part in (inputs, gradients)) if linear else (inputs, gradients)
    with no_host_reads():
        add_by_sample(found, a, d, sources, None if linear else module)
    torch.testing.assert_close(found.float(), truth, rtol=1e-4, atol=1e-5)


def test_a_ledger_of_a_convolution_reads_the_labels_only_on_a_cpu(monkeypatch):
    module = nn.Conv2d(2, 3, 3)
    inputs, gradients = torch.randn(4, 2, 5, 5), torch.randn(4, 3, 3, 3)
    sources = Sources(torch.tensor([0, 1, 1, 0]), 3)
    with pytest.raises(AssertionError, match="the host reads"), no_host_reads():
        source_gradients(module, inputs, gradients, sources)
    meta = [tensor.to("meta") for tensor in (inputs, gradients)]
    split = source_gradients(nn.Conv2d(2, 3, 3, device="meta"), *meta, Sources(sources.rows.to("meta"), 3))
    assert split["weight"].shape == (3, 3, 2, 3, 3)
