"""Object stores of this machine: moto's S3 and Python's HTTP server, each behind a proxy that breaks what a test wants."""

import functools
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import fsspec
import pytest
from moto.server import ThreadedMotoServer
from proxy import Proxy

from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset

Configure = Callable[..., DataConfig]

_CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "planted-key",
    "AWS_SECRET_ACCESS_KEY": "planted-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class _RangedHandler(SimpleHTTPRequestHandler):
    """Serves parts of files, which Python's own does not; `plain/...` as Python's own."""

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        plain = self.path.startswith("/plain/")
        if plain:
            self.path = self.path.removeprefix("/plain")
        file = Path(self.translate_path(self.path))
        if plain or wanted is None or not file.is_file():
            super().do_GET()
            return
        start, stop = (int(text) for text in wanted.removeprefix("bytes=").split("-"))
        data = file.read_bytes()[start : stop + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/{file.stat().st_size}")
        self.end_headers()
        self.wfile.write(data)

    def do_HEAD(self) -> None:
        self.path = self.path.removeprefix("/plain")
        super().do_HEAD()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name it has there
        pass


@pytest.fixture(scope="session")
def bucket(digits: Path) -> Iterator[int]:
    """The port of an S3 server that holds the digits as s3://shards/digits."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _CREDENTIALS.items():
            patch.setenv(name, value)
        client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
        client.create_bucket(Bucket="shards")
        for file in digits.iterdir():
            client.put_object(Bucket="shards", Key=f"digits/{file.name}", Body=file.read_bytes())
        client.close()
    yield port
    server.stop()


@pytest.fixture(scope="session")
def pages(digits: Path) -> Iterator[int]:
    """The port of an HTTP server that holds the digits as /digits, and as /plain/digits without ranges."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_RangedHandler, directory=str(digits.parent)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def s3(bucket: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The proxy in front of s3://shards."""
    proxy = Proxy(bucket)
    for name, value in _CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # they remember the endpoint of an earlier test
    yield proxy
    proxy.close()


@pytest.fixture
def http(pages: int) -> Iterator[Proxy]:
    """The proxy in front of the HTTP server."""
    proxy = Proxy(pages)
    yield proxy
    proxy.close()


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    """A config of the digits behind a URL, with a cache of this test and a patience of seconds."""

    def make(path: str, **settings: Any) -> DataConfig:
        tree = {"path": path, "image_size": 8, "channels": 1, "lanes": 8, "stall_timeout_seconds": 8.0} | settings
        tree["cache"] = {"dir": str(tmp_path / "cache")} | tree.get("cache", {})
        return DataConfig.from_dict(tree, "the test")

    return make


@pytest.fixture
def remote_digits(s3: Proxy, configure: Configure) -> Dataset:
    return Dataset.open(configure("s3://shards/digits"))
