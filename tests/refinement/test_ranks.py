"""Two processes: each rank knows its own samples, and the table of both is the sum."""

from collections import Counter

import pytest
import torch

from tests.helpers import run_two_ranks

pytestmark = pytest.mark.slow


def launch(module, folder):
    """Run a module of this folder in two processes; what each rank wrote."""
    run_two_ranks(f"tests.refinement.{module}", folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return launch("two_ranks", tmp_path_factory.mktemp("ranks"))


def test_each_rank_knows_its_own_samples(ranks):
    for name in ranks[0]:
        for rank in ranks:
            assert rank[name]["found"] == rank[name]["truth"]
            assert rank[name]["num_samples"] == 50
        assert ranks[0][name]["truth"] != ranks[1][name]["truth"]


def test_the_table_of_both_is_the_same_on_both_and_the_sum(ranks):
    for name in ranks[0]:
        visits = Counter(sample for rank in ranks for batch in rank[name]["truth"] for sample in batch)
        for rank in ranks:
            whole = rank[name]["whole"]
            assert dict(zip(whole["sample_id"], whole["visits"], strict=True)) == dict(visits)
            assert whole["target"] == [sample % 4 for sample in whole["sample_id"]]
            assert whole["refinement/a"] == [sample * visits[sample] * 0.5 for sample in whole["sample_id"]]


def test_live_influence_of_both_even_where_one_has_seen_nothing(ranks):
    for rank in ranks:
        nothing, first, both = rank["shuffled"]["scores"]
        assert nothing == [[], [], [], []]
        assert first == [[[1.0], [0.0], [0.0], [1.0]], [[0, 3]], [[0, 2]]]
        assert both == [[[1.0], [2.0], [0.0], [3.0]], [[3, 1, 0]], [[2, 1, 0]]]
