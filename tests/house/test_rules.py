"""Every rule of a stage is provoked once, by values that its conditions name, and is silent without one of them."""

import contextlib
import itertools
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from house import ROOT, STAGES
from pydantic import BaseModel

from foveal.commands.reference import get_stage_configs, render_rules
from foveal.config import Config, machine, read_yaml, set_by_dotted_key
from foveal.errors import ConfigError
from foveal.rules import Condition, Rule
from foveal.setting_names import get_section_class
from foveal.training.config import StageConfig

CONFIGS = get_stage_configs()
CASES = [(stage, rule) for stage in STAGES for rule in CONFIGS[stage].rules]


def candidates(annotation: Any) -> Iterator[Any]:
    """Values of a type, as YAML has them."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        yield from inner
    elif origin in {Union, types.UnionType}:
        yield from (value for part in inner for value in candidates(part))
    elif origin is tuple and inner[-1] is not Ellipsis:
        yield [next(candidates(part)) for part in inner]
    elif origin is tuple:
        yield from ([next(candidates(inner[0]))] * count for count in range(3))
    elif origin is dict:
        yield from ({"a": value} for value in candidates(inner[1]))
    elif origin is not None:  # Annotated
        yield from candidates(inner[0])
    elif isinstance(annotation, type) and issubclass(annotation, Config):
        fields = {name: field for name, field in annotation.model_fields.items() if field.is_required()}
        values = itertools.product(*(candidates(field.annotation) for field in fields.values()))
        yield from (dict(zip(fields, chosen, strict=True)) for chosen in values)
    else:
        yield from {bool: (False, True), int: (1, 0, 2), float: (0.5, 0.0, 1.0), str: ("a",)}.get(annotation, (None,))


def values_of(model: type[BaseModel], setting: str) -> Iterator[Any]:
    section, _, rest = setting.partition(".")
    field = model.model_fields[section]
    if not rest:
        return candidates(field.annotation)
    inner = get_section_class(field)
    assert inner is not None, setting
    return values_of(inner, rest)


def load(stage: str, rule: Rule, met: dict[Condition, bool]) -> StageConfig:
    """A shipped config with each condition met or not, as told, under this rule alone."""
    no_rule: Any = type("NoRule", (CONFIGS[stage],), {"rules": (), "__module__": __name__})
    one_rule: Any = type("OneRule", (CONFIGS[stage],), {"rules": (rule,), "__module__": __name__})
    for values in itertools.product(*(values_of(no_rule, condition.setting) for condition in met)):
        tree = read_yaml(ROOT / f"configs/{stage}/digits.yaml")
        for condition, value in zip(met, values, strict=True):
            section, _, inner = condition.setting.partition(".")
            if inner and tree.get(section) is None:  # a section that is null has settings that must be given
                tree[section] = next(candidates(no_rule.model_fields[section].annotation))
            set_by_dotted_key(tree, condition.setting, value)
        with contextlib.suppress(ConfigError):  # values that no config may have, such as a mean of no channel
            cfg = no_rule.from_dict(tree, "the test")
            if all(condition.is_met_by(cfg) == expected for condition, expected in met.items()):
                break
    else:
        pytest.fail(f"no values found for {met}")
    return one_rule.from_dict(tree, "the test")


@pytest.mark.parametrize(("stage", "rule"), CASES, ids=str)
def test_a_rule_refuses_what_it_names_and_nothing_less(stage: str, rule: Rule) -> None:
    broken = dict.fromkeys(rule.conditions, True) | ({} if rule.required is None else {rule.required: False})
    with pytest.raises(ConfigError, match="the test: ") as refused:
        load(stage, rule, broken)
    sentence = str(refused.value)
    assert sentence.endswith(f": {rule.because}; {rule.remedy}")
    assert all(condition.setting in sentence for condition in broken)
    for condition, met in broken.items():
        load(stage, rule, broken | {condition: not met})


def test_the_reference_lists_every_rule_once() -> None:
    text = render_rules(CONFIGS)
    assert [rule for _, rule in CASES if text.count(f"| `{rule}` |") != 1] == []


def test_conditions_read_what_they_print() -> None:
    class Section(Config):
        name: str = "a"

    class Settings(Config):
        number: float = 0.5
        names: tuple[str, ...] = ("a", "b")
        section: Section | None = None
        keys: dict[str, Any] = machine({"a": {"b": False}})

    met = ("number", "number=0.5|1", "number>0", "names", "names>1", "section!=x", "keys.a.b=false")
    unmet = ("number=1", "number>0.5", "names>2", "section", "section.name=a", "section.name!=b", "keys.a.c=1")
    settings = Settings()
    assert [text for text in (*met, *unmet) if Condition.parse(text).is_met_by(settings)] == list(met)
    assert [str(Condition.parse(text)) for text in met[:3]] == ["number", "number=0.5 or 1", "number>0"]
