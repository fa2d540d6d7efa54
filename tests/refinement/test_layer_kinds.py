"""Linear layers of other libraries: the Conv1D of transformers, and the LoRA adapters of peft, by stand-ins."""

import pytest
import torch
from torch import nn

from lightning_neuro import Probe, RepresentationRefinement
from lightning_neuro.checks import ArgumentError
from lightning_neuro.refinement.sample_norms import gradient_norms
from lightning_neuro.refinement.traced_layers import find_layers
from tests.models import Module, fit
from tests.refinement.following import by_id


class Conv1D(nn.Module):
    """As in `transformers.pytorch_utils`: y = x W + b with a weight of shape (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf).normal_(std=0.3))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.size()[:-1], self.nf)


class Tokens(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.first, self.last = layers

    def forward(self, x):
        return self.last(self.first(x.flatten(1).reshape(-1, 8, 8)).relu()).mean(1)


def conv1d_and_linear():
    """The same network with both kinds of layers."""
    torch.manual_seed(0)
    ours = Tokens(Conv1D(6, 8), Conv1D(4, 6))
    linear = Tokens(nn.Linear(8, 6), nn.Linear(6, 4))
    linear.load_state_dict(
        {name: value.T.clone() if "weight" in name else value.clone() for name, value in ours.state_dict().items()}
    )
    return ours, linear


@pytest.mark.parametrize("options", [{}, {"layers": ["net.first", "net.last"]}, {"mode": "pfahler2021"}])
def test_conv1d_of_transformers_is_a_linear_layer(options):
    found, expected = (RepresentationRefinement(Probe(num_samples=32), on_error="raise", **options) for _ in range(2))
    for net, callback in zip(conv1d_and_linear(), (found, expected), strict=True):
        torch.manual_seed(0)
        fit(Module(net), callback)
    assert found.scalars == pytest.approx(expected.scalars, rel=1e-3, abs=1e-5)
    for name, values in by_id(expected.samples).items():
        assert by_id(found.samples)[name] == pytest.approx(values, rel=1e-3)
    assert list(found.ledger) == list(expected.ledger)
    assert found.result["net.last"].num_units == 4
    if options.get("mode"):
        x = torch.randn(3, 6)
        scores, truth = (callback.step_scores["net.last"].scores(x).cosine for callback in (found, expected))
        torch.testing.assert_close(scores, truth, rtol=1e-4, atol=1e-5)  # trained in float32


def test_conv1d_norms():
    ours, linear = conv1d_and_linear()
    inputs, gradients = torch.randn(5, 3, 8), torch.randn(5, 3, 6)
    torch.testing.assert_close(
        gradient_norms(ours.first, inputs, gradients), gradient_norms(linear.first, inputs, gradients)
    )


def test_conv1d_cannot_be_used_where_the_weight_must_be_that_of_linear():
    with pytest.raises(ArgumentError, match=r"influence_every_n_steps.*Conv1D"):
        fit(Module(conv1d_and_linear()[0]), RepresentationRefinement(influence_every_n_steps=1))


class LoraLinear(nn.Module):
    """As `peft.tuners.lora.Linear`: it wraps a frozen layer, and adds the product of two small ones."""

    def __init__(self, base_layer, rank=2):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_dropout = nn.ModuleDict({"default": nn.Identity()})
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base_layer.out_features, bias=False)})
        self.lora_embedding_A = nn.ParameterDict()

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def adapted():
    torch.manual_seed(0)
    return Module(Tokens(LoraLinear(nn.Linear(8, 6)), LoraLinear(nn.Linear(6, 4))))


def test_lora_adapter_by_name_says_which_parts_can_be_traced():
    with pytest.raises(ArgumentError, match=r"'net.first': it is a LoRA adapter.*'net.first.lora_A.default'"):
        find_layers(adapted(), "net.first")


@pytest.mark.parametrize("patterns", ["fir*", ["net.fir*"], "net.first.lora_*.default"])
def test_glob_on_a_lora_adapter_selects_its_trained_parts(patterns):
    assert list(find_layers(adapted(), patterns)) == ["net.first.lora_A.default", "net.first.lora_B.default"]


def test_lora_fit():
    callback = RepresentationRefinement(Probe(num_samples=32), layers=["fir*", "las*"], on_error="raise")
    fit(adapted(), callback)
    assert len(callback.ledger) == 4
    assert callback.scalars["refinement/completeness_error"] < 1e-5
    assert callback.scalars["refinement/untraced_share"] < 1e-4
    default = RepresentationRefinement(Probe(num_samples=32), on_error="raise")
    fit(adapted(), default)
    assert list(default.ledger) == ["net.last.lora_B.default"]
