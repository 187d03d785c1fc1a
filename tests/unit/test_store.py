"""Checkpoints: whole or not at all, believed only if every byte is there, alone and on two ranks."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import Ranks

from foveal.checkpoint.store import CheckpointConfig, Store, TrainState, check_same_science
from foveal.distributed.world import World
from foveal.errors import CheckpointError
from foveal.files import drafted, sha256, write_json

ALONE = World(0, 1, 0, "none", torch.device("cpu"))
SCIENCE = {"seed": 3, "optim.betas": [0.9, 0.95]}


class Files:
    """An engine that writes one file a rank and one in a folder, as DeepSpeed does."""

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank

    def save(self, folder: Path) -> None:
        (folder / f"rank-{self.rank}.pt").write_bytes(b"weights of rank %d " % self.rank * 100)
        (folder / "engine").mkdir(exist_ok=True)
        (folder / "engine" / f"moments-{self.rank}.pt").write_bytes(bytes(range(256)))

    def load(self, folder: Path) -> None: ...


class Failing(Files):
    """An engine that dies in the middle of writing."""

    def save(self, folder: Path) -> None:
        super().save(folder)
        raise OSError(28, "No space left on device")


def state(step: int) -> TrainState:
    return TrainState(step, step * 1.5, 1, "plain, fp32", SCIENCE, {"torch": "2"})


def store(root: Path, keep: int = 9, keep_every: int = 0) -> Store:
    return Store(root, CheckpointConfig(keep=keep, keep_every=keep_every), ALONE)


@pytest.fixture
def two(tmp_path: Path) -> Store:
    """A store with whole checkpoints at steps 10 and 20."""
    made = store(tmp_path)
    made.save(Files(), state(10))
    made.save(Files(), state(20))
    return made


def names(root: Path) -> list[str]:
    return sorted(each.name for each in root.iterdir())


def test_what_was_saved_is_found(two: Store, tmp_path: Path) -> None:
    assert two.newest() == (tmp_path / "step-00000020", state(20))
    assert names(tmp_path) == ["step-00000010", "step-00000020"]
    assert sorted(json.loads((tmp_path / "step-00000020" / "checksums.json").read_text())) == [
        "engine/moments-0.pt",
        "rank-0.pt",
        "state.json",
    ]


def test_nothing_is_found_in_nothing(tmp_path: Path) -> None:
    assert store(tmp_path / "new").newest() is None


def cut(folder: Path) -> None:
    file = folder / "rank-0.pt"
    file.write_bytes(file.read_bytes()[:-1])


def empty(folder: Path) -> None:
    (folder / "rank-0.pt").write_bytes(b"")


def flip(name: str) -> Callable[[Path], None]:
    def one_bit(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return one_bit


def lose(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def lose_half(folder: Path) -> None:
    shutil.rmtree(folder / "engine")
    (folder / "state.json").unlink()


def lose_all_but_the_list(folder: Path) -> None:
    for file in folder.iterdir():
        if file.name != "checksums.json":
            shutil.rmtree(file) if file.is_dir() else file.unlink()


def add(folder: Path) -> None:
    (folder / "engine" / "late.pt").write_bytes(b"")


HARM = {
    "cut short": cut,
    "empty": empty,
    "one bit of the weights": flip("rank-0.pt"),
    "one bit in a folder": flip("engine/moments-0.pt"),
    "one bit of the state": flip("state.json"),
    "one bit of the list": flip("checksums.json"),
    "a file lost": lose("engine/moments-0.pt"),
    "the state lost": lose("state.json"),
    "the list lost": lose("checksums.json"),
    "half deleted": lose_half,
    "all but the list deleted": lose_all_but_the_list,
    "everything deleted": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
    "a list cut short": lambda folder: (folder / "checksums.json").write_text("{"),
    "one file too many": add,
}


@pytest.mark.parametrize("harm", HARM.values(), ids=HARM.keys())
def test_what_is_not_whole_is_passed_over(
    harm: Callable[[Path], None], two: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    harm(tmp_path / "step-00000020")
    assert two.newest() == (tmp_path / "step-00000010", state(10))
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said == [f"checkpoint {tmp_path / 'step-00000020'} is torn or corrupt; the one before it is used"]


def test_where_none_is_whole_none_is_used(two: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for folder in tmp_path.iterdir():
        cut(folder)
    assert two.newest() is None
    assert len(caplog.records) == 2


def test_a_torn_one_is_replaced_by_the_next_save(two: Store, tmp_path: Path) -> None:
    cut(tmp_path / "step-00000020")
    two.save(Files(), state(20))
    assert two.newest() == (tmp_path / "step-00000020", state(20))
    assert names(tmp_path) == ["step-00000010", "step-00000020"]


def test_only_so_many_are_kept(tmp_path: Path) -> None:
    made = store(tmp_path, keep=2, keep_every=40)
    for step in range(10, 110, 10):
        made.save(Files(), state(step))
    assert names(tmp_path) == [f"step-{step:08d}" for step in (40, 80, 90, 100)]


def test_one_is_always_kept_while_the_next_is_written(tmp_path: Path) -> None:
    made = store(tmp_path, keep=1)
    made.save(Files(), state(10))
    with pytest.raises(OSError, match="No space"):
        made.save(Failing(), state(20))
    assert made.newest() == (tmp_path / "step-00000010", state(10))
    made.save(Files(), state(20))
    assert names(tmp_path) == ["step-00000020"]


def test_what_a_failed_save_left_is_removed_at_the_next_start(two: Store, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space"):
        two.save(Failing(), state(20))
    assert names(tmp_path) == [".draft-step-00000020", "step-00000010", "step-00000020"]
    assert two.newest() == (tmp_path / "step-00000020", state(20))
    again = store(tmp_path)
    assert names(tmp_path) == ["step-00000010", "step-00000020"]
    again.save(Files(), state(30))
    assert again.newest() == (tmp_path / "step-00000030", state(30))


@pytest.mark.parametrize("kill", [1, 2])
def test_killed_while_a_checkpoint_is_replaced_one_of_them_survives(
    kill: int, two: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replacing takes two renames; a kill before either leaves the old one or the new one, not nothing."""
    (tmp_path / "step-00000010").rename(tmp_path / "elsewhere")
    rename, calls = Path.rename, iter(range(1, 9))

    def killed(here: Path, there: Path) -> Path:
        if next(calls) == kill:
            raise KeyboardInterrupt
        return rename(here, there)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        two.save(Files(), state(20))
    monkeypatch.undo()
    assert store(tmp_path).newest() == (tmp_path / "step-00000020", state(20))
    assert names(tmp_path) == ["elsewhere", "step-00000020"]


