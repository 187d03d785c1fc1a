"""Servers that stall, refuse, or are not there: one sentence within the patience, with the shard's name and no secret."""

import logging
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from ports import free_port
from proxy import Proxy
from ranks import stage_named

from foveal.checkpoint.saver import CheckpointSaver
from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.loader import train_batches
from foveal.data.sampling.sources import build_training_set
from foveal.data.storage.remote import PermanentRemoteError, RemoteFolder
from foveal.errors import ConfigError, DataError
from foveal.redact import redact
from foveal.training.cli import main

Configure = Callable[..., DataConfig]


@contextmanager
def within(seconds: float, at_least: float = 0.0) -> Iterator[None]:
    start = time.monotonic()
    yield
    assert at_least <= time.monotonic() - start < seconds


@pytest.mark.usefixtures("remote_digits")  # the client of S3 has read its own files before a read is timed
@pytest.mark.parametrize("server", ["s3", pytest.param("http", marks=pytest.mark.thorough)])
def test_a_read_that_stalls(
    server: str, request: pytest.FixtureRequest, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy: Proxy = request.getfixturevalue(server)
    url = (
        "s3://shards/digits" if server == "s3" else f"http://someone:${{SHARDS_PASSWORD}}@127.0.0.1:{proxy.port}/digits"
    )
    monkeypatch.setenv("SHARDS_PASSWORD", "planted")
    dataset = Dataset.open(configure(url, stall_timeout_seconds=4.0))
    shard = dataset.manifest.splits["train"].shards[1].file
    proxy.inject("stall", about=f"{shard} HTTP", times=100)
    with within(20.0, at_least=2.5), pytest.raises(DataError) as caught:
        dataset.read_bytes(shard, 0, 100)
    shown = url.replace("someone:${SHARDS_PASSWORD}@", "")
    assert str(caught.value).startswith(
        f"{shown}/{shard} cannot be read, 5 attempts failed (TimeoutError: no answer within 0.5 s)"
    )
    proxy.heal()
    proxy.inject("stall", about=f"{shard} HTTP", times=2)
    with within(20.0):
        assert len(dataset.read_bytes(shard, 0, 100)) == 100


@pytest.mark.usefixtures("remote_digits")
def test_a_run_whose_server_stalls_ends(s3: Proxy, configure: Configure) -> None:
    cfg = configure("s3://shards/digits", stall_timeout_seconds=3.0)
    data = build_training_set(Dataset.open(cfg), cfg, seed=3, batch_size=64)
    s3.inject("stall", about=".tar HTTP", times=100)
    with (
        train_batches(data, cfg, rank=0, world_size=1, microbatch_size=64, start_step=0, stop_step=2) as batches,
        within(60.0),  # the patience begins with the last that has come, and a prefetch may fail before
        pytest.raises(DataError, match=r"s3://shards/digits/train-00000\d.tar"),
    ):
        next(batches)


@pytest.mark.parametrize("setting", ["path", "index"])
def test_a_password_in_a_setting_is_refused(configure: Configure, setting: str) -> None:
    """A config is written into the run directory and into MLflow; a variable's value is not."""
    secret = "planted"
    with pytest.raises(ConfigError, match=rf"^data.{setting}: a URL with a password in it") as caught:
        Dataset.open(configure(**{"path": "s3://shards/digits", setting: f"http://someone:{secret}@127.0.0.1/digits"}))
    assert secret not in str(caught.value)


_PLANTED = {name: f"planted-{number}-secret" for number, name in enumerate(("SHARDS_PASSWORD", "SHARDS_SIGNATURE"))}


def _leaks(place: Path, *more: str) -> list[str]:
    """Where a planted secret stands in the bytes of a folder's files, in their names, or in other texts."""
    there = {text[:80]: text.encode() for text in more}
    for file in place.rglob("*"):
        with suppress(FileNotFoundError):  # the delivery to MLflow, which was given up, still ends its draft
            if file.is_file():
                there[str(file)] = file.read_bytes()
    secrets = [secret.encode() for secret in _PLANTED.values()]
    return [where for where, data in there.items() if any(secret in data + where.encode() for secret in secrets)]


@pytest.mark.usefixtures("own_environment")
@pytest.mark.parametrize("end", ["finished", "refused", "failed"])
def test_secrets_of_a_run_stand_nowhere(
    configs: dict[str, Path], http: Proxy, tmp_path: Path, monkeypatch, capfd, caplog, end: str
) -> None:
    """A run whose settings name variables goes on from its own config.yaml; what it writes and says has no value of them.

    Refused: a shard of its data. Failed: by an error that is none of ours, in a log with its traceback.
    """
    password, signature = _PLANTED.values()
    place = f"127.0.0.1:{http.port}/digits?sv=1&sig={signature}"
    alive, dead = f"sqlite:///{tmp_path}/mlflow.db", f"http://me:{password}@127.0.0.1:9/?token={signature}"
    for name, value in (_PLANTED | {"STORE": alive if end == "finished" else dead}).items():
        monkeypatch.setenv(name, value)
    run = tmp_path / "run"
    words = [str(configs["pretrain"]), "engine.kind=plain", f"run.dir={run}", "tracking.uri=${STORE}"]
    words += [f"data.path=http://me:${{SHARDS_PASSWORD}}@{place.replace(signature, '${SHARDS_SIGNATURE}')}"]
    words += [f"data.cache.dir={tmp_path}/cache", "tracking.flush_timeout_seconds=0.5", "data.stall_timeout_seconds=8"]
    if end == "refused":
        http.inject("403", about="train-000003.tar HTTP", times=10**6)
    elif end == "failed":
        monkeypatch.setattr(CheckpointSaver, "save", lambda *_: _fail(f"https://me:{password}@{place}"))
    with pytest.raises(SystemExit if end != "failed" else RuntimeError) as done:
        main(stage_named("pretrain"), words)
    said = capfd.readouterr()
    traced = "".join(traceback.format_exception(done.value)) if end == "failed" else ""
    assert not _leaks(tmp_path, said.out, said.err, redact(traced))
    assert (run / "attempts" / "0001.end.json").exists()
    if end == "finished":
        assert isinstance(done.value, SystemExit) and done.value.code == 0
        assert "sig=${SHARDS_SIGNATURE}" in (run / "config.yaml").read_text()
        with pytest.raises(SystemExit) as done:
            main(stage_named("pretrain"), [str(run / "config.yaml")])
        assert done.value.code == 0
        assert "is finished already" in caplog.text


def _fail(where: str) -> None:
    raise RuntimeError(f"no place at {where}")


@pytest.mark.thorough
@pytest.mark.usefixtures("remote_digits")
@pytest.mark.parametrize("about", ["manifest.json", "GET /shards?"])
def test_a_start_that_stalls(s3: Proxy, configure: Configure, about: str) -> None:
    s3.inject("stall", about=about, times=100, after=0)
    with within(20.0), pytest.raises(DataError, match=r"^s3://shards/digits.* cannot be read, 5 attempts failed"):
        Dataset.open(configure("s3://shards/digits", stall_timeout_seconds=2.0))


def test_nobody_there(configure: Configure, caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    secret, name = "planted", "a.tar"
    url = f"http://someone:{secret}@127.0.0.1:{port}/digits"
    with caplog.at_level(logging.DEBUG, "foveal"), within(20.0), pytest.raises(DataError) as caught:
        RemoteFolder(url, all_attempts_timeout=2.0).read_up_to(name, 0, 1)
    assert str(caught.value).startswith(f"http://127.0.0.1:{port}/digits/{name} cannot be read, 5 attempts failed")
    assert [record.message.count(f"attempt {n} of 5") for n, record in enumerate(caplog.records, 1)] == [1, 1, 1, 1]
    assert secret not in caplog.text + str(caught.value)


def test_what_is_refused_is_not_asked_for_again(
    s3: Proxy, http: Proxy, configure: Configure, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(DataError, match=r"s3://shards/nowhere/manifest.json is not there or .*: run `foveal"):
        Dataset.open(configure("s3://shards/nowhere", stall_timeout_seconds=240.0))
    with pytest.raises(PermanentRemoteError, match=r"s3://nobody/x/a.tar is not there or may not be read \("):
        RemoteFolder("s3://nobody/x", 240.0).file_size("a.tar")
    with pytest.raises(PermanentRemoteError, match=r"/digits/a.tar is not there or may not be read \(FileNotFoundErro"):
        RemoteFolder(f"http://127.0.0.1:{http.port}/digits", 240.0).read_up_to("a.tar", 0, 10)
    http.inject("401")
    with pytest.raises(PermanentRemoteError, match="may not be read"):
        RemoteFolder(f"http://127.0.0.1:{http.port}/digits", 240.0).read_up_to("manifest.json", 0, 10)
    assert "attempt" not in caplog.text  # of a failed one a line would tell


def test_an_outage_is_no_refusal(digits: Path, http: Proxy) -> None:
    """fsspec says of both that there is no such file."""
    remote = RemoteFolder(f"http://127.0.0.1:{http.port}/digits", 8.0)
    http.inject("503", times=2)  # HEAD, and the GET that fsspec tries then
    assert remote.file_size("train-000000.tar") == (digits / "train-000000.tar").stat().st_size


def test_less_than_was_asked_for(digits: Path, s3: Proxy) -> None:
    size = (digits / "manifest.json").stat().st_size
    with pytest.raises(
        DataError, match=rf"manifest.json cannot be read, .* \(EOFError: 100 bytes from {size - 10} were"
    ):
        RemoteFolder("s3://shards/digits", 8.0).read_up_to("manifest.json", size - 10, size + 90)


def test_a_page_that_lists_something_else(http: Proxy, configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RemoteFolder, "file_sizes", lambda _: {"about.html": None})
    assert Dataset.open(configure(f"http://127.0.0.1:{http.port}/digits")).num_samples("train") == 1437


def edited(digits: Path, index: Path, old: str, new: str) -> str:
    """An index of the digits whose manifest says something else."""
    index.mkdir()
    for file in digits.glob("*.index"):
        shutil.copy(file, index)
    text = (digits / "manifest.json").read_text()
    assert old in text
    (index / "manifest.json").write_text(text.replace(old, new))
    return str(index)


def test_a_missing_shard_is_said_at_the_start(
    digits: Path, http: Proxy, s3: Proxy, configure: Configure, tmp_path: Path
) -> None:
    """Unless the server lists nothing: then when it is read."""
    index = edited(digits, tmp_path / "index", "train-000004.tar", "train-000009.tar")
    http_url = f"http://127.0.0.1:{http.port}/digits"
    for url in ("s3://shards/digits", http_url):
        with pytest.raises(DataError, match=rf"^{url}/train-000009.tar is missing, and manifest.json lists it"):
            Dataset.open(configure(url, index=index))
    http.inject("401", about="GET /digits/ ", times=9)
    http.inject("401", about="GET /digits HTTP", times=9)
    dataset = Dataset.open(configure(http_url))
    assert dataset.read_bytes("train-000004.tar", 0, 10)


def test_a_shard_of_another_size(digits: Path, s3: Proxy, configure: Configure, tmp_path: Path) -> None:
    size = (digits / "train-000004.tar").stat().st_size
    index = edited(digits, tmp_path / "index", f'"bytes": {size}', f'"bytes": {size + 512}')
    with pytest.raises(
        DataError, match=r"has \d+ bytes and manifest.json says \d+: restore it, or run `foveal data in"
    ):
        Dataset.open(configure("s3://shards/digits", index=index))


@pytest.mark.parametrize(("url", "package"), [("gs://bucket/x", "gcsfs"), ("s3://bucket/x", "s3fs")])
def test_a_driver_that_is_not_installed(url: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, url[:2], raising=False)
    with pytest.raises(DataError, match=rf"{url} needs the package {package}, which is not installed: `pip install "):
        RemoteFolder(url, 1.0)


def test_a_file_to_walk_through(digits: Path, s3: Proxy) -> None:
    remote = RemoteFolder("s3://shards/digits", 240.0)
    file = digits / "train-000000.tar"
    assert remote.file_sizes() == {each.name: each.stat().st_size for each in digits.iterdir()}
    modified = remote.modified_time(file.name)
    assert modified is not None and abs(modified - time.time()) < 600
    assert remote.etag(file.name)
    with remote.open_file(file.name) as stream, file.open("rb") as same:
        for offset, size in ((0, 512), (300_000, 512), (512, 5000), (file.stat().st_size - 10, 100)):
            assert stream.seek(offset) == same.seek(offset)
            assert stream.read(size) == same.read(size)
        assert stream.seek(-20, 2) == same.seek(-20, 2)
        assert stream.read() == same.read()
    assert s3.gets("train-000000.tar HTTP") <= 5
