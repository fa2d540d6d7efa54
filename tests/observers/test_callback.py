"""ObserverProbes: attributes of the user's own, keys, the tag limit, references, resume, figures."""

import math
import warnings
from functools import partial

import pytest
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_neuro import ArgumentError, ObserverProbes, Probe
from lightning_neuro.identity import content_hash
from lightning_neuro.keys import parse_key
from lightning_neuro.observers import ObserverOptions, read_attributes
from lightning_neuro.observers.attributes import read_attribute_values
from lightning_neuro.observers.result import MEASURES
from tests.models import MemoryLogger, Module, fit, images, loader, mlp

LAYERS = ("net.2", "net.4")
bright = {"bright": lambda batch: batch[0].flatten(1).mean(1) > 0.5, "even": lambda batch: batch[1] % 2 == 0}


def probes(*args, denotation=False, **options):
    """Without the search for units that denote something, which takes most of the time."""
    return ObserverProbes(*args, denotation=denotation, on_error="raise", **options)


def test_every_documented_key_is_there():
    callback = probes(attributes=bright, denotation=True, log_scalars="*")
    log = MemoryLogger()
    fit(mlp(), callback, logger=log)
    key = "observers/balanced_accuracy/{}/{}"
    for name in bright:
        values = [callback.scalars[key.format(name, layer)] for layer in LAYERS]
        assert callback.scalars[key.format(name, "whole_network")] == pytest.approx(sum(values) / 2)
    for measure in MEASURES:
        for layer in LAYERS:
            values = callback.result[layer].by_attribute()[measure]
            assert values.keys() == bright.keys(), measure
            assert callback.scalars[f"observers/{measure}/{layer}"] == pytest.approx(sum(values.values()) / 2)
            if measure == "balanced_accuracy":
                assert values == {name: callback.scalars[key.format(name, layer)] for name in bright}
        assert f"observers/{measure}" in log.curves
    of_attributes = {key.split("/")[1] for key in callback.scalars if len(key.split("/")) == 4}
    gains = {f"gain_over_{what}" for what in ("initial", "initial_low", "input", "input_low", "class", "class_low")}
    assert of_attributes == {"balanced_accuracy", *gains}
    for layer in LAYERS:
        start = callback.initial[f"observers/balanced_accuracy/{layer}"]
        assert callback.scalars[f"observers/balanced_accuracy_initial/{layer}"] == start
        assert f"observers/num_denoting_units/{layer}" in log.curves
        before = callback.initial[f"observers/balanced_accuracy/even/{layer}"]
        assert callback.before[layer]["even"] == pytest.approx(before)
        now = callback.scalars[key.format("even", layer)]
        assert callback.scalars[f"observers/gain_over_initial/even/{layer}"] == pytest.approx(now - before)
        raw = callback.from_input["even"]
        assert callback.scalars[f"observers/gain_over_input/even/{layer}"] == pytest.approx(now - raw)
        assert callback.initial[f"observers/gain_over_initial/even/{layer}"] == 0
        low = callback.scalars[f"observers/gain_over_initial_low/even/{layer}"]
        assert low == pytest.approx(callback.result[layer].gain_over_initial_low[1].item()) and low < now - before
    assert set(callback.from_input) == {"bright", "even"}
    mean = sum(callback.from_input.values()) / 2
    assert callback.scalars["observers/balanced_accuracy_input"] == pytest.approx(mean)


def test_gains_of_single_attributes_are_curves_only_if_someone_watches_them():
    watched = "observers/gain_over_initial_low/even/net.4"
    log = MemoryLogger()
    stop = EarlyStopping(watched, mode="max", patience=100, stopping_threshold=-1.0)
    trainer = fit(mlp(), probes(attributes=bright), stop, logger=log, max_epochs=3)
    single = {key for key in log.curves if len(key.split("/")) == 4}
    assert {key for key in single if "balanced_accuracy" not in key} == {watched}
    assert stop.stopped_epoch == 0 and trainer.current_epoch == 1  # the bound was above the threshold


