"""A setting that does not exist gets the nearest name, wherever it lies; a value the nearest value."""

from typing import Literal

import pytest

from foveal.config import Config, science
from foveal.errors import ConfigError


class Optim(Config):
    name: Literal["adamw", "sgd"] = science("adamw")
    lr_per_256: float = science(1e-3)


class Batch(Config):
    global_size: int = science(8)


class Probe(Config):
    kinds: tuple[str, ...] = science(())


class Entry(Config):
    share: float = science(0.5)


class Whole(Config):
    kind: str = science("a")
    weights: Literal["balanced"] | tuple[float, ...] | None = science(None)
    optim: Optim = Optim()
    batch: Batch = Batch()
    probe: Probe | None = science(None)
    mix: tuple[Entry, ...] = science(())


_EVERY_TYPE = (
    "weights: input should be 'balanced' (given: 'balance'). Did you mean 'balanced'?; "
    "weights: input should be a valid list (given: 'balance')"
)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"lr": 1}, "lr is not a setting. Did you mean 'optim.lr_per_256'?"),
        ({"batch_size": 1}, "batch_size is not a setting. Did you mean 'batch.global_size'?"),
        ({"batch": {"size": 1}}, "batch.size is not a setting. There are: global_size"),
        ({"optim": {"kinds": ()}}, "optim.kinds is not a setting. Did you mean 'probe.kinds'?"),
        ({"probe": {"kind": "a"}}, "probe.kind is not a setting. Did you mean 'probe.kinds'?"),
        ({"mix": ({"shore": 1},)}, "mix.0.shore is not a setting. Did you mean 'mix.0.share'?"),
        ({"xyz": 1}, "xyz is not a setting. There are: kind, weights, optim, batch, probe, mix"),
        (
            {"optim": {"name": "Adam"}},
            "optim.name: input should be 'adamw' or 'sgd' (given: 'Adam'). Did you mean 'adamw'?",
        ),
        ({"optim": "adamw"}, "optim: a section is expected, such as optim.name=... (given: 'adamw')"),
        ({"batch": 8}, "batch: a section is expected, such as batch.global_size=... (given: 8)"),
        (
            {"weights": "balance"},
            _EVERY_TYPE,
        ),
    ],
)
def test_what_is_near_is_offered(values: dict, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Whole.from_dict(values, "x")
    assert str(caught.value) == f"x: {sentence}"
