"""A config in the making: settings in the order in which they are written, with a comment on some, and its YAML."""

from dataclasses import dataclass, field
from typing import Any

from foveal.config import set_by_dotted_key
from foveal.strict_yaml import dump_yaml

_LINE_LENGTH = 120
_BLOCK_SECTIONS = ("data",)  # sections with a line for each setting; the others take one line


@dataclass
class Draft:
    """Settings, nested, and the reasons of some, by dotted name."""

    settings: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def set(self, name: str, value: Any, reason: str = "") -> None:
        """Set a setting by its dotted name; setting it again replaces value and reason."""
        set_by_dotted_key(self.settings, name, value)
        self.reasons.pop(name, None)
        if reason:
            self.reasons[name] = reason

    def to_yaml(self, header: list[str]) -> str:
        """Return the YAML text, with these lines of comment at its top."""
        lines = [f"# {line}" for line in header]
        for name, value in self.settings.items():
            if name in _BLOCK_SECTIONS:
                lines.append(f"{name}:")
                lines += [
                    line
                    for key, entry in value.items()
                    for line in _with_comment(f"  {key}: {_format(entry)}", self._reasons_of(f"{name}.{key}"))
                ]
            else:
                lines += _with_comment(f"{name}: {_format(value)}", self._reasons_of(name))
        return "\n".join(lines) + "\n"

    def _reasons_of(self, name: str) -> str:
        """Return the reasons of a setting, or of the settings in a section, as one comment."""
        return "; ".join(text for key, text in self.reasons.items() if key == name or key.startswith(f"{name}."))


def _with_comment(line: str, comment: str) -> list[str]:
    """Return a line with its comment behind it, or above it if both are too long for a line."""
    if not comment:
        return [line]
    joined = f"{line}  # {comment}"
    indent = " " * (len(line) - len(line.lstrip()))
    return [joined] if len(joined) <= _LINE_LENGTH else [f"{indent}# {comment}", line]


def _format(value: Any) -> str:
    """Return a value as YAML in one line."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_format(entry)}' for key, entry in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_format, value))}]"
    if isinstance(value, float) and 0 < value < 0.01:
        return f"{value:.1e}".replace("e-0", "e-")
    return dump_yaml([value])[2:].strip()
