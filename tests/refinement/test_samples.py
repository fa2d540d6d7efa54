"""The joined table of samples: order, columns, names, and where the samples come from."""

import csv

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from lightning_neuro import Probe, RepresentationRefinement
from lightning_neuro.refinement import Indexed, sample_origins
from lightning_neuro.refinement.samples import ranked_samples, sample_scores, top_rows, write_csv
from tests.models import fit, images, mlp


def table():
    return {
        "sample_id": np.array([4, 7, 9]),
        "target": np.array([1, -1, 0]),
        "visits": np.array([2, 2, 4]),
        "recorded": np.array([2, 2, 4]),
        "refinement/a": np.array([1.0, 6.0, 4.0]),
        "refinement/b": np.array([0.0, 0.0, 0.0]),
    }


PREDICTIONS = {
    "predicted": np.array([1, 0, -1]),
    "suggested": np.array([0, 0, 1]),
    "loss": np.array([0.5, 2.0, np.nan]),
}


def test_the_score_is_per_visit_relative_to_the_mean_of_each_layer():
    # Per visit .5, 3, 1 with a mean of 1.5; a layer that was never refined says nothing.
    assert sample_scores(table()) == pytest.approx(np.array([0.5, 3.0, 1.0]) / 1.5 / 2)


def test_scores_do_not_depend_on_the_units_of_a_layer_or_on_visits():
    one = table() | {"refinement/b": np.array([3.0, 1.0, 2.0])}
    other = one | {"refinement/b": 1000 * one["refinement/b"]}
    assert sample_scores(one) == pytest.approx(sample_scores(other))
    more = {name: 3 * column if "ref" in name or name == "visits" else column for name, column in one.items()}
    assert sample_scores(one) == pytest.approx(sample_scores(more))


def test_samples_are_sorted_by_the_loss_and_those_without_one_are_last():
    found = ranked_samples(table(), PREDICTIONS, {}, ["cat", "dog"])
    labels = ["label", "label_name", "predicted", "predicted_name", "suggested", "suggested_name"]
    assert list(found)[:9] == ["rank", "sample_id", *labels, "loss"]
    assert found["rank"].tolist() == [1, 2, 3]
    assert found["sample_id"].tolist() == [7, 4, 9]
    assert found["label"].tolist() == [-1, 1, 0]
    assert found["label_name"].tolist() == ["no label", "dog", "cat"]
    assert found["predicted_name"].tolist() == ["cat", "dog", "no label"]
    assert found["suggested_name"].tolist() == ["cat", "cat", "dog"]
    assert found["score"] == pytest.approx(sample_scores(table())[[1, 0, 2]])
    assert found["refinement/a"].tolist() == [6.0, 1.0, 4.0]


def test_without_a_loss_they_are_sorted_by_the_score():
    found = ranked_samples(table(), {}, {"path": np.array([f"{i}.png" for i in range(10)], dtype=object)})
    assert found["sample_id"].tolist() == [7, 9, 4]
    assert found["path"].tolist() == ["7.png", "9.png", "4.png"]
    assert not {"loss", "predicted", "label_name"} & set(found)
    empty = {name: column[:0] for name, column in table().items()}
    with np.errstate(all="raise"):
        assert len(ranked_samples(empty, {}, {})["score"]) == 0


def test_rows_for_people_hold_names():
    header, rows = top_rows(ranked_samples(table(), PREDICTIONS, {}, ["cat", "dog"]), 2)
    assert header == ["rank", "sample id", "label", "predicted", "suggested", "loss", "score", "visits"]
    assert rows[0][:6] == [1, 7, "no label", "cat", "cat", 2.0] and len(rows) == 2


def test_the_csv_and_pandas_hold_the_table(tmp_path):
    path = tmp_path / "samples.csv"
    path.write_text("old")
    samples = ranked_samples(table(), PREDICTIONS, {}, ["cat, or so", "dog"])
    write_csv(samples, path)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["label_name"] for row in rows] == ["no label", "dog", "cat, or so"]
    assert [float(row["score"]) for row in rows] == samples["score"].tolist()
    assert [file.name for file in tmp_path.iterdir()] == ["samples.csv"]
    frame = pd.DataFrame(samples)
    assert list(frame.columns) == list(samples) and len(frame) == 3
    pd.testing.assert_frame_equal(pd.read_csv(path), frame, check_dtype=False)


# Origins


class Files(Dataset):
    """Like torchvision's ImageFolder."""

    def __init__(self, names, attribute="samples"):
        setattr(self, attribute, [(name, 0) for name in names] if attribute in ("samples", "imgs") else names)
        self.length = len(names)

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        raise AssertionError("samples must not be loaded")


@pytest.mark.parametrize("attribute", ["samples", "imgs", "paths", "filenames", "files", "image_paths"])
def test_paths_of_folders(attribute):
    found = sample_origins(Files(["a", "b", "c"], attribute))
    assert list(found) == ["path"] and found["path"].tolist() == ["a", "b", "c"]


def test_subsets_of_subsets_and_concatenations_lead_to_the_file():
    both = ConcatDataset([Files(["a", "b"]), Files(["c", "d", "e"])])
    inner = Subset(both, [4, 3, 2, 1])
    found = sample_origins(Indexed(Subset(inner, torch.tensor([0, 2]))))
    assert found["base_index"].tolist() == [4, 2] and found["path"].tolist() == ["e", "c"]
    parts = torch.utils.data.random_split(both, [2, 3], generator=torch.Generator().manual_seed(0))
    for part in parts:
        assert sample_origins(part)["path"].tolist() == ["abcde"[i] for i in part.indices]


def test_what_does_not_fit_is_left_out():
    odd = Files(["a", "b"])
    odd.samples = [("a", 0)]  # not one for each sample
    for dataset in (odd, TensorDataset(torch.zeros(3)), None, [1, 2], Files([1, 2], "files")):
        assert sample_origins(dataset) == {}


# In a fit


def test_the_callback_names_classes_and_indices_and_draws_its_samples():
    train = Subset(images(64), range(63, 31, -1))
    callback = RepresentationRefinement(Probe(class_names=["a", "b", "c", "d"]), on_error="raise")
    assert callback.samples == {}
    fit(mlp(), callback, train=torch.utils.data.DataLoader(train, batch_size=8))
    samples = callback.samples
    assert (samples["base_index"] == 63 - samples["sample_id"]).all()
    assert [("a", "b", "c", "d").index(name) for name in samples["label_name"]] == samples["label"].tolist()
    assert (samples["label"] == samples["base_index"] % 4).all()
    assert set(samples["predicted_name"]) <= set("abcd")
    figure = callback.plot_samples(train, count=3)
    assert figure.get_size_inches()[0] == pytest.approx(3.3)


def test_the_figure_and_the_table_belong_to_the_last_step(tmp_path):
    from pytorch_lightning.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(mlp(), RepresentationRefinement(on_error="raise"), logger=TensorBoardLogger(tmp_path))
    (path,) = {path.parent for path in tmp_path.rglob("version_0/events.out*")}
    events = EventAccumulator(str(path)).Reload()
    (at,) = {event.step for event in events.Images("refinement/samples")}
    assert at == events.Images("refinement/sources")[-1].step == events.Scalars("refinement/norm")[-1].step == 7
    (tag,) = [tag for tag in events.Tags()["tensors"] if tag.startswith("refinement/samples")]
    assert events.Tensors(tag)[-1].step == 7
