"""Which modules a forward pass calls."""

import copy
import pickle
from contextlib import suppress
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from lightning_neuro.call_trace import SeenCall, call_trace
from tests.helpers import hooks_of


def rows(seen: list[SeenCall]) -> list[tuple[object, ...]]:
    return [(call.name, call.input_shape, call.output_shape, call.depth) for call in seen]


class Net(nn.Module):
    """Registers its head first, and calls its activation twice."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)
        self.act = nn.ReLU(inplace=True)
        self.trunk = nn.Sequential(nn.Linear(4, 5), self.act, nn.Linear(5, 3), self.act)
        self.unused = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(input=x))


EXPECTED = [
    ("", (7, 4), (7, 2), 0),
    ("trunk", (7, 4), (7, 3), 1),
    ("trunk.0", (7, 4), (7, 5), 2),
    ("act", (7, 5), (7, 5), 2),
    ("trunk.2", (7, 5), (7, 3), 2),
    ("act", (7, 3), (7, 3), 2),
    ("head", (7, 3), (7, 2), 1),
]


def test_calls_are_listed_in_the_order_of_their_start() -> None:
    net = Net()
    with call_trace(net) as seen:
        net(torch.ones(7, 4))
    assert rows(seen) == EXPECTED
    assert [call.module for call in seen][:4] == [net, net.trunk, net.trunk[0], net.act]
    assert hooks_of(net) == []
    net(torch.ones(7, 4))
    assert len(seen) == len(EXPECTED)


def test_the_outputs_are_those_of_a_run_without_it() -> None:
    net, x = Net(), torch.randn(7, 4)
    expected = net(x)
    with call_trace(net):
        assert torch.equal(net(x), expected)


def test_names_are_clean_and_a_compiled_model_is_seen_in_an_eager_pass() -> None:
    net = Net()
    compiled = torch.compile(net)
    with torch.compiler.set_stance("force_eager"), call_trace(compiled) as seen:
        compiled(torch.ones(7, 4))
    assert rows(seen) == EXPECTED
    assert seen[0].module is net


class Catches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.Sequential(nn.Linear(2, 2), nn.Linear(3, 3))
        self.after = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.outer(x)
        except RuntimeError:
            return self.after(x)


def test_the_depth_is_right_after_an_exception_that_the_model_catches() -> None:
    net = Catches()
    with call_trace(net) as seen:
        net(torch.ones(1, 2))
    assert rows(seen) == [
        ("", (1, 2), (1, 2), 0),
        ("outer", (1, 2), None, 1),
        ("outer.0", (1, 2), (1, 2), 2),
        ("outer.1", (1, 2), None, 2),
        ("after", (1, 2), (1, 2), 1),
    ]


def test_the_depth_is_right_after_a_call_that_a_hook_of_the_user_stopped() -> None:
    net = Catches()

    def stop(module: nn.Module, inputs: object) -> None:
        raise RuntimeError

    net.outer.register_forward_pre_hook(stop)
    with call_trace(net) as seen:
        net(torch.ones(1, 2))
    assert [(call.name, call.depth) for call in seen] == [("", 0), ("outer", 1), ("after", 1)]


def test_the_depth_is_right_after_a_call_that_ended_without_its_hook() -> None:
    # torch calls no hook after exceptions that are no `Exception`.
    class Stopped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    class Resumes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Stopped()

        def forward(self, x: Tensor) -> Tensor:
            with suppress(KeyboardInterrupt):
                self.inner(x)
            return x

    with call_trace(net := nn.Sequential(Resumes(), nn.ReLU())) as seen:
        net(torch.ones(1, 2))
    assert [(call.name, call.output_shape, call.depth) for call in seen] == [
        ("", (1, 2), 0),
        ("0", (1, 2), 1),
        ("0.inner", None, 2),
        ("1", (1, 2), 1),
    ]


def test_an_exception_takes_the_hooks_off() -> None:
    net = Net()
    with pytest.raises(RuntimeError), call_trace(net):
        net(torch.ones(7, 3))
    assert hooks_of(net) == []


@dataclass
class Strict:
    """A user's container that cannot be built again from its parts."""

    first: Tensor

    def __deepcopy__(self, memo: object) -> "Strict":
        raise ZeroDivisionError


class Returns(nn.Module):
    def __init__(self, output: object) -> None:
        super().__init__()
        self.output = output

    def forward(self, *inputs: object) -> object:
        return self.output


PACKED = pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])


@pytest.mark.parametrize(
    ("output", "shape"),
    [
        (None, None),
        ("text", None),
        (PACKED, (4, 2)),
        ((None, {"b": [torch.ones(2, 3)]}), (2, 3)),
        (torch.tensor(1.0), ()),
        (Strict(torch.ones(1)), None),
    ],
    ids=["none", "text", "packed", "containers", "scalar", "strict"],
)
def test_outputs_of_any_kind_do_no_harm(output: object, shape: tuple[int, ...] | None) -> None:
    net = Returns(output)
    with call_trace(net) as seen:
        assert net("text", output) is output
    assert rows(seen) == [("", shape, shape, 0)]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_have_no_shape(layout: torch.layout) -> None:
    tensor = torch.nested.nested_tensor([torch.ones(3, 2), torch.ones(1, 2)], layout=layout)
    net = nn.Identity()
    with call_trace(net) as seen:
        assert net(tensor) is tensor
    assert rows(seen) == [("", None, None, 0)]


def test_a_recurrent_layer_with_a_packed_sequence() -> None:
    net = nn.LSTM(2, 3)
    with call_trace(net) as seen:
        assert isinstance(net(PACKED)[0], PackedSequence)
    assert rows(seen) == [("", (4, 2), (4, 3), 0)]


def test_scripted_modules_are_passed_over() -> None:
    net = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(2, 2))), nn.ReLU())
    with call_trace(net) as seen:
        net(torch.ones(1, 2))
    assert rows(seen) == [("", (1, 2), (1, 2), 0), ("1", (1, 2), (1, 2), 1)]
    assert hooks_of(net[1:]) == []


def test_copies_and_pickles_record_nothing() -> None:
    net = Net()
    with call_trace(net) as seen:
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            twin(torch.ones(7, 4))
    assert seen == []
