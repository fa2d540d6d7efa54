"""The table of samples: what is counted, when, and for which sample."""

import gc
import io
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lightning_neuro import Probe, RepresentationRefinement
from lightning_neuro.checks import ArgumentError
from lightning_neuro.refinement.sample_table import SampleTable, gini
from lightning_neuro.refinement.sample_tracking import is_recorded
from lightning_neuro.refinement.training_steps import TrainBatch
from tests.models import fit, loader, mlp
from tests.refinement.following import by_id


def batch(ids, targets=None):
    return TrainBatch(torch.tensor(ids), None if targets is None else torch.tensor(targets))


def show(table, layer, norms, who):
    """A layer with one weight: its per-sample gradient norm is the input where the output gradient is 1."""
    module = nn.Linear(1, 1, bias=False)
    table.see(layer, module, torch.tensor(norms, dtype=torch.float64)[:, None], torch.ones(len(norms), 1).double(), who)


def rate(value):
    return torch.tensor(value, dtype=torch.float64)


def test_what_is_seen_counts_when_it_is_committed_times_the_rate():
    table = SampleTable(["a", "b"], 10)
    who = batch([7, 2, 4], [1, 0, 1])
    show(table, "a", [1.0, 2.0, 3.0], who)
    show(table, "b", [10.0, 20.0, 30.0], who)
    assert len(table.arrays()["sample_id"]) == 0
    table.commit("a", rate(0.5))
    table.commit("b", rate(0.25))
    table.commit("a", rate(0.5))  # nothing pending any more
    found = {name: column.tolist() for name, column in table.arrays().items()}
    assert found == {
        "sample_id": [2, 4, 7],
        "target": [0, 1, 1],
        "visits": [1, 1, 1],
        "recorded": [1, 1, 1],
        "refinement/a": [1.0, 1.5, 0.5],
        "refinement/b": [5.0, 7.5, 2.5],
    }
    assert table.values("a").tolist() == [1.0, 1.5, 0.5]


def test_accumulated_micro_batches_add_and_dropped_ones_do_not():
    table = SampleTable(["a"], 4)
    show(table, "a", [1.0, 2.0], batch([0, 1]))
    show(table, "a", [4.0, 8.0], batch([2, 1]))
    table.commit("a", rate(1.0))
    show(table, "a", [100.0, 100.0], batch([0, 3]))
    table.drop("a")
    table.commit("a", rate(1.0))
    found = table.arrays()
    assert found["sample_id"].tolist() == [0, 1, 2]
    assert found["refinement/a"].tolist() == [1.0, 10.0, 4.0]
    assert found["visits"].tolist() == [1, 2, 1]
    assert found["target"].tolist() == [-1, -1, -1]


def test_a_sample_twice_in_a_batch_is_visited_twice():
    table = SampleTable(["a"], 4)
    show(table, "a", [1.0, 2.0], batch([3, 3], [1, 1]))
    table.commit("a", rate(1.0))
    found = table.arrays()
    assert (found["visits"].tolist(), found["refinement/a"].tolist()) == ([2], [3.0])


def test_a_module_called_twice_is_one_visit():
    table = SampleTable(["a", "b"], 4)
    who = batch([0])
    for _ in range(2):
        show(table, "a", [1.0], who)
    show(table, "b", [1.0], who)
    table.commit("a", rate(1.0))
    table.commit("b", rate(1.0))
    assert table.arrays()["visits"].tolist() == [1]
    assert table.arrays()["refinement/a"].tolist() == [2.0]


def test_batches_are_not_kept():
    table = SampleTable(["a"], 4)
    for _ in range(3):
        show(table, "a", [1.0], batch([0]))
        table.commit("a", rate(1.0))
    gc.collect()
    assert len(table._counted) == 0 and not table._pending


