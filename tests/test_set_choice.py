"""The probe set from samples that were taken, and units in its order."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_neuro.class_choice import ClassChoice
from lightning_neuro.kept_batch import KeptBatch, merged
from lightning_neuro.ride import TakenBatch
from lightning_neuro.set_choice import agreed_format, choose_taken, in_set_order, set_of_taken
from lightning_neuro.targets import target_format
from lightning_neuro.units import UnitRows, selected

ONE_RANK: Any = SimpleNamespace(world_size=1)
CHOICE = ClassChoice(512)


def taken(number: int, rows: list[int], labels: list[int]) -> TakenBatch:
    """Samples whose only unit is 100 x number of the batch + row."""
    values = torch.tensor([[100.0 * number + row] for row in rows])
    kept = KeptBatch((values, torch.tensor(labels)), values, torch.tensor(labels), len(rows), values[:, 0].long())
    return TakenBatch(number, torch.tensor(rows), {"layer": UnitRows(values)}, kept)


BATCHES = [taken(0, [1, 4, 5], [0, 0, 0]), taken(1, [0, 2], [1, 1]), taken(3, [7, 8], [0, 2])]


def test_the_choice_is_balanced_and_activations_go_along() -> None:
    chosen = choose_taken(BATCHES, 4, 0, CHOICE)
    labels = torch.cat([batch.kept.target for batch in chosen if batch.kept is not None])
    assert sorted(labels.tolist()) in ([0, 0, 1, 2], [0, 1, 1, 2])
    for batch in chosen:
        assert batch.kept is not None and batch.rows is not None
        assert torch.equal(batch.activations["layer"].values, batch.kept.inputs)
        assert torch.equal(100 * batch.number + batch.rows, batch.kept.inputs[:, 0].long())
        assert torch.equal(batch.kept.batch[0], batch.kept.inputs) and torch.equal(
            batch.kept.keys, batch.kept.inputs[:, 0]
        )


def test_units_come_in_the_order_of_the_set_whatever_the_order_of_the_loop() -> None:
    samples = set_of_taken(ONE_RANK, choose_taken(BATCHES, 6, 0, CHOICE), rideable=True, class_choice=CHOICE)
    assert samples.num_samples == 6 and samples.num_classes == 3
    again = []
    for number, (rows, _) in reversed(samples.places.items()):
        assert rows is not None
        again.append(TakenBatch(number, rows, {"layer": UnitRows(100.0 * number + rows[:, None].double())}))
    units = in_set_order(samples, again)
    for batch, found in zip(samples.batches, units, strict=True):
        assert torch.equal(found["layer"].values, batch.inputs.double())


def test_several_rows_per_sample_stay_with_their_sample() -> None:
    samples = set_of_taken(ONE_RANK, choose_taken(BATCHES, 7, 0, CHOICE), rideable=True, class_choice=CHOICE)
    again = []
    for number, (rows, _) in reversed(samples.places.items()):
        assert rows is not None
        owners = torch.arange(len(rows)).repeat_interleave(2)
        values = (100.0 * number + rows[owners])[:, None]
        again.append(TakenBatch(number, rows, {"layer": UnitRows(values, owners, torch.arange(2).repeat(len(rows)))}))
    for batch, found in zip(samples.batches, in_set_order(samples, again), strict=True):
        units = found["layer"]
        assert units.samples is not None and torch.equal(units.values, batch.inputs[units.samples])
        assert units.positions is not None and units.positions.tolist() == [0, 1] * len(batch.inputs)


def test_rows_that_belong_to_no_sample_are_shown_once() -> None:
    samples = set_of_taken(ONE_RANK, choose_taken(BATCHES, 7, 0, CHOICE), rideable=True, class_choice=CHOICE)
    again = [
        TakenBatch(n, r, {"nodes": UnitRows(torch.ones(5, 2), aligned=False)}) for n, (r, _) in samples.places.items()
    ]
    units = in_set_order(samples, again)
    assert [list(found) for found in units] == [["nodes"]] + [[]] * (len(units) - 1)
    assert units[0]["nodes"].values.shape == (15, 2) and not units[0]["nodes"].aligned


def test_rows_of_chosen_samples() -> None:
    units = UnitRows(torch.arange(5.0)[:, None], torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 1, 0, 0, 1]))
    some = selected(units, torch.tensor([0, 2]))
    assert some.values.flatten().tolist() == [0.0, 1.0, 3.0, 4.0]
    assert some.samples is not None and some.samples.tolist() == [0, 0, 1, 1]
    assert some.positions is not None and some.positions.tolist() == [0, 1, 0, 1]
    free = UnitRows(torch.ones(3, 1), aligned=False)
    assert selected(free, torch.tensor([0])) is free


def test_whole_batches_are_not_cut() -> None:
    whole = [TakenBatch(0, None, {}, KeptBatch("graphs", None, None, 8, torch.arange(8)))]
    assert choose_taken(whole, 3, 0, CHOICE) == whole


def kept(x: Tensor, **more: Any) -> KeptBatch:
    return KeptBatch({"x": x, **more}, x, torch.zeros(len(x)).long(), len(x), torch.arange(len(x)))


def test_small_batches_of_one_shape_are_joined() -> None:
    joined = merged([kept(torch.ones(2, 3)), kept(torch.zeros(3, 3)), kept(torch.ones(4, 3))], max_size=6)
    assert [batch.num_samples for batch in joined] == [5, 4]
    assert joined[0].inputs.sum() == 6 and joined[0].batch["x"].shape == (5, 3) and len(joined[0].keys) == 5


@pytest.mark.parametrize(
    "batches",
    [
        [kept(torch.ones(2, 3)), kept(torch.ones(2, 4))],  # texts of different lengths
        [kept(torch.ones(2, 3), names=["a", "b"]), kept(torch.ones(2, 3), names=["c", "d"])],
        [kept(torch.ones(2, 3), edges=torch.ones(7, 9)), kept(torch.ones(2, 3), edges=torch.ones(7, 9))],
    ],
)
def test_other_batches_are_not_joined(batches: list[KeptBatch]) -> None:
    assert merged(batches, max_size=100) == batches


def test_the_ranks_agree_on_the_form_of_the_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 alone would take its values for two classes; the quantiles are those of all samples."""
    of_ranks = [torch.tensor([0.0, 1.0]), torch.arange(0.0, 50.0)]
    own = [target_format([values]) for values in of_ranks]
    texts = [f"{form.form}\n{'/'.join(form.names)}\n" for form in own]
    gathered: list[Tensor] = []
    monkeypatch.setattr("lightning_neuro.set_choice.agreed", lambda trainer, compute: compute())
    monkeypatch.setattr("lightning_neuro.set_choice.gather_texts", lambda trainer, text: texts)
    monkeypatch.setattr("lightning_neuro.set_choice.gather", lambda trainer, mine: (gathered.append(mine), of_ranks)[1])
    two: Any = SimpleNamespace(world_size=2)
    first, second = (agreed_format(two, [values]) for values in of_ranks)
    assert first == second and first.form == "values" and [form.form for form in own] == ["binary", "values"]
    assert all(torch.equal(mine, values.double()) for mine, values in zip(gathered, of_ranks, strict=True))
    quartiles = torch.quantile(torch.cat(of_ranks), torch.tensor([0.25, 0.5, 0.75]))
    assert first.thresholds == tuple(quartiles.tolist())
