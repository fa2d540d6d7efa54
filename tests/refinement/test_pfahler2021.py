"""The paper's scores against a loop over its formulas, and its batches."""

import math
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_neuro.refinement.pfahler2021 import ClassBatchSampler, StepScores, step_score
from tests.models import images
from tests.refinement.test_influence import randn

LAYERS = {
    "linear": (nn.Linear(4, 3), (4,)),
    "no bias": (nn.Linear(4, 3, bias=False), (4,)),
    "tokens": (nn.Linear(4, 3), (2, 4)),
    "conv": (nn.Conv2d(2, 4, 3, stride=2, padding=1, dilation=1, groups=2), (2, 5, 5)),
    "circular": (nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), (2, 6)),
}


def train(module, shape, optimizer, steps=12, batch=1):
    """Train on random data; returns the scores and the weights after each step."""
    torch.manual_seed(0)
    module = module.double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    recorder, history = StepScores(module, steps), [[p.detach().clone() for p in module.parameters()]]
    classes = torch.arange(20) % 3
    for step in range(steps):
        ids = torch.arange(20)[classes == step % 3][(step // 3 * batch) % 5 :][:batch]
        optimizer.zero_grad()
        (module(randn(len(ids), *shape, seed=step)) ** 2).mean().backward()
        optimizer.step()
        recorder.record(ids, classes[ids])
        history.append([p.detach().clone() for p in module.parameters()])
    return recorder, history


def outputs(module, weights, inputs):
    """The layer's output with other weights."""
    own = [p.detach().clone() for p in module.parameters()]
    with torch.no_grad():
        for parameter, weight in zip(module.parameters(), weights, strict=True):
            parameter.copy_(weight)
        found = module(inputs)
        for parameter, weight in zip(module.parameters(), own, strict=True):
            parameter.copy_(weight)
    return found.flatten(1)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_against_the_formulas(name, optimizer):
    module, shape = LAYERS[name]
    module = module.double()
    make = {
        "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
        "adamw": lambda p: torch.optim.AdamW(p, 0.05),
    }[optimizer]
    recorder, history = train(module, shape, make(module.parameters()))
    h = randn(3, *shape, seed=99)
    z = [outputs(module, weights, h) for weights in history]
    score = recorder.scores(h)
    for q in range(3):
        p = z[-1][q] - z[0][q]
        for t in range(12):
            c = z[t + 1][q] - z[t][q]
            dot, norm = float(c @ p), float(c.norm())
            assert score.norm[t, q].item() == pytest.approx(norm, rel=1e-9)
            assert score.cosine[t, q].item() == pytest.approx(dot / (float(p.norm()) * norm), abs=1e-9)
        assert score.length[q].item() == pytest.approx(float(p.norm()), rel=1e-9)
        assert score.projection[:, q].sum().item() == pytest.approx(float(p.norm()), rel=1e-9)


@pytest.mark.parametrize("form", ["cosine", "projection"])
def test_a_samples_influence_is_the_sum_over_its_steps(form):
    module, shape = LAYERS["linear"]
    recorder, _ = train(module, shape, torch.optim.SGD(module.double().parameters(), 0.1), steps=18, batch=2)
    h = randn(2, *shape, seed=99)
    score = recorder.scores(h)
    found = recorder.influence(h, 99, form=form)
    for q in range(2):
        expected: dict[int, float] = {}
        for t, ids in enumerate(recorder._ids):
            for i in ids.tolist():
                part = max(score.cosine[t, q].item(), 0) if form == "cosine" else score.projection[t, q].item()
                expected[i] = expected.get(i, 0) + part
        assert dict(zip(found.sample_ids[q].tolist(), found.scores[q].tolist(), strict=True)) == pytest.approx(expected)
        assert found.scores[q].tolist() == sorted(expected.values(), reverse=True)
        assert found.targets[q].tolist() == [i % 3 for i in found.sample_ids[q].tolist()]
    with pytest.raises(ValueError, match=r"`form` must be one of.*got 'max'"):
        recorder.influence(h, form="max")


def test_the_ridge_plots_data():
    module, shape = LAYERS["linear"]
    recorder, _ = train(module, shape, torch.optim.SGD(module.double().parameters(), 0.1), steps=7, batch=2)
    h = randn(2, *shape, seed=99)
    score, by_class = recorder.scores(h), recorder.by_class(h)
    for q in range(2):
        assert [len(pairs) for pairs in by_class[q].values()] == [3, 2, 2]
        assert by_class[q][1].tolist() == [[score.cosine[t, q].item(), score.norm[t, q].item()] for t in (1, 4)]
    recorder = StepScores(module, 1)
    recorder.record(torch.tensor([0, 1]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"several classes in 1 of 1 steps.*ClassBatchSampler"):
        recorder.by_class(h)


def test_a_step_that_changes_nothing_has_no_direction():
    changes = torch.zeros(3, 1, 2)
    changes[1, 0, 0] = 2.0
    score = step_score(changes)
    assert score.cosine.flatten().tolist() == pytest.approx([0, 1, 0])
    nothing = step_score(torch.zeros(2, 1, 2))
    assert nothing.cosine.flatten().tolist() == [0, 0] and nothing.length.item() == 0


def test_a_record_can_be_saved():
    module, shape = LAYERS["linear"]
    recorder, _ = train(module, shape, torch.optim.SGD(module.double().parameters(), 0.1), steps=4)
    twin = StepScores(module, 4)
    twin.load_state_dict(recorder.state_dict())
    h = randn(2, *shape, seed=99)
    assert torch.equal(twin.scores(h).cosine, recorder.scores(h).cosine) and len(twin) == 4


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"`module` must be.*Embedding"):
        StepScores(nn.Embedding(2, 2), 5)
    with pytest.raises(ValueError, match=r"`memory_limit`.*120,000 bytes.*got 100,000"):
        StepScores(nn.Linear(4, 6), 1000, memory_limit=100_000)
    StepScores(nn.Linear(4, 6), 1000, memory_limit=120_000)
    recorder = StepScores(nn.Linear(4, 6), 1)
    with pytest.raises(ValueError, match="at least one step"):
        recorder.scores(torch.zeros(1, 4))
    recorder.record(torch.tensor([0]), torch.tensor([0]))
    with pytest.raises(ValueError, match="`num_steps`"):
        recorder.record(torch.tensor([0]), torch.tensor([0]))
    for changes in (torch.zeros(2, 3), torch.zeros(2, 3, 4, dtype=torch.int64)):
        with pytest.raises(ValueError, match="`changes` must be a floating"):
            step_score(changes)


LABELS = [0] * 7 + [1] * 5 + [3] * 8


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("ghosts", [0, 4])
def test_batches_are_of_one_class_and_epochs_hold_all_samples(drop_last, ghosts):
    sampler = ClassBatchSampler(LABELS, 3, num_ghosts=ghosts, drop_last=drop_last)
    before = torch.get_rng_state()
    epochs = [list(sampler), list(sampler)]
    assert torch.equal(before, torch.get_rng_state())
    for batches in epochs:
        own = [batch[: len(batch) - ghosts] for batch in batches]
        assert all(len({LABELS[i] for i in batch}) == 1 for batch in own)
        assert len(batches) == len(sampler) == (5 if drop_last else 8)
        counts = Counter(i for batch in own for i in batch)
        assert set(counts.values()) == {1} and len(counts) == (15 if drop_last else 20)
        if drop_last:
            assert {len(batch) for batch in own} == {3}
    assert epochs[0] != epochs[1]
    if ghosts:
        drawn = Counter(i for batches in epochs for batch in batches for i in batch[-ghosts:])
        assert {LABELS[i] for i in drawn} == {0, 1, 3} and all(len(set(b[-ghosts:])) == 4 for b in epochs[0])


def test_the_order_is_that_of_the_seed_and_epoch():
    first = list(ClassBatchSampler(LABELS, 3, seed=5))
    sampler = ClassBatchSampler(torch.tensor(LABELS), 3, seed=5)
    assert list(sampler) == first
    second = list(sampler)
    sampler.set_epoch(0)
    assert list(sampler) == first and list(sampler) == second
    assert first != list(ClassBatchSampler(LABELS, 3, seed=6))
    # Classes come in no order, so that training does not go through them one by one.
    orders = {tuple(LABELS[b[0]] for b in ClassBatchSampler(LABELS, 3, seed=seed)) for seed in range(5)}
    assert len(orders) > 3


def test_it_works_in_a_loader():
    data = images(40)
    loader = DataLoader(data, batch_sampler=ClassBatchSampler(data.tensors[1], 5, num_ghosts=2))
    for x, y in loader:
        assert len(x) == 7 and len(y[:-2].unique()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([], 3, {}), "`labels` must be"),
        (([0.5], 3, {}), "`labels` must be"),
        (([[0]], 3, {}), "`labels` must be"),
        (([0], 0, {}), "`batch_size`"),
        (([0], 1, {"num_ghosts": 2}), "`num_ghosts` must be at most 1; got 2"),
        (([0], 1, {"num_ghosts": -1}), "`num_ghosts` must be an integer >= 0"),
    ],
)
def test_wrong_sizes_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        ClassBatchSampler(*arguments[:2], **arguments[2])


