"""The lineage in model cards: names and digests of the ancestors, no paths, and markup shown as it is."""

import re
from html import unescape
from typing import Any

from lineage_cards import DIGITS
from markdown_it import MarkdownIt

from foveal.models.config import VitConfig
from foveal.models.vit import encoder_card
from foveal.runs.inputs import DatasetInput, ModelInput, RunInputs
from foveal.weights.export import Card
from foveal.weights.model_card import build_model_card
from foveal.weights.model_card_lineage import lineage_section

VIT = VitConfig(name="vit_tiny_patch16_224", patch=4, width=48, depth=1, heads=3)
HOSTILE = "a|b <script>alert(1)</script> [x](y) `c`\n# *d* ü"


def card_of(*models: ModelInput, **inputs: Any) -> Card:
    record = RunInputs("/disk/of/ann/run", "finetune", (DIGITS,), models).to_dict() | inputs
    return Card("finetune", encoder_card(VIT, 16, 1), (0.3,), (0.4,), inputs=record)


def cells(text: str) -> list[str]:
    rendered = MarkdownIt("commonmark").enable("table").render(text)
    return [unescape(re.sub("</?code>", "", cell)) for cell in re.findall(r"<td>(.*?)</td>", rendered, re.DOTALL)]


def test_ancestors_are_a_table() -> None:
    encoder = RunInputs("/disk/of/ann/encoder", "pretrain", (DIGITS, DIGITS))
    fork = ModelInput("fork", "/disk/of/ann/encoder", "f" * 64, "pretrain", 3, encoder)
    teacher = ModelInput("teacher", "/disk/of/ann/x", "e" * 64, "pretrain", 9, RunInputs("/r", "pretrain", (), (fork,)))
    others = ModelInput("init", "/disk/of/ann/weights.pth", "a" * 64, "foreign", 0)
    text = build_model_card(card_of(teacher, others))
    assert "## Lineage" in text
    assert "/disk/of/ann" not in text
    assert cells(lineage_section(card_of(teacher, others))) == [
        *("teacher", "pretrain", "9", "", "e" * 64),
        *("init", "weights of others", "", "not recorded", "a" * 64),
        *("forked run of the teacher", "pretrain", "3", "digits", "f" * 64),
    ]


def test_markup_is_text() -> None:
    data = DatasetInput("training", HOSTILE, "/", "train", "d", 1, 1)
    model = ModelInput(HOSTILE, "/", HOSTILE, HOSTILE, 1, RunInputs("/", "pretrain", (data,)))
    shown = HOSTILE.replace("\n", " ")
    assert cells(lineage_section(card_of(model))) == [shown, shown, "1", shown, shown]


def test_without_ancestors_there_is_no_section() -> None:
    for card in (card_of(), card_of(run=3), Card("pretrain", encoder_card(VIT, 16, 1), (0.3,), (0.4,))):
        assert lineage_section(card) == ""
        assert "Lineage" not in build_model_card(card)


def test_many_ancestors_are_counted() -> None:
    models = [ModelInput(f"arm.{number}", "/", f"{number}", "pretrain", 1) for number in range(40)]
    text = lineage_section(card_of(*models))
    assert len(cells(text)) == 5 * 30
    assert text.endswith("\n10 more models are in card.json.\n")
