"""Check the keys of ``engine.deepspeed`` with DeepSpeed's own parser, without starting DeepSpeed."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Self

from pydantic import BaseModel, ValidationError

from foveal.engines.deepspeed import import_deepspeed
from foveal.errors import ConfigError

_SECTION = "engine.deepspeed"


def check_deepspeed_settings(full_config: Mapping[str, Any], user_keys: Iterable[str]) -> None:
    """Refuse keys that are unknown to DeepSpeed, and invalid values.

    ``full_config`` holds all of DeepSpeed's settings, ``user_keys`` the keys that a user added.
    Raises: ConfigError.
    """
    import_deepspeed()
    derived = {
        name: value for name, value in full_config.items() if name not in user_keys or name == "zero_optimization"
    }
    for name in user_keys:
        settings = _RecordingDict(derived | {name: full_config[name]})
        _parse_deepspeed_config(settings, name)
        if name not in settings.requested_keys:
            raise ConfigError(
                f"{_SECTION}.{name} is not a setting of DeepSpeed's.{_suggest_name(name, settings.requested_keys)}"
            )
        default = settings.requested_defaults.get(name)
        if isinstance(default, int | float) and not _matches_type(full_config[name], default):
            raise ConfigError(
                f"{_SECTION}.{name}: {'true or false' if isinstance(default, bool) else 'a number'} is expected "
                f"(given: {full_config[name]!r})"
            )


class _RecordingDict(dict[str, Any]):
    """Settings that record which keys are read, and with which defaults."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        self.requested_keys = {"sequence_parallel_size"}  # read only with several ranks
        self.requested_defaults: dict[str, Any] = {}

    def __copy__(self) -> Self:
        return self

    def __contains__(self, name: object) -> bool:
        self.requested_keys.add(str(name))
        return super().__contains__(name)

    def __getitem__(self, name: str) -> Any:
        self.requested_keys.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.requested_keys.add(name)
        self.requested_defaults[name] = default
        return super().get(name, default)

    def keys(self) -> Any:
        return self


def _parse_deepspeed_config(settings: _RecordingDict, name: str) -> None:
    """Parse the settings with DeepSpeed; ``name`` is the user's key. Raises: ConfigError."""
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    try:
        DeepSpeedConfig(settings)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        path = ".".join(str(part) for part in (_SECTION, name, *detail["loc"]))
        if detail["type"] == "extra_forbidden":
            suggestion = _suggest_name(str(detail["loc"][-1]), _deepspeed_field_names())
            raise ConfigError(f"{path} is not a setting of DeepSpeed's.{suggestion}") from None
        reason = detail["msg"][0].lower() + detail["msg"][1:]
        raise ConfigError(f"{path}: {reason} (given: {detail['input']!r:.60})") from None
    except (
        DeepSpeedConfigError,
        AssertionError,
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{_SECTION}.{name}={settings[name]!r:.60} is refused by DeepSpeed ({reason})") from None


def _deepspeed_field_names() -> set[str]:
    """Return the field names of all of DeepSpeed's sections."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    sections: list[type[BaseModel]] = [DeepSpeedConfigModel]
    for section in sections:
        sections.extend(section.__subclasses__())
    return {name for section in sections for name in section.model_fields}


def _suggest_name(name: str, candidates: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, sorted(candidates), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def _matches_type(value: Any, default: bool | float) -> bool:
    return isinstance(value, int | float) and (isinstance(default, bool) or not isinstance(value, bool))
