"""A progress bar at the bottom of a terminal. What the process writes meanwhile appears above the bar."""

import io
import logging
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_REFRESHES_PER_SECOND = 4


@dataclass(frozen=True, slots=True)
class BarContent:
    """The two lines of a bar: name, bar and position; details. ``fraction`` is in [0, 1]."""

    name: str
    fraction: float
    position: str
    details: str


class LiveBar:
    """Shows what ``describe`` returns, several times per second, until it is stopped.

    A thread calls ``describe``, so that progress costs the training loop nothing and the bar lives in a long step.
    Meanwhile ``sys.stderr``, ``sys.stdout`` if it is a terminal, and the handlers of all loggers that write there print
    above the bar. Processes that are forked meanwhile write past it.
    """

    def __init__(self, describe: Callable[[], BarContent], console: Console | None = None) -> None:
        self._describe = describe
        self._console = console or Console(file=sys.stderr)  # this stream, not what sys.stderr will be
        self._live = Live(
            console=self._console,
            get_renderable=self._render,
            refresh_per_second=_REFRESHES_PER_SECOND,
            redirect_stdout=False,  # rich would break long lines, and send stdout to the console of stderr
            redirect_stderr=False,
        )
        self._streams: list[_StreamAboveBar] = []

    @staticmethod
    def is_possible() -> bool:
        """Whether stderr is a terminal that can move its cursor."""
        return sys.stderr.isatty() and not Console(file=sys.stderr).is_dumb_terminal

    def start(self) -> None:
        """Show the bar and redirect what is written."""
        self._live.start()
        self._console.show_cursor(True)  # a killed process must leave a terminal with a cursor
        for name in ("stderr", "stdout"):
            stream = getattr(sys, name)
            if name == "stderr" or stream.isatty():
                above = _StreamAboveBar(self._console, stream)
                self._streams.append(above)
                setattr(sys, name, above)
                _replace_handler_streams(stream, above)

    def stop(self) -> None:
        """Leave the bar as it is and write directly again; only the first call counts."""
        for above in self._streams:
            above.release()
            _replace_handler_streams(above, above.stream)
            for name in ("stderr", "stdout"):
                if getattr(sys, name) is above:
                    setattr(sys, name, above.stream)
        self._streams = []
        self._live.stop()

    def _render(self) -> RenderableType:
        content = self._describe()
        first = Table.grid(padding=(0, 1), expand=True)
        first.add_column(no_wrap=True, overflow="ellipsis", max_width=24)
        first.add_column(ratio=1, min_width=4)
        first.add_column(no_wrap=True, overflow="ellipsis")
        bar = ProgressBar(total=1.0, completed=min(max(content.fraction, 0.0), 1.0))
        first.add_row(Text(content.name), bar, Text(content.position))
        details = [Text(content.details, no_wrap=True, overflow="ellipsis")] if content.details else []
        return Group(first, *details)


class _StreamAboveBar(io.TextIOBase):
    """Prints complete lines above the bar, and everything directly once the bar has stopped."""

    def __init__(self, console: Console, stream: TextIO) -> None:
        self.stream = stream
        self._console = console
        self._process = os.getpid()
        self._partial_line = ""
        self._lock = threading.RLock()  # a signal handler may write while this thread does

    def write(self, text: str) -> int:
        if self._process != os.getpid():
            return self.stream.write(text)
        with self._lock:
            *lines, rest = (self._partial_line + text).split("\n")
            self._partial_line = rest.rpartition("\r")[2]  # a library's own bar draws over its line
            if lines:
                self._print("\n".join(line.rpartition("\r")[2] for line in lines))
        return len(text)

    def release(self) -> None:
        """Print an incomplete line and write directly from now on."""
        with self._lock:
            rest, self._partial_line, self._process = self._partial_line, "", -1
            if rest:
                self._print(rest)

    def _print(self, lines: str) -> None:
        self._console.print(lines, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def flush(self) -> None:
        self.stream.flush()

    def isatty(self) -> bool:
        return self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.stream.encoding


def _replace_handler_streams(old: Any, new: Any) -> None:
    """Let the handlers of all loggers that write to ``old`` write to ``new``."""
    loggers = [logging.getLogger(), *logging.getLogger().manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", ()):  # a placeholder has no handlers
            if vars(handler).get("stream") is old:  # those that read sys.stderr at each record need nothing
                handler.setStream(new)