def test_what_has_no_row_is_counted_and_left_out():
    table = SampleTable(["a"], 3)
    show(table, "a", [1.0, 2.0, 3.0, 4.0], batch([0, 3, -1, 2], [5, 6, 7, 8]))
    show(table, "a", [1.0, 2.0], TrainBatch(None, None))
    show(table, "a", [1.0, 2.0, 3.0], batch([0, 1]))  # dimension 0 is not the batch's
    show(table, "a", [math.nan, math.inf], batch([0, 1]))
    show(table, "unknown", [1.0], batch([0]))
    table.commit("a", rate(1.0))
    found = table.arrays()
    assert found["sample_id"].tolist() == [0, 1, 2]
    assert found["refinement/a"].tolist() == [1.0, 0.0, 4.0]
    assert found["target"].tolist() == [5, -1, 8]
    notes = table.notes()
    assert "2 visits" in notes["ids"] and "0 ... 2" in notes["ids"]
    assert notes["nonfinite"].startswith("2 ")
    assert notes["without_id"].startswith("5 ")
    assert SampleTable(["a"], 3).notes() == {}


def over_ranks(mine, other):
    """The table of two ranks, as the first one sees it."""
    theirs = iter(
        [
            *other._refinement.values(),
            *(other._visits, other._recorded, other._targets, other._num_nonfinite, other._num_without_id),
        ]
    )

    class Strategy:
        root_device = torch.device("cpu")

        def reduce(self, tensor, reduce_op):
            parts = torch.stack([tensor, torch.as_tensor(next(theirs))])
            return parts.sum(0) if reduce_op == "sum" else parts.amax(0)

    return mine.over_ranks(SimpleNamespace(world_size=2, strategy=Strategy()))


def random_table(seed, steps=6):
    generator = torch.Generator().manual_seed(seed)
    table = SampleTable(["a", "b"], 12)
    feed(table, generator, steps)
    return table


def feed(table, generator, steps):
    for _ in range(steps):
        who = TrainBatch(torch.randperm(12, generator=generator)[:5], None)
        who = TrainBatch(who.ids, who.ids % 3)
        for layer in table.layers:
            show(table, layer, torch.rand(5, generator=generator).tolist(), who)
            table.commit(layer, rate(0.1))


def same(one, other):
    return all(np.array_equal(one.arrays()[name], other.arrays()[name]) for name in one.arrays())


def test_shards_merge_to_the_whole():
    whole = random_table(0)
    feed(whole, torch.Generator().manual_seed(1), 6)
    merged = over_ranks(random_table(0), random_table(1))
    assert merged.arrays()["sample_id"].tolist() == whole.arrays()["sample_id"].tolist()
    for name, column in whole.arrays().items():
        assert merged.arrays()[name] == pytest.approx(column, abs=1e-14)


def test_a_target_that_only_one_shard_knows_is_known_to_the_whole():
    one, other = SampleTable(["a"], 3), SampleTable(["a"], 3)
    show(one, "a", [1.0], batch([0], [2]))
    show(other, "a", [1.0, 1.0], batch([1, 2], [1, 0]))
    for table in (one, other):
        table.commit("a", rate(1.0))
    assert over_ranks(one, other).arrays()["target"].tolist() == [2, 1, 0]
    assert over_ranks(other, one).arrays()["target"].tolist() == [2, 1, 0]


def test_what_was_pending_is_not_part_of_a_state():
    table = SampleTable(["a"], 3)
    state = table.state_dict()
    show(table, "a", [1.0], batch([0]))
    table.load_state_dict(state)
    table.commit("a", rate(1.0))
    assert len(table.arrays()["sample_id"]) == 0


def test_resume_is_as_uninterrupted():
    generator = torch.Generator().manual_seed(3)
    whole, first = random_table(3, 8), SampleTable(["a", "b"], 12)
    feed(first, generator, 5)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    second = SampleTable(["a", "b"], 12)
    second.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert same(first, second)
    saved = first.state_dict()
    feed(second, generator, 3)
    assert same(second, whole)
    assert torch.equal(saved["visits"], first._visits)
    with pytest.raises(ValueError, match=r"\['a'\] and 12 samples; got \['a', 'b'\] and 12"):
        SampleTable(["a"], 12).load_state_dict(saved)


