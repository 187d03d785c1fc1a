"""A hyperparameter chosen from a list may lie at an end of it, and a better one beyond: a sentence says so."""

from collections.abc import Sequence


def describe_list_edge(
    owner: str, name: str, chosen: float, candidates: Sequence[float], *, is_count: bool = False
) -> str | None:
    """Return a sentence if the chosen value is the lowest or highest of a list of two or more; else None.

    It proposes two values beyond that end, in the ratio of the last two values there. ``is_count``: integers from 1.
    """
    values = sorted(set(candidates))
    if len(values) < 2 or chosen not in (values[0], values[-1]):
        return None
    end, neighbour = ("lowest", values[1]) if chosen == values[0] else ("highest", values[-2])
    ratio = chosen / neighbour
    proposals = [chosen * ratio, chosen * ratio**2]
    if is_count:
        proposals = [round(value) for value in proposals if round(value) >= 1 and round(value) != chosen]
    if not proposals:
        return None
    beyond = " and ".join(f"{value:.3g}" for value in dict.fromkeys(proposals))
    return (
        f"{owner}: the chosen {name} {chosen:g} is the {end} of its list, and a better one may lie beyond: try {beyond}"
    )
