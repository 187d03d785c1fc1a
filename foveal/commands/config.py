"""``foveal config``: list and print the configs that ship; rewrite a YAML file of 0.1 under the names of 0.2."""

import difflib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from foveal.atomic import draft_path
from foveal.config import set_by_dotted_key
from foveal.errors import ConfigError
from foveal.renames import DROPPED, list_renames, translate_setting, translate_settings
from foveal.setting_names import format_alternatives
from foveal.strict_yaml import parse_yaml, read_yaml
from foveal.training.config_files import SHIPPED_CONFIGS, read_summary
from foveal.training.stage import STAGE_NAMES
from foveal.training.stage_help import format_rows

_PIPELINE_SETTINGS = ("set", "from")  # keys of a pipeline's stage whose values are settings by dotted name
app = typer.Typer(no_args_is_help=True, help="List and print the configs that ship; rewrite old ones.")


@app.command("list")
def list_command(
    kind: Annotated[
        str | None, typer.Argument(metavar="[KIND]", help="pretrain, distill, finetune, pipelines or accelerate.")
    ] = None,
) -> None:
    """List the configs that ship with foveal, each with what it is for."""
    kinds = _list_kinds()
    if kind is not None and kind not in kinds:
        raise ConfigError(f"there are no configs of '{kind}'; there are {', '.join(kinds)}")
    names = [name for name in _list_shipped() if kind in (None, name.partition("/")[0])]
    for line in format_rows([(name, read_summary(_find_shipped(name))) for name in names], most_lines=1):
        typer.echo(line)
    typer.echo(
        "\nfoveal config show NAME prints one; foveal train STAGE NAME [key=value ...] trains by one of that stage"
    )


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="KIND/NAME, as foveal config list has it; NAME if one kind has it.")],
) -> None:
    """Print a config that ships with foveal, to begin your own with: foveal config show pretrain/digits > mine.yaml."""
    typer.echo(_find_shipped(name).read_text(), nl=False)


def _list_kinds() -> list[str]:
    return [*STAGE_NAMES, *sorted({folder.name for folder in SHIPPED_CONFIGS.iterdir()} - set(STAGE_NAMES))]


def _list_shipped() -> dict[str, Path]:
    """Return the shipped files by KIND/NAME."""
    return {
        f"{kind}/{file.stem}": file
        for kind in _list_kinds()
        for file in sorted((SHIPPED_CONFIGS / kind).glob("*.yaml"))
    }


def _find_shipped(text: str) -> Path:
    """Return the shipped file of KIND/NAME, or of a NAME that one kind has. Raises: ConfigError."""
    name = text.removeprefix("configs/").removesuffix(".yaml")
    files = _list_shipped()
    matches = [full for full in files if name in (full, full.partition("/")[2])]
    if len(matches) == 1:
        return files[matches[0]]
    if matches:
        raise ConfigError(f"several configs are named '{name}': give {' or '.join(matches)}")
    near = difflib.get_close_matches(name, [*files, *(full.partition("/")[2] for full in files)], n=3)
    hint = format_alternatives(near) if near else "foveal config list shows what does."
    raise ConfigError(f"no config '{name}' ships with foveal. {hint}")


@app.command()
def upgrade(file: Annotated[Path, typer.Argument(help="A stage's settings, or a pipeline.")]) -> None:
    """Rewrite a YAML file under the names of 0.2; comments, order and everything else stay."""
    file = file.resolve()  # a link stays one
    tree = read_yaml(file)
    text = file.read_bytes().decode()
    line_end = "\r\n" if "\r\n" in text else "\n"
    old_text = text.replace("\r\n", "\n")
    try:
        wanted, all_renames = _translate_document(tree)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    if not all_renames:
        typer.echo(f"{file}: no name of 0.1 is left")
        return
    upgraded = upgrade_text(old_text)
    if upgraded.count("#") < old_text.count("#") or _parse_or_none(upgraded) != wanted:
        raise ConfigError(f"{file}: its layout cannot be kept; change it by hand: {list_renames(all_renames)}")
    draft = draft_path(file)
    try:
        draft.write_bytes(upgraded.replace("\n", line_end).encode())
        shutil.copymode(file, draft)
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)
    typer.echo(f"{file}: rewritten")


def upgrade_text(text: str) -> str:
    """Return the text of a YAML file with its settings under the names of 0.2."""
    upgrader = _Upgrader(text)
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if isinstance(root, yaml.MappingNode):
        upgrader.visit(root)
    for element in root.value if isinstance(root, yaml.SequenceNode) else ():
        for key, settings in element.value if isinstance(element, yaml.MappingNode) else ():
            if key.value in _PIPELINE_SETTINGS and isinstance(settings, yaml.MappingNode):
                upgrader.visit(settings)
    return upgrader.apply()


@dataclass(frozen=True)
class _Entry:
    """A key and its value in a mapping; ``path``: its dotted name from the top, as parts."""

    mapping: yaml.MappingNode
    number: int
    path: tuple[str, ...]
    own_length: int  # parts of the path that the key states: more than 1 for a dotted key of a pipeline

    @property
    def key(self) -> yaml.Node:
        return self.mapping.value[self.number][0]

    @property
    def value(self) -> yaml.Node:
        return self.mapping.value[self.number][1]


