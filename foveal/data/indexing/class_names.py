"""Names of classes as a command states them: a list, or a file of one in a line."""

from pathlib import Path

from foveal.errors import ConfigError, DataError


def read_class_names(classes: str, classes_file: Path | None) -> list[str] | None:
    """Return the class names of --classes or --classes-file, None without either. Raises: DataError, ConfigError."""
    if classes_file is None:
        first, *others = classes.split(",")
        if len({part.startswith(" ") for part in others}) > 1:
            raise ConfigError(
                f"--classes {classes[:60]!r} has commas with and without a space behind: names that contain commas are "
                f"given with --classes-file; otherwise write all commas alike"
            )
        return [part.strip() for part in (first, *others)] if classes else None
    if classes:
        raise ConfigError("--classes and --classes-file both give the class names: omit one")
    try:
        names = [line.strip() for line in classes_file.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--classes-file {classes_file} cannot be read as UTF-8 ({error})") from None
    if not names:
        raise DataError(f"--classes-file {classes_file} has no names")
    return names
