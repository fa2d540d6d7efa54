"""Gates of attention heads, against networks whose weights were changed by hand."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_neuro import ConceptPaths, Probe
from lightning_neuro.layers import resolve_layers
from lightning_neuro.paths import NadPaths, attribution_scores, concept_paths, evaluate_paths, refine_paths
from lightning_neuro.paths.gates import GatedModel
from lightning_neuro.paths.metric import LayerPaths
from tests.models import Attention, Attentive, Module, fit

HEADS = 4


def of_head(head: int) -> slice:
    return slice(2 * head, 2 * head + 2)


def without(net: Any, head: int, mean: Tensor | None = None) -> Any:
    """A copy without a head: its columns of the projection are zero; its mean output goes into the bias."""
    changed = deepcopy(net)
    proj = changed.attn.proj if hasattr(changed, "attn") else changed.blocks[0]["attn"].proj
    with torch.no_grad():
        if mean is not None:
            proj.bias += proj.weight[:, of_head(head)] @ mean[of_head(head)]
        proj.weight[:, of_head(head)] = 0
    return changed


class HeadOfClass(nn.Module):
    """Head c carries class c: it copies the channels that show the class, and only its logit reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.head = Attention(2 * HEADS, HEADS), nn.Linear(2 * HEADS, HEADS, bias=False)
        with torch.no_grad():
            for weight in self.parameters():
                weight.zero_()
            self.attn.qkv.weight[4 * HEADS :] = torch.eye(2 * HEADS)
            self.attn.proj.weight.copy_(torch.eye(2 * HEADS))
            for c in range(HEADS):
                self.head.weight[c, of_head(c)] = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attn(x).mean(1))


def shown(each: int = 8) -> tuple[Tensor, Tensor]:
    """(N, 5, 8): the channels of the class are positive at all positions."""
    y = torch.arange(HEADS).repeat(each)
    x = 0.1 * torch.rand(len(y), 5, 2 * HEADS, generator=torch.Generator().manual_seed(0))
    for row, label in enumerate(y.tolist()):
        x[row, :, of_head(label)] += 1 + row / 100
    return x, y


def random_data() -> tuple[Attentive, Tensor, Tensor]:
    torch.manual_seed(0)
    return Attentive().eval(), torch.randn(20, 1, 8, 8), torch.arange(20) % 4


@pytest.mark.parametrize("layer", ["blocks.0.attn.heads", "blocks.*.attn.heads"])
def test_a_gate_of_zero_is_a_projection_with_zero_columns(layer: str) -> None:
    net, x, _ = random_data()
    gated = GatedModel(net, resolve_layers(net, layer))
    with torch.no_grad():
        logits, _ = gated.locate_units(x, len(x))
        assert torch.equal(logits, net(x))
        for head in range(HEADS):
            gate = torch.ones(1, HEADS)
            gate[0, head] = 0
            masked = gated.run(x, len(x), {"blocks.0.attn.heads": gate})
            torch.testing.assert_close(masked, without(net, head)(x), rtol=0, atol=1e-6)


