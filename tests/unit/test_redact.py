"""Secrets of every form: refused as literal settings, redacted in files, logs and messages."""

import io
import logging
import sys
import threading

import pytest

from foveal.config import Config, machine
from foveal.data.config import DataConfig, expand_path
from foveal.data.storage.remote import RemoteFolder
from foveal.errors import ConfigError, DataError
from foveal.redact import RedactingFormatter, describe_secret_in_urls, redact, redact_tracebacks, redact_url_secrets
from foveal.tracking.tracker import TrackingConfig

PLANTED = "pl4nted0secret"
_AS_USER, _AS_PASSWORD = f"{PLANTED}@", f"me:{PLANTED}@"
SECRETS = [
    f"https://{_AS_USER}host/api",
    f"https://{PLANTED}:@host/api",
    f"https://{_AS_PASSWORD}host:8080/api",
    f"https://me:a/{PLANTED}@host/api",
    f"https://me:{'a@'}{PLANTED}@host/api",
    f"postgresql+psycopg2://{_AS_PASSWORD}host/db?sslmode=require",
    f"https://host/api?token={PLANTED}",
    f"https://host/api?page=1&access_token={PLANTED}#here",
    f"https://host/api#access_token={PLANTED}",
    f"https://host/api?to%6Ben={PLANTED}",
    f"https://bucket/x?X-Amz-Credential={PLANTED}%2Fus&X-Amz-Date=1&X-Amz-Signature={PLANTED}",
    f"https://bucket/x?X-Amz-Security-Token={PLANTED}",
    f"https://account/x?sv=2024&sp=r&sig={PLANTED}%3D",
    f"abfss://container@account/x?sig={PLANTED}",
    f"https://storage/x?GoogleAccessId=a&Expires=1&Signature={PLANTED}",
    f"https://host/x?api_key={PLANTED}",
]
HARMLESS = [
    "sqlite:///runs/mlflow.db?timeout=60",
    "postgresql://joe@host/db?sslkey=/client.key",
    "abfss://container@account/x",
    "https://host:8080/a@b?page=3",
    "http://[::1]:80/a@b",
    "s3://bucket/a@b.c",
    "/data/me@here/x?token=1",
    "https://user:${PASSWORD}@host/x",
    "https://${TOKEN}@host?sig=${SIGNATURE}&key=$KEY",
    "${A_URI}",
]


class Anything(Config):
    uri: str = machine("")
    free: dict[str, object] = machine({})


@pytest.mark.parametrize("url", SECRETS)
def test_a_secret_of_any_shape_is_refused_and_redacted(url: str, tmp_path) -> None:
    redacted = redact_url_secrets(f"'{url}/manifest.json', {url}: 403 (at {url}).")
    assert PLANTED not in redacted
    assert redacted.endswith(").")
    assert "host" in redacted or "://" in redacted
    assert PLANTED not in str(DataError(f"{url} is damaged"))
    file = tmp_path / "config.yaml"
    for tree in ("free: {deep: [{er: URL}]}", "uri: URL"):
        file.write_text(tree.replace("URL", f'"{url}"'))
        with pytest.raises(ConfigError, match="written into the run directory and into MLflow") as caught:
            Anything.load(file)
        assert PLANTED not in str(caught.value)
    with pytest.raises(
        ConfigError, match=r"^--uri: uri: the URI holds a .*; write \${A_VARIABLE} for the URI"
    ) as caught:
        TrackingConfig.from_dict({"uri": url}, "--uri")
    assert PLANTED not in str(caught.value)
    with pytest.raises(ConfigError, match=r"^data.path: a URL with a"):
        expand_path(url, "data.path")


@pytest.mark.parametrize("url", HARMLESS)
def test_what_is_no_secret_stays(url: str, tmp_path) -> None:
    assert describe_secret_in_urls(url) is None
    if not url.startswith(("postgresql", "/")):
        assert redact_url_secrets(f"{url}: no such folder") == f"{url}: no such folder"
    file = tmp_path / "config.yaml"
    file.write_text(f'uri: "{url}"')
    cfg = Anything.load(file)
    cfg.dump(file)
    assert (cfg.uri, Anything.load(file)) == (url, cfg)


def test_a_secret_among_free_settings(tmp_path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"free: {{comet: {{api_key: {PLANTED}, enabled: true}}}}")
    with pytest.raises(ConfigError, match=r"free.comet.api_key: a secret in it would .* in the environment") as caught:
        Anything.load(file)
    assert PLANTED not in str(caught.value)


def test_secrets_of_the_environment_are_said_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDS_TOKEN", PLANTED)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/etc/key.json")
    assert redact(f"https://host/{PLANTED}/x: false /etc/key.json") == "https://host/***/x: false /etc/key.json"
    assert str(DataError(f"{PLANTED} is gone")) == "*** is gone"


def test_logs_and_tracebacks_hold_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.StringIO()
    handler = logging.StreamHandler(output)
    handler.setFormatter(RedactingFormatter("%(levelname)s %(message)s"))
    monkeypatch.setattr(sys, "stderr", output)
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    redact_tracebacks()

    def fail() -> None:
        try:
            raise OSError(f"cause at {SECRETS[0]}")
        except OSError as error:
            raise RuntimeError(f"no answer from {SECRETS[2]}") from error

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    try:
        fail()
    except RuntimeError as error:
        sys.excepthook(RuntimeError, error, error.__traceback__)
        handler.handle(
            logging.makeLogRecord({"msg": "at %s", "args": (SECRETS[6],), "exc_info": sys.exc_info(), "levelname": "E"})
        )
    text = output.getvalue()
    assert PLANTED not in text
    assert text.count("RuntimeError: no answer from https://host:8080/api") == 3
    assert text.count("OSError: cause at https://host/api") == 3
    assert "E at https://host/api?token=***" in text


def test_a_signature_is_of_every_file_of_a_folder() -> None:
    query = f"?sv=1&sig={PLANTED}"
    remote = RemoteFolder(f"https://host/shards/{query}", 1.0)
    assert remote._path("a.index") == f"https://host/shards/a.index{query}"
    assert (remote.display_path(), remote.display_path("a.index")) == (
        "https://host/shards",
        "https://host/shards/a.index",
    )


def test_a_variable_changes_no_science(tmp_path) -> None:
    """The data's location, with its secret, is a machine setting."""
    science = [
        DataConfig(path=path, image_size=8).science_settings() for path in ("https://a/x", "https://${T}@b?sig=${S}")
    ]
    assert science[0] == science[1]
