"""A checkpoint knows no engine and no number of ranks: what any shape saved, any other goes on from."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from engines import OPTIM, OTHERS, SHAPES, Shape, Trainer, gathered
from ranks import Ranks

from foveal.distributed.world import World

_SAVED, _MORE = 3, 20
_REL = 1e-5

_WIDEST = f"zero 3, {SHAPES['accelerated zero 3'].ranks} ranks"  # a machine with one GPU has room for one
# The format knows no writer: plain reads what every shape leaves and writes the same bits again, every shape reads what
# plain and ZeRO 3 leave, and what its neighbour of a ring does; so any pair is one that was tried or two of them.
_HUBS = ("plain", _WIDEST)
_NAMES = list(SHAPES)
# What make test looks at: one of each way to hold weights and moments.
_FIRST = ("zero 1, 2 ranks", _WIDEST, "ddp, 2 ranks", "fsdp2, 2 ranks", "zero 3 bf16", "fsdp2 bf16")


def sources(now: str) -> list[str]:
    """Whose checkpoints a shape goes on from: its own first, for an engine that has taken no step."""
    everyone = _NAMES if now == "plain" else [*_HUBS, _NAMES[_NAMES.index(now) - 1]]
    return list(dict.fromkeys([now, *everyone]))


def first(name: str) -> Any:
    return pytest.param(name, marks=() if name in _FIRST else pytest.mark.thorough)


PAIRS = [(was, now) for now in SHAPES for was in sources(now)]


@dataclass(frozen=True)
class Saved:
    """A checkpoint after a few steps, and the losses of the run that made it and was not interrupted."""

    folder: Path
    losses: list[float]


@dataclass(frozen=True)
class Resumed:
    """What became of a checkpoint: written anew before the next step, and the losses that followed."""

    folder: Path
    losses: list[float]
    groups: list[tuple[Any, ...]]
    updates: tuple[int, int]


def run_and_save(world: World, shape: Shape, folder: Path) -> Saved:
    trainer = Trainer(world, shape)
    trainer.steps(0, _SAVED)
    trainer.look(_SAVED)
    trainer.save(folder)
    return Saved(folder, trainer.steps(_SAVED, _SAVED + _MORE))


def resume_all(world: World, shape: Shape, folders: dict[str, tuple[Path, int]], to: Path) -> dict[str, Resumed]:
    """One engine goes on from each checkpoint in turn: the first time as it was built, then in the midst of another run."""
    trainer, found = Trainer(world, shape), {}
    for name, (folder, more) in folders.items():
        trainer.look(_SAVED)
        trainer.load(folder, _SAVED)
        before = trainer.engine.num_updates
        trainer.save(to / name)
        losses = trainer.steps(_SAVED, _SAVED + more)
        found[name] = Resumed(to / name, losses, trainer.groups(), (before, trainer.engine.num_updates))
    return found


@pytest.fixture(scope="module")
def pools(one_rank: Ranks, two_ranks: Ranks) -> dict[int, Ranks]:
    return {1: one_rank, 2: two_ranks}


@pytest.fixture(scope="module")
def saved(pools: dict[int, Ranks], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    """The checkpoint of a shape, made once."""
    made: dict[str, Saved] = {}

    def of(name: str) -> Saved:
        if name not in made:
            shape = (SHAPES | OTHERS)[name]
            made[name] = pools[shape.ranks].call(run_and_save, shape, tmp_path_factory.mktemp("saved"))[0]
        return made[name]

    return of


@pytest.fixture(scope="module")
def resumed(pools, saved, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Resumed]]:
    """What a shape makes of the checkpoints that it goes on from."""
    made: dict[str, dict[str, Resumed]] = {}

    def of(name: str) -> dict[str, Resumed]:
        if name not in made:
            folders = {other: (saved(other).folder, _MORE if other in (name, *_HUBS) else 1) for other in sources(name)}
            shape = SHAPES[name]
            made[name] = pools[shape.ranks].call(resume_all, shape, folders, tmp_path_factory.mktemp("resumed"))[0]
        return made[name]

    return of


def check_same(one: Path, other: Path) -> None:
    """Two checkpoints hold the same bits."""
    ours, theirs = gathered(one), gathered(other)
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not ours[key].equal(theirs[key])] == []


@pytest.mark.parametrize(("was", "now"), [pytest.param(*pair, marks=first(pair[1]).marks) for pair in PAIRS])
def test_any_shape_goes_on_from_any_other(was: str, now: str, saved, resumed) -> None:
    before, after = saved(was), resumed(now)[was]
    check_same(after.folder, before.folder)
    more = len(after.losses)
    assert after.updates == (_SAVED, _SAVED + more)
    if was == now:
        assert after.losses == before.losses
    else:
        assert after.losses == pytest.approx(before.losses[:more], rel=_REL)


def test_every_pair_is_a_way_through_plain() -> None:
    assert {(was, "plain") for was in SHAPES} | {("plain", now) for now in SHAPES} <= set(PAIRS)


@pytest.mark.parametrize("now", [first(name) for name in SHAPES])
def test_groups_keep_their_settings(now: str, resumed) -> None:
    """A checkpoint brings none: learning rate factors, weight decay and AdamW's constants are those of the settings."""
    expected = [
        ("layer 0, no decay", 0.125, 0.0),
        ("layer 1, no decay", 0.25, 0.0),
        ("layer 1, decay", 0.25, 0.3),
        ("layer 2, no decay", 0.5, 0.0),
        ("layer 2, decay", 0.5, 0.3),
        ("layer 3, decay", 1.0, 0.3),
        ("layer 3, no decay", 1.0, 0.0),
    ]
    for after in resumed(now).values():
        assert after.groups == [(*each, OPTIM.betas, OPTIM.eps) for each in expected]


@pytest.mark.parametrize("name", [first(name) for name in OTHERS])
def test_itself_bit_for_bit(name: str, pools, saved, tmp_path: Path) -> None:
    """bf16 products, and updates in the host's memory: on the same machine nothing changes."""
    before, shape = saved(name), OTHERS[name]
    after = pools[shape.ranks].call(resume_all, shape, {"it": (before.folder, _MORE)}, tmp_path)[0]["it"]
    check_same(after.folder, before.folder)
    assert after.losses == before.losses


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.close()


FOURS = {
    "zero 1": Shape(4, "deepspeed", 1),
    "zero 3": Shape(4, "deepspeed", 3),
    "ddp": Shape(4, "accelerate"),
    "fsdp2": Shape(4, "accelerate", sharding="fsdp2"),
}


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.parametrize("name", FOURS)
def test_four_ranks(name: str, four_ranks: Ranks, pools, saved, tmp_path: Path) -> None:
    """From two ranks to four, and from four to one."""
    before = saved(_WIDEST)
    after = four_ranks.call(resume_all, FOURS[name], {"four": (before.folder, _MORE)}, tmp_path)[0]["four"]
    back = pools[1].call(resume_all, SHAPES["plain"], {"one": (after.folder, _MORE)}, tmp_path)[0]["one"]
    check_same(back.folder, before.folder)
    for losses in (after.losses, back.losses):
        assert losses == pytest.approx(before.losses, rel=_REL)
