"""How the model is called: seen once, and repeated."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_neuro.model_calls import modules_outside_graphs, part_at, parts_of, watched_calls
from tests.helpers import hooks_of


class Parts(nn.Module):
    """An encoder and a head; how they are called is up to the step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(4, 5), nn.ReLU())
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor, scale: float = 1.0, *, mask: Tensor | None = None) -> Tensor:
        hidden = self.encoder(x) * scale
        return self.head(hidden if mask is None else hidden * mask)


@dataclass
class Batch:
    x: Tensor
    y: Tensor


X, Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 3

# A batch, and a step over it.
STEPS: dict[str, tuple[Any, Any]] = {
    "positional": ((X, Y), lambda net, b: net(b[0])),
    "keywords": ({"x": X, "mask": torch.ones(6, 5)}, lambda net, b: net(**b)),
    "constant": ([X, Y], lambda net, b: net(b[0], 0.5)),
    "nested": ({"views": [X, X + 1], "y": Y}, lambda net, b: (net(b["views"][0]), net(b["views"][1]))[1]),
    "dataclass": (Batch(X, Y), lambda net, b: net(b.x)),
    "two parts": ((X, Y), lambda net, b: net.head(net.encoder(b[0]))),
    "a view of the same memory": ((X, Y), lambda net, b: net(b[0].view(6, 4))),
}


def other(batch: Any) -> Any:
    """Another batch of the same structure and size."""
    if isinstance(batch, Tensor):
        return batch if batch.dtype == torch.long else batch * 2 + 1
    if isinstance(batch, dict):
        return {key: other(part) for key, part in batch.items()}
    return Batch(other(batch.x), batch.y) if isinstance(batch, Batch) else type(batch)(map(other, batch))


@pytest.mark.parametrize("name", STEPS)
def test_calls_are_repeated_also_with_another_batch_and_other_weights(name: str) -> None:
    batch, step = STEPS[name]
    net = Parts()
    with watched_calls(net, batch) as seen:
        expected = step(net, batch)
    plan = seen.plan()
    assert plan is not None and plan.fits_any_batch and hooks_of(net) == []
    assert torch.equal(plan.run(net, plan.inputs_of(batch)), expected)
    with torch.no_grad():
        net.head.weight.mul_(3), net.encoder[0].weight.mul_(-2)
    assert torch.equal(plan.run(net, plan.inputs_of(other(batch))), step(net, other(batch)))


def test_the_inputs_are_those_at_the_time_of_the_call() -> None:
    net, x = Parts(), X.clone()
    with watched_calls(net, [x]) as seen:
        expected = net(x)
        x.zero_()
    plan = seen.plan()
    assert plan is not None and torch.equal(plan.run(net, seen.inputs), expected)


def test_what_is_computed_from_the_batch_is_kept_but_does_not_fit_another_batch() -> None:
    net = Parts()
    with watched_calls(net, (X, Y)) as seen:
        expected = net(X.flip(0))
    plan = seen.plan()
    assert plan is not None and not plan.fits_any_batch and torch.equal(plan.run(net, seen.inputs), expected)


def test_integer_masks_between_calls_are_constants_but_values_may_depend_on_the_weights() -> None:
    net = Parts()
    with watched_calls(net, (X, Y)) as seen:
        net.head(net.encoder(X) + 1)
    assert seen.plan() is None and "may depend on the weights" in seen.why_not

    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return x * mask

    net.masked = Masked()
    with watched_calls(net, (X, Y)) as seen:
        expected = net.head(net.masked(net.encoder(X), Y[:, None] > 0))
    plan = seen.plan()
    assert plan is not None and torch.equal(plan.run(net, seen.inputs), expected)


def test_losses_and_metrics_are_not_part_of_the_model() -> None:
    class Lit(Parts):
        def __init__(self) -> None:
            super().__init__()
            self.loss, self.act, self.accuracy = nn.CrossEntropyLoss(), nn.Tanh(), MulticlassAccuracy(3)
            self.softmax, self.scaled = nn.Softmax(1), nn.Softmax(1)

    net = Lit()
    with watched_calls(net, (X, Y)) as seen:
        auxiliary = net.loss(net(X) * 2, Y)  # computed between two calls, but only for the loss
        expected = net.head(net.act(net.encoder(X)))
        net.accuracy(net.softmax(expected), Y), net.loss(expected, Y) + auxiliary
        net.scaled(expected / 2)
    plan = seen.plan()
    assert plan is not None and [call.module for call in plan.calls] == ["", "encoder", "act", "head", "softmax"]
    assert plan.in_batch == ((0,),)  # the labels are not among the inputs
    assert torch.equal(plan.run(net, seen.inputs), expected)
    with watched_calls(net, (X, Y)) as seen:
        net.loss(torch.randn(6, 3), Y)
    assert seen.calls_nothing and seen.plan() is None


