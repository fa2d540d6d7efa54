"""The update log on disk: exact up to half precision, and complete up to its last shard if the disk fails."""

import errno
import io
import os
import warnings

import pytest
import torch
from torch import nn

from lightning_neuro.refinement import update_log as log_module
from lightning_neuro.refinement.influence_table import InfluenceTable
from lightning_neuro.refinement.training_steps import TrainBatch
from lightning_neuro.refinement.update_log import UpdateLogWriter, load_update_log
from tests.refinement.test_influence import Run, randn


class Writer(UpdateLogWriter):
    def refresh(self, probe_inputs):
        pass


def logged(folder, run=None, *others, **options):
    run = run or Run()
    writer = Writer(folder, {"fc": run.module}, **options)
    run.train(writer, *others)
    writer.close()
    return run


@pytest.mark.parametrize("shard_bytes", [1, 4000, 10**6])
@pytest.mark.parametrize("bias", [True, False])
def test_the_log_gives_the_scores_of_the_table(tmp_path, shard_bytes, bias):
    run, along = Run(bias=bias), randn(4, 3, seed=3)
    live = InfluenceTable("fc", run.module, 30, direction=along)
    logged(tmp_path / "log", run, live, shard_bytes=shard_bytes)
    found = load_update_log(tmp_path / "log").influence_on_layer_inputs(run.probe, 30, along)
    expected = live.top(30)
    assert found.num_samples == 30 and found.direction == "given"
    largest = expected.scores.abs().max()
    for q in range(4):
        by_id = dict(zip(found.sample_ids[q].tolist(), found.scores[q].tolist(), strict=True))
        truth = dict(zip(expected.sample_ids[q].tolist(), expected.scores[q].tolist(), strict=True))
        assert all(abs(by_id[i] - truth[i]) < 2e-3 * largest for i in truth)
        assert found.targets[q].tolist() == [i % 3 for i in found.sample_ids[q].tolist()]
    shards = len(list((tmp_path / "log").glob("shard-0-*.pt")))
    assert shards == {1: 40, 4000: 3, 10**6: 1}[shard_bytes]
    assert not list((tmp_path / "log").glob("*.tmp"))


def test_along_the_refinement_the_scores_of_plain_sgd_sum_to_its_length(tmp_path):
    run = logged(tmp_path)
    opened = load_update_log(tmp_path)
    p = run.module(run.probe).detach() - run.before
    found = opened.influence_on_layer_inputs(run.probe, direction="refinement")
    assert found.total.tolist() == pytest.approx(p.norm(dim=1).tolist(), rel=2e-3)
    own = torch.tensor([0, 1, 2, 0])
    contrast = opened.influence_on_layer_inputs(run.probe, direction="contrast", targets=own)
    outputs = run.module(run.probe).detach()
    rivals = outputs.scatter(1, own[:, None], -torch.inf).argmax(1)
    expected = (p.gather(1, own[:, None]) - p.gather(1, rivals[:, None]))[:, 0] / 2**0.5
    assert contrast.total.tolist() == pytest.approx(expected.tolist(), rel=5e-3, abs=2e-3)
    assert torch.allclose(opened.final["fc"][0], run.module.weight) and not torch.equal(
        *[weights["fc"][0] for weights in (opened.initial, opened.final)]
    )


def test_steps_rates_positions_and_what_is_dropped(tmp_path):
    module = nn.Linear(2, 1, bias=False)
    writer = UpdateLogWriter(tmp_path, {"fc": module}, shard_bytes=1)
    a = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])  # one sample at two positions
    who = TrainBatch(torch.tensor([5]), torch.tensor([2]))
    writer.see("fc", module, a, torch.tensor([[[1e-7], [3e-9]]]), who)
    writer.commit("fc", torch.tensor(0.5))
    writer.see("fc", module, a, torch.full((1, 2, 1), torch.inf), who)
    writer.see("other", module, a, torch.ones(1, 2, 1), who)
    writer.see("fc", module, a, torch.ones(1, 2, 1), TrainBatch(None, None))
    writer.drop("other")
    writer.drop("fc")
    writer.commit("fc", torch.tensor(1.0))
    writer.see("fc", module, a[:, :1], torch.ones(1, 1, 1), TrainBatch(torch.tensor([6]), None))
    writer.see("fc", module, a[:, :1], torch.full((1, 1, 1), torch.nan), TrainBatch(torch.tensor([7]), None))
    writer.commit("fc", torch.tensor(2.0))
    writer.close()
    rows = [shard["fc"] for shard in load_update_log(tmp_path).shards()]
    whole = {name: torch.cat([part[name] for part in rows]) for name in rows[0]}
    assert whole["id"].tolist() == [5, 5, 6] and whole["target"].tolist() == [2, 2, -1]
    assert whole["step"].tolist() == [0, 0, 2]
    assert whole["a"].tolist() == [[1, 2], [3, 4], [1, 2]]
    assert whole["d"].flatten().tolist() == pytest.approx([5e-8, 1.5e-9, 2.0], rel=1e-3)