def test_every_key_says_what_it_is_of():
    callback = probes(attributes=bright | {"net.2": bright["even"]})  # an attribute may be called like a layer
    fit(mlp(), callback, max_epochs=1)
    seen = set()
    for key in callback.scalars:
        family, entry = parse_key(key)
        assert family == "observers" and (entry.layer in LAYERS or entry.layer is None)
        seen.add(entry.attribute)
    assert seen == {None, "bright", "even", "net.2"}
    key = "observers/balanced_accuracy/{}/net.4"
    assert callback.scalars[key.format("net.2")] == callback.scalars[key.format("even")]


def test_every_option_reaches_the_metric():
    options: ObserverOptions = {"classifier": "logistic", "num_controls": 3, "num_folds": 7, "denotation": False}
    assert options.keys() == ObserverOptions.__annotations__.keys()
    given, default = ObserverProbes(**options).metric.settings, ObserverProbes().metric.settings
    for name, value in options.items():
        assert getattr(given, name) == value != getattr(default, name)


def test_the_raw_input_is_read_with_the_same_folds():
    corners = {"corners": lambda batch: batch[0][:, 0, 0, 0] > batch[0][:, 0, 7, 7]}
    callback = probes(Probe(source=images(64)), attributes=corners, num_folds=3)
    fit(mlp(), callback, max_epochs=1, train=loader())
    x, y = images(64).tensors
    values = read_attribute_values(corners, [x, y], 64)

    def by_hand(**options):
        found = read_attributes(x.flatten(1), values, y, groups=content_hash(x), denotation=False, **options)
        return found.balanced_accuracy.item()

    assert callback.from_input == {"corners": pytest.approx(by_hand(num_folds=3))}
    assert abs(by_hand(num_folds=5) - by_hand(num_folds=3)) > 0.01


def test_classes_have_their_names():
    named = probes(Probe(layers="net.4", class_names=["cat", "n/a", "emu"]))
    plain = probes(Probe(layers="net.4"))
    for callback in (named, plain):
        fit(mlp(), callback, max_epochs=1)
    for k, name in enumerate(["cat", "n_a", "emu", "class_3"]):
        key = "observers/balanced_accuracy/{}/net.4"
        assert named.scalars[key.format(name)] == plain.scalars[key.format(f"class_{k}")]
    assert list(named.from_input) == ["cat", "n_a", "emu", "class_3"]


def test_keys_of_a_dict_batch_and_missing_values():
    class Dicts(torch.utils.data.Dataset):
        def __len__(self):
            return 64

        def __getitem__(self, i):
            x, y = images(64)[i]
            return {"image": x, "label": y, "first": float(y < 2) if i % 3 else math.nan}

    class Net(Module):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["image"], batch["label"]), batch_idx)

        def validation_step(self, batch, batch_idx):
            super().validation_step((batch["image"], batch["label"]), batch_idx)

    callback = probes(Probe(source=Dicts()), attributes={"first": "first"})
    trainer_loader = DataLoader(Dicts(), batch_size=16)
    fit(Net(mlp().net), callback, train=trainer_loader, val=False)
    result = callback.result["net.2"]
    assert result.num_known.item() == 64 - 22
    assert result.balanced_accuracy.item() > 0.7


