"""Whatever way a network is trained, the values are those of its weights, computed by hand."""

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pytorch_lightning.loggers import Logger

from lightning_neuro import MetricCallback
from tests.contract.callbacks import (
    CALLBACKS,
    Make,
    assert_close,
    assert_logged,
    listed_probe,
    over_activations,
    over_activations_with_modes,
)
from tests.helpers import hooks_of
from tests.models import MemoryLogger, Module, fit, loader, mlp


class Manual(Module):
    """Manual optimization with two optimizers, one for each half."""

    def __init__(self) -> None:
        super().__init__(mlp().net)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), lr=1e-2) for part in (self.net[:3], self.net[3:])]


MODES: dict[str, tuple[Callable[[], Any], dict[str, Any], float]] = {
    "plain": (mlp, {}, 1e-6),
    "accumulation": (mlp, {"accumulate_grad_batches": 2}, 1e-6),
    "clipping": (mlp, {"gradient_clip_val": 0.1}, 1e-6),
    "bf16-mixed": (mlp, {"precision": "bf16-mixed"}, 1e-6),
    "64-true": (mlp, {"precision": "64-true"}, 1e-3),
    "manual": (Manual, {}, 1e-6),
    "no inference mode": (mlp, {"inference_mode": False}, 1e-6),
    "deterministic": (mlp, {"deterministic": True}, 1e-6),
}


@pytest.fixture(autouse=True)
def not_deterministic_afterwards() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@over_activations_with_modes
@pytest.mark.parametrize("mode", MODES)
def test_values_are_those_of_the_weights(make: Make, mode: str) -> None:
    new, options, tolerance = MODES[mode]
    module, callback, without = new(), make(listed_probe()), new()
    fit(module, callback, train=loader(), **options)
    fit(without, train=loader(), **options)
    for mine, other in zip(module.parameters(), without.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert_logged(callback, module, tolerance)


@over_activations
def test_bf16_true_is_near_the_same_weights_in_full_precision(make: Make) -> None:
    module, callback = mlp(), make(listed_probe())
    fit(module, callback, train=loader(), precision="bf16-true")
    assert callback.scalars
    assert next(module.parameters()).dtype == torch.bfloat16
    assert set(callback.result) == {"net.2", "net.4"}
    if callback.family == "":  # smooth in the activations, unlike bins and communities
        assert_logged(callback, module, 2e-2)


@pytest.mark.parametrize(("options", "steps"), [({}, [0, 1, 3, 5, 7]), ({"accumulate_grad_batches": 2}, [0, 1, 3])])
def test_every_n_steps_counts_optimiser_steps(make: Make, options: dict[str, Any], steps: list[int]) -> None:
    logger = MemoryLogger()
    callback = make(listed_probe(every_n_steps=2), log_scalars="*")
    fit(mlp(), callback, logger=logger, **options)
    for key in callback.initial:
        assert [step for step, _ in logger.curves[key]] == steps


def test_manual_optimisation_counts_the_steps_of_both_optimizers(make: Make) -> None:
    logger = MemoryLogger()
    callback = make(listed_probe(every_n_steps=4), log_scalars="*")
    trainer = fit(Manual(), callback, logger=logger)
    assert trainer.global_step == 16
    assert all(len(logger.curves[key]) == 1 + 4 for key in callback.initial)


@over_activations
def test_validate_alone(make: Make) -> None:
    module, fitted, alone = mlp(), make(listed_probe()), make(listed_probe(), log_scalars="*")
    trainer = fit(module, fitted, train=loader())
    logger = MemoryLogger()
    validating = type(trainer)(
        **{"callbacks": [alone], "logger": logger, "accelerator": "cpu", "enable_progress_bar": False}
    )
    (metrics,) = validating.validate(module, loader(32), verbose=False)
    assert_logged(alone, module)
    for key, value in alone.scalars.items():
        assert metrics[key] == pytest.approx(value, rel=1e-6)
    assert hooks_of(module) == []
    # Nothing made under inference mode stays behind: the module can be trained on.
    fit(module, make(listed_probe()), train=loader())


# 9: torch.compile -----------------------------------------------------------------------------------------------------


class Silent(Module):
    """Logs nothing of its own: where Lightning compiles the steps too, its `self.log` breaks the compiler."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])


def compile_whole(module: Any, backend: str) -> Any:
    return torch.compile(module, backend=backend)


def compile_net(module: Any, backend: str) -> Any:
    module.net = torch.compile(module.net, backend=backend)
    return module


def compile_layer(module: Any, backend: str) -> Any:
    module.net[2] = torch.compile(module.net[2], backend=backend)
    return module


def compile_in_place(module: Any, backend: str) -> Any:
    module.compile(backend=backend)
    return module


def compile_net_in_place(module: Any, backend: str) -> Any:
    module.net.compile(backend=backend)
    return module


WAYS = {
    way.__name__: way for way in (compile_whole, compile_net, compile_layer, compile_in_place, compile_net_in_place)
}


def curves(callback: MetricCallback, module: Any) -> dict[str, float]:
    logger: Logger = MemoryLogger()
    fit(module, callback, train=loader(), logger=logger)
    assert isinstance(logger, MemoryLogger)
    return {
        f"{key} {step}": value
        for key, curve in logger.curves.items()
        for step, value in curve
        if key.startswith(callback.name)
    }


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("name", "way"),
    # How hooks get past a compiler is decided by the base class.
    [*(("user", way) for way in WAYS), *((name, "compile_net") for name in CALLBACKS if name != "user")],
)
def test_compiled_values_are_the_uncompiled_ones(make: Make, way: str) -> None:
    expected = curves(make(listed_probe()), Silent(mlp().net))
    module = WAYS[way](Silent(mlp().net), "eager")
    assert_close(curves(make(listed_probe()), module), expected)
    # Compiled, and run, before the callback was there: a hook added later is skipped by the compiled graph.
    # A measure may become defined as the network trains on.
    assert expected.keys() <= curves(make(listed_probe()), module).keys()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.skipif(shutil.which("g++") is None, reason="the default backend needs a C++ compiler")
def test_the_default_backend() -> None:
    make = CALLBACKS["user"]
    expected = curves(make(listed_probe()), mlp())
    assert_close(curves(make(listed_probe()), compile_net(mlp(), "inductor")), expected, 1e-3)
