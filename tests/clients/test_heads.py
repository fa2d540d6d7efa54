"""Heads of attention layers in timm and transformers, told apart by the weights of their values."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_neuro import (
    ActivationEntropy,
    ActivationTopology,
    ConceptPaths,
    NeuronCommunities,
    ObserverProbes,
    Probe,
)
from lightning_neuro.heads import Heads
from lightning_neuro.layers import resolve_layers
from lightning_neuro.paths.gates import GatedModel, evaluating
from tests.clients.harness import hooks_of
from tests.clients.registry import load_clients
from tests.clients.test_padding import still, still_and_wider

pytestmark = pytest.mark.clients

CLIENTS = ("timm_vit_tiny", "bert_forward", "bert_model_lora", "gpt2_lm", "vit_pixel_values")


def client(name: str) -> Any:
    """The project, its model and a batch of its validation data."""
    for package in load_clients()[name].needs:
        pytest.importorskip(package, reason=f"{package} is not installed; see the extra `clients`")
    torch.manual_seed(0)
    project = load_clients()[name].build()
    return project, project.module.eval(), next(iter(project.fit["val_dataloaders"]))


def forward_of(name: str, module: Any, batch: Any) -> Callable[[Any], Tensor]:
    """Runs the model on a batch; returns (N, outputs)."""
    if name.startswith("timm"):
        return lambda batch: module(batch[0])
    return lambda batch: module.model(**batch).logits.flatten(1)


def values_of_head(module: nn.Module, attention: str, rows: slice) -> None:
    """Set the weights that make a head's values to zero, so that its output is zero."""
    parts = dict(dict(module.named_modules())[attention].named_modules())
    value = next(
        (part for name, part in parts.items() if name in ("self.value", "v_proj", "self.value.base_layer")), None
    )
    with torch.no_grad():
        if value is not None:
            weight, bias = value.weight, value.bias
        elif "qkv" in parts:
            weight, bias = parts["qkv"].weight.chunk(3)[2], parts["qkv"].bias.chunk(3)[2]
        else:  # the Conv1D of GPT-2 has its outputs in the columns
            weight, bias = parts["c_attn"].weight.chunk(3, 1)[2].T, parts["c_attn"].bias.chunk(3)[2]
        weight[rows] = 0
        bias[rows] = 0


@pytest.mark.parametrize("name", CLIENTS)
def test_a_closed_gate_is_a_head_without_values(name: str) -> None:
    _, module, batch = client(name)
    heads = resolve_layers(module, "heads")
    assert len(heads) == (12 if name == "timm_vit_tiny" else 2)
    site, layer = list(heads.items())[1]
    assert isinstance(layer, Heads)
    num_heads, size = layer.num_heads, layer.projection.weight.shape[0] // layer.num_heads
    forward = forward_of(name, module, batch)
    num_samples = len(forward(batch))
    with evaluating(module), torch.no_grad():
        gated = GatedModel(module, heads, forward)
        gated.locate_units(batch, num_samples)
        assert set(gated.num_units.values()) == {num_heads}
        for head in range(num_heads):
            gate = torch.ones(1, num_heads)
            gate[0, head] = 0
            changed = deepcopy(module)
            values_of_head(changed, site.removesuffix(".heads"), slice(head * size, (head + 1) * size))
            expected = forward_of(name, changed, batch)(batch)
            assert (expected - forward(batch)).abs().max() > 1e-5
            torch.testing.assert_close(gated.run(batch, num_samples, {site: gate}), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", CLIENTS)
def test_the_callbacks_log_heads_as_a_replay_would(name: str) -> None:
    """In the validation's own steps, and in passes of our own."""
    found = []
    replay: dict[str, Any] = {
        "forward_fn": lambda module, batch: module.model(**batch),
        "input_fn": lambda batch: batch,
    }
    if name.startswith("timm"):
        replay = {"forward_fn": lambda module, x: module(x)}
    for own in ({}, replay):
        project, module, _ = client(name)
        probe = Probe("heads", num_samples=64, **own)
        callbacks = [
            make(probe, figures="never") for make in (NeuronCommunities, ActivationEntropy, ActivationTopology)
        ]
        if name != "gpt2_lm":  # one label a token
            callbacks.append(ObserverProbes(probe, figures="never"))
        before = hooks_of(module)
        project.train(callbacks)
        assert hooks_of(module) == before
        found.append({key: value for callback in callbacks for key, value in callback.scalars.items()})
    ridden, replayed = found
    assert ridden.keys() == replayed.keys() and any(key.endswith("heads") for key in ridden)
    for key, value in ridden.items():
        assert value == pytest.approx(replayed[key], abs=1e-6), key


@pytest.mark.parametrize("name", [name for name in CLIENTS if name != "gpt2_lm"])
def test_paths_run_through_heads(name: str) -> None:
    project, _, _ = client(name)
    paths = ConceptPaths(Probe("heads", num_samples=64))
    project.train([paths])
    assert paths.result and all(layer.endswith(".heads") for layer in paths.result)
    assert "paths/auroc" in paths.scalars


def test_fused_and_eager_attention_of_timm_give_the_same_heads() -> None:
    _, module, (x, _) = client("timm_vit_tiny")
    found = []
    for fused in (True, False):
        for part in module.modules():
            if hasattr(part, "fused_attn"):
                part.fused_attn = fused
        gated = GatedModel(module, resolve_layers(module, "heads"), module)
        with evaluating(module), torch.no_grad():
            found.append(gated.locate_units(x, len(x))[1])
    assert len(found[0]) == 12
    for name, mean in found[0].items():
        torch.testing.assert_close(found[1][name], mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bert_forward", "gpt2_lm"])
def test_padding_changes_no_value_of_a_head(name: str) -> None:
    found = []
    for change in (still, still_and_wider):
        project, _, _ = client(name)
        change(project)
        probe = Probe("heads")
        callbacks = [
            make(probe, figures="never") for make in (NeuronCommunities, ActivationEntropy, ActivationTopology)
        ]
        project.train(callbacks)
        found.append({key: value for callback in callbacks for key, value in callback.scalars.items()})
    narrow, wide = found
    assert narrow.keys() == wide.keys()
    for key, value in narrow.items():
        assert wide[key] == pytest.approx(value, abs=1e-4, rel=1e-4), key
