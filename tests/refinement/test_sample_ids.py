"""Sample ids in real fits, against what the dataset itself says it returned."""

import copy
import pickle
import random
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data.dataloader import _BaseDataLoaderIter

import lightning_neuro
from lightning_neuro import RepresentationRefinement
from lightning_neuro.checks import ArgumentError
from lightning_neuro.refinement import Indexed, drawn_indices
from lightning_neuro.refinement.sample_ids import SampleIds
from tests.models import fit, images, mlp
from tests.refinement.following import by_id

N = 50


class Bulk(Indexed):
    """The same images, by single indices or by lists of them."""

    def __getitem__(self, index):
        if isinstance(index, int):
            return super().__getitem__(index)
        return torch.utils.data.default_collate([super(Bulk, self).__getitem__(i) for i in index])


class Watch(pl.Callback):
    """Asks for the ids of each training batch, and notes what the batch itself says."""

    def __init__(self, field=None, stop_at=None) -> None:
        self.field, self.stop_at, self.ids = field, stop_at, None
        self.found, self.truth, self.rng, self.num_samples = [], [], [], None

    def on_fit_start(self, trainer, pl_module):
        self.ids = SampleIds(trainer, self.field)

    def on_train_start(self, trainer, pl_module):
        self.num_samples = self.ids.num_samples

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        batch = batch[0] if isinstance(batch, list) and isinstance(batch[0], list) else batch
        self.truth.append(next(iter(batch.values()))[2].tolist() if isinstance(batch, dict) else batch[2].tolist())
        ids = None if self.ids is None else self.ids.of_batch(batch)
        self.found.append(None if ids is None else ids.tolist())
        self.rng.append((torch.get_rng_state(), random.random.__self__.getstate(), np.random.get_state()[1]))  # noqa: NPY002
        if len(self.truth) == self.stop_at:
            raise RuntimeError("enough")

    def close(self):
        if self.ids is not None:
            self.ids.close()

    def teardown(self, trainer, pl_module, stage):
        self.close()

    def on_exception(self, trainer, pl_module, exception):
        self.close()


class Unwatched(Watch):
    """Only notes what the batch says."""

    def on_fit_start(self, trainer, pl_module):
        pass

    def on_train_start(self, trainer, pl_module):
        pass


class Shuffled:
    """A batch sampler of a user: no length, random numbers drawn at once, and one list that it fills again."""

    def __iter__(self):
        order = torch.randperm(N).tolist()  # drawn when it is asked for an iterator, not at the first batch
        return self.batches(order)

    def batches(self, order):
        batch = []
        for start in range(0, N, 9):
            batch[:] = order[start : start + 9]
            yield batch


class Fresh(Shuffled):
    """The same with a new list for each batch, as worker processes need it."""

    def batches(self, order):
        return map(list, super().batches(order))


def data(**options):
    return DataLoader(Bulk(images(N)), **({"batch_size": 8} | options))


LOADERS = {
    "in order": lambda: data(),
    "shuffled": lambda: data(shuffle=True),
    "drop last": lambda: data(shuffle=True, drop_last=True),
    "own generator": lambda: data(shuffle=True, generator=torch.Generator().manual_seed(5)),
    "workers": lambda: data(shuffle=True, num_workers=2),
    "persistent workers": lambda: data(shuffle=True, num_workers=2, persistent_workers=True, prefetch_factor=3),
    "with replacement": lambda: data(sampler=WeightedRandomSampler(torch.arange(1.0, N + 1), 30)),
    "batch sampler": lambda: data(batch_size=1, batch_sampler=BatchSampler(RandomSampler(range(N)), 7, False)),
    "batch sampler of a user": lambda: DataLoader(Bulk(images(N)), batch_sampler=Shuffled()),
    "its workers": lambda: DataLoader(Bulk(images(N)), batch_sampler=Fresh(), num_workers=2),
    "bulk": lambda: data(batch_size=None, sampler=BatchSampler(RandomSampler(range(N)), 7, False)),
    "one combined loader": lambda: CombinedLoader([data(shuffle=True)], "max_size_cycle"),
}