WRONG = {
    "no such key": ({"mark": "mark"}, "field of the batch"),
    "no such index": ({"mark": 7}, "field of the batch"),
    "length": ({"mark": lambda batch: batch[1][:3]}, "16 samples"),
    "values": ({"mark": lambda batch: batch[1]}, "0, 1 or NaN"),
    "function": ({"mark": lambda batch: batch[7]}, "IndexError"),
    "kind": ({"mark": lambda batch: "yes"}, "numbers"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_attribute_is_named_before_the_first_step(case):
    attributes, said = WRONG[case]
    module = mlp()
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(ArgumentError, match=rf"attributes\['mark'\].*{said}"):
        fit(module, ObserverProbes(Probe(source=list(loader(32))), attributes=attributes))
    assert all(map(torch.equal, before, module.parameters()))


@pytest.mark.parametrize("field", [lambda batch: batch[0][:, 0, 0, 0], lambda batch: ["film"] * len(batch[1]), 7])
def test_wrong_groups_are_named_before_the_first_step(field):
    with pytest.raises(ArgumentError, match=r"^`group_fn`"):
        fit(mlp(), ObserverProbes(group_fn=field))


@pytest.mark.filterwarnings("ignore:observers. the analysis of layer 'net.4'")
def test_an_attribute_that_fails_later_does_not_end_the_run():
    calls = []

    def fails_later(batch):
        calls.append(batch)
        return batch[1] == 0 if len(calls) <= 2 else batch[7]

    callback, other = ObserverProbes(attributes={"first": fails_later}), ObserverProbes(name="other")
    with pytest.warns(UserWarning, match=r"layer 'net\.2' failed"):
        assert fit(mlp(), callback, other, train=loader()).global_step == 8
    assert callback.result == {} and callback.depth is None
    key = "observers/balanced_accuracy/first/net.4"
    assert callback.scalars[key] == callback.initial[key]
    assert set(other.result) == set(LAYERS)


class Wrapped(Module):
    """Takes its input out of what the case below has put it in."""

    def __init__(self, unpack):
        super().__init__(mlp().net)
        self.unpack = unpack

    def forward(self, x):
        return super().forward(self.unpack(x))


INPUTS = {
    "time first": (lambda x: x.flatten(1)[None].repeat(3, 1, 1), lambda x: x[0]),
    "mask first": (lambda x: {"mask": torch.ones(len(x), 5), "image": x}, lambda x: x["image"]),
    "no tensor": (lambda x: {"image": x.numpy()}, lambda x: torch.as_tensor(x["image"])),
}


@pytest.mark.parametrize("case", INPUTS)
def test_samples_are_told_apart_whatever_the_input_is_wrapped_in(case):
    pack, unpack = INPUTS[case]
    callback = probes(Probe(source=[(pack(x), y) for x, y in loader(64, batch_size=1 if case == "no tensor" else 16)]))

    def collate(items):
        return pack(torch.stack([x for x, _ in items])), torch.tensor([int(y) for _, y in items])

    data = DataLoader(images(64), batch_size=16, collate_fn=collate)
    fit(Wrapped(unpack), callback, train=data, val=False)
    result = callback.result["net.2"]
    assert result.num_samples == 64
    assert result.balanced_accuracy.min() > 0.6


def test_the_input_may_be_a_number_a_sample():
    class Net(Module):
        def forward(self, x):
            return super().forward(x[:, None])

    net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    y = torch.arange(64) % 4
    data = DataLoader(TensorDataset(y + 0.1 * torch.randn(64, generator=torch.Generator().manual_seed(0)), y), 16)
    callback = probes(Probe(source=data.dataset))
    fit(Net(net), callback, train=data, val=False)
    assert callback.from_input["class_3"] > 0.9


def test_groups_are_held_out_together():
    seen = []

    class Look(ObserverProbes):
        def update(self, metric, activations, batch):
            super().update(metric, activations, batch)
            seen.append((batch.targets, metric.groups[-1]))

    fit(mlp(), Look(group_fn=lambda batch: batch[1] // 2), max_epochs=1)
    for targets, groups in seen:
        assert len(groups.unique()) == 2
        assert all(len(groups[targets // 2 == g].unique()) == 1 for g in (0, 1))


def test_undefined_attributes_are_told_in_one_warning_and_not_logged():
    callback = ObserverProbes(attributes=bright | {"never": lambda batch: batch[1] > 9})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(mlp(), callback, max_epochs=1)
    told = [str(w.message) for w in caught if "never" in str(w.message)]
    assert len(told) == 1 and "32 samples" in told[0]
    assert not any("never" in key for key in callback.scalars)
    assert callback.scalars["observers/balanced_accuracy/even/net.2"] > 0.5


def test_too_many_attributes_become_extremes_and_a_table(tmp_path):
    attributes = {f"class {k} | {n}": (lambda batch, k=k: batch[1] == k) for n in range(2) for k in range(4)}
    attributes["never"] = lambda batch: batch[1] > 9  # without a score, so it counts as none
    options = {"attributes": attributes, "heatmap": False, "num_controls": 0}
    callback = probes(max_attributes=7, **options)
    with pytest.warns(UserWarning, match="never"):
        fit(mlp(), callback, max_epochs=1, logger=TensorBoardLogger(tmp_path, name="", version=""))
    tags = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
    own = [tag for tag in tags.Tags()["scalars"] if tag.startswith("observers/")]
    assert "observers/balanced_accuracy/net.2" in own and not any("class" in tag for tag in own)
    for layer in LAYERS:
        scores = callback.result[layer].balanced_accuracy
        scores = scores[scores.isfinite()].sort().values
        for name, some in (("lowest_3", scores[:3]), ("highest_3", scores[-3:])):
            key = f"observers/balanced_accuracy/{name}/{layer}"
            assert callback.scalars[key] == pytest.approx(some.mean().item())
            assert key in callback.initial and key in own
    table = tags.Tensors("observers/balanced_accuracy/text_summary")[-1].tensor_proto.string_val[0].decode()
    lines = table.splitlines()
    assert lines[0] == "| attribute | net.2 | net.4 | raw input |"
    assert len(lines) == 2 + 9
    value = float(callback.result["net.4"].balanced_accuracy[0])
    assert lines[2].startswith("| class 0 \\| 0 |") and f"| {value:.3f} | " in lines[2]
    # One that another callback monitors, or that is asked for, is a curve nevertheless.
    asked = "observers/balanced_accuracy/class 2 | 0/net.4"
    log = MemoryLogger()
    with pytest.warns(UserWarning, match="never"):
        fit(mlp(), probes(max_attributes=7, prog_bar=asked, **options), max_epochs=1, logger=log)
    assert {key for key in log.curves if "class" in key} == {asked}
    just = probes(max_attributes=8, **options)
    with pytest.warns(UserWarning, match="never"):
        fit(mlp(), just, max_epochs=1)
    assert "observers/balanced_accuracy/class 3 | 1/net.4" in just.scalars
    assert not any("lowest_3" in key for key in just.scalars)


def test_classes_of_which_there_are_too_few_samples_are_left_out():
    """Of 16 classes a set of 160 samples holds 10; they keep the names of their labels."""
    x = images(320).tensors[0]
    labels = 5 * (torch.arange(320) % 16)
    callback = probes(Probe(source=[(x, labels)], num_samples=160), heatmap=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        fit(mlp(), callback, max_epochs=1)
    result = callback.result["net.4"]
    assert len(result.names) == 10 and {int(name.split("_")[1]) % 5 for name in result.names} == {0}
    assert result.balanced_accuracy.isfinite().all()


def test_a_network_that_learns_raises_what_can_be_read_and_the_input_stays():
    callback = probes(Probe(layers="net.4"))
    fit(mlp(), callback, max_epochs=8, train=loader(shuffle=True))
    key = "observers/balanced_accuracy/net.4"
    assert callback.scalars[key] > callback.initial[key] + 0.05
    assert (
        callback.scalars["observers/balanced_accuracy_input"] == callback.initial["observers/balanced_accuracy_input"]
    )


def test_the_same_samples_are_in_the_same_fold_all_run_and_in_any_order():
    first, second = probes(Probe(source=images(32))), probes(Probe(source=list(loader(32, batch_size=5))))
    fit(mlp(), first, max_epochs=1, train=loader())
    fit(mlp(), second, max_epochs=1, train=loader())
    for key, value in first.scalars.items():
        assert second.scalars[key] == pytest.approx(value, abs=1e-7), key


def test_positions_of_one_sample_are_held_out_together():
    callback = probes(Probe(reduction="tokens"), attributes=bright)
    from tests.models import convnet

    fit(convnet(), callback, max_epochs=1)
    result = callback.result["net.0.2"]
    assert result.num_samples == 32 * 36
    assert result.balanced_accuracy.isfinite().all()


def test_references_outlive_a_resume(tmp_path):
    callback = probes(attributes=bright)
    save = ModelCheckpoint(tmp_path, filename="last")
    fit(mlp(), callback, save, enable_checkpointing=True)
    resumed = probes(attributes=bright)
    fit(mlp(), resumed, max_epochs=3, ckpt_path=tmp_path / "last.ckpt")
    assert (resumed.from_input, resumed.before) == (callback.from_input, callback.before)


def test_adding_or_removing_observers_on_resume_keeps_the_optimizer(tmp_path):
    """A run with observers, continued without, and the other way round, is the run that never had any."""

    def weights(*callbacks, **options):
        module = mlp()
        fit(module, *callbacks, train=loader(), **options)
        return list(module.parameters())

    whole = weights(max_epochs=2)
    for first, then in (((), (probes(),)), ((probes(), probes(name="two")), (probes(),))):
        folder = tmp_path / f"{len(first)}{len(then)}"
        save = ModelCheckpoint(folder, filename="last")
        weights(*first, save, max_epochs=1, enable_checkpointing=True)
        resumed = weights(*then, max_epochs=2, ckpt_path=folder / "last.ckpt")
        assert all(map(torch.equal, whole, resumed))


@pytest.mark.parametrize("number", [1, 4])
def test_global_step_does_not_depend_on_the_number_of_observers(number):
    attributes = {f"a{n}": bright["even"] for n in range(number)}
    assert fit(mlp(), probes(attributes=attributes)).global_step == 8


def test_inputs_that_are_no_floats_have_no_raw_observer():
    class Tokens(Module):
        def forward(self, x):
            return super().forward(x.float())

    x, y = images(64).tensors
    data = DataLoader(TensorDataset((4 * x).long(), y), batch_size=16)
    callback = probes(Probe(source=data.dataset))
    fit(Tokens(mlp().net), callback, train=data, val=False)
    assert callback.from_input == {}
    assert not any("_input" in key for key in callback.scalars)


def test_the_logistic_observer_is_near():
    make = partial(probes, Probe(layers="net.4"), attributes={"even": bright["even"]}, num_controls=0)
    ridge, logistic = make(), make(classifier="logistic", num_folds=3)
    for callback in (ridge, logistic):
        fit(mlp(), callback, max_epochs=1, train=loader())
    key = "observers/auroc"
    assert abs(ridge.scalars[key] - logistic.scalars[key]) < 0.2
    assert logistic.scalars[key] > 0.6


def test_figures_are_those_promised():
    callback = probes(denotation=True)
    fit(mlp(), callback)
    maps = {f"{name}/{layer}" for name in ("weights", "patterns", "effects") for layer in LAYERS}
    names = maps | {"attributes", "explanation", "proportion"}
    assert set(callback.draw(callback.result)) == names
    plain = probes(heatmap=False)
    fit(mlp(), plain)
    assert set(plain.draw(plain.result)) == {"attributes"}
    assert "observers/num_denoting_units" not in plain.scalars


def test_without_labels_the_default_is_disabled_with_one_warning() -> None:
    callback = ObserverProbes(Probe(source=[(images(32).tensors[0],)]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(mlp(), callback)
    (text,) = [str(warning.message) for warning in caught if "bservers" in str(warning.message)]
    assert (
        text.startswith("observers is disabled in this run. ObserverProbes needs a class label") and "target_fn" in text
    )
    assert trainer.current_epoch == 2 and callback.scalars == {}


def test_samples_whose_label_is_to_be_ignored_are_left_out() -> None:
    x, y = images(64).tensors
    some = torch.arange(64) % 3 > 0
    scores = []
    for data in ((x, torch.where(some, y, -100)), (x[some], y[some])):
        callback = ObserverProbes(Probe(source=[data]))
        fit(mlp(), callback, max_epochs=1, limit_train_batches=1)
        scores.append({key: value for key, value in callback.initial.items() if "selectivity" not in key})
    assert scores[0].keys() == scores[1].keys()
    for key, value in scores[0].items():
        if "input" not in key:
            assert value == pytest.approx(scores[1][key], abs=1e-9), key


def test_several_labels_go_with_each_position_of_their_sample() -> None:
    """The position shows the first label of its sample, and nothing else does."""
    labels = (torch.rand(60, 2, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    x = torch.randn(60, 5, 3, generator=torch.Generator().manual_seed(1)) + 6 * labels[:, None, :1]

    class Steps(Module):
        def training_step(self, batch, batch_idx):
            return self(batch[0]).square().mean()

        def validation_step(self, batch, batch_idx):
            self(batch[0])

    callback = ObserverProbes(Probe(layers="1", source=[(x, labels)], reduction="tokens"))
    module = Steps(nn.Sequential(nn.Linear(3, 4), nn.Identity()))
    fit(module, callback, max_epochs=1, train=DataLoader(TensorDataset(x), batch_size=20), val=False)
    key = "observers/balanced_accuracy/{}/whole_network"
    assert callback.initial[key.format("label_0")] > 0.95
    assert callback.initial[key.format("label_1")] < 0.7
