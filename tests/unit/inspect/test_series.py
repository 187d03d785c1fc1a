"""Charts of results by something: any names, gaps, one position, spread."""

import numpy as np
import pytest

from foveal.inspect.picture import Picture
from foveal.inspect.series import Values, draw_series


def draw(series: dict[str, Values], positions: list[str], connected: bool = True) -> Picture:
    return draw_series(series, positions, title="T", x="block", y="top-1", subject="9 images", connected=connected)


def test_it_says_where_a_series_is_highest() -> None:
    picture = draw({"knn": {"1": [0.5], "2": [0.75], "3": [0.25]}}, ["1", "2", "3"])
    assert picture.description == (
        "top-1 by block, of 9 images: knn from 50.0 % at 1 to 25.0 % at 3, lowest 25.0 % at 3, highest 75.0 % at 2."
    )


def test_it_says_the_spread_of_folds() -> None:
    folds: dict[str, Values] = {"seed 0": {"0": [0.5], "1": [0.7]}}
    assert draw(folds, ["0", "1"], connected=False).description.endswith("seed 0 60.0 % (50.0 % to 70.0 %).")


@pytest.mark.parametrize("connected", [True, False])
@pytest.mark.parametrize(
    ("series", "positions"),
    [
        pytest.param({"a": {"1": [0.5]}}, ["1"], id="one value"),
        pytest.param({"<b>ä $x$": {"$1$": [0.5, 0.6]}, "b": {"$1$": [0.1]}}, ["$1$"], id="one position"),
        pytest.param({"a": {"1": [0.5]}, "b": {"2": [0.1]}, "c": {}}, ["1", "2"], id="gaps"),
        pytest.param({f"arm {n}": {"1": [3.0, float("nan")], "2": [4.0]} for n in range(9)}, ["1", "2"], id="losses"),
        pytest.param({"a": {f"layer {n}": [0.1] for n in range(60)}}, [f"layer {n}" for n in range(60)], id="many"),
    ],
)
def test_everything_draws(series: dict[str, Values], positions: list[str], connected: bool) -> None:
    image = draw(series, positions, connected).image
    assert max(image.size) < 2000
    assert len(np.unique(np.asarray(image)[:, :, 3])) > 1
