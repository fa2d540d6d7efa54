"""Which evaluations of a run are removed when its files take too much space."""

from collections.abc import Collection, Mapping


def steps_to_remove(sizes: Mapping[int, int], budget: int, *, keep: Collection[int] = ()) -> list[int]:
    """Choose steps to remove, so that the rest fits into a budget and is spread evenly over time.

    As long as the rest is too large, the step whose two neighbours are closest together is removed; of several, the
    oldest. The first and the last step are never removed.

    Args:
        sizes: Step -> number of bytes.
        budget: Number of bytes that the rest may take.
        keep: Further steps that are never removed.

    Returns:
        The steps, in the order of their removal. The rest may be larger than the budget if it only holds steps that are
        never removed.

    Example:
        >>> steps_to_remove({0: 10, 5: 10, 10: 10, 20: 10, 40: 10}, budget=30)
        [5, 10]
    """
    steps = sorted(sizes)
    total = sum(sizes.values())
    removed: list[int] = []
    while total > budget:
        inner = [place for place in range(1, len(steps) - 1) if steps[place] not in keep]
        if not inner:
            break
        place = min(inner, key=lambda place: (steps[place + 1] - steps[place - 1], place))
        step = steps.pop(place)
        total -= sizes[step]
        removed.append(step)
    return removed
