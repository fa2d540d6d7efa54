"""Forecasting: darts, which builds module and trainer itself, and pytorch_forecasting."""

from typing import Any

import numpy as np
import torch

from tests.clients.registry import TRAINER, OwnFit, Project, client


@client("darts_nbeats", "darts", model="NBEATSModel")
@client("darts_nbeats_no_val", "darts", model="NBEATSModel", val=False)
@client("darts_rnn", "darts", model="RNNModel")
@client("darts_rnn_no_val", "darts", model="RNNModel", val=False)
@client("darts_tft", "darts", model="TFTModel")
@client("darts_tft_no_val", "darts", model="TFTModel", val=False)
def darts(model: str, val: bool = True) -> Project:
    """Callbacks go in through `pl_trainer_kwargs`; `val_series` is optional."""
    import darts.models
    from darts import TimeSeries

    noise = torch.randn(200).numpy()
    series = TimeSeries.from_values((np.sin(np.arange(200) / 5) + 0.1 * noise).astype(np.float32))
    options: dict[str, Any] = {"input_chunk_length": 12, "n_epochs": 2, "batch_size": 32, "random_state": 7}
    options |= {
        "NBEATSModel": {"output_chunk_length": 4, "num_stacks": 2, "num_blocks": 1, "layer_widths": 16},
        "RNNModel": {"model": "LSTM", "hidden_dim": 12, "training_length": 16},
        "TFTModel": {"output_chunk_length": 4, "hidden_size": 8, "num_attention_heads": 2, "add_relative_index": True},
    }[model]

    def run(callbacks: list[Any]) -> None:
        trainer = {key: value for key, value in TRAINER.items() if key not in ("max_epochs", "enable_checkpointing")}
        forecaster = getattr(darts.models, model)(**options, pl_trainer_kwargs=trainer | {"callbacks": callbacks})
        forecaster.fit(series[:110], val_series=series[110:] if val else None)

    return OwnFit(run=run)


@client("forecasting_tft", "pytorch_forecasting", "lightning")
def temporal_fusion() -> Project:
    """pytorch_forecasting's TFT; its batches are (dict of inputs, (target, weight))."""
    import pandas as pd
    from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet
    from pytorch_forecasting.metrics import QuantileLoss

    steps = np.arange(60)
    rows = [
        pd.DataFrame(
            {
                "time": steps,
                "shop": str(shop),
                "sales": (np.sin(steps / 4 + shop) + 0.1 * torch.randn(60).numpy()).astype(np.float32),
            }
        )
        for shop in range(3)
    ]
    sales = pd.concat(rows, ignore_index=True)
    train = TimeSeriesDataSet(
        sales[sales.time < 44],
        time_idx="time",
        target="sales",
        group_ids=["shop"],
        max_encoder_length=8,
        max_prediction_length=3,
        static_categoricals=["shop"],
        time_varying_known_reals=["time"],
        time_varying_unknown_reals=["sales"],
        add_relative_time_idx=True,
    )
    val = TimeSeriesDataSet.from_dataset(train, sales, min_prediction_idx=35, stop_randomization=True)
    sizes = {"hidden_size": 8, "attention_head_size": 2, "hidden_continuous_size": 4, "dropout": 0.1}
    module = TemporalFusionTransformer.from_dataset(train, loss=QuantileLoss(), log_interval=-1, **sizes)
    fit = {
        "train_dataloaders": train.to_dataloader(train=True, batch_size=32, num_workers=0),
        "val_dataloaders": val.to_dataloader(train=False, batch_size=32, num_workers=0),
    }
    return Project(module, fit, {"gradient_clip_val": 0.1}, namespace="lightning.pytorch")
