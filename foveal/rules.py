"""Combinations of settings that are refused: each a rule, from which its check, its test and its line of docs come.

A condition is text about one setting, under its dotted name:

    init                        set: neither null nor empty
    target=features              equal to a value, or to one of several (method=layers|relations)
    engine.sharding!=ddp        unequal to a value
    log.images_every>0        above a number; a list's length is compared
"""

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foveal.config import Config, parse_yaml

_CONDITION = re.compile(r"(?P<setting>[a-z_][\w.]*)(?:(?P<sign>!=|=|>)(?P<values>.+))?")
_ABSENT = object()  # the value of a setting in a section that is null


@dataclass(frozen=True)
class Condition:
    """A statement about one setting. ``sign`` is empty for "is set", ``values`` are the alternatives behind it."""

    setting: str
    sign: str
    values: tuple[Any, ...]

    @classmethod
    def parse(cls, text: str) -> "Condition":
        """Return the condition of a text such as ``log.images_every>0``."""
        match = _CONDITION.fullmatch(text)
        assert match is not None, f"{text} is not a condition"
        values = () if match["values"] is None else tuple(map(parse_yaml, match["values"].split("|")))
        return cls(match["setting"], match["sign"] or "", values)

    def __str__(self) -> str:
        return f"{self.setting}{self.sign}{' or '.join(map(_format_value, self.values))}"

    def is_met_by(self, cfg: Config) -> bool:
        """Whether the config meets the condition; one about a section that is null is not met."""
        value = self._value_in(cfg)
        if value is _ABSENT:
            return False
        if not self.sign:
            return value is not None and value not in ((), {}, "")
        if self.sign == ">":
            return operator.gt(len(value) if isinstance(value, tuple) else value, self.values[0])
        return (value in self.values) == (self.sign == "=")

    def describe_in(self, cfg: Config) -> str:
        """Return the setting with its value in the config; without it for a value of more than one word."""
        value = self._value_in(cfg)
        is_short = value is None or value == () or isinstance(value, bool | int | float | str)
        return f"{self.setting}={_format_value(value)}" if is_short else self.setting

    def _value_in(self, cfg: Config) -> Any:
        value: Any = cfg
        for name in self.setting.split("."):
            value = value.get(name, _ABSENT) if isinstance(value, Mapping) else getattr(value, name, _ABSENT)
        return value


@dataclass(frozen=True)
class Rule:
    """A refusal: ``conditions`` that are all met, where ``required``, if there is one, is not."""

    conditions: tuple[Condition, ...]
    required: Condition | None
    because: str
    remedy: str

    def is_broken_by(self, cfg: Config) -> bool:
        """Whether the config is to be refused."""
        is_required_met = self.required is not None and self.required.is_met_by(cfg)
        return not is_required_met and all(condition.is_met_by(cfg) for condition in self.conditions)

    def explain(self, cfg: Config) -> str:
        """Return why a config that breaks the rule is refused, in one sentence with the remedy."""
        named = _join([condition.describe_in(cfg) for condition in self.conditions])
        given = "" if self.required is None else f" (given: {self.required.describe_in(cfg)})"
        return f"{named} {self._verdict()}{given}: {self.because}; {self.remedy}"

    def __str__(self) -> str:
        return f"{_join([str(condition) for condition in self.conditions])} {self._verdict()}"

    def _verdict(self) -> str:
        if self.required is not None:
            return f"{'requires' if len(self.conditions) == 1 else 'require'} {self.required}"
        return "exclude each other" if len(self.conditions) > 1 else "is refused"


def excludes(*conditions: str, because: str, remedy: str) -> Rule:
    """Return the rule that the conditions are not met together; a single one is never met in the stage."""
    return Rule(tuple(map(Condition.parse, conditions)), None, because, remedy)


def requires(*conditions: str, because: str, remedy: str) -> Rule:
    """Return the rule that the last condition is met wherever the conditions before it are."""
    *given, required = map(Condition.parse, conditions)
    return Rule(tuple(given), required, because, remedy)


def explain_first_broken(rules: Sequence[Rule], cfg: Config) -> str | None:
    """Return the sentence of the first rule that the config breaks, or None."""
    return next((rule.explain(cfg) for rule in rules if rule.is_broken_by(cfg)), None)


def _format_value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if value == ():
        return "[]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _join(words: Sequence[str]) -> str:
    """Return "a", "a and b" or "a, b and c"."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