def run(watch, train, **options):
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    module = mlp()
    if options.pop("validate_too", False):
        module.val_dataloader = lambda: train
    if isinstance(train, CombinedLoader):
        step = module.training_step
        module.training_step = lambda batch, batch_idx: step(batch[0] if isinstance(batch[0], list) else batch, 0)
    module.train_dataloader = lambda: train
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(callbacks=[watch], **({"max_epochs": 2, "enable_model_summary": False} | quiet | options))
    trainer.fit(module)


@pytest.mark.parametrize("name", LOADERS)
def test_the_ids_are_those_the_dataset_gave(name):
    watch = Watch()
    run(watch, LOADERS[name](), max_epochs=3)
    assert len(watch.truth) >= 12
    assert watch.found == watch.truth
    assert watch.num_samples == N
    assert len({tuple(ids) for ids in watch.truth[:4]}) == 4


@pytest.mark.parametrize(
    "options",
    [
        {"limit_train_batches": 3},
        {"limit_train_batches": 0.5, "accumulate_grad_batches": 2},
        {"reload_dataloaders_every_n_epochs": 1},
        {"val_check_interval": 2},
        {"max_epochs": -1, "max_steps": 17},
        {"overfit_batches": 3},
        {"fast_dev_run": 3},
    ],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_under_the_trainers_options(options, workers):
    watch = Watch()
    train = data(shuffle=True, num_workers=workers)
    # The same loader for both: two iterators at a time.
    run(watch, train, validate_too="val_check_interval" in options, **options)
    assert watch.truth and watch.found == watch.truth


@pytest.mark.parametrize("name", LOADERS)
def test_what_is_drawn_and_the_random_state_are_as_without(name):
    plain, watched = Unwatched(), Watch()
    run(plain, LOADERS[name]())
    run(watched, LOADERS[name]())
    assert plain.truth == watched.truth
    for before, after in zip(plain.rng, watched.rng, strict=True):
        assert torch.equal(before[0], after[0]) and before[1] == after[1] and np.array_equal(before[2], after[2])


@pytest.mark.parametrize("stop_at", [None, 3])
@pytest.mark.parametrize("count", [1, 2])
def test_nothing_is_left_behind(stop_at, count):
    original = _BaseDataLoaderIter._next_index
    watches = [Watch(stop_at=stop_at if number == 0 else None) for number in range(count)]
    train = data(shuffle=True, num_workers=1, persistent_workers=True)
    before = dict(vars(train))
    trainer = pl.Trainer(
        callbacks=[*watches], max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    own = set(vars(trainer.strategy))
    if stop_at:
        with pytest.raises(RuntimeError, match="enough"):
            trainer.fit(mlp(), train)
    else:
        trainer.fit(mlp(), train)
        assert watches[-1].found == watches[0].truth  # both listen
    changed = {name for name, value in vars(train).items() if before.get(name) is not value}
    assert changed <= {"worker_init_fn", "_iterator"}  # Lightning's own
    assert "process_dataloader" not in set(vars(trainer.strategy)) - own
    assert _BaseDataLoaderIter._next_index is original


def test_one_that_stops_listening_does_not_stop_the_other():
    class Leaves(Watch):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.close()

    stays = Watch()
    for watches in ((Leaves(), stays), (stays, Leaves())):
        fit(mlp(), *watches, train=data(shuffle=True), val=False)
        assert stays.found == stays.truth and len(stays.truth) % 14 == 0


def test_a_later_patch_of_the_same_method_stays(monkeypatch):
    """Somebody else may patch it while we listen: then theirs must survive ours."""
    original, calls = _BaseDataLoaderIter._next_index, []

    class Patches(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            ours = _BaseDataLoaderIter._next_index
            monkeypatch.setattr(_BaseDataLoaderIter, "_next_index", lambda it: calls.append(1) or ours(it))

    watch = Watch()
    fit(mlp(), watch, Patches(), train=data(), val=False)
    assert watch.found == watch.truth
    before = len(calls)
    assert len(list(data())) == 7 and len(calls) == before + 8
    again = Watch()
    fit(mlp(), again, train=data(), val=False)  # below theirs it is used again
    assert again.found == again.truth and again.found
    monkeypatch.undo()
    fit(mlp(), Watch(), train=data(), val=False)
    assert _BaseDataLoaderIter._next_index is original


def test_only_the_training_loader_is_recorded_and_little_is_kept():
    kept, over_validation = [], []

    class Keeps(Watch):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            requests = self.ids._drawn._requests
            kept.append(max(len(one.kept) for one in requests.values()))
            train = trainer.train_dataloader._index_sampler
            over_validation.extend(it for it in requests if it._index_sampler is not train)

    watch = Keeps()
    train = data(shuffle=True, batch_size=2, num_workers=1)
    fit(mlp(), watch, train=train, reload_dataloaders_every_n_epochs=1)
    assert watch.found == watch.truth and len(kept) == 50
    assert max(kept) <= 4  # the batch, and what its worker was asked for in advance
    assert not over_validation


def test_others_see_the_users_own_samplers_while_it_listens():
    seen = []

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            loader = trainer.train_dataloader
            seen.append((type(loader.batch_sampler), type(loader.sampler)))
            seen.append(pickle.loads(pickle.dumps(loader)).batch_size)
            twin = copy.deepcopy(loader)
            seen.append([len(batch[0]) for batch in twin])

    watch = Watch()
    fit(mlp(), watch, Look(), train=data(shuffle=True))
    assert seen == [(BatchSampler, RandomSampler), 8, [8, 8, 8, 8, 8, 8, 2]]
    assert watch.found == watch.truth


def test_resume_in_the_middle_of_an_epoch(tmp_path):
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    first = Watch(stop_at=5)
    trainer = pl.Trainer(callbacks=[first, checkpoint], max_epochs=2, logger=False, enable_progress_bar=False)
    with pytest.raises(RuntimeError, match="enough"):
        trainer.fit(mlp(), data(shuffle=True))
    resumed = Watch()
    fit(mlp(), resumed, train=data(shuffle=True, num_workers=1), ckpt_path=checkpoint.best_model_path)
    assert resumed.truth and resumed.found == resumed.truth


# The plain way: a field of the batch


@pytest.mark.parametrize("field", [2, -1, lambda batch: batch[2]])
def test_a_field_of_a_sequence(field):
    watch = Watch(field)
    run(watch, data(shuffle=True, num_workers=2, in_order=False))
    assert watch.found == watch.truth and watch.num_samples == N


def test_a_field_of_a_mapping_and_what_it_must_hold():
    ids = SampleIds(None, "index")
    assert ids.of_batch({"index": torch.tensor([[4], [2]], dtype=torch.int32)}).tolist() == [4, 2]
    assert ids.of_batch({"x": torch.zeros(2)}) is None  # later in a run nothing is raised
    for bad in ({"x": torch.zeros(2)}, {"index": torch.zeros(2)}, {"index": ["a"]}, [torch.zeros(2)], torch.zeros(3)):
        with pytest.raises(ArgumentError, match="`sample_id_fn`"):
            SampleIds(None, "index").of_batch(bad)
    with pytest.raises(ArgumentError, match=r"`sample_id_fn`.*got 3"):
        SampleIds(None, 3).of_batch([torch.zeros(2)])


def test_indexed_adds_the_index_to_items_of_any_kind():
    x, y = images(6).tensors

    class Dicts(TensorDataset):
        classes = ("cat", "dog")

        def __getitem__(self, index):
            return {"x": self.tensors[0][index]}

        def __getitems__(self, indices):
            raise AssertionError("it would fetch items without their index")

    class Bare(TensorDataset):
        def __getitem__(self, index):
            return self.tensors[0][index]

    pairs, dicts, bare = Indexed(TensorDataset(x, y)), Indexed(Dicts(x)), Indexed(Bare(x))
    assert pairs[4][2] == 4 and torch.equal(pairs[4][0], x[4]) and pairs[4][1] == y[4]
    assert dicts[3]["sample_id"] == 3 and set(dicts[3]) == {"x", "sample_id"}
    assert bare[5][1] == 5 and torch.equal(bare[5][0], x[5])
    assert len(pairs) == 6 and dicts.classes == ("cat", "dog")
    (batch,) = DataLoader(dicts, batch_size=6)
    assert batch["sample_id"].tolist() == list(range(6))
    assert copy.deepcopy(dicts)[1]["sample_id"] == pickle.loads(pickle.dumps(pairs))[1][2] == 1
    with pytest.raises(AttributeError, match="missing"):
        _ = pairs.missing


@pytest.mark.parametrize("field", [None, -1])
def test_the_callback_takes_the_field_and_the_table_holds_its_ids(field):
    """The field says where a sample is in the whole dataset, and the loader where it is in the subset."""
    whole = Indexed(images(64))
    train = DataLoader(Subset(whole, range(32, 64)), batch_size=8)
    read = None if field is None else lambda batch: batch[field] - 32
    callback = RepresentationRefinement(sample_id_fn=read, on_error="raise")
    fit(mlp(), callback, train=train)
    table = by_id(callback.samples)
    assert table["sample_id"].tolist() == list(range(32))
    assert np.array_equal(table["label"], np.arange(32) % 4)
    assert np.array_equal(table["base_index"], np.arange(32, 64))
    shifted = RepresentationRefinement(sample_id_fn=lambda batch: 63 - batch[-1], on_error="raise")
    fit(mlp(), shifted, train=train)
    assert np.array_equal(by_id(shifted.samples)["refinement/net.5"], table["refinement/net.5"][::-1])


# Where the ids cannot be known


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Bulk(images(N))[i] for i in range(N))


class Batches:
    def __iter__(self):
        return iter(data())


class Unasked(DataLoader):
    """Made its iterator before Lightning saw it, and uses it all run."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.once = list(super().__iter__())

    def __iter__(self):
        return iter(self.once) if hasattr(self, "once") else super().__iter__()


def filtered(batch):
    return torch.utils.data.default_collate(batch[:-1])


def warnings_of(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [text for text in map(str, (w.message for w in caught)) if "Per-sample tracking" in text]


@pytest.mark.parametrize(
    ("train", "said"),
    [
        (lambda: DataLoader(Stream(), batch_size=8), "Stream"),
        (lambda: data(num_workers=2, in_order=False), "in_order=False"),
        (lambda: Batches(), "Batches"),
        (lambda: CombinedLoader([data(), data()], "max_size_cycle"), "2 loaders"),
        (lambda: Unasked(Bulk(images(N)), batch_size=8), "Unasked"),
        (lambda: data(collate_fn=filtered), "8 samples"),
    ],
)
def test_where_ids_cannot_be_known_it_is_said_once(train, said):
    watch = Watch()
    (warning,) = warnings_of(lambda: run(watch, train()))
    assert watch.truth and set(map(str, watch.found)) == {"None"}
    assert said in warning and "Indexed" in warning and "sample_id_fn" in warning


def test_batches_made_by_the_dataset_have_no_ids():
    class Eights(Bulk):
        def __getitem__(self, index):
            return super().__getitem__([(index + i) % N for i in range(8)])

    watch = Watch()
    train = DataLoader(Eights(images(N)), batch_size=None)
    (warning,) = warnings_of(lambda: run(watch, train, limit_train_batches=4))
    assert "lists of integers" in warning
    assert watch.found == [None] * 8


def test_a_training_step_that_iterates_by_itself():
    class Own(type(mlp())):
        def training_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            return self(batch[0]).square().sum()

    class Ask(pl.Callback):
        def on_fit_start(self, trainer, pl_module):
            self.ids, self.found = SampleIds(trainer), []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.found.append(self.ids.of_batch(batch))

        def teardown(self, trainer, pl_module, stage):
            self.ids.close()

    ask = Ask()
    assert len(warnings_of(lambda: fit(Own(mlp().net), ask, train=data()))) == 1
    assert ask.found and set(ask.found) == {None}


def test_a_field_without_a_known_number_of_samples_is_said_once():
    train = DataLoader(Stream(), batch_size=10)
    callback = RepresentationRefinement(sample_id_fn=2, num_sources=4)
    (warning,) = warnings_of(lambda: run(callback, train, max_steps=4))
    assert "no length" in warning
    assert callback.samples == {}


# The private names


class Objects(pl.Callback):
    """Holds one object of each class whose private names are used, as it is in a training step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        fetcher = trainer.fit_loop._data_fetcher
        self.found = {
            "DataLoader": trainer.train_dataloader,
            "_BaseDataLoaderIter": fetcher.iterator._iterator.iterators[0],
            "_MultiProcessingDataLoaderIter": iter(DataLoader(images(8), num_workers=1)),
            "_FitLoop": trainer.fit_loop,
            "CombinedLoader": fetcher.iterator,
            "_ModeIterator": fetcher.iterator._iterator,
            "_PrefetchDataFetcher": fetcher,
        }


def test_every_private_name_exists_in_the_installed_versions():
    objects = Objects()
    fit(mlp(), objects, train=data())
    assert set(objects.found) == set(drawn_indices.PRIVATE_NAMES)
    for kind, names in drawn_indices.PRIVATE_NAMES.items():
        for name in names:
            assert hasattr(objects.found[kind], name), f"{type(objects.found[kind])} has no {name}"


EVERY_NAME = [name for names in drawn_indices.PRIVATE_NAMES.values() for name in names]


@pytest.mark.parametrize("name", sorted(set(EVERY_NAME)))
def test_a_missing_private_name_is_named_with_the_versions_and_training_goes_on(name, monkeypatch):
    original = drawn_indices._private

    def without(owner, asked):
        if asked == name:
            raise drawn_indices.UnknownInternalsError(owner, asked)
        return original(owner, asked)

    monkeypatch.setattr(drawn_indices, "_private", without)
    watch = Watch()
    (warning,) = warnings_of(lambda: run(watch, data(num_workers=1 if name == "_send_idx" else 0)))
    assert f"`{name}`" in warning and torch.__version__ in warning and pl.__version__ in warning
    assert "Indexed" in warning
    assert len(watch.found) == 14 and set(watch.found) == {None}


def test_the_file_reads_no_other_private_name():
    """Every private name in the file goes through `_private`, or is one that it replaces."""
    import ast
    import inspect

    tree = ast.parse(inspect.getsource(drawn_indices))
    nodes = list(ast.walk(tree))
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute) and node.attr.startswith("_")}
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    own |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "self"}
    assert {name for name in read - own if not name.startswith("__")} == {"_next_index"}
    asked = {
        node.args[1].value
        for node in nodes
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "_private"
    }
    assert asked == set(EVERY_NAME)


def test_no_other_file_uses_private_names_of_the_data_loader():
    names = {name for name in EVERY_NAME if name.startswith("_")}
    folder = Path(lightning_neuro.__file__).parent
    users = {path.name for path in folder.rglob("*.py") if any(re.search(rf"\b{n}\b", path.read_text()) for n in names)}
    assert users == {"drawn_indices.py"}
