"""Which steps stay: the first, the last, those that are asked for, and the rest spread evenly."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_neuro.artefacts.thinning import steps_to_remove

runs = st.dictionaries(st.integers(0, 10_000), st.integers(0, 1_000), max_size=40)


@settings(max_examples=300, deadline=None)
@given(runs, st.integers(0, 20_000), st.sets(st.integers(0, 10_000)))
def test_the_rest_fits_and_what_must_stay_stays(sizes: dict[int, int], budget: int, keep: set[int]) -> None:
    removed = steps_to_remove(sizes, budget, keep=keep)
    rest = sizes.keys() - set(removed)
    assert len(set(removed)) == len(removed) and set(removed) <= sizes.keys() - keep
    if sizes:
        assert {min(sizes), max(sizes)} <= rest
        assert sum(sizes[step] for step in rest) <= budget or rest <= keep | {min(sizes), max(sizes)}
    # Nothing more than needed, and the same again for what is left.
    assert not removed or sum(sizes[step] for step in {*rest, removed[-1]}) > budget
    assert steps_to_remove({step: sizes[step] for step in rest}, budget, keep=keep) == []
    assert steps_to_remove(dict(reversed(sizes.items())), budget, keep=keep) == removed


def test_the_narrowest_goes_first_and_of_several_the_oldest() -> None:
    even = dict.fromkeys(range(0, 60, 10), 1)
    assert steps_to_remove(even, 5) == [10]
    assert steps_to_remove({0: 1, 10: 1, 20: 1, 21: 1, 40: 1}, 4) == [20]
    assert steps_to_remove(even, 100) == [] == steps_to_remove({}, 0)


@given(st.integers(3, 30), st.integers(31, 400))
@settings(max_examples=50, deadline=None)
def test_a_long_run_stays_evenly_covered(kept: int, evaluations: int) -> None:
    """Thinned after each evaluation, as in a run: no gap is more than a few times the even one."""
    sizes: dict[int, int] = {}
    for step in range(evaluations):
        sizes[step] = 1
        for removed in steps_to_remove(sizes, kept):
            del sizes[removed]
    steps = sorted(sizes)
    assert len(steps) == kept and steps[0] == 0 and steps[-1] == evaluations - 1
    gaps = [after - before for before, after in pairwise(steps)]
    assert max(gaps) <= 3 * (evaluations - 1) / (kept - 1) + 1
