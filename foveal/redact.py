"""Secrets: a URL may hold a password, a token or a signature. foveal's files, logs and messages hold none of them.

A setting with a literal secret is refused (``describe_secret_in_urls``), because a run directory stores its settings. A
setting may name an environment variable instead: the reference is stored, and the variable's value is redacted.
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

# User and password: up to the last @ before a slash, or up to a later @ if the password contains a slash; a port
# followed by a path does not match.
_USER = re.compile(r"([\w+.-]*)://([^/?#\s]*@|[^/@\s:\[]*:(?!\d+(?:[/?#\s]|$))\S*@)")
_QUERY = re.compile(r"([?&;#]|&amp;)([\w.%~\[\]-]+)=([^\s&;#'\"<>]*)")
_CLOSING = ".,:;)]}"  # punctuation of the sentence, not of the URL
_REFERENCE = re.compile(r"\$\{\w+\}|^\$\w+[.,:;)\]}]*$")
_CONTAINERS = {"abfs", "abfss", "wasb", "wasbs"}  # schemes with a container's name before the @
# Schemes with account names before the @, which are no tokens.
_ACCOUNTS = _CONTAINERS | {
    "postgres",
    "postgresql",
    "mysql",
    "mariadb",
    "mssql",
    "oracle",
    "ssh",
    "sftp",
    "hdfs",
    "smb",
}
_SECRET_NAMES = {"sig", "key", "auth", "pass", "pwd", "pw"}
_SECRET_NAME_PARTS = re.compile(
    "token|secret|passw|passphrase|signature|credential|apikey|accesskey|authorization|oauth|jwt|bearer"
)
_MIN_SECRET_LENGTH = 8  # characters of an environment value to redact: a shorter value may be part of ordinary words
REDACTED = "***"


@lru_cache(maxsize=1024)
def is_secret_name(name: str) -> bool:
    """Return whether a name, in a query, a mapping or the environment, is that of a secret."""
    plain = re.sub("[^a-z0-9]", "", unquote(name).lower())
    return plain in _SECRET_NAMES or _SECRET_NAME_PARTS.search(plain) is not None


def redact_url_secrets(text: str) -> str:
    """Return a text without the users, passwords, tokens and signatures in its URLs."""
    return _QUERY.sub(_redacted_query, _USER.sub(_redacted_user, text))


def redact(text: str) -> str:
    """Return ``redact_url_secrets`` of a text, also without the values of environment variables with a secret's name."""
    return _replace_secrets(redact_url_secrets(text), _environment_secrets())


def printable(text: str) -> str:
    """Return text without secrets and without what would move a terminal's cursor or end a line."""
    return "".join(character if character.isprintable() else "?" for character in redact(text))


def describe_secret_in_urls(text: str) -> str | None:
    """Return a description of the literal secret in a text's URLs; None without one, or for a variable reference."""
    for scheme, userinfo in _USER.findall(text):
        user, _, password = userinfo.removesuffix("@").partition(":")
        is_account = scheme.partition("+")[0].lower() in _ACCOUNTS
        if (password or (user and not is_account)) and not _REFERENCE.search(password or user):
            return "a password" if password else "a user or token"
    for _, name, value in _QUERY.findall(text) if "://" in text else ():
        if value and is_secret_name(name) and not _REFERENCE.search(value):
            return f"a secret ({name})"
    return None


def describe_secrets_in_settings(value: Any, dotted_name: str) -> Iterator[tuple[str, str]]:
    """Yield (dotted name, description) of every literal secret in nested plain data."""
    if isinstance(value, str):
        if secret := describe_secret_in_urls(value):
            yield dotted_name, secret
    elif isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(inner, str) and inner and is_secret_name(str(key)):
                yield f"{dotted_name}.{key}", "a secret"
            yield from describe_secrets_in_settings(inner, f"{dotted_name}.{key}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from describe_secrets_in_settings(inner, f"{dotted_name}.{number}")


class RedactingFormatter(logging.Formatter):
    """A log formatter that redacts secrets, in tracebacks too."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def redact_tracebacks() -> None:
    """Redact secrets in uncaught exceptions, of threads too, and in the log lines of ``logging.lastResort``."""
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _print_uncaught
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = lambda args: (
            None if args.exc_type is SystemExit else _print_uncaught(args.exc_type, args.exc_value, args.exc_traceback)
        )
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(RedactingFormatter("%(message)s"))


def _print_uncaught(error_type: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    if issubclass(error_type, KeyboardInterrupt):
        sys.__excepthook__(error_type, error or error_type(), trace)
    else:
        sys.stderr.write(redact("".join(traceback.format_exception(error_type, error, trace))))
        sys.stderr.flush()


def _redacted_user(match: re.Match[str]) -> str:
    scheme, userinfo = match.groups()
    public = _REFERENCE.search(userinfo.removesuffix("@")) or (scheme in _CONTAINERS and ":" not in userinfo)
    return match[0] if public else f"{scheme}://"


def _redacted_query(match: re.Match[str]) -> str:
    mark, name, value = match.groups()
    if not value or not is_secret_name(name) or _REFERENCE.search(value):
        return match[0]
    return f"{mark}{name}={REDACTED}{value[len(value.rstrip(_CLOSING)) :]}"


def _environment_secrets() -> list[str]:
    """Return the secrets of the environment, longest first; paths are not secrets."""
    secrets = {value for name, value in os.environ.items() if len(value) >= _MIN_SECRET_LENGTH and is_secret_name(name)}
    return sorted((value for value in secrets if not value.startswith(("/", "~"))), key=len, reverse=True)


def _replace_secrets(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, REDACTED)
    return text