def test_a_filled_head_is_the_bias_of_its_mean_output() -> None:
    net, x, _ = random_data()
    seen: list[Tensor] = []
    handle = net.blocks[0]["attn"].proj.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    net(x)
    handle.remove()
    mean = seen[0].detach().flatten(0, 1).mean(0)
    gated = GatedModel(net, resolve_layers(net, "0.attn.heads"))
    with torch.no_grad():
        _, means = gated.locate_units(x, len(x))
        torch.testing.assert_close(means["blocks.0.attn.heads"], mean)
        for head in range(HEADS):
            gate = torch.ones(1, HEADS)
            gate[0, head] = 0
            masked = gated.run(x, len(x), {"blocks.0.attn.heads": gate}, means)
            torch.testing.assert_close(masked, without(net, head, mean)(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_where_all_after_the_heads_is_linear_the_score_is_the_fall_of_the_logit(ablation: Any) -> None:
    """Both of the function and of the metric that the callback uses."""
    torch.manual_seed(0)
    net, (x, y) = HeadOfClass(), shown()
    with torch.no_grad():
        for weight in net.parameters():
            weight += 0.3 * torch.randn_like(weight)
    seen: list[Tensor] = []
    handle = net.attn.proj.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    own = net(x).gather(1, y[:, None])
    handle.remove()
    mean = seen[0].detach().flatten(0, 1).mean(0) if ablation == "mean" else None
    falls = torch.cat([own - without(net, head, mean)(x).gather(1, y[:, None]) for head in range(HEADS)], dim=1)
    expected = torch.stack([falls[y == label].double().mean(0) for label in range(HEADS)]).detach()
    found = attribution_scores(net, x, y, "attn.heads", ablation=ablation)["attn.heads"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    metric = LayerPaths(ablation=ablation)
    gated = GatedModel(net, resolve_layers(net, "attn.heads"))
    for rows in torch.arange(len(y)).split(8):
        part = gated.attribute(x[rows], y[rows], gradients=True)
        metric.update(
            part.contributions["attn.heads"],
            y[rows],
            gradients=part.gradients["attn.heads"],
            features=part.features["attn.heads"],
        )
    result = metric.compute()
    weights = result.counts / result.counts.sum(0)
    torch.testing.assert_close((result.scores * weights[..., None]).sum(0), expected, rtol=1e-4, atol=1e-5)
    assert result.num_units == HEADS and len(result.mean) == 2 * HEADS


def test_the_head_that_carries_a_class_is_its_path() -> None:
    net, (x, y) = HeadOfClass(), shown()
    planted = torch.eye(HEADS, dtype=torch.bool)
    scores = attribution_scores(net, x, y, "attn.heads")
    paths = concept_paths(scores, 0.25)
    assert torch.equal(paths["attn.heads"], planted)
    for ablation in ("zero", "mean"):
        found = evaluate_paths(net, x, y, paths, ablation=ablation)
        assert (found.tpr > 0.99).all() and (found.auroc > 0.99).all()
    # Ablated, the class is lost: nothing is left of its logit.
    assert (evaluate_paths(net, x, y, paths).drops.diagonal() == 1).all()
    gates = refine_paths(net, x, y, scores, density=0.25, num_steps=20)["attn.heads"]
    assert gates.shape == (HEADS, HEADS) and (gates.diagonal() > 0).all()
    nad = NadPaths(net, layers="attn.heads", num_passes=2).fit(x, y).paths["attn.heads"]
    assert nad.shape == (HEADS, HEADS)


def test_paths_with_the_number_of_channels_are_refused() -> None:
    net, (x, y) = HeadOfClass(), shown()
    with pytest.raises(ValueError, match=r"bool of shape \(concepts, 4\) in layer 'attn\.heads'"):
        evaluate_paths(net, x, y, {"attn.heads": torch.ones(4, 8, dtype=torch.bool)})


def test_a_layer_that_is_called_twice_has_heads_for_each_call() -> None:
    net, (x, y) = HeadOfClass(), shown()
    net.forward = lambda x: net.head(net.attn(net.attn(x)).mean(1))  # type: ignore[method-assign]
    scores = attribution_scores(net, x, y, "attn.heads")
    assert list(scores) == ["attn.heads.call1", "attn.heads.call2"]
    evaluate_paths(net, x, y, concept_paths(scores, 0.25))


def test_the_channels_of_heads_are_last_after_a_convolution_too() -> None:
    """(N, height, width, channels), as many rows as channels, and no linear layer before the projection."""
    torch.manual_seed(0)
    conv, proj, head = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8, 8), nn.Linear(8, 4)
    net = nn.ModuleDict({"conv": conv, "proj": proj, "head": head})
    net.forward = lambda x: head(proj(conv(x).permute(0, 2, 3, 1)).mean((1, 2)))  # type: ignore[method-assign]
    x = torch.randn(6, 1, 8, 8)
    gated = GatedModel(net, resolve_layers(net, "proj.heads=4"))
    with torch.no_grad():
        gated.locate_units(x, 6)
        masked = gated.run(x, 6, {"proj.heads": torch.tensor([[1.0, 0.0, 1.0, 1.0]])})
        proj.weight[:, of_head(1)] = 0
        torch.testing.assert_close(masked, net(x))


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_the_callback_finds_the_head_of_each_class(ablation: Any) -> None:
    x, y = shown(16)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 16)
    module = Module(HeadOfClass())
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)  # type: ignore[method-assign]
    paths = ConceptPaths(Probe("heads", num_samples=64), density=0.25, ablation=ablation)
    fit(module, paths, train=data, val=data)
    assert torch.equal(paths.result["net.attn.heads"].masks, torch.eye(HEADS, dtype=torch.bool))
    assert paths.scalars["paths/auroc"] > 0.99