def test_single_sample_batches_agree_with_the_samples_own_scores_under_plain_sgd():
    """With one sample a step and plain SGD the whole step is the sample's own update."""
    from lightning_neuro.refinement.influence_table import InfluenceTable
    from lightning_neuro.refinement.training_steps import TrainBatch

    torch.manual_seed(0)
    module, h = nn.Linear(4, 3).double(), randn(2, 4, seed=9)
    start = [p.detach().clone() for p in module.parameters()]
    x, y = randn(10, 4), torch.arange(10) % 3

    def run(listener):
        for i in torch.arange(30) % 10:
            logits = module(x[i : i + 1])
            gradient = torch.autograd.grad(nn.functional.cross_entropy(logits, y[i : i + 1]), logits)[0]
            listener(i[None], gradient)
            with torch.no_grad():
                module.weight -= 0.3 * gradient.T @ x[i : i + 1]
                module.bias -= 0.3 * gradient[0]
            yield i[None]

    recorder = StepScores(module, 30)
    for i in run(lambda *_: None):
        recorder.record(i, y[i])
    along = nn.functional.linear(h, module.weight - start[0], module.bias - start[1]).detach()
    for parameter, value in zip(module.parameters(), start, strict=True):
        parameter.data.copy_(value)
    live = InfluenceTable("fc", module, 10, direction=along / along.norm(dim=1, keepdim=True))
    live.refresh(h)
    seen = lambda i, d: live.see("fc", module, x[i], d, TrainBatch(i, y[i]))  # noqa: E731
    for _ in run(seen):
        live.commit("fc", torch.tensor(0.3).double())
    whole, single = recorder.influence(h, 10), live.top(10)
    assert torch.equal(whole.sample_ids, single.sample_ids)
    assert torch.allclose(whole.scores, single.scores, atol=1e-10)
    assert not math.isclose(whole.scores[0, 0], recorder.influence(h, 10, form="cosine").scores[0, 0])
