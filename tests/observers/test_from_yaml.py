"""Attributes from a YAML file: by import path, by key and by index."""

import pytest

jsonargparse = pytest.importorskip("jsonargparse")


# Lightning's CLI calls what newer versions of jsonargparse deprecate.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:pytorch_lightning.cli")
def test_attributes_come_from_a_config_file(tmp_path, monkeypatch):
    from pytorch_lightning.cli import LightningCLI

    from tests.models import mlp

    monkeypatch.setattr("sys.argv", ["train.py"])  # Lightning warns of further words

    config = tmp_path / "config.yaml"
    config.write_text(
        """
trainer:
  callbacks:
    - class_path: lightning_neuro.ObserverProbes
      init_args:
        attributes: {mark: 3, artist: artist, loaders: "lightning_neuro.demo:digits_loaders"}
        group_fn: 4
        num_folds: 4
"""
    )
    cli = LightningCLI(
        type(mlp()),
        args=["--seed_everything=false", "--config", str(config), "--model.net=torch.nn.Identity"],
        run=False,
    )
    (observers,) = (one for one in cli.trainer.callbacks if type(one).__name__ == "ObserverProbes")
    assert observers.attributes == {"mark": 3, "artist": "artist", "loaders": "lightning_neuro.demo:digits_loaders"}
    assert (observers.group_fn, observers.metric.settings.num_folds) == (4, 4)
