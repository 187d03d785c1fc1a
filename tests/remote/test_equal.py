"""Shards behind URLs give the batches that the same shards in a folder give, whatever the network does on the way."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from proxy import Proxy

from foveal.data.batch import Batch
from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.loader import eval_batches, train_batches
from foveal.data.sampling.sources import build_training_set
from foveal.data.workers import WorkerPool

Configure = Callable[..., DataConfig]
PATIENT = {"stall_timeout_seconds": 240.0}  # where requests are counted, none is repeated on a busy machine


def trained(cfg: DataConfig, steps: int = 6, workers: WorkerPool | None = None) -> list[Batch]:
    data = build_training_set(Dataset.open(cfg), cfg, seed=3, batch_size=64)
    with train_batches(
        data,
        cfg,
        rank=0,
        world_size=1,
        microbatch_size=64,
        start_step=20,
        stop_step=20 + steps,
        workers=workers,
    ) as batches:
        return list(batches)


def same(ours: list[Batch], others: list[Batch]) -> bool:
    names = ("images", "labels", "ids")
    pairs = list(zip(ours, others, strict=True))
    return all(getattr(one, name).equal(getattr(other, name)) for one, other in pairs for name in names)


@pytest.fixture
def here(digits: Path, configure: Configure) -> list[Batch]:
    return trained(configure(str(digits)))


def test_s3(digits: Path, here: list[Batch], s3: Proxy, configure: Configure) -> None:
    cfg = configure("s3://shards/digits", **PATIENT)
    with closing(WorkerPool(2, cfg.stall_timeout_seconds)) as workers:
        assert same(here, trained(cfg, workers=workers))
    asked = len(s3.requests)
    assert same(here, trained(cfg))
    assert s3.gets("train-") == 12  # six shards and their indices, in the first run, by whichever process
    assert asked - s3.gets("train-") < len(s3.requests) - s3.gets("train-") <= 2 * asked

    def evaluated(path: str) -> list[Batch]:
        cfg = configure(path, **PATIENT)
        return list(
            eval_batches(
                Dataset.open(cfg),
                cfg,
                split="val",
                subset="all",
                training_seed=0,
                rank=0,
                world_size=1,
                microbatch_size=180,
            )
        )

    assert same(evaluated(str(digits)), evaluated("s3://shards/digits"))


def test_an_index_behind_another_url_than_the_shards(
    digits: Path, here: list[Batch], s3: Proxy, configure: Configure
) -> None:
    assert same(here, trained(configure(str(digits), index="s3://shards/digits")))
    assert s3.gets(".tar HTTP") == 0
    assert same(here, trained(configure("s3://shards/digits", index=str(digits))))


@pytest.mark.parametrize("kind", ["503", "cut", "wrong"])
def test_s3_through_faults(here: list[Batch], s3: Proxy, configure: Configure, kind: str) -> None:
    for about in ("manifest.json", "GET /shards?", "train-000001.tar", "train-000002.tar.index", "train-"):
        if kind != "wrong" or "train" in about:  # the manifest is not checked but by what it describes
            s3.inject(kind, about=about, times=2, after=500)
    assert same(here, trained(configure("s3://shards/digits")))
    assert s3.faults_left() == 0


@pytest.mark.parametrize("path", ["digits", "plain/digits"])
@pytest.mark.parametrize("kind", ["none", "503", "cut", "wrong"])
def test_http(
    here: list[Batch], http: Proxy, configure: Configure, path: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`plain` ignores ranges, as Python's server does: the answer to the first piece is the whole file."""
    if kind != "none":
        http.inject(kind, about="train-", times=3, after=500)
    monkeypatch.setenv("SHARDS_PASSWORD", "planted")
    assert same(here, trained(configure(f"http://someone:${{SHARDS_PASSWORD}}@127.0.0.1:{http.port}/{path}")))
    assert http.faults_left() == 0


def test_a_large_file_comes_in_pieces(
    here: list[Batch], http: Proxy, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foveal.data.storage.remote.CHUNK_BYTES", 100_000)
    assert same(here, trained(configure(f"http://127.0.0.1:{http.port}/digits", **PATIENT)))
    assert http.gets("train-000001.tar HTTP") == 6  # of 501,760 bytes


def test_a_server_that_ignores_ranges_sends_a_file_once(
    here: list[Batch], http: Proxy, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foveal.data.storage.remote.CHUNK_BYTES", 100_000)
    assert same(here, trained(configure(f"http://127.0.0.1:{http.port}/plain/digits", **PATIENT)))
    assert http.gets("train-000001.tar HTTP") == 1
