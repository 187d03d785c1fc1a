"""Secrets: a URL may hold a password, a token or a signature. What foveal writes and says holds none of them.

A setting that has one written out is refused (``written_secret``), since a run directory keeps its settings; one that
names an environment variable is kept as it is, and everything that was made of the variable's value is redacted.
"""

import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator
from functools import lru_cache
from types import TracebackType
from typing import Any
from urllib.parse import unquote

# What stands before the host: up to the last @ before a slash, or where a password holds a slash itself, which a port
# followed by a path does not look like.
_USER = re.compile(r"([\w+.-]*)://([^/?#\s]*@|[^/@\s:\[]*:(?!\d+(?:[/?#\s]|$))\S*@)")
_QUERY = re.compile(r"([?&;#]|&amp;)([\w.%~\[\]-]+)=([^\s&;#'\"<>]*)")
_CLOSING = ".,:;)]}"  # of the sentence, not of the URL
_REFERENCE = re.compile(r"\$\{\w+\}|^\$\w+[.,:;)\]}]*$")
_CONTAINERS = {"abfs", "abfss", "wasb", "wasbs"}  # whose part before the @ is a place
# Schemes whose users are names that a database or a machine knows, and no tokens.
_NAMES = _CONTAINERS | {"postgres", "postgresql", "mysql", "mariadb", "mssql", "oracle", "ssh", "sftp", "hdfs", "smb"}
_WHOLE = {"sig", "key", "auth", "pass", "pwd", "pw"}
_PARTS = re.compile(
    "token|secret|passw|passphrase|signature|credential|apikey|accesskey|authorization|oauth|jwt|bearer"
)
_SHORTEST = 8  # letters of a value that is looked for wherever it stands: a shorter one is a part of ordinary words
REDACTED = "***"


@lru_cache(maxsize=1024)
def is_secret_name(name: str) -> bool:
    """Whether what has this name, in a query, a mapping or the environment, is a secret."""
    plain = re.sub("[^a-z0-9]", "", unquote(name).lower())
    return plain in _WHOLE or _PARTS.search(plain) is not None


def redact_urls(text: str) -> str:
    """A text with URLs in it, without the users, passwords, tokens and signatures in them."""
    return _QUERY.sub(_redacted_query, _USER.sub(_redacted_user, text))


def redact(text: str) -> str:
    """``redact_urls``, and without the values of environment variables that are secrets by their names."""
    return _replace_secrets(redact_urls(text), _environment_secrets())


def find_secret_in_text(text: str) -> str | None:
    """What secret is written out in the URLs of a text, in words; none where there is none, or a variable stands there."""
    for scheme, before in _USER.findall(text):
        user, _, password = before.removesuffix("@").partition(":")
        named = scheme.partition("+")[0].lower() in _NAMES
        if (password or (user and not named)) and not _REFERENCE.search(password or user):
            return "a password" if password else "a user or token"
    for _, name, value in _QUERY.findall(text) if "://" in text else ():
        if value and is_secret_name(name) and not _REFERENCE.search(value):
            return f"a secret ({name})"
    return None


def find_secrets_in_settings(value: Any, setting: str) -> Iterator[tuple[str, str]]:
    """(dotted name, what secret) of every secret that is written out in plain data, however deep."""
    if isinstance(value, str):
        if what := find_secret_in_text(value):
            yield setting, what
    elif isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(inner, str) and inner and is_secret_name(str(key)):
                yield f"{setting}.{key}", "a secret"
            yield from find_secrets_in_settings(inner, f"{setting}.{key}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from find_secrets_in_settings(inner, f"{setting}.{number}")


class RedactingFormatter(logging.Formatter):
    """A formatter of log lines, tracebacks included, that hold no secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def redact_tracebacks() -> None:
    """Print uncaught exceptions, those of threads too, and warnings of nobody's log, without secrets in them."""
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _print_uncaught
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = lambda args: (
            None if args.exc_type is SystemExit else _print_uncaught(args.exc_type, args.exc_value, args.exc_traceback)
        )
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(RedactingFormatter("%(message)s"))


def _print_uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error or kind(), trace)
    else:
        sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))
        sys.stderr.flush()


def _redacted_user(match: re.Match[str]) -> str:
    scheme, before = match.groups()
    kept = _REFERENCE.search(before.removesuffix("@")) or (scheme in _CONTAINERS and ":" not in before)
    return match[0] if kept else f"{scheme}://"


def _redacted_query(match: re.Match[str]) -> str:
    mark, name, value = match.groups()
    if not value or not is_secret_name(name) or _REFERENCE.search(value):
        return match[0]
    return f"{mark}{name}={REDACTED}{value[len(value.rstrip(_CLOSING)) :]}"


def _environment_secrets() -> list[str]:
    """The secrets of the environment, the longest first."""
    found = {value for name, value in os.environ.items() if len(value) >= _SHORTEST and is_secret_name(name)}
    return sorted((value for value in found if not value.startswith(("/", "~"))), key=len, reverse=True)


def _replace_secrets(text: str, secrets: list[str]) -> str:
    for each in secrets:
        text = text.replace(each, REDACTED)
    return text
