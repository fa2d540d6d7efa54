"""Where samples and units lie, which labels belong to which rows."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_neuro import Probe
from lightning_neuro.layer_reading import BatchShape, LayerAxes, batch_first_of, fractions_of, nodes_to_rows
from lightning_neuro.layers import named_layers, resolve_layers
from lightning_neuro.probe_batch import ProbeBatch
from lightning_neuro.targets import Targets
from lightning_neuro.unit_reader import UnitReader
from lightning_neuro.units import UnitRows


def read(model: nn.Module, layers: Any, inputs: Tensor, *, samples: int, rows: Any = None, **options: Any) -> Any:
    warned: list[str] = []
    reader = UnitReader(Probe(layers, **options), lambda sentence, cause: warned.append(sentence))
    reader.layers = resolve_layers(model, layers)
    count = samples if rows is None else len(rows)
    with reader.reading(model, BatchShape(samples, rows, torch.arange(count)), [inputs]) as recording:
        model(inputs)
    return recording.activations, reader, warned


def test_the_samples_are_found_in_either_dimension() -> None:
    torch.manual_seed(0)
    first, time = nn.LSTM(3, 4, batch_first=True), nn.LSTM(3, 4)
    time.load_state_dict(first.state_dict())
    x = torch.randn(5, 5, 3)  # as many steps as samples: only the module tells
    for net, inputs in ((first, x), (time, x.transpose(0, 1))):
        holder = nn.ModuleDict({"rnn": net})
        holder.forward = lambda values, n=net: n(values)  # type: ignore[method-assign]
        units, reader, _ = read(holder, "rnn", inputs, samples=5)
        torch.testing.assert_close(units["rnn"].values, first(x)[0].mean(1))
        assert not reader.axes.undecided


def test_what_cannot_be_decided_is_learned_from_a_batch_of_another_size() -> None:
    axes = LayerAxes()
    square, other = torch.zeros(4, 4, 2), torch.zeros(4, 3, 2)
    assert axes.dim_of_samples(("a", 1), square, 4, None) == 0 and axes.undecided == {"a"}
    assert axes.dim_of_samples(("a", 1), other, 3, None) == 1 and not axes.undecided
    assert axes.dim_of_samples(("a", 1), square, 4, None) == 1
    # Matrices and maps have their samples in front.
    assert axes.dim_of_samples(("b", 1), torch.zeros(4, 4), 4, None) == 0
    assert axes.dim_of_samples(("b", 1), torch.zeros(4, 4, 4, 4), 4, None) == 0 and not axes.undecided


def test_layers_inside_an_attention_layer_follow_its_order() -> None:
    net = nn.ModuleDict({"enc": nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2), 2, enable_nested_tensor=False)})
    modules = named_layers(net)
    assert batch_first_of("enc.layers.1.linear1", modules) is False
    assert batch_first_of("enc", modules) is False
    assert batch_first_of("other", modules) is None


def test_only_the_rows_that_are_asked_for_are_kept() -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU())
    x = torch.randn(6, 1, 5, 5)
    rows = torch.tensor([4, 1])
    for reduction in ("mean", "max", "random", "cls", "flatten"):
        options: dict[str, Any] = {"reduction": reduction, "seed": 3}
        some, _, _ = read(net, "1", x, samples=6, rows=rows, **options)
        alone, _, _ = read(net, "1", x[rows], samples=2, **options)
        assert torch.equal(some["1"].values, alone["1"].values)


def test_an_error_in_a_hook_never_reaches_the_users_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no units")

    monkeypatch.setattr("lightning_neuro.layer_reading.unit_rows", fail)
    units, _, warned = read(nn.Sequential(nn.Linear(2, 3)), "0", torch.ones(4, 2), samples=4)
    assert units == {} and "no units" in warned[0] and len(warned) == 1


def test_random_numbers_are_a_samples_own() -> None:
    keys = torch.arange(2000)
    numbers = fractions_of(keys, 0, "a")
    assert torch.equal(fractions_of(keys.flip(0), 0, "a").flip(0), numbers)
    assert float(numbers.min()) >= 0 and float(numbers.max()) < 1
    assert abs(float(numbers.mean()) - 0.5) < 0.03
    for other in (fractions_of(keys, 0, "b"), fractions_of(keys, 1, "a")):
        assert abs(float(torch.corrcoef(torch.stack([numbers, other]))[0, 1])) < 0.1


def test_nodes_are_averaged_over_their_graph() -> None:
    nodes, owners = torch.tensor([[1.0], [3.0], [10.0]]), torch.tensor([0, 0, 2])
    assert nodes_to_rows(nodes, owners, 3, "mean").values.flatten().tolist() == [2.0, 0.0, 10.0]
    every = nodes_to_rows(nodes, owners, 3, "tokens")
    assert torch.equal(every.values, nodes) and every.samples is not None and torch.equal(every.samples, owners)


def test_of_the_nodes_those_of_the_chosen_graphs_are_read() -> None:
    class Graphs:
        batch = torch.tensor([0, 0, 1, 2, 2])

    net = nn.Sequential(nn.Identity())
    for reduction, expected in (("mean", [7.0, 1.0]), ("tokens", [0.0, 2.0, 6.0, 8.0])):
        reader = UnitReader(Probe("0", reduction=reduction), lambda sentence, cause: None)  # type: ignore[arg-type]
        reader.layers = resolve_layers(net, "0")
        rows = torch.tensor([2, 0])
        with reader.reading(net, BatchShape(3, rows, rows), Graphs()) as recording:
            net(torch.tensor([[0.0], [2.0], [4.0], [6.0], [8.0]]))
        units = recording.activations["0"]
        assert units.values.flatten().tolist() == expected
        assert reduction == "mean" or units.samples.tolist() == [1, 1, 0, 0]


# Labels of rows -----------------------------------------------------------------------------------------------------


def batch_of(rows: UnitRows, **labels: Any) -> ProbeBatch:
    found = Targets(**labels)
    return ProbeBatch({"layer": rows.values}, None, found.classes, None, 2, 3, found, {"layer": rows})


def test_each_row_has_the_label_of_its_sample() -> None:
    rows = UnitRows(torch.zeros(5, 1), torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 1, 0, 1, 2]), (3,))
    at = batch_of(rows, classes=torch.tensor([2, 1])).at("layer")
    assert at.targets is not None and at.targets.tolist() == [2, 2, 1, 1, 1]
    assert at.sample_index is not None and at.sample_index.tolist() == [0, 0, 1, 1, 1]


def test_each_row_has_the_label_of_its_position_if_there_are_such() -> None:
    labels = torch.tensor([[5, 6, 7], [8, 9, -1]])
    rows = UnitRows(torch.zeros(3, 1), torch.tensor([0, 1, 1]), torch.tensor([2, 0, 2]), (3,))
    at = batch_of(rows, positions=labels).at("layer")
    assert at.targets is not None and at.targets.tolist() == [7, 8, -1]
    # One position of each sample.
    at = batch_of(UnitRows(torch.zeros(2, 1), None, torch.tensor([1, 0]), (3,)), positions=labels).at("layer")
    assert at.targets is not None and at.targets.tolist() == [6, 8]


def test_a_layer_of_lower_resolution_has_the_label_of_the_nearest_pixel() -> None:
    labels = torch.arange(4).reshape(1, 2, 2).repeat_interleave(2, 1).repeat_interleave(2, 2)
    rows = UnitRows(torch.zeros(4, 1), torch.zeros(4).long(), torch.arange(4), (2, 2))
    at = batch_of(rows, positions=labels).at("layer")
    assert at.targets is not None and at.targets.tolist() == [0, 1, 2, 3]


def test_rows_of_unknown_samples_have_no_labels() -> None:
    batch = batch_of(UnitRows(torch.zeros(5, 1), aligned=False), classes=torch.tensor([2, 1]))
    assert not batch.is_aligned("layer") and batch.at("layer").targets is None
