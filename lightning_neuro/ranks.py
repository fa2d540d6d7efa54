"""What processes that train together must agree on."""

import pytorch_lightning as pl
import torch


def on_any_rank(trainer: "pl.Trainer", condition: bool) -> bool:
    """Whether a condition holds on at least one rank; every rank must ask."""
    return condition if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(condition, all=False)


def over_ranks(trainer: "pl.Trainer", value: int, reduce_op: str) -> int:
    """The `"sum"` or `"max"` of a number over all ranks; every rank must ask."""
    if trainer.world_size == 1:
        return value
    number = torch.tensor(value, device=trainer.strategy.root_device)
    return int(trainer.strategy.reduce(number, reduce_op=reduce_op))