def test_a_copy_under_another_name_is_nobodys_business(two: Store, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "step-00000010", tmp_path / "step-00000010.safe")
    shutil.copytree(tmp_path / "step-00000020", tmp_path / "step-backup")
    made = store(tmp_path, keep=1)
    assert made.newest() == (tmp_path / "step-00000020", state(20))
    made.save(Files(), state(30))
    assert names(tmp_path) == ["step-00000010.safe", "step-00000030", "step-backup"]


def test_the_newest_is_so_by_number(tmp_path: Path) -> None:
    made = store(tmp_path)
    for step in (99_999_999, 100_000_000):
        made.save(Files(), state(step))
    assert made.newest() == (tmp_path / "step-100000000", state(100_000_000))


def test_another_format_is_refused_by_number(two: Store, tmp_path: Path) -> None:
    folder = tmp_path / "step-00000020"
    tree = json.loads((folder / "state.json").read_text()) | {"format": 7}
    write_json(folder / "state.json", tree)
    sums = json.loads((folder / "checksums.json").read_text())
    write_json(folder / "checksums.json", sums | {"state.json": sha256(folder / "state.json")})
    with pytest.raises(CheckpointError, match=r"step-00000020 has checkpoint format 7; this foveal reads format 1$"):
        two.newest()


def test_other_science_is_named_with_both_values(tmp_path: Path) -> None:
    check_same_science(SCIENCE, dict(SCIENCE), tmp_path)
    with pytest.raises(CheckpointError) as caught:
        check_same_science(SCIENCE | {"gone": 1}, SCIENCE | {"seed": 4, "new": None, "more": "x"}, tmp_path)
    assert "gone (was 1, is None), more (was None, is 'x'), seed (was 3, is 4)" in str(caught.value)
    assert "optim.betas" not in str(caught.value)


def test_a_draft_that_fails_leaves_what_was(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    with drafted(folder) as draft:
        (draft / "a").write_text("old")
    with pytest.raises(FileNotFoundError), drafted(folder) as draft:
        (draft / "a").rename(draft / "b")
    assert (folder / "a").read_text() == "old"
    with drafted(folder) as draft:
        (draft / "b").write_text("new")
    assert names(folder) == ["b"]
    assert names(tmp_path) == ["export"]


def _save(world: World, root: Path, step: int, fails: bool) -> str:
    made = Store(root, CheckpointConfig(keep=9), world)
    try:
        made.save(Failing(world.rank) if fails else Files(world.rank), state(step))
    except OSError as error:
        return str(error)
    return "saved"


def _newest(world: World, root: Path) -> tuple[Path, TrainState] | None:
    return Store(root, CheckpointConfig(), world).newest()


def test_two_ranks_agree_on_what_is_whole(two_ranks: Ranks, tmp_path: Path) -> None:
    assert two_ranks.call(_newest, tmp_path) == [None, None]
    for step in (10, 20, 30):
        assert two_ranks.call(_save, tmp_path, step, False) == ["saved", "saved"]
    last = tmp_path / "step-00000030"
    assert sorted(json.loads((last / "checksums.json").read_text())) == [
        "engine/moments-0.pt",
        "engine/moments-1.pt",
        "rank-0.pt",
        "rank-1.pt",
        "state.json",
    ]
    assert two_ranks.call(_newest, tmp_path) == [(last, state(30))] * 2
    flip("rank-1.pt")(last)  # each rank reads a share: only one of them sees the harm
    flip("engine/moments-0.pt")(tmp_path / "step-00000020")
    assert two_ranks.call(_newest, tmp_path) == [(tmp_path / "step-00000010", state(10))] * 2


def test_a_save_that_fails_on_two_ranks_leaves_the_old_one(two_ranks: Ranks, tmp_path: Path) -> None:
    two_ranks.call(_save, tmp_path, 10, False)
    answers = two_ranks.call(_save, tmp_path, 20, True)
    assert all("No space left" in answer for answer in answers)
    assert two_ranks.call(_newest, tmp_path) == [(tmp_path / "step-00000010", state(10))] * 2
    assert names(tmp_path) == ["step-00000010"]
