"""`lightning.pytorch` and `pytorch_lightning` are two class trees; the callbacks work in both, and say the same."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning
import torch
from torch import Tensor, nn

from lightning_neuro import MetricCallback, Probe
from tests.contract.callbacks import AT_THE_END, CALLBACKS, Make, layers_of, mean_keys, over_activations
from tests.helpers import hooks_of
from tests.models import loader, mlp

lightning = pytest.importorskip("lightning.pytorch")

NAMESPACES = {"pytorch_lightning": pytorch_lightning, "lightning": lightning}


def module_of(pl: Any) -> Any:
    class Classifier(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp().net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    return Classifier()


def train(pl: Any, *callbacks: Any, module: Any = None, **options: Any) -> Any:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    defaults = {"max_epochs": 2, "accelerator": "cpu", "enable_model_summary": False}
    trainer = pl.Trainer(callbacks=list(callbacks), **(defaults | quiet | options))
    trainer.fit(module or module_of(pl), loader(), loader(32))
    return trainer


def test_both_accept_the_callback(make: Make) -> None:
    for pl in NAMESPACES.values():
        assert isinstance(make(), pl.Callback)


def test_both_give_the_same_values(make: Make) -> None:
    callbacks = []
    for pl in NAMESPACES.values():
        callbacks.append(callback := make(log_scalars="*"))
        trainer = train(pl, callback)
        for key, value in callback.scalars.items():
            assert float(trainer.callback_metrics[key]) == pytest.approx(value, rel=1e-6)
    assert callbacks[0].scalars == callbacks[1].scalars != {}
    assert callbacks[0].initial == callbacks[1].initial


def test_monitors_of_lightning(make: Make, name: str, tmp_path: Path) -> None:
    key = mean_keys(name)[0]
    stop = lightning.callbacks.EarlyStopping(key, mode="max", patience=100)
    save = lightning.callbacks.ModelCheckpoint(tmp_path, monitor=key, mode="max")
    logger = lightning.loggers.CSVLogger(tmp_path / "logs")
    callback = make()
    train(lightning, stop, save, callback, max_epochs=3, enable_checkpointing=True, logger=logger)
    assert float(stop.best_score) == float(save.best_model_score) >= callback.scalars[key] - 1e-6
    state = torch.load(save.best_model_path, weights_only=True)["callbacks"][callback.state_key]
    assert state["initial"] == callback.initial

    resumed = make()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_epochs=4, accelerator="cpu", callbacks=[resumed], **quiet)
    trainer.fit(module_of(lightning), loader(), loader(32), ckpt_path=save.best_model_path)
    assert resumed.initial == callback.initial
    assert resumed.last_epoch == 3


def test_tensorboard_of_lightning(make: Make, name: str, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback = make(log_scalars="*")
    train(lightning, callback, logger=lightning.loggers.TensorBoardLogger(tmp_path, name="", version=""))
    tags = EventAccumulator(str(tmp_path)).Reload().Tags()
    assert callback.scalars.keys() <= set(tags["scalars"])
    figures = callback.draw(callback.result) | callback.draw_curves()
    assert len(tags["images"]) == len(figures) + len(AT_THE_END.get(name, []))
    assert len(tags["histograms"]) == (0 if name in ("user", "example") else len(layers_of(name)))


@over_activations
@pytest.mark.parametrize("namespace", NAMESPACES)
def test_an_error_before_training_leaves_no_hook(make: Make, namespace: str) -> None:
    pl = NAMESPACES[namespace]
    module = module_of(pl)
    with pytest.raises(Exception, match="matches no module"):
        train(pl, make(Probe(layers="nothing")), module=module)
    assert hooks_of(module) == []


@over_activations
@pytest.mark.parametrize("namespace", NAMESPACES)
def test_validate_of_both(make: Make, namespace: str) -> None:
    pl = NAMESPACES[namespace]
    module, callback = module_of(pl), make(log_scalars="*")
    trainer = pl.Trainer(callbacks=[callback], logger=False, accelerator="cpu", enable_progress_bar=False)
    (metrics,) = trainer.validate(module, loader(32), verbose=False)
    assert callback.scalars
    for key, value in callback.scalars.items():
        assert metrics[key] == pytest.approx(value, rel=1e-6)


def test_callbacks_of_ours_are_found_in_either() -> None:
    for pl in NAMESPACES.values():
        callbacks: list[MetricCallback] = [make(name=f"n{i}") for i, make in enumerate(CALLBACKS.values())]
        train(pl, *callbacks)
        assert all(callback.scalars for callback in callbacks)
