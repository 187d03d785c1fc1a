"""Whether DeepSpeed would take the keys of ``engine.deepspeed``: its own parsing is asked, nothing is started."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Self

from pydantic import BaseModel, ValidationError

from foveal.engines.deepspeed import import_deepspeed
from foveal.errors import ConfigError

_WHERE = "engine.deepspeed"


def check_deepspeed_keys(config: Mapping[str, Any], user_keys: Iterable[str]) -> None:
    """Refuse keys that DeepSpeed does not know, and values that it does not take.

    ``config`` are all settings that DeepSpeed gets, ``given`` the names of those that a user added.
    Raises: ConfigError, one sentence.
    """
    import_deepspeed()
    alone = {name: value for name, value in config.items() if name not in user_keys or name == "zero_optimization"}
    for name in user_keys:
        asked = _RecordingDict(alone | {name: config[name]})
        _parse_deepspeed_config(asked, name)
        if name not in asked.requested_keys:
            raise ConfigError(
                f"{_WHERE}.{name} is not a setting of DeepSpeed's.{_suggest_name(name, asked.requested_keys)}"
            )
        default = asked.requested_defaults.get(name)
        if isinstance(default, int | float) and not _matches_type(config[name], default):
            raise ConfigError(
                f"{_WHERE}.{name}: {'true or false' if isinstance(default, bool) else 'a number'} is expected "
                f"(given: {config[name]!r})"
            )


class _RecordingDict(dict[str, Any]):
    """Settings that remember which names they were asked for, and with which defaults."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        self.requested_keys = {"sequence_parallel_size"}  # which is asked for only among ranks
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
    """Let DeepSpeed read the settings, one of which is a user's. Raises: ConfigError."""
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    try:
        DeepSpeedConfig(settings)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in (_WHERE, name, *first["loc"]))
        if first["type"] == "extra_forbidden":
            raise ConfigError(
                f"{place} is not a setting of DeepSpeed's.{_suggest_name(str(first['loc'][-1]), _deepspeed_field_names())}"
            ) from None
        said = first["msg"][0].lower() + first["msg"][1:]
        raise ConfigError(f"{place}: {said} (given: {first['input']!r:.60})") from None
    except (
        DeepSpeedConfigError,
        AssertionError,
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"{_WHERE}.{name}={settings[name]!r:.60} is not what DeepSpeed takes there ({said})"
        ) from None


def _deepspeed_field_names() -> set[str]:
    """The fields of all of DeepSpeed's sections."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    kinds: list[type[BaseModel]] = [DeepSpeedConfigModel]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    return {name for kind in kinds for name in kind.model_fields}


def _suggest_name(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def _matches_type(value: Any, default: bool | float) -> bool:
    return isinstance(value, int | float) and (isinstance(default, bool) or not isinstance(value, bool))