def test_layers_add_and_must_be_named(tmp_path):
    run, other = Run(), nn.Linear(5, 2).double()
    writer = UpdateLogWriter(tmp_path, {"fc": run.module, "b": other})
    who = TrainBatch(torch.arange(4), torch.arange(4) % 3)
    for layer, module in writer.layers.items():
        writer.see(layer, module, randn(4, 5), randn(4, module.out_features), who)
        writer.commit(layer, torch.tensor(1.0))
    writer.close()
    opened, h = load_update_log(tmp_path), randn(2, 5, seed=1)
    along = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"by name.*fc, b"):
        opened.influence_on_layer_inputs(h)
    with pytest.raises(ValueError, match=r"`inputs`.*fc, b.*got 'c'"):
        opened.influence_on_layer_inputs({"c": h})
    with pytest.raises(ValueError, match=r"`inputs`.*\(Q, 5\).*'fc'.*\(2, 4\)"):
        opened.influence_on_layer_inputs({"fc": h[:, :4]})
    with pytest.raises(ValueError, match="same number of samples"):
        opened.influence_on_layer_inputs({"fc": h, "b": h[:1]})
    with pytest.raises(ValueError, match="`direction` must be"):
        opened.influence_on_layer_inputs({"fc": h}, direction="down")
    # Without training there is no refinement; along a given direction the scores of both layers add.
    assert opened.influence_on_layer_inputs({"fc": h, "b": h}, 4, "refinement").total.tolist() == [0, 0]
    one = opened.influence_on_layer_inputs({"fc": h}, 1, along).scores
    assert one.abs().min() > 0
    both = opened.influence_on_layer_inputs({"b": h}, 4, torch.ones(2, 2)).total
    assert both.abs().min() > 0


def test_a_full_disk_ends_the_log_and_not_the_training(tmp_path, monkeypatch):
    run, count = Run(), [0]
    real = os.replace

    def replace(*names):
        count[0] += 1
        if count[0] >= 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*names)

    monkeypatch.setattr(log_module.os, "replace", replace)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logged(tmp_path, run, shard_bytes=1)
    (said,) = [str(warning.message) for warning in caught]
    assert "could not be written ([Errno 28] No space left" in said
    assert "(2 shards); training continues" in said
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["initial.pt", "shard-0-00000.pt", "shard-0-00001.pt"]
    opened = load_update_log(tmp_path)
    assert opened.influence_on_layer_inputs(run.probe).num_samples <= 12
    assert sum(len(shard["fc"]["id"]) for shard in opened.shards()) == 12


def test_one_warning_and_nothing_is_kept_after_a_failure(tmp_path, monkeypatch):
    run = Run()
    writer = Writer(tmp_path, {"fc": run.module}, shard_bytes=1)

    def fails(*_):
        raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", fails)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train(writer)
        writer.close()
    assert len(caught) == 1 and "PytorchStreamWriter failed" in str(caught[0].message)
    assert writer.closed and not writer._pending and not writer._buffer
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="no update log in"):
        load_update_log(tmp_path)