@dataclass
class _Upgrader:
    """Collects replacements of text; nothing but names and values of 0.1 is touched."""

    text: str
    edits: dict[tuple[int, int], str] = field(default_factory=dict)  # by begin and end
    new_sections: dict[tuple[int, str], _Entry] = field(default_factory=dict)  # by mapping and name: the first entry

    def visit(self, mapping: yaml.MappingNode, path: tuple[str, ...] = ()) -> None:
        """Upgrade the entries of a mapping, and of those in it."""
        for number, (key, value) in enumerate(mapping.value):
            parts = tuple(str(key.value).split("."))
            entry = _Entry(mapping, number, path + parts, len(parts))
            if self._rename_key(entry):
                continue
            for prefix, inner in _inner_mappings(value):
                self.visit(inner, entry.path + prefix)
            if isinstance(value, yaml.ScalarNode):
                self._upgrade_value(entry)

    def _rename_key(self, entry: _Entry) -> bool:
        """Rename a key, or move or delete the entry; return whether its value went with it."""
        name, value = translate_setting(".".join(entry.path), entry.value.value)
        new_name = name.split(".")
        if name in DROPPED and value == DROPPED[name] and tuple(new_name) != entry.path:
            self._delete(entry)  # the default of fine-tuning, and no setting of the other stages
            return True
        if tuple(new_name) == entry.path:
            return False
        if len(new_name) == len(entry.path):
            self._replace(entry.key, ".".join(new_name[-entry.own_length :]))
            return False
        if entry.own_length == len(entry.path):
            self._replace(entry.key, ".".join(new_name))
            return False
        if len(new_name) > len(entry.path):
            self._move_into_section(entry, *new_name[-2:])
        else:
            self._move_to_top(entry, ".".join(new_name))
        return True

    def _upgrade_value(self, entry: _Entry) -> None:
        value = entry.value.value
        new_value = translate_setting(".".join(entry.path), value)[1]
        if new_value != value:
            self._replace(entry.value, new_value)

    def _move_into_section(self, entry: _Entry, section: str, name: str) -> None:
        """Make an entry one of a section beside it: the first one states the section, the others follow in it."""
        first = self.new_sections.setdefault((id(entry.mapping), section), entry)
        span = (first.key.start_mark.index, first.value.end_mark.index)
        inner = f"{name}: {self._source(entry.value)}"
        if first is entry:
            self.edits[span] = f"{section}: {{{inner}}}"
        else:
            self.edits[span] = f"{self.edits[span][:-1]}, {inner}}}"
            self._delete(entry)

    def _move_to_top(self, entry: _Entry, name: str) -> None:
        """Delete an entry, and state it in a line before the top section that it was in."""
        value = translate_setting(".".join(entry.path), entry.value.value)[1]
        self._delete(entry)
        begin = self.text.find(f"\n{entry.path[0]}:") + 1
        self.edits[begin, begin] = f"{name}: {value}\n"

    def _delete(self, entry: _Entry) -> None:
        entries, begin, end = entry.mapping.value, entry.key.start_mark.index, entry.value.end_mark.index
        if not entry.mapping.flow_style:
            comment = self.text.find("#", end, self.text.find("\n", end) % (len(self.text) + 1))
            begin = self.text.rfind("\n", 0, begin) + 1 if comment < 0 else begin
            end = (self.text.find("\n", end) + 1 or len(self.text)) if comment < 0 else comment  # a comment stays
        elif entry.number:
            begin = entries[entry.number - 1][1].end_mark.index
        elif len(entries) > 1:
            end = entries[1][0].start_mark.index
        self.edits[begin, end] = ""

    def _replace(self, node: yaml.Node, text: str) -> None:
        self.edits[node.start_mark.index, node.end_mark.index] = text

    def _source(self, node: yaml.Node) -> str:
        return self.text[node.start_mark.index : node.end_mark.index]

    def apply(self) -> str:
        """Return the text with all replacements."""
        text = self.text
        for begin, end in sorted(self.edits, reverse=True):
            text = text[:begin] + self.edits[begin, end] + text[end:]
        return text


def _inner_mappings(value: yaml.Node) -> Iterator[tuple[tuple[str, ...], yaml.MappingNode]]:
    """Yield the mapping that a value is, or the mappings of the list that it is, each with its part of the path."""
    if isinstance(value, yaml.MappingNode):
        yield (), value
    for number, element in enumerate(value.value if isinstance(value, yaml.SequenceNode) else ()):
        if isinstance(element, yaml.MappingNode):
            yield (str(number),), element


def _translate_document(document: Any) -> tuple[Any, dict[str, str]]:
    """Return a config or a pipeline with nested settings under their new names, and its renames."""
    all_renames: dict[str, str] = {}

    def translate(tree: dict[str, Any]) -> dict[str, Any]:
        translated, renamed = translate_settings(tree)
        all_renames.update(renamed)
        for name, value in DROPPED.items():
            if name in renamed.values() and translated.get(name) == value:
                del translated[name]
        return translated

    if isinstance(document, dict):
        return translate(document), all_renames
    return [_with_settings(element, translate) for element in _nest_document(document)], all_renames


def _parse_or_none(text: str) -> Any:
    try:
        return _nest_document(parse_yaml(text))
    except (yaml.YAMLError, ConfigError):
        return None


def _nest_document(document: Any) -> Any:
    """Return a config as it is, and a pipeline with nested settings in place of dotted names."""
    return document if isinstance(document, dict) else [_with_settings(element, _nest) for element in document or ()]


def _with_settings(element: Any, change: Any) -> Any:
    if not isinstance(element, dict):
        return element
    return element | {key: change(element[key]) for key in _PIPELINE_SETTINGS if isinstance(element.get(key), dict)}


def _nest(settings: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in settings.items():
        set_by_dotted_key(nested, str(name), value)
    return nested
