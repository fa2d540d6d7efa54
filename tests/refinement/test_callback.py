"""RepresentationRefinement in fits of Lightning: what it records, logs, writes and leaves behind."""

import math
import pickle
import warnings

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_neuro import NeuronCommunities, Probe, RepresentationRefinement
from lightning_neuro.checks import ArgumentError
from lightning_neuro.refinement.training_steps import TrainingSteps
from lightning_neuro.refinement.update_log import load_update_log
from tests.helpers import texts
from tests.models import MemoryLogger, Module, convnet, fit, images, loader, mlp, transformer

EXACT = 1e-5


def refinement(layers=None, **options):
    return RepresentationRefinement(layers=layers, **({"on_error": "raise"} | options))


def with_optimizer(module, make):
    module.configure_optimizers = lambda: make(module)
    return module


def one_cycle(module):
    optimizer = SGD(module.parameters(), lr=0.01, momentum=0.9)
    schedule = OneCycleLR(optimizer, max_lr=0.1, total_steps=40)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Manual(Module):
    """Two optimizers by hand; a pass that is thrown away; gradients scaled and clipped by hand."""

    def __init__(self):
        super().__init__(mlp().net)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        for optimizer in (first, second):
            self.manual_backward(3 * super().training_step(batch, batch_idx))
            optimizer.zero_grad()
            self.net.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            nn.utils.clip_grad_value_(self.parameters(), 0.02)
            optimizer.step()
            self.net.zero_grad()

    def configure_optimizers(self):
        return Adam(self.net[1].parameters(), lr=0.01), SGD(self.net[3:].parameters(), lr=0.1, momentum=0.9)