def test_wrong_sizes_are_refused():
    for layers, samples, name in (([], 3, "layers"), (["a"], 0, "num_samples")):
        with pytest.raises(ArgumentError, match=name):
            SampleTable(layers, samples)
    assert SampleTable(["a", "b"], 999).num_bytes == 8 * 5 * 1000


@pytest.mark.parametrize("seed", range(4))
def test_gini_is_the_mean_difference_over_twice_the_mean(seed):
    values = torch.rand(40, generator=torch.Generator().manual_seed(seed)) ** 3
    v = values.double().numpy()
    expected = np.abs(v[:, None] - v[None]).mean() / (2 * v.mean())
    assert gini(values) == pytest.approx(expected, abs=1e-12)


def test_gini_of_nothing_is_undefined():
    assert math.isnan(gini(torch.zeros(4)))
    assert math.isnan(gini(torch.zeros(0)))
    assert gini(torch.ones(1)) == 0.0


def test_visits_in_other_steps_are_estimated_by_those_in_recorded_steps():
    table = SampleTable(["a", "b"], 4)
    for step, who in enumerate(([0, 1], [0, 2], [0, 1])):
        recorded = step != 1
        micro = TrainBatch(torch.tensor(who), torch.tensor([1, 0]), recorded)
        show(table, "a", [1.0 + step, 4.0], micro)
        if recorded:  # layers that only the table needs are not followed in other steps
            show(table, "b", [10.0, 10.0], micro)
        table.commit("a", rate(1.0))
        table.commit("b", rate(1.0))
    found = {name: column.tolist() for name, column in table.arrays().items()}
    assert found == {
        "sample_id": [0, 1],  # of sample 2 nothing is known
        "target": [1, 0],
        "visits": [3, 2],
        "recorded": [2, 2],
        "refinement/a": [(1.0 + 3.0) / 2 * 3, 8.0],
        "refinement/b": [30.0, 20.0],
    }
    again = SampleTable(["a", "b"], 4)
    again.load_state_dict(table.state_dict())
    assert again.arrays()["recorded"].tolist() == [2, 2]


@pytest.mark.parametrize("every", [1, 2, 5])
def test_one_of_every_n_steps_is_recorded_and_not_always_the_same(every):
    steps = [step for step in range(100 * every) if is_recorded(step, every)]
    assert [step // every for step in steps] == list(range(100))
    places = torch.tensor([step % every for step in steps]).bincount(minlength=every)
    assert places.min() > 100 / every / 2


def test_estimates_of_a_fit_are_those_of_all_steps():
    tables, followed = {}, {}
    for every in (1, 2):
        callback = RepresentationRefinement(Probe(num_samples=16), track_samples="*", sample_every_n_steps=every)
        fit(mlp(), callback, train=loader(64), max_epochs=20)
        tables[every] = by_id(callback.samples)
        followed[every] = callback.ledger["net.5"].weights()["weight"]
    full, some = tables[1], tables[2]
    assert torch.equal(followed[1], followed[2])  # the ledger does not depend on it
    assert full["sample_id"].tolist() == some["sample_id"].tolist() == list(range(64))
    assert (full["recorded"] == 20).all() and (some["visits"] == 20).all()
    assert 0.3 < some["recorded"].mean() / 20 < 0.7
    for layer in ("net.1", "net.3", "net.5"):
        one, other = full[f"refinement/{layer}"], some[f"refinement/{layer}"]
        assert other.sum() == pytest.approx(one.sum(), rel=0.2)
        assert torch.corrcoef(torch.tensor(np.stack([one, other])))[0, 1] > 0.5