def test_an_input_that_was_changed_in_place_is_another_input() -> None:
    net, x = Parts(), X.clone()
    with watched_calls(net, (X, Y)) as seen:
        net(x)
        x.add_(1)
        expected = net(x)
    plan = seen.plan()
    assert plan is None or torch.equal(plan.run(net, seen.inputs), expected)
    assert "may depend on the weights" in seen.why_not


def test_an_output_that_was_changed_in_place_is_not_taken_for_the_output() -> None:
    net = Parts()
    with watched_calls(net, (X, Y)) as seen, torch.no_grad():
        hidden = net.encoder(X)
        hidden.mul_(2)
        net.head(hidden)
    assert seen.plan() is None


def test_a_step_without_calls_and_one_that_fails() -> None:
    net = Parts()
    with watched_calls(net, (X, Y)) as seen:
        pass
    assert seen.plan() is None and seen.calls_nothing
    with pytest.raises(RuntimeError), watched_calls(net, (X, Y)) as seen:
        net(torch.zeros(2, 9))
    assert hooks_of(net) == [] and not seen.calls_nothing
    # After an error inside a call, the next call counts again.
    with watched_calls(net, (X, Y)) as seen:
        with pytest.raises(RuntimeError):
            net(torch.zeros(2, 9))
        net(X)
    plan = seen.plan()
    assert plan is not None and [call.module for call in plan.calls] == ["", ""]


def test_the_call_through_which_a_strategy_runs_the_step_does_not_count() -> None:
    class Lit(Parts):
        def training_step(self, batch: Any) -> Tensor:
            return self(batch[0])

    net = Lit()
    original = net.forward

    def run_step(*args: Any) -> Tensor:  # as Lightning's redirection under distributed strategies
        net.forward = original  # type: ignore[method-assign]
        return net.training_step(*args)

    with watched_calls(net, (X, Y)) as seen:
        net.forward = run_step  # type: ignore[method-assign]
        net((X, Y))
    plan = seen.plan()
    assert (
        plan is not None
        and [call.module for call in plan.calls] == [""]
        and torch.equal(plan.run(net, seen.inputs), net(X))
    )


def test_objects_that_hide_their_tensors_are_passed_whole() -> None:
    class Graphs:
        def __init__(self, x: Tensor) -> None:
            self.x = x

        def to(self, device: Any) -> "Graphs":
            return self

    class OverGraphs(Parts):
        def forward(self, batch: Any) -> Tensor:  # type: ignore[override]
            return super().forward(batch.x)

    net, graphs = OverGraphs(), Graphs(X)
    with watched_calls(net, graphs) as seen:
        net(graphs)
    plan = seen.plan()
    assert plan is not None and plan.in_batch == ((),)
    assert torch.equal(plan.run(net, plan.inputs_of(Graphs(X + 1))), Parts()(X + 1))


def test_a_list_of_images_is_one_input_however_long() -> None:
    class OverList(Parts):
        def forward(self, images: Any) -> Tensor:  # type: ignore[override]
            return super().forward(torch.stack(list(images)))

    net = OverList()
    for size in (3, 5):
        batch = (list(torch.randn(size, 4)), [{"labels": 1}] * size)
        with watched_calls(net, batch) as seen:
            expected = net(batch[0])
        plan = seen.plan()
        assert plan is not None and plan.in_batch == ((0,),)
        assert torch.equal(plan.run(net, plan.inputs_of(batch)), expected)


def test_parts_of_a_batch_are_found_again() -> None:
    batch = {"a": [X, (Y, "text")], "b": Batch(X, Y)}
    found = list(parts_of(batch))
    assert all(part_at(batch, path) is part for path, part in found)
    assert {path for path, part in found if part is Y} == {("a", 1, 0), ("b", "y")}


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_compiled_and_scripted_modules_are_seen_from_outside_only() -> None:
    net = Parts()
    net.encoder = torch.compile(net.encoder)  # type: ignore[assignment]
    net.head = torch.jit.trace(net.head, torch.zeros(1, 5))  # type: ignore[assignment]
    assert list(modules_outside_graphs(net)) == ["", "encoder"]
    assert list(modules_outside_graphs(Parts())) == ["", "encoder", "encoder.0", "encoder.1", "head"]
