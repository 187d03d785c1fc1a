"""The manifest of a data set: where it is read, and what is missing where there is none."""

from pathlib import Path

from foveal.data.config import is_url
from foveal.data.format.manifest import MANIFEST_NAME, Manifest, parse_manifest, read_manifest
from foveal.data.storage.remote import PermanentRemoteError, RemoteFolder
from foveal.errors import DataError
from foveal.redact import redact_url_secrets
from foveal.timeouts import STORAGE_AWAY_ERRNOS, read_with_timeout


def find_manifest(folder: str, index_folder: str, remote: RemoteFolder | None, stall_timeout: float) -> Manifest:
    """Read the manifest in ``index_folder``, which is ``remote`` if it is a URL, of the shards in ``folder``.

    Raises: DataError that says what to do where there is none.
    """
    if remote is not None:
        return _read_remote_manifest(remote, folder)
    return read_with_timeout(
        Path(index_folder) / MANIFEST_NAME, stall_timeout, lambda: _read_local_manifest(folder, Path(index_folder))
    )


def _read_remote_manifest(remote: RemoteFolder, folder: str) -> Manifest:
    try:
        text = remote.read_up_to(MANIFEST_NAME, 0, remote.file_size(MANIFEST_NAME))
        return parse_manifest(text, remote.display_path(MANIFEST_NAME))
    except PermanentRemoteError as error:
        raise DataError(
            f"{error}: run `foveal data index {redact_url_secrets(folder)} --index FOLDER` and set data.index "
            f"to that folder, or correct data.path"
        ) from None


def format_index_option(folder: str, index: str) -> str:
    """Return the --index option of `foveal data index`; empty if the index is in the shards' folder."""
    return "" if folder == index else f" --index {index}"


def _read_local_manifest(folder: str, index_folder: Path) -> Manifest:
    if not is_url(folder) and not Path(folder).is_dir():
        place = "" if Path(folder).is_absolute() else f" (in {Path.cwd()})"
        raise DataError(f"data.path: no such folder: {folder}{place}")
    try:
        return read_manifest(index_folder)
    except OSError as error:
        if error.errno in STORAGE_AWAY_ERRNOS:
            raise
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise DataError(f"{index_folder / MANIFEST_NAME} cannot be read ({error})") from None
    if is_url(folder):
        url = redact_url_secrets(folder)
        raise DataError(
            f"{url}: no {MANIFEST_NAME} in {index_folder}; run `foveal data index {url} --index {index_folder}`"
        )
    index_option = format_index_option(folder, str(index_folder))
    if any(Path(folder).glob("*.tar")):
        raise DataError(f"{folder}: these shards have no index; run `foveal data index {folder}{index_option}`")
    if any(Path(folder).glob("*.tar.*")):
        raise DataError(f"{folder}: these shards are compressed, which has no random access; unpack and index them")
    raise DataError(
        f"{folder}: no {MANIFEST_NAME} and no shards (*.tar) here; run `foveal data pack` or correct data.path"
    )
