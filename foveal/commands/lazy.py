"""A group of commands whose modules are imported when one of them is run: --help of the group is answered at once."""

import importlib
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from foveal.interrupt import COMMAND_INTERRUPTED, exit_at_once_on_interrupt


@dataclass(frozen=True)
class Entry:
    """A command of a group: its place as ``module:attribute``, a Typer or a function; its line and panel of --help.

    ``parses_itself``: the function reads all its arguments from the context, --help too.
    """

    place: str
    help: str
    panel: str
    parses_itself: bool = False


class LazyCommand(TyperCommand):
    """A command that --help of its group lists; parsing its arguments imports it."""

    def __init__(self, name: str, entry: Entry) -> None:
        super().__init__(name, callback=None, help=entry.help, rich_help_panel=entry.panel)
        self._entry = entry

    def load(self) -> Any:
        """Import the command and return it."""
        module, _, attribute = self._entry.place.partition(":")
        with exit_at_once_on_interrupt(COMMAND_INTERRUPTED):  # torch takes seconds
            command = getattr(importlib.import_module(module), attribute)
        group = typer.Typer(add_completion=False)
        if isinstance(command, typer.Typer):
            group.add_typer(command, name=self.name)
        else:
            extra = self._entry.parses_itself
            settings = {"ignore_unknown_options": extra, "allow_extra_args": extra}
            group.command(self.name, add_help_option=not extra, context_settings=settings)(command)
        return typer.main.get_group(group).commands[self.name or ""]

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        return self.load().make_context(*arguments, **options)


def lazy_group(entries: dict[str, Entry]) -> type[TyperGroup]:
    """Return the class of a group with these commands, by name and in this order."""

    class LazyGroup(TyperGroup):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            for name, entry in entries.items():
                self.add_command(LazyCommand(name, entry), name)

    return LazyGroup
