"""pytorch_tabular, which builds the module, the loaders and the trainer from a data frame."""

import warnings
from typing import Any

import torch

from tests.clients.registry import OwnFit, Project, client


def frame(num_samples: int, classes: bool) -> Any:
    """Three numbers and a category, and a class or a number that they make."""
    import pandas as pd

    x = torch.randn(num_samples, 3)
    kind = torch.randint(0, 3, (num_samples,))
    score = x[:, 0] + 0.5 * x[:, 1] + (kind - 1.0) + 0.1 * torch.randn(num_samples)
    target = (score > 0).long() + (score > 1).long() if classes else score
    columns = {name: x[:, i].numpy() for i, name in enumerate(("a", "b", "c"))}
    return pd.DataFrame(columns | {"kind": ["uvw"[k] for k in kind.tolist()], "target": target.numpy()})


@client("tabular_classification", "pytorch_tabular", task="classification")
@client("tabular_regression", "pytorch_tabular", task="regression")
def tabular(task: str) -> Project:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pytorch_tabular import TabularModel
        from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
        from pytorch_tabular.models import CategoryEmbeddingModelConfig

    model = TabularModel(
        data_config=DataConfig(target=["target"], continuous_cols=["a", "b", "c"], categorical_cols=["kind"]),
        model_config=CategoryEmbeddingModelConfig(task=task, layers="24-12"),
        optimizer_config=OptimizerConfig(),
        trainer_config=TrainerConfig(
            batch_size=32,
            max_epochs=2,
            accelerator="cpu",
            devices=1,
            early_stopping=None,
            checkpoints=None,
            load_best=False,
            progress_bar="none",
            trainer_kwargs={"enable_model_summary": False},
        ),
        verbose=False,
    )
    train, val = (frame(n, task == "classification") for n in (96, 104))
    return OwnFit(run=lambda callbacks: model.fit(train=train, validation=val, callbacks=callbacks, seed=7))
