"""What kind of layer a module is, in any library: activation, gate, recurrent, linear or convolution."""

import re

from torch import nn
from torch.nn.modules import activation as _activation
from torch.nn.modules import conv as _conv
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_neuro.units import own_modules

_NOT_HIDDEN = (nn.MultiheadAttention, nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin)
_ACTIVATIONS = tuple(cls for cls in own_modules(_activation) if cls not in _NOT_HIDDEN)
LINEAR_OR_CONV: tuple[type[nn.Module], ...] = (nn.Linear, _conv._ConvNd)

# Class names such as GELUActivation, QuickGELU, Swish, HardMish, FReLU, SnakeBeta, ActFn.
_ACTIVATION_NAME = re.compile(r"(?i:[a-z]elu|silu|swish|mish|sigmoid|tanh|softplus|activation|^snake)|Act(?![a-z])")
_LINEAR_NAME = re.compile(r"(?i:linear|conv|dense)")
_GATE_NAME = re.compile(r"(^|_)(se|gate|gates|gating|squeeze|excite|excitation)(_|\d|$)")


def is_activation(module: nn.Module) -> bool:
    """Whether a module applies an activation function: one of torch, or of a class that is named like one.

    Only modules without submodules and matrices of parameters are recognised by their name; `PReLU` and the like have
    at most a parameter per unit.
    """
    if isinstance(module, _ACTIVATIONS):
        return True
    named = _ACTIVATION_NAME.search(type(module).__name__) and not isinstance(module, _NOT_HIDDEN)
    return bool(named) and not any(module.children()) and all(part.ndim <= 1 for part in module.parameters())


def is_sigmoid(module: nn.Module) -> bool:
    """Whether an activation maps to 0 .. 1; beside other activations in a model it is most likely a gate."""
    return "sigmoid" in type(module).__name__.lower()


def is_gate(name: str) -> bool:
    """Whether a module's name says that it is part of a gate, such as squeeze-and-excitation."""
    return any(_GATE_NAME.search(part) for part in name.lower().split("."))


def is_recurrent(module: nn.Module) -> bool:
    """Whether a module is a recurrent layer."""
    return isinstance(module, nn.RNNBase)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear or convolution layer: one of torch, or named like one and with a weight matrix."""
    # An attention module uses the weights of its projection without calling it.
    if isinstance(module, LINEAR_OR_CONV):
        return not isinstance(module, NonDynamicallyQuantizableLinear)
    weight = module._parameters.get("weight")
    return bool(_LINEAR_NAME.search(type(module).__name__)) and weight is not None and weight.ndim >= 2