@pytest.mark.parametrize("limit", [5000, 30_000])
def test_the_size_limit_is_kept(tmp_path, limit):
    with pytest.warns(UserWarning, match=rf"size limit of {limit:,} bytes.*training continues"):
        logged(tmp_path, shard_bytes=1, size_limit=limit)
    shards = list(tmp_path.glob("shard*.pt"))
    assert len(shards) >= (limit > 5000) * 2
    assert sum(path.stat().st_size for path in tmp_path.glob("*.pt") if path.name != "final.pt") <= limit


def test_without_a_final_state_the_last_shards_weights_stand(tmp_path):
    run = Run(steps=20)
    writer = Writer(tmp_path, {"fc": run.module}, shard_bytes=1)
    run.train(writer)
    assert torch.allclose(load_update_log(tmp_path).final["fc"][0], run.module.weight)  # never closed


def test_resume_is_as_uninterrupted(tmp_path):
    whole = logged(tmp_path / "whole", shard_bytes=1500)
    run = Run()
    first = Writer(tmp_path / "parts", {"fc": run.module}, shard_bytes=1500)
    run.train(first, steps=23)
    file = io.BytesIO()
    torch.save([first.state_dict(), run.module.state_dict()], file)
    run.train(first, begin=23, steps=12)  # what is lost with the interruption
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    run.module.load_state_dict(saved[1])
    second = Writer(tmp_path / "parts", {"fc": run.module}, shard_bytes=1500)
    second.load_state_dict(saved[0])
    run.train(second, begin=23)
    second.close()
    one, other = (
        load_update_log(tmp_path / name).influence_on_layer_inputs(whole.probe, 30) for name in ("whole", "parts")
    )
    assert torch.equal(one.sample_ids, other.sample_ids) and torch.equal(one.scores, other.scores)
    elsewhere = Writer(tmp_path / "elsewhere", {"fc": run.module}, shard_bytes=1500)
    with pytest.warns(UserWarning, match="shards of the resumed run are not in"):
        elsewhere.load_state_dict(saved[0])


@pytest.mark.parametrize("limit", [10**9, 5000])
def test_a_finished_log_goes_on_after_a_resume_and_a_broken_one_does_not(tmp_path, limit):
    run = Run()
    first = Writer(tmp_path, {"fc": run.module}, shard_bytes=1, size_limit=limit)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.train(first, steps=20)
    first.close()
    before = len(list(tmp_path.glob("shard*.pt")))
    second = Writer(tmp_path, {"fc": run.module}, shard_bytes=1)
    second.load_state_dict(first.state_dict())
    run.train(second, begin=20)
    second.close()
    assert len(list(tmp_path.glob("shard*.pt"))) == (40 if limit > 5000 else before)


def test_a_second_run_in_the_same_folder_replaces_the_first(tmp_path):
    logged(tmp_path, Run(steps=30), shard_bytes=1)
    logged(tmp_path, Run(steps=3), shard_bytes=1)
    assert len(list(tmp_path.glob("shard*.pt"))) == 3
    broken_off = Run(steps=2)
    broken_off.train(Writer(tmp_path, {"fc": broken_off.module}, shard_bytes=1))
    assert len(list(tmp_path.glob("shard*.pt"))) == 2
    assert torch.equal(load_update_log(tmp_path).final["fc"][0], broken_off.module.weight)


def test_ranks_write_side_by_side(tmp_path):
    run = Run()
    writers = [Writer(tmp_path, {"fc": run.module}, rank=rank, shard_bytes=1) for rank in range(2)]
    run.train(*writers)
    for writer in writers:
        writer.close()
    alone = logged(tmp_path / "alone")
    both, one = (
        load_update_log(path).influence_on_layer_inputs(alone.probe, direction=torch.ones(4, 3))
        for path in (tmp_path, tmp_path / "alone")
    )
    assert both.total.tolist() == pytest.approx((2 * one.total).tolist(), rel=1e-6)


def test_wrong_layers_and_formats_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`layers` must hold at least one"):
        UpdateLogWriter(tmp_path, {})
    with pytest.raises(ValueError, match="'c', a Conv1d"):
        UpdateLogWriter(tmp_path, {"c": nn.Conv1d(1, 1, 1)})
    torch.save({"format": 99, "weights": {}}, tmp_path / "initial.pt")
    with pytest.raises(ValueError, match="format 1; got format 99"):
        load_update_log(tmp_path)
