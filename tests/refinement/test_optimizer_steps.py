"""The split step, against the real optimizers: the sum of the parts, and each part by itself."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, NAdam, RMSprop

from lightning_neuro.refinement.optimizer_steps import momentum_before, step_parts, used_gradient, why_inexact

PARTS = 3
SHAPE = (4, 5)

SGDS = [
    {},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.4},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
    {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1, "maximize": True},
    {"momentum": 0.9, "nesterov": True, "maximize": True},
]
ADAMS = [
    {},
    {"weight_decay": 0.2},
    {"amsgrad": True, "betas": (0.9, 0.5)},
    {"maximize": True, "betas": (0.6, 0.8)},
    {"eps": 0.1},
]
WAYS = [{"foreach": False}, {"foreach": True}, {"fused": True}]
OPTIMIZERS = [(SGD, {"lr": 0.1} | given) for given in SGDS] + [
    (cls, {"lr": 0.02} | given) for cls in (Adam, AdamW) for given in [*ADAMS, {"weight_decay": 0.1, "amsgrad": True}]
]


class Split:
    """A parameter and its parts: one for each source, the last with the initial weights."""

    def __init__(self, cls, options, shape=SHAPE):
        generator = torch.Generator().manual_seed(0)
        self.parameter = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        self.optimizer = cls([self.parameter], **options)
        self.parts = torch.zeros(PARTS + 1, *shape, dtype=torch.float64)
        self.parts[-1] = self.parameter.detach()
        self.means = torch.zeros_like(self.parts)
        self.first = True

    def step(self, gradients):
        """Step the optimizer with the sum of (parts, *shape), and each part with its own."""
        self.parameter.grad = gradients.sum(0)
        self.optimizer.step()
        group, state = self.optimizer.param_groups[0], self.optimizer.state[self.parameter]
        with torch.no_grad():
            used = used_gradient(group, state, self.parameter.grad)
            torch.testing.assert_close(used, gradients.sum(0), rtol=1e-12, atol=1e-12)
            given = torch.cat([gradients, torch.zeros_like(gradients[:1])])
            step_parts(
                self.optimizer,
                group,
                state,
                parts=self.parts,
                means=self.means,
                gradients=given,
                first=self.first,
            )
        self.first = False


def gradients(steps, seed=1):
    return torch.randn(steps, PARTS, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("way", WAYS, ids=["loop", "foreach", "fused"])
@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
def test_parts_add_up_to_the_real_weights(cls, options, way):
    split = Split(cls, options | way)
    for number, given in enumerate(gradients(30)):
        split.optimizer.param_groups[0]["lr"] = options["lr"] * (1 + number % 3)  # a schedule
        split.step(given)
    torch.testing.assert_close(split.parts.sum(0), split.parameter.detach(), rtol=1e-12, atol=1e-12)
    assert (split.parts[:-1].abs().amax((1, 2)) > 0.01).all()


def test_without_momentum_a_part_is_the_sum_of_its_own_gradients():
    split, given = Split(SGD, {"lr": 0.1}), gradients(20)
    initial = split.parameter.detach().clone()
    for one in given:
        split.step(one)
    torch.testing.assert_close(split.parts[:-1], -0.1 * given.sum(0), rtol=1e-12, atol=1e-13)
    assert torch.equal(split.parts[-1], initial)


# Two steps by hand: gradients g then h, from weights w, rate r, momentum m, dampening d, decay l.
R, M, D, L = 0.1, 0.9, 0.3, 0.2
BY_HAND = {
    "momentum": ({"momentum": M}, lambda g, h: -R * g - R * (M * g + h), lambda w: w),
    "dampening": (
        {"momentum": M, "dampening": D},
        lambda g, h: -R * g - R * (M * g + (1 - D) * h),
        lambda w: w,
    ),
    "nesterov": (
        {"momentum": M, "nesterov": True},
        lambda g, h: -R * (1 + M) * g - R * (h + M * (M * g + h)),
        lambda w: w,
    ),
    "decay": (
        {"weight_decay": L},
        lambda g, h: (1 - R * L) * -R * g - R * h,
        lambda w: (1 - R * L) ** 2 * w,
    ),
    "maximize": ({"maximize": True}, lambda g, h: R * (g + h), lambda w: w),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_two_steps_by_hand(name):
    options, of_source, of_initial = BY_HAND[name]
    split, (g, h) = Split(SGD, {"lr": R} | options), gradients(2)
    initial = split.parameter.detach().clone()
    split.step(g)
    split.step(h)
    torch.testing.assert_close(split.parts[:-1], of_source(g, h), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(split.parts[-1], of_initial(initial), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("decoupled", [True, False])
def test_two_steps_of_adam_by_hand(decoupled):
    rate, b1, b2, eps, decay = 0.01, 0.9, 0.99, 1e-3, 0.1
    options = {"lr": rate, "betas": (b1, b2), "eps": eps, "weight_decay": decay}
    split, given = Split(AdamW if decoupled else Adam, options), gradients(2)
    weights = [torch.zeros_like(g) for g in given[0]] + [split.parameter.detach().clone()]
    means, second = [torch.zeros(SHAPE, dtype=torch.float64)] * (PARTS + 1), 0.0
    for t, g in enumerate(given, start=1):
        whole = sum(weights)
        total = g.sum(0) if decoupled else g.sum(0) + decay * whole
        second = b2 * second + (1 - b2) * total**2
        slope = rate / (1 - b1**t) / ((second / (1 - b2**t)).sqrt() + eps)
        for part in range(PARTS + 1):
            own = g[part] if part < PARTS else torch.zeros(SHAPE, dtype=torch.float64)
            own = own if decoupled else own + decay * weights[part]
            means[part] = b1 * means[part] + (1 - b1) * own
            shrunk = (1 - rate * decay) * weights[part] if decoupled else weights[part]
            weights[part] = shrunk - slope * means[part]
        split.step(g)
    torch.testing.assert_close(split.parts, torch.stack(weights), rtol=1e-12, atol=1e-13)


# With a preconditioner that the gradient does not change (Adam's, where eps drowns the rest), steps are linear.
HUGE = {"lr": 1e7, "eps": 1e9}
LINEAR = [(SGD, {"lr": 0.1} | given) for given in SGDS] + [
    (Adam, HUGE),
    (Adam, HUGE | {"weight_decay": 0.1}),
    (AdamW, HUGE | {"weight_decay": 1e-9}),
    (AdamW, HUGE | {"weight_decay": 1e-9, "amsgrad": True}),
]


@pytest.mark.parametrize(("cls", "options"), LINEAR)
def test_leaving_a_source_out_takes_exactly_its_part_away(cls, options):
    split, given = Split(cls, options), gradients(15)
    for one in given:
        split.step(one)
    for source in range(PARTS):
        without = Split(cls, options)
        others = given.clone()
        others[:, source] = 0
        for one in others:
            without.parameter.grad = one.sum(0)
            without.optimizer.step()
        difference = (split.parameter - without.parameter).detach()
        torch.testing.assert_close(split.parts[source], difference, rtol=1e-6, atol=1e-7)


def test_which_optimizers_are_exact():
    parameter = [nn.Parameter(torch.ones(2))]
    assert [why_inexact(cls(parameter, lr=0.1)) for cls in (SGD, Adam, AdamW)] == ["", "", ""]
    for cls in (RMSprop, NAdam, type("MyAdam", (Adam,), {})):
        assert cls.__name__ in why_inexact(cls(parameter, lr=0.1))


def test_running_mean_of_a_time_before():
    for cls, options in ((SGD, {"momentum": 0.9}), (Adam, {}), (AdamW, {})):
        split = Split(cls, {"lr": 0.1} | options)
        assert momentum_before(split.optimizer.state[split.parameter]) is None
        given = gradients(1)[0]
        split.step(given)
        mean = momentum_before(split.optimizer.state[split.parameter])
        factor = 1.0 if cls is SGD else 0.1
        torch.testing.assert_close(mean, factor * given.sum(0), rtol=1e-12, atol=1e-13)
    plain = Split(SGD, {"lr": 0.1})
    plain.step(gradients(1)[0])
    assert momentum_before(plain.optimizer.state[plain.parameter]) is None


def test_learning_rate_may_be_a_tensor():
    split = Split(Adam, {"lr": torch.tensor(0.01, dtype=torch.float64)})
    for one in gradients(5):
        split.step(one)
    torch.testing.assert_close(split.parts.sum(0), split.parameter.detach(), rtol=1e-12, atol=1e-12)


def test_older_adamw_without_an_entry_for_its_decay():
    split = Split(AdamW, {"lr": 0.01, "weight_decay": 0.5})
    split.step(gradients(1)[0])
    parts, state = split.parts.clone(), copy.deepcopy(split.optimizer.state[split.parameter])
    group = {key: value for key, value in split.optimizer.param_groups[0].items() if key != "decoupled_weight_decay"}
    arguments = {"means": split.means.clone(), "gradients": torch.zeros_like(parts), "first": False}
    step_parts(split.optimizer, group, state, parts=parts, **arguments)
    other = split.parts.clone()
    arguments = {"means": split.means.clone(), "gradients": torch.zeros_like(parts), "first": False}
    step_parts(split.optimizer, split.optimizer.param_groups[0], state, parts=other, **arguments)
    assert torch.equal(parts, other)
    assert not torch.equal(parts, split.parts)
