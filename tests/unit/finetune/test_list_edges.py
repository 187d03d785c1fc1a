"""A chosen value at an end of its list: one sentence with values beyond."""

from finetune.list_edges import describe_list_edge


def test_only_an_end_of_a_list_is_worth_a_sentence() -> None:
    rates = (1e-2, 1e-3, 3e-3)
    assert describe_list_edge("mae", "lr_per_256", 3e-3, rates) is None
    assert describe_list_edge("mae", "lr_per_256", 1e-2, (1e-2,)) is None
    highest = describe_list_edge("mae", "lr_per_256", 1e-2, (5e-3, 1e-2))
    assert highest is not None
    assert highest.startswith("mae: the chosen lr_per_256 0.01 is the highest of its list")
    assert highest.endswith("try 0.02 and 0.04")
    lowest = describe_list_edge("mae", "lr_per_256", 1e-3, (1e-3, 1e-2))
    assert lowest is not None and lowest.endswith(
        "is the lowest of its list, and a better one may lie beyond: try 0.0001 and 1e-05"
    )


def test_counts_are_whole_and_from_1() -> None:
    assert describe_list_edge("knn", "k", 1, (1, 20), is_count=True) is None
    lowest = describe_list_edge("knn", "k", 5, (5, 10), is_count=True)
    assert lowest is not None and lowest.endswith("try 2 and 1")
