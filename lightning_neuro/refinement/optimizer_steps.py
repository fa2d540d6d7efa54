"""The update rules of SGD, Adam and AdamW as recursions that are linear in the gradient, so that they can be split.

For a given preconditioner (the denominator of Adam), an update is linear in the gradients of all steps so far. So the
gradient can be split into parts, each part can be run through the same rule, and the weights of the parts add up to the
real weights.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

EXACT = (SGD, Adam, AdamW)


def why_inexact(optimizer: Optimizer) -> str:
    """The reason why the steps of an optimizer cannot be split exactly; empty if they can."""
    # Subclasses are not accepted, because they may step differently.
    if type(optimizer) not in EXACT:
        names = ", ".join(cls.__name__ for cls in EXACT)
        return f"{type(optimizer).__name__} is not one of {names}, whose steps are split exactly"
    return ""


def used_gradient(group: dict[str, Any], state: dict[str, Any], gradient: Tensor) -> Tensor:
    """The gradient that a finished step used, from what the step left in the parameter and in the state."""
    if group.get("nesterov") and not group["weight_decay"] and not group["maximize"] and _foreach(group, gradient):
        # This implementation adds the momentum to the gradient of the parameter in place.
        momentum: Tensor = group["momentum"] * state["momentum_buffer"]
        return gradient - momentum
    return gradient


def _foreach(group: dict[str, Any], gradient: Tensor) -> bool:
    if group["foreach"] is None:
        return gradient.is_cuda and group.get("fused") is None  # the default of torch
    return bool(group["foreach"])


def momentum_before(state: dict[str, Any]) -> Tensor | None:
    """The running mean of gradients that an optimizer holds from earlier training; None if it holds none."""
    buffer: Tensor | None = state.get("momentum_buffer", state.get("exp_avg"))
    return buffer


def step_parts(
    optimizer: Optimizer,
    group: dict[str, Any],
    state: dict[str, Any],
    *,
    parts: Tensor,
    means: Tensor | None,
    gradients: Tensor,
    first: bool,
) -> None:
    """Repeat the step that an optimizer has just made for each part of a parameter.

    Args:
        optimizer: One of the types in `EXACT`.
        group: The parameter group, which holds the options of the step.
        state: The state of the parameter after the step.
        parts: (parts, *shape), changed in place; they sum to the parameter.
        means: (parts, *shape), changed in place: the running mean of the gradients of each part; None for SGD without
            momentum.
        gradients: (parts, *shape), changed in place; they sum to the gradient that the optimizer used.
        first: Whether the optimizer had no running mean before this step.
    """
    if group["maximize"]:
        gradients.neg_()
    if type(optimizer) is SGD:
        _sgd(group, parts, means, gradients, first)
    else:
        assert means is not None
        decoupled = group.get("decoupled_weight_decay", type(optimizer) is AdamW)  # torch before 2.7 has no entry
        _adam(group, state, parts, means, gradients, decoupled)


def _sgd(group: dict[str, Any], parts: Tensor, means: Tensor | None, gradients: Tensor, first: bool) -> None:
    lr, momentum = group["lr"], group["momentum"]
    if group["weight_decay"]:
        gradients.add_(parts, alpha=group["weight_decay"])
    if momentum:
        assert means is not None
        means.mul_(momentum).add_(gradients, alpha=1.0 if first else 1 - group["dampening"])
        gradients = gradients + momentum * means if group["nesterov"] else means
    parts.sub_(lr * gradients)


def _adam(
    group: dict[str, Any], state: dict[str, Any], parts: Tensor, means: Tensor, gradients: Tensor, decoupled: bool
) -> None:
    lr, decay, (beta1, beta2) = group["lr"], group["weight_decay"], group["betas"]
    if decay and decoupled:
        parts.mul_(1 - lr * decay)
    elif decay:
        gradients.add_(parts, alpha=decay)
    means.mul_(beta1).add_(gradients, alpha=1 - beta1)
    # In double precision: 1 - beta2 ** 1 is .001, and single precision would lose four digits of it.
    step = torch.as_tensor(state["step"], device=parts.device, dtype=parts.dtype)
    second = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"].to(parts.dtype)
    denominator = (second / (1 - beta2**step)).sqrt_().add_(group["eps"])
    # One division for all parts.
    parts.addcmul_(means, denominator.reciprocal_().mul_(lr / (beta1**step - 1)))