CONDITIONS = {
    "plain": (mlp, {}),
    "convnet": (convnet, {}),
    "transformer": (transformer, {}),
    "accumulation": (convnet, {"accumulate_grad_batches": 3}),
    "clip by norm": (mlp, {"gradient_clip_val": 0.1}),
    "clip by value": (mlp, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "bf16": (convnet, {"precision": "bf16-mixed"}),
    "double": (convnet, {"precision": "64-true"}),
    "manual": (Manual, {}),
    "one cycle": (lambda: with_optimizer(mlp(), one_cycle), {}),
    "groups": (
        lambda: with_optimizer(
            mlp(),
            lambda m: AdamW(
                [{"params": m.net[1].parameters(), "lr": 0.1}, {"params": m.net[3:].parameters()}], lr=0.01
            ),
        ),
        {},
    ),
}
LAYERS = {"transformer": ["net.head", "net.encoder.layers.0.linear1"], "convnet": ["net.0.0", "net.1.*1", "net.1.4"]}


@pytest.mark.parametrize("name", CONDITIONS)
def test_parts_add_up_in_a_fit(name):
    make, options = CONDITIONS[name]
    module = make()
    layers = LAYERS.get(name) or (["net.0.0", "net.1.1"] if make is convnet else ["net.1", "net.3", "net.5"])
    callback = refinement(layers, phases=3, probe=Probe(num_samples=32))
    fit(module, callback, max_epochs=5, **options)
    bound = {"bf16": 2e-2, "double": 1e-10}.get(name, EXACT)  # under autocast the real output has three digits
    found = {key: value for key, value in callback.scalars.items() if key.startswith("refinement/completeness_error/")}
    assert len(found) == len(callback.ledger) >= 2
    assert max(found.values()) <= bound
    inputs = images().tensors[0].to(next(module.parameters()).dtype)
    for layer, ledger in callback.ledger.items():
        assert callback.scalars[f"refinement/untraced_share/{layer}"] < (0.02 if name == "bf16" else 1e-4)
        explained = callback.explain(module, inputs, layer)
        assert explained.residual <= (1e-10 if name == "double" else EXACT)
        assert explained.norms()[:4].sum((1, 2)).min() > 0.01
        ones = torch.ones(64, dtype=torch.float64)
        torch.testing.assert_close(explained.shares().sum((0, 1)), ones, rtol=1e-6, atol=1e-6)
        assert ledger.weights()["weight"].shape[0] == 4 + 2


# Which samples


class Lone(Module):
    """Output c is driven by the samples of class c alone: the loss of a sample looks at no other output."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return -self(x)[torch.arange(len(y)), y].mean()

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=0.1)


def test_own_class_share_on_planted_data():
    # Classes in features of their own, so that a class' samples touch nothing but its own output's weights.
    x, y = torch.eye(4).repeat(16, 1), torch.arange(64) % 4
    data = DataLoader(TensorDataset(x, y), batch_size=16)
    torch.manual_seed(0)
    logger = MemoryLogger()
    callback = refinement(probe=Probe("net.0", source=list(data)), phases=2)
    fit(Lone(nn.Sequential(nn.Linear(4, 4, bias=False))), callback, train=data, val=False, logger=logger)
    # Of what sets class 0 apart, (1, 0, 0, 0) - (1, 1, 1, 1) / 4, the rest is that the other classes did not move it.
    assert callback.scalars["refinement/own_class_share/net.0"] == pytest.approx(0.75, abs=1e-6)
    assert callback.scalars["refinement/own_class_share_null/net.0"] == pytest.approx(0.25, abs=1e-6)
    torch.testing.assert_close(callback.result["net.0"].raw_shares[:4, :4], torch.eye(4).double())
    # A step adds lr / 4 to the one weight of each class: |p| = 8 steps x 0.025.
    assert callback.scalars["refinement/norm/net.0"] == pytest.approx(0.2, rel=1e-5)
    torch.testing.assert_close(
        callback.result["net.0"].phase_shares[:4], torch.full((4, 2), 1 / 8).double(), rtol=1e-5, atol=1e-6
    )
    first = {key for key, curve in logger.curves.items() if curve[0][0] == 0}
    assert "refinement/initial_share" in first
    assert "refinement/own_class_share" not in first  # nothing was trained yet
    assert len(logger.curves["refinement/own_class_share"]) == 2


def test_sources_of_ones_own():
    """The id of the data set that a sample comes from, with an unknown one, next to class labels for the loss."""
    x, y = images().tensors
    where = torch.arange(64) % 3 + 5 * (torch.arange(64) % 7 == 0)
    train = DataLoader(TensorDataset(x, y, where), batch_size=16)
    callback = refinement(source_fn=lambda batch: batch[2], num_sources=3, probe=Probe(source=list(train)))
    fit(mlp(), callback, train=train, val=False)
    ledger = callback.ledger["net.5"]
    assert ledger.num_sources == 3
    parts = ledger.weights()["weight"]
    assert parts[:4].flatten(1).norm(dim=1).min() > 0.01  # "other", too
    assert callback.result["net.5"].counts.tolist() == [int((where == k).sum()) for k in range(3)] + [
        int((where > 2).sum())
    ]
    assert "refinement/own_class_share" not in callback.scalars


def test_targets_out_of_range_are_other():
    x, y = images().tensors
    train = DataLoader(TensorDataset(x, torch.where(torch.arange(64) % 2 == 0, y, 3)), batch_size=16)
    callback = refinement(num_sources=3, probe=Probe(source=list(loader(32))))
    fit(mlp(), callback, train=train, val=False)
    parts = callback.ledger["net.5"].weights()["weight"].flatten(1).norm(dim=1)
    assert parts[1] == 0  # odd classes are all 3 now
    assert parts[3] > 0.01
    assert callback.result["net.5"].counts.tolist() == [8, 8, 8, 8]


# Before the first step


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source_fn": lambda batch: batch[1], "num_sources": 101}, "`num_sources`.*at most 100.*got 101"),
        ({"memory_limit": "1KB"}, r"ledgers would take .*net.5.*memory_limit.*1.*raise the limit|0.0 MB"),
        ({"layers": "net.0"}, "`layers`.*'net.0'.*Flatten"),
        ({"layers": "nothing"}, "nothing"),
        ({"update_log": True}, "`update_log`.*folder"),
        ({"layers": "net.[15]", "track_samples": "net.0"}, "`track_samples`.*'net.0'.*Flatten"),
    ],
)
def test_refused_before_the_first_step(options, message):
    module = mlp()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(ArgumentError, match=message):
        fit(module, RepresentationRefinement(**options))
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


def test_layer_tied_to_an_embedding_is_refused():
    module = mlp()
    module.embedding = nn.Embedding(4, 8)
    module.embedding.weight = module.net[5].weight
    with pytest.raises(ArgumentError, match=r"net\.5.*Embedding"):
        fit(module, RepresentationRefinement(layers="net.5"))


# Together with other callbacks


def test_another_callback_before_ours_changes_nothing():
    """Its evaluation at the start runs the model too, and opens our ledgers."""
    alone, beside = refinement(probe=Probe(num_samples=32)), refinement(probe=Probe(num_samples=32))
    fit(mlp(), alone)
    fit(mlp(), NeuronCommunities(Probe(num_samples=32)), beside)
    assert alone.scalars == beside.scalars
    assert alone.initial == beside.initial
    after = refinement(probe=Probe(num_samples=32))
    fit(mlp(), after, NeuronCommunities(Probe(num_samples=32)))
    assert alone.scalars == after.scalars
    for layer, ledger in alone.ledger.items():
        assert torch.equal(ledger.weights()["weight"], beside.ledger[layer].weights()["weight"])


def test_fallback_says_so_once():
    callback = RepresentationRefinement()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(with_optimizer(mlp(), lambda m: RMSprop(m.parameters(), lr=0.001)), callback)
    said = [str(w.message) for w in caught if "RMSprop" in str(w.message)]
    assert len(said) == 1
    assert "net.5" in said[0]
    assert "projection" in said[0]
    assert callback.result["net.5"].completeness_error < EXACT
    assert "refinement/completeness_error" not in callback.scalars


def test_iterable_dataset_says_once_that_samples_have_no_ids():
    class Stream(IterableDataset):
        def __len__(self):
            return 64

        def __iter__(self):
            return iter(images())

    callback = RepresentationRefinement()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(mlp(), callback, train=DataLoader(Stream(), batch_size=16))
    assert sum("IterableDataset" in str(w.message) for w in caught) == 1
    assert callback.samples == {}
    assert callback.scalars["refinement/completeness_error"] < EXACT
    assert math.isfinite(callback.scalars["refinement/own_class_share"])


# After the fit


def test_explain_and_validate_after_the_fit():
    module, callback = mlp(), refinement(["net.3", "net.5"], phases=2)
    trainer = fit(module, callback)
    x = images(8, seed=5).tensors[0]
    module.train()
    found = callback.explain(module, x)
    assert module.training
    with torch.no_grad():
        torch.testing.assert_close(found.outputs.float(), module(x))  # the last of the layers is the head
    assert callback.explain(module, x, "net.3").outputs.shape == (8, 8)
    with pytest.raises(ValueError, match=r"net\.3, net\.5; got 'net\.1'"):
        callback.explain(module, x, "net.1")
    parts = callback.ledger["net.5"].weights()["weight"].clone()
    last = dict(callback.scalars)
    trainer.validate(module, loader(32), verbose=False)
    assert callback.scalars == pytest.approx(last, rel=1e-5, abs=1e-7)
    assert torch.equal(callback.ledger["net.5"].weights()["weight"], parts)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_table_update_log_and_figures_are_written(tmp_path):
    logger = pl.loggers.TensorBoardLogger(tmp_path)
    # The pattern names a Flatten and activations, too, which are left out.
    callback = refinement(update_log=True, influence_every_n_steps=2, track_samples=["net.[0123]"], phases=2)
    fit(mlp(), callback, logger=logger)
    (table,) = tmp_path.rglob("samples.csv")
    header, *rows = table.read_text().splitlines()
    layers = ["refinement/net.5", "refinement/net.1", "refinement/net.3"]
    names = ["rank", "sample_id", "label", "predicted", "suggested", "loss", "score", "visits"]
    names += ["recorded", *layers]
    assert header.split(",") == names == list(callback.samples)
    assert len(rows) == 64
    assert callback.samples["visits"].tolist() == [2] * 64
    assert 0 <= callback.scalars["refinement/sample_gini/net.3"] < 1
    (folder,) = [path for path in tmp_path.rglob("updates") if path.is_dir()]
    found = load_update_log(folder).influence_on_layer_inputs(images(5).tensors[0].flatten(1)[:, :8], top_k=3)
    assert found.sample_ids.shape == (5, 3)
    live = callback.probe_influence(top_k=4)
    assert live.sample_ids.shape[1] == 4
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (path,) = {path.parent for path in tmp_path.rglob("version_0/events.out*")}
    tags = EventAccumulator(str(path)).Reload().Tags()
    assert "refinement/sources" in tags["images"]
    assert "refinement/samples" in tags["images"]
    assert any(tag.startswith("refinement/samples") for tag in tags["tensors"])


# Failures


class Fails(pl.Callback):
    def __init__(self, do):
        self.do = do

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3:
            self.do(trainer)


def test_error_in_a_step_never_reaches_training():
    plain = mlp()
    fit(plain)
    module, callback = mlp(), RepresentationRefinement()

    def destroy(trainer):
        callback.ledger["net.5"]._parts = {}

    with pytest.warns(UserWarning, match="layer 'net.5' in a training step"):
        trainer = fit(module, callback, Fails(destroy))
    assert trainer.global_step == 8
    for key, value in plain.state_dict().items():
        assert torch.equal(value, module.state_dict()[key])
    assert not trainer.optimizers[0]._optimizer_step_post_hooks


def test_hooks_go_after_an_exception():
    def boom(trainer):
        kept.append(trainer.optimizers[0])
        assert trainer.optimizers[0]._optimizer_step_post_hooks
        raise RuntimeError("boom")

    kept, module, callback = [], mlp(), RepresentationRefinement()
    with pytest.raises(RuntimeError, match="boom"):
        fit(module, callback, Fails(boom))
    assert not kept[0]._optimizer_step_post_hooks
    assert not any(m._forward_hooks for m in module.modules())
    assert callback.ledger["net.5"].weights()["weight"][:-1].any()  # what was found is still there


def test_second_fit_begins_anew():
    callback = refinement()
    fit(mlp(), callback)
    first = callback.ledger["net.5"].weights()["weight"].clone()
    fit(mlp(), callback)
    torch.testing.assert_close(callback.ledger["net.5"].weights()["weight"], first)


# Options: each arrives where it is used


def opened_with(**options):
    """A callback with these options, and what its fit opened."""
    found = {}

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            found["run"], found["hooks"] = callback.run, callback.hooks

    callback = refinement(**options)
    fit(mlp(), callback, Look(), max_epochs=1)
    return callback, found["run"], found["hooks"]


def test_the_limit_of_the_update_log_arrives(tmp_path):
    with pytest.warns(UserWarning, match="size limit of 2,000 bytes"):
        fit(mlp(), refinement(update_log=tmp_path, update_log_limit=2000))
    assert sum(path.stat().st_size for path in tmp_path.rglob("shard*.pt")) <= 2000
    fit(mlp(), refinement(update_log=tmp_path, update_log_limit="1MB"))
    assert 2000 < sum(path.stat().st_size for path in tmp_path.rglob("shard*.pt")) <= 1e6


SMALL = {"num_sources": 1, "phases": 1, "track_samples": False}  # a ledger of 36 weights and 3 rows


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        # In double precision: parts, means, four times the parts in a step, twice two of its rows in an evaluation.
        ({}, 36 * (2 * 3 + 4 * 3 + 2 * 2) * 8),
        # Three layers, both kinds of visits and class of 640 samples, and a row for samples without one. Of their
        # predictions loss, both classes, votes, visits and the time of the last.
        ({"track_samples": "*"}, 8 * (3 + 3 + 6) * 641),
        # A vector of 4 numbers for each of 16 inputs, class and flag.
        ({"influence_every_n_steps": 1}, 641 * (8 * 16 * 4 + 9)),
        # All weights in single precision, in each of 80 steps.
        ({"mode": "pfahler2021"}, 80 * 36 * 4),
    ],
)
def test_the_memory_limit_is_the_memory_that_is_needed(options, needed):
    train = loader(640)
    fit(mlp(), refinement(memory_limit=needed, **(SMALL | options)), train=train)
    with pytest.raises(ArgumentError, match="`memory_limit`"):
        fit(mlp(), refinement(memory_limit=needed - 1, **(SMALL | options)), train=train)


def test_samples_are_tracked_where_the_user_says():
    everywhere = ["net.5", "net.1", "net.3"]
    for given, layers in [
        (True, ["net.5"]),
        ("*", everywhere),
        (["net.1", "net.3"], everywhere),
        ("net.1", ["net.5", "net.1"]),
    ]:
        callback, run, hooks = opened_with(track_samples=given)
        assert run.tracking.table.layers == layers == list(hooks.layers)
        assert list(run.ledgers) == ["net.5"] == list(run.ledgers)
        ginis = {key.split("/")[2] for key in callback.scalars if key.startswith("refinement/sample_gini/")}
        assert ginis == set(layers)
        values = [callback.scalars[f"refinement/sample_gini/{layer}"] for layer in layers]
        assert callback.scalars["refinement/sample_gini"] == pytest.approx(sum(values) / len(values))
    callback, run, _ = opened_with(track_samples=False)
    assert run.tracking is None and callback.samples == {}
    assert not any("sample_gini" in key for key in callback.scalars)


def test_the_mode_decides_whether_steps_are_kept():
    callback, run, _ = opened_with(layers=["net.3", "net.5"])
    assert callback.step_scores == run.step_scores == {}
    callback, run, _ = opened_with(mode="pfahler2021", layers=["net.3", "net.5"], track_samples=False)
    assert {layer: len(scores) for layer, scores in callback.step_scores.items()} == {"net.3": 4, "net.5": 4}
    h = torch.randn(3, 8)
    p = callback.ledger["net.5"].explain(h).refinement  # the ledger and the steps agree
    assert torch.allclose(callback.step_scores["net.5"].scores(h).length, p.norm(dim=1), rtol=1e-4)
    assert callback.step_scores["net.5"].influence(h, 3).sample_ids.shape == (3, 3)


class TwoSteps(Module):
    """Two optimizers that both step in every batch, so that the global step rises by two."""

    def __init__(self):
        super().__init__(mlp().net)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        return SGD(self.net[1].parameters(), lr=0.1), SGD(self.net[3:].parameters(), lr=0.1)


class Refreshes(pl.Callback):
    """Notes the steps after which the tracked inputs were updated."""

    def __init__(self, callback):
        self.callback, self.steps = callback, []

    def on_train_batch_end(self, trainer, *_):
        if self.callback.last_influence_step == trainer.global_step:
            self.steps.append(trainer.global_step)


@pytest.mark.parametrize(
    ("every", "steps"), [(1, [2, 4, 6, 8, 10, 12, 14, 16]), (3, [4, 6, 10, 12, 16]), (5, [6, 10, 16])]
)
def test_influence_is_updated_whenever_its_interval_has_passed(every, steps):
    """With two optimizers a multiple of the interval may never be the global step."""
    callback = refinement(influence_every_n_steps=every)
    watch = Refreshes(callback)
    fit(TwoSteps(), callback, watch)
    assert watch.steps == steps
    # The same moments as those of a probe.
    probe, last = Probe(every_n_steps=every), 0
    for step in range(2, 17, 2):
        assert probe.due_at_step(step, last) == (step in steps)
        last = step if step in steps else last
    assert callback.probe_influence().num_samples == 64


def test_a_resumed_run_updates_influence_as_the_uninterrupted_one(tmp_path):
    whole = refinement(influence_every_n_steps=3)
    fit(mlp(), whole, train=loader(), max_epochs=4)
    first = refinement(influence_every_n_steps=3)
    trainer = fit(mlp(), first, train=loader(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    resumed = refinement(influence_every_n_steps=3)
    watch = Refreshes(resumed)
    fit(mlp(), resumed, watch, train=loader(), max_epochs=4, ckpt_path=tmp_path / "part.ckpt")
    assert watch.steps == [6, 9, 12, 15]
    one, other = whole.probe_influence(), resumed.probe_influence()
    assert torch.equal(one.sample_ids, other.sample_ids)
    torch.testing.assert_close(one.scores, other.scores)


class TimeFirst(nn.Module):
    """A linear layer over the rows of an 8 x 8 image, with the time before the samples."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(x).mean(0)


class Nested(nn.Module):
    """Takes images in a mapping, next to a table that is not of the samples."""

    def __init__(self):
        super().__init__()
        self.net = mlp().net

    def forward(self, inputs):
        return self.net(inputs["image"] + inputs["table"].mean())


def time_first(samples):
    x, y = zip(*samples, strict=True)
    return torch.stack(x)[:, 0].transpose(0, 1), torch.stack(y)


def nested(samples):
    x, y = zip(*samples, strict=True)
    return {"image": torch.stack(x), "table": torch.zeros(3, 5)}, torch.stack(y)


@pytest.mark.parametrize(
    ("network", "collate", "layer_inputs"),
    [(TimeFirst, time_first, (16, 8, 8)), (Nested, nested, (16, 8)), (lambda: mlp().net, None, (16, 8))],
)
def test_influence_is_on_the_first_samples_of_the_probe_set_wherever_they_lie(network, collate, layer_inputs, tmp_path):
    callback = refinement(influence_every_n_steps=1, probe=Probe(num_samples=24, source="train"))
    drawn = {}

    class Draws(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            tracking = callback.run.tracking
            drawn.update(tracking.draw_influence(trainer, tracking.top_over_ranks(trainer), None))

    train = loader(48, batch_size=24, collate_fn=collate)
    logger = pl.loggers.TensorBoardLogger(tmp_path)
    fit(Module(network()), callback, Draws(), train=train, val=False, logger=logger)
    tracked = callback.tracking.inputs
    assert tuple(tracked.layer_inputs.shape) == layer_inputs
    assert len(tracked.inputs) == 16 and len(drawn) == 1
    assert callback.probe_influence().scores.shape[0] == 16
    pictures, labels = images(48).tensors
    rows = []
    for found, target, layer_input in zip(tracked.inputs, tracked.targets, tracked.layer_inputs, strict=True):
        if collate is nested:
            assert found["table"].shape == (3, 5)
            found = found["image"]
        wanted = pictures[:, 0] if collate is time_first else pictures
        rows += [row for row in range(48) if torch.equal(found, wanted[row])]
        assert int(target) == int(labels[rows[-1]])
        if collate is time_first:
            assert torch.equal(layer_input, found)
    assert len(set(rows)) == 16


def test_everything_known_of_a_batch_is_moved_to_the_device_of_the_model(monkeypatch):
    begun = []
    monkeypatch.setattr(TrainingSteps, "begin", lambda _, batch, sources: begun.append((batch, sources)))
    device, callback = torch.device("meta"), refinement()

    class Begins(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            callback.run.begin_batch(batch, batch[1], device)
            callback.run.begin_batch(batch, None, device)

    fit(mlp(), callback, Begins(), max_steps=1)
    _, (labelled, sources), (unlabelled, _) = begun
    assert labelled.ids.device == labelled.targets.device == sources.rows.device == device
    assert unlabelled.ids.device == device and unlabelled.targets is None


# Names and figures


def test_class_names_are_those_of_the_sources():
    names = ("ant", "bee", "cat", "dog")
    callback = refinement(probe=Probe(class_names=names))
    module = mlp()
    fit(module, callback)
    assert callback.result["net.5"].names == (*names, "other")
    assert callback.explain(module, images(3).tensors[0]).sources == (*names, "other")
    few = refinement(probe=Probe(class_names=names), num_sources=3)
    fit(mlp(), few)
    assert few.result["net.5"].names == (*names[:3], "other")
    other = refinement(probe=Probe(class_names=names), source_fn=1, num_sources=4)
    fit(mlp(), other)
    assert other.result["net.5"].names == ("0", "1", "2", "3", "other")


def test_figures_name_their_layers(tmp_path):
    logger = pl.loggers.TensorBoardLogger(tmp_path)
    callback = refinement(
        ["net.3", "net.5"], influence_every_n_steps=2, probe=Probe(class_names=["ant", "bee", "cat", "dog"])
    )
    drawn = {}

    class Draws(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            tracking = callback.run.tracking
            drawn.update(tracking.draw_influence(trainer, tracking.top_over_ranks(trainer), callback.class_names))

    fit(mlp(), callback, Draws(), logger=logger)
    drawn |= callback.draw(callback.result)
    assert set(drawn) == {"sources", "influence/net.5"}
    assert "net.3" in texts(drawn["sources"]) and "net.5" in texts(drawn["sources"])
    assert "net.5" in texts(drawn["influence/net.5"]) and "dog" in texts(drawn["influence/net.5"])
    assert "fc" in texts(callback.layer_metrics["net.5"].plot(callback.result["net.5"], layer="fc"))


def test_results_compare_and_pickle():
    callback, module = refinement(), mlp()
    fit(module, callback)
    result, explained = callback.result["net.5"], callback.explain(module, images(3).tensors[0])
    for found in (result, explained):
        twin = pickle.loads(pickle.dumps(found))
        assert found == found and found != twin  # by identity, and without comparing tensors
        for name, value in vars(found).items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(getattr(twin, name), value, rtol=0, atol=0, equal_nan=True)
            else:
                assert getattr(twin, name) == value
    assert (result.num_units, result.num_samples, result.num_nonfinite) == (4, 32, 0)
    after = pickle.loads(pickle.dumps(callback))
    assert after.scalars == callback.scalars and list(after.ledger) == ["net.5"]


def test_a_layer_given_to_the_probe_does_not_matter():
    """It is for the callbacks that share the probe; these layers need not even exist here."""
    plain, other = refinement(), refinement(probe=Probe(layers="net.2"))
    fit(mlp(), plain)
    fit(mlp(), other)
    assert plain.scalars == other.scalars


def test_layers_of_the_probe_that_match_nothing_do_not_matter():
    callback = refinement(probe=Probe(layers="nothing"))
    fit(mlp(), callback)
    assert callback.scalars["refinement/completeness_error"] < EXACT
