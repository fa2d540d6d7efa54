"""A gate at every unit: the common mechanism of attribution, masked passes and learned masks.

A gate g multiplies a unit's output a at all positions. What it removes is replaced by a fill m, zero or the unit's
mean: the output becomes m + g (a - m). At g = 1 nothing changes. The derivative of a logit with respect to the gate, at
g = 1, is sum over positions of (a - m) dz/da: the effect of ablating the unit, to first order. A gate of 0 is the
ablation itself. The gate of an attention head multiplies all channels of the head before the output projection, and m
has a value for each channel. So every derivative here is with respect to gates, and none with respect to parameters;
and since a gated output is a new tensor, in-place activations after it do no harm.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from lightning_neuro.batches import first_tensor
from lightning_neuro.capture import MAX_CALLS_AS_LAYERS, uncompiled
from lightning_neuro.checks import ArgumentError, NothingToDoError
from lightning_neuro.heads import Heads, Layer, hooked_module, require_divisible
from lightning_neuro.isolation import evaluation_mode, without_inference_mode
from lightning_neuro.layers import named_layers, resolve_layers
from lightning_neuro.paths.layer_outputs import (
    UnitAxes,
    broadcast,
    check_classes,
    unit_axes,
    unit_means,
    with_tensor,
)
from lightning_neuro.paths.logits import class_scores, require_no_probabilities
from lightning_neuro.units import latest_layout


class Site(NamedTuple):
    """A place in the forward pass where units have gates: one call of a layer.

    Attributes:
        layer: Name of the layer.
        call: Which of the layer's calls in the pass, from 1.
    """

    layer: str
    call: int

    def name(self, num_calls: int) -> str:
        """The key of the site in scores and paths: the layer's name, with the call if there is more than one."""
        return self.layer if num_calls == 1 else f"{self.layer}.call{self.call}"


def modules_of_sites(model: nn.Module, names: Mapping[str, Any]) -> dict[str, Layer]:
    """The layers to which the sites of scores or paths belong, as modules or heads by name.

    A layer of exactly that name has precedence over a call of another layer.

    Raises:
        MisconfigurationException: If a name is neither a layer nor a call of one.
    """
    layers = named_layers(model)
    calls = {
        Site(layer, call).name(MAX_CALLS_AS_LAYERS): layer
        for layer in (*layers, *(f"{name}.heads" for name in layers))
        for call in range(1, MAX_CALLS_AS_LAYERS + 1)
    }
    return resolve_layers(model, [name if name in layers else calls.get(name, name) for name in names])


@dataclass(frozen=True, eq=False)
class Attribution:
    """Contributions of all units for N samples, from one forward and one backward pass.

    Attributes:
        logits: (N, classes).
        contributions: Site -> (N, units), sum over positions of a dz_y/da.
        gradients: Site -> (N, channels), sum over positions of dz_y/da; empty unless requested. The channels are the
            units, except for heads, each of which has several.
        features: Site -> (N, channels), mean over positions of a.
    """

    logits: Tensor
    contributions: dict[str, Tensor]
    gradients: dict[str, Tensor]
    features: dict[str, Tensor]


class GatedModel:
    """Puts a gate at every unit of some layers of a model.

    A layer that is called several times in a pass (a shared ReLU) is a site for each of its first eight calls, named
    `<layer>.call1`, `<layer>.call2`, ...

    Args:
        model: The model.
        layers: Module or heads by name.
        forward: Runs the model on its inputs. Default: the model itself.
        num_classes: Number of classes of the labels, by which outputs that are no logits are recognised; see
            `class_scores`. None: the output is taken for logits.
        independent: Whether each logit says of an attribute whether it is present (sigmoid, several labels a sample),
            and not of a class how likely it is compared with the others (softmax).
        sample_dims: Layer and number of the call -> dimension of the samples in its output, where it is known.

    Attributes:
        names: Site -> its key in scores and paths; available after a pass of `attribute` or `locate_units`.
        axes: Name of a site -> dimensions of samples and units in its output; available after such a pass.
        num_units: Name of a site -> number of its units; available after such a pass.
        failures: Layer -> why its units cannot be gated.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Layer],
        forward: Callable[[Any], Any] | None = None,
        *,
        num_classes: int | None = None,
        independent: bool = False,
        sample_dims: Mapping[tuple[str, int], int] | None = None,
    ) -> None:
        self.model = model
        self.layers = dict(layers)
        self.forward: Callable[[Any], Any] = model if forward is None else forward
        self.num_classes = num_classes
        self.independent = independent
        self.sample_dims = {} if sample_dims is None else sample_dims  # filled while the model runs
        self.names: dict[Site, str] = {}
        self.axes: dict[str, UnitAxes] = {}
        self.num_units: dict[str, int] = {}
        self.failures: dict[str, str] = {}

    def attribute(self, inputs: Any, targets: Tensor, *, gradients: bool = False) -> Attribution:
        """Compute the contributions of all units to the logit of each sample's class: one forward, one backward pass.

        Args:
            inputs: The model's input.
            targets: int64 (N,), class labels.
            gradients: Whether to also return the gradients without the activations, which mean ablation needs.

        Returns:
            Logits, contributions, gradients and mean activations.

        Raises:
            ArgumentError: If the model returns no logits, they depend on no site, or a label is not a class.
        """
        gates: dict[Site, Tensor] = {}
        shifts: dict[Site, Tensor] = {}
        features: dict[Site, Tensor] = {}

        def act(site: Site, output: Tensor, axes: UnitAxes) -> Tensor:
            shape = output.shape[axes.samples], output.shape[axes.units]
            gates[site] = output.new_ones(shape[0], self._num_units(site, output, axes)).requires_grad_()
            features[site] = _summable(unit_means(output.detach(), axes))
            output = output * broadcast(gates[site], output, axes)
            if gradients:
                shifts[site] = output.new_zeros(shape).requires_grad_()
                output = output + broadcast(shifts[site], output, axes)
            return output

        with torch.enable_grad():
            logits = self._locating_pass(inputs, len(targets), act)
            targets = targets.to(logits.device)
            check_classes(targets, logits.shape[1])
            if not gates:
                reasons = "; ".join(f"layer '{layer}': {reason}" for layer, reason in self.missing().items())
                raise NothingToDoError(f"No path can run through the layers. {reasons}.")
            if not logits.requires_grad:
                raise ArgumentError(f"The logits must depend on one of the layers: {', '.join(self.layers)}.")
            own = logits.gather(1, targets[:, None]).sum()
            leaves = [*gates.values(), *shifts.values()]
            found = torch.autograd.grad(own, leaves, allow_unused=True)
        finite = logits.detach().isfinite().all(1)
        undefined = torch.where(finite, 0.0, float("nan"))[:, None]
        # A layer that the logits do not depend on (an auxiliary head) has no effect on them.
        effects = [
            _summable((torch.zeros_like(leaf) if effect is None else effect) + undefined)
            for leaf, effect in zip(leaves, found, strict=True)
        ]
        names = [self.names[site] for site in gates]
        return Attribution(
            logits=_summable(logits.detach()),
            contributions=dict(zip(names, effects[: len(names)], strict=True)),
            gradients=dict(zip(names, effects[len(names) :], strict=True)) if gradients else {},
            features=dict(zip(names, features.values(), strict=True)),
        )

    def locate_units(self, inputs: Any, num_samples: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the model unchanged, and find the units; returns the logits, and each site's means, (channels,)."""
        means: dict[Site, Tensor] = {}

        def act(site: Site, output: Tensor, axes: UnitAxes) -> Tensor:
            means[site] = unit_means(output, axes).mean(0)
            return output

        logits = self._locating_pass(inputs, num_samples, act)
        return logits, {self.names[site]: mean for site, mean in means.items()}

    def run(
        self,
        inputs: Any,
        num_samples: int,
        gates: Mapping[str, Tensor],
        fill: Mapping[str, Tensor] | None = None,
        *,
        outputs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Run the model with gates at the units; differentiable with respect to the gates.

        Args:
            inputs: The model's input.
            num_samples: N.
            gates: Site -> (N, units) or (1, units); a site without gates is left as it is.
            fill: Site -> (channels,), what replaces the output of a unit whose gate is 0; default: zero.
            outputs: If given, filled with the output of every known site, after its gates.

        Returns:
            (N, classes) logits.
        """

        def act(site: Site, output: Tensor) -> Tensor:
            name = self.names.get(site)
            if name is None:
                return output
            if name in gates:
                gate = broadcast(gates[name].to(output), output, self.axes[name])
                if fill is None or name not in fill:
                    output = output * gate
                else:
                    mean = broadcast(fill[name].to(output)[None], output, self.axes[name])
                    output = torch.lerp(mean, output, gate)
            if outputs is not None:
                # A copy, because an in-place activation may follow.
                outputs[name] = output.clone()
            return output

        # The hooks are global and recognise modules by identity, so a model that copies or inspects itself during a
        # masked pass finds no hook on itself.
        outputs_hook, heads_hook = self._hooks(act)
        handles = [register_module_forward_hook(outputs_hook), register_module_forward_pre_hook(heads_hook)]
        try:
            return class_scores(self._forward(inputs), num_samples, self.num_classes)
        finally:
            for handle in handles:
                handle.remove()

    def missing(self) -> dict[str, str]:
        """Layers whose units have no gates after the last locating pass, each with the reason."""
        located = {site.layer for site in self.names}
        reasons = dict.fromkeys(self.layers, "the forward pass does not call it") | self.failures
        return {layer: reasons[layer] for layer in self.layers if layer not in located}

    def require_all_layers(self) -> None:
        """Require that the units of every layer have gates.

        Raises:
            ArgumentError: If a layer was not called or has no units; the message names them.
        """
        if reasons := [f"layer '{name}': {reason}" for name, reason in self.missing().items()]:
            raise ArgumentError(f"`layers` must name layers that paths can run through; got {'; '.join(reasons)}.")

    def _locating_pass(self, inputs: Any, num_samples: int, act: Callable[[Site, Tensor, UnitAxes], Tensor]) -> Tensor:
        """Run the model, find the axes of every site and pass them to `act`; returns the logits."""
        found: dict[Site, UnitAxes] = {}
        num_units: dict[Site, int] = {}
        handles = []

        def locate(site: Site, output: Tensor) -> Tensor:
            try:
                if site.call > MAX_CALLS_AS_LAYERS:
                    raise ValueError(
                        f"it ran more than {MAX_CALLS_AS_LAYERS} times in one pass; the later calls are left out"
                    )
                known_dim = self.sample_dims.get((site.layer, site.call))
                units_last = True if isinstance(self.layers[site.layer], Heads) else layout(output)
                axes = unit_axes(output, num_samples, units_last, known_dim)
                num_units[site] = self._num_units(site, output, axes)
                found[site] = axes
            except ValueError as error:
                self.failures[site.layer] = str(error)
                return output
            return act(site, output, found[site])

        outputs_hook, heads_hook = self._hooks(locate)
        with latest_layout(self.model) as layout:
            try:
                # Registered after the hooks of the layout, which must have seen a layer before it is queried.
                for layer in self.layers.values():
                    module = hooked_module(layer)
                    if isinstance(layer, Heads):
                        handles.append(module.register_forward_pre_hook(heads_hook))
                    else:
                        handles.append(module.register_forward_hook(outputs_hook))
                logits = class_scores(self._forward(inputs), num_samples, self.num_classes)
            finally:
                for handle in handles:
                    handle.remove()
        if self.independent:
            require_no_probabilities(logits)
        calls = outputs_hook.calls + heads_hook.calls
        self.names = {site: site.name(calls[site.layer]) for site in found}
        self.axes = {self.names[site]: axes for site, axes in found.items()}
        self.num_units = {self.names[site]: num_units[site] for site in found}
        return logits

    def _hooks(self, act: Callable[[Site, Tensor], Tensor]) -> tuple["_OutputHook", "_InputHook"]:
        """The hook of the layers whose outputs have gates, and that of the output projections of heads."""
        names: dict[bool, dict[int, str]] = {True: {}, False: {}}
        for name, layer in self.layers.items():
            names[isinstance(layer, Heads)][id(hooked_module(layer))] = name
        return _OutputHook(names[False], act), _InputHook(names[True], act)

    def _num_units(self, site: Site, output: Tensor, axes: UnitAxes) -> int:
        channels, layer = output.shape[axes.units], self.layers[site.layer]
        if not isinstance(layer, Heads):
            return channels
        require_divisible(channels, layer.num_heads)
        return layer.num_heads

    def _forward(self, inputs: Any) -> Any:
        # The recurrent layers of cuDNN have no derivative in evaluation mode; torch's native ones do.
        recurrent = torch.is_grad_enabled() and any(isinstance(part, nn.RNNBase) for part in self.model.modules())
        with torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext():
            return self.forward(inputs)


def _summable(tensor: Tensor) -> Tensor:
    """The tensor on a device that supports float64, in which sums are computed."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor


class _OutputHook:
    """Passes the outputs of known modules to `act`, which may replace them.

    A class and not a closure, so that the hooked model can be pickled and copied; the copy's hook does nothing.
    """

    def __init__(self, names: Mapping[int, str], act: Callable[[Site, Tensor], Tensor] | None) -> None:
        self.names = names
        self.act = act
        self.calls: Counter[str] = Counter()

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        name = self.names.get(id(module))
        if name is None or self.act is None:
            return None
        self.calls[name] += 1
        try:
            tensor = first_tensor(output)
        except TypeError:
            return None
        return with_tensor(output, tensor, self.act(Site(name, self.calls[name]), tensor))

    def __reduce__(self) -> tuple[type["_OutputHook"], tuple[dict[int, str], None]]:
        return type(self), ({}, None)


class _InputHook(_OutputHook):
    """Passes the inputs of known modules to `act`, which may replace them."""

    def __call__(self, module: nn.Module, inputs: Any, output: Any = None) -> Any:
        return super().__call__(module, inputs, inputs)


@contextmanager
def without_fused_kernels() -> Iterator[None]:
    """Run compiled models eagerly, and transformer layers unfused, because no hook fires in fused code."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with uncompiled():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, ordinary tensors, no fused kernels; the model is restored afterwards."""
    with ExitStack() as stack:
        stack.enter_context(without_inference_mode())
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(without_fused_kernels())
        yield
