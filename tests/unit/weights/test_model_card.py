"""Model cards: Hugging Face reads them, their lines run, and a name with markup in it is shown as it is."""

import io
import re
from contextlib import redirect_stdout
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoders import shaken
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image

from finetune.tasks.registry import find_task
from foveal.models.config import SegmentationHeadCard, VitConfig
from foveal.models.segment import LastMapLinearHead
from foveal.models.vit import build_encoder, encoder_card
from foveal.weights.export import Card, write_export
from foveal.weights.model_card import build_model_card
from foveal.weights.model_card_facts import DataFacts, ModelCardFacts
from foveal.weights.model_card_loading import EXPORT, IMAGE

VIT = VitConfig(name="vit_tiny_patch16_224", patch=4, width=48, depth=1, heads=3)
CLASSES = ("cats, dogs", 'a "quoted" name', "犬", "<b>bold</b>")
HOSTILE = (
    "a|b", "`code`", "``", "a `` b", "*bold*", "_it_", "# heading", "- item", "1. one", "[link](x)", "![image](x)",
    "<script>alert(1)</script>", "&lt;", "a\\|b", "\\", "~~gone~~", "---", "$x$", "<!-- hidden -->", "a <br> b", "=",
)  # fmt: skip
FACTS = ModelCardFacts(
    training_data=(DataFacts("my: data", "train", 1_200, 1_000), DataFacts("more", "train", 50, 50)),
    evaluation_data=DataFacts("my: data", "val", 300, 300),
    license="apache-2.0",
    developers="A. Person, 研究所",
    model_description="First line,\nsame paragraph.\n\nSecond *paragraph*.",
)


def card_of(classes: tuple[str, ...] = CLASSES, **fields: Any) -> Card:
    encoder = encoder_card(VIT, 16, 1, num_classes=len(classes))
    science = {"task": "classification", "epochs": 3, "optim.name": "adamw", "data.eval_crop_ratio": 1.0, "seed": 0}
    stated: dict[str, Any] = {
        "step": 12,
        "metrics": {"loss": 0.5, "images_per_second": 1e3, "val_top1": 0.875, "val_loss": 0.25},
        "science": science | {"inherited.data": "d1", "inherited.init": "d2", "inherited.fork.run": "/secret/run"},
        "versions": {"foveal": "0.2.0", "torch": "2.15.0"},
    }
    return Card("finetune", encoder, (0.3,), (0.4,), classes, **stated | fields)


def rendered(text: str) -> str:
    """The HTML of a card's Markdown, by CommonMark with GitHub's tables."""
    return MarkdownIt("commonmark").enable("table").render(text.partition("\n---\n")[2])


def cells(text: str) -> list[str]:
    """The text of every cell of the tables, markup inside a cell as HTML."""
    return [unescape(cell) for cell in re.findall(r"<td>(.*?)</td>", rendered(text), re.DOTALL)]


def test_hugging_face_reads_the_front_matter(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(build_model_card(card_of(), FACTS))
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert data == {
        "license": "apache-2.0",
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["foveal", "timm", "image-classification"],
        "metrics": ["accuracy"],
    }
    other = ModelCardFacts(license_name='mine: "v1"\n---\nlicense: mit', license_link="LICENSE")
    segmenter = replace(card_of(), head={"kind": "segmentation"}, encoder=encoder_card(VIT, 16, 1))
    (tmp_path / "README.md").write_text(build_model_card(segmenter, other))
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", 'mine: "v1" --- license: mit')
    assert (data["library_name"], data["pipeline_tag"]) == ("foveal", "image-segmentation")
    (tmp_path / "README.md").write_text(build_model_card(card_of(())))
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert data["pipeline_tag"] == "image-feature-extraction"
    assert "license" not in data


def test_it_says_what_is_known_and_no_more() -> None:
    text = build_model_card(card_of(), FACTS)
    assert text == build_model_card(card_of(), FACTS)
    for line in (
        "| training | my: data | `train` | 1,200 (1,000 used) |\n| training | more | `train` | 50 |",
        "| evaluation | my: data | `val` | 300 |",
        "| `epochs` | `3` |",
        "| `val_top1` | 0.875 |",
        "| Developed by | A. Person, 研究所 |",
        "First line, same paragraph.\n\nSecond \\*paragraph\\*.\n",
        "normalised with mean 0.3 and std 0.4;",
        "Images are of 16 x 16 pixels",
        "The metrics are of the split `val` of my: data;",
        "Training began from weights (sha256 `d2`) whose data and licence are not in this card.",
    ):
        assert line in text
    for absent in ("images_per_second", "0.5 ", "/secret", "No licence", "chosen by"):
        assert absent not in text


def test_it_says_what_is_missing() -> None:
    card = card_of(metrics={"loss": 0.5}, science={})
    text = build_model_card(card)
    for line in (
        "The names of the data sets were not recorded.",
        "The settings were not recorded.",
        "No evaluation of these weights was recorded.",
        "were not evaluated on images apart from those that they were trained on",
        "No licence was stated",
    ):
        assert line in text
    chosen = build_model_card(card_of(science={"early_stopping.metric": "val_top1"}))
    assert "The step was chosen by `val_top1`, so that its value is better than" in chosen


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_shown_as_it_is(name: str) -> None:
    facts = replace(FACTS, developers=name, model_description=name, training_data=(DataFacts(name, name, 1),))
    text = build_model_card(card_of((name, "next")), facts)
    shown = cells(text)
    assert shown[shown.index("0") + 1] == name
    assert shown[shown.index("Developed by") + 1] == name
    training = shown.index("training")
    assert shown[training + 1] == name
    split = re.sub("</?code>", "", shown[training + 2])
    assert split == name
    paragraph = rendered(text).split("</p>")[1].partition("<p>")[2]
    assert unescape(paragraph) == name
    html = rendered(text)
    assert not re.search(r"<(script|b|br|em|strong|a|img|h3|!--)\b", html)


def test_a_name_of_several_lines_is_one() -> None:
    text = build_model_card(card_of(("a\n| 9 | b |\n\n# c\r\u2028d\u202ee\x00f", "next")), FACTS)
    shown = cells(text)
    assert shown[shown.index("0") + 1] == "a | 9 | b | # c d e f"
    assert "9" not in shown


def test_no_secret_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE_TOKEN", "abcdef-12345678")
    facts = replace(FACTS, developers="see s3://" + "me:word@host/x", model_description="by abcdef-12345678")
    text = build_model_card(card_of(), facts)
    assert "word@" not in text
    assert "12345678" not in text


def test_many_classes_are_counted() -> None:
    text = build_model_card(card_of(tuple(f"class {number}" for number in range(1000))))
    assert "\n970 more classes are in card.json.\n" in text
    assert len(text) < 10_000


def run_lines(folder: Path, image: Path) -> list[str]:
    """Run the card's blocks of Python; return what each prints."""
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    printed = []
    for block in blocks:
        with redirect_stdout(io.StringIO()) as out:
            exec(block.replace(EXPORT, str(folder)).replace(IMAGE, str(image)), {})  # noqa: S102
        printed.append(out.getvalue().strip())
    return printed


def grey_image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.mark.parametrize("task", ["classification", "multilabel", None])
def test_the_lines_that_load_it_run(task: str | None, tmp_path: Path) -> None:
    classes = CLASSES if task else ()
    torch.manual_seed(0)
    encoder = build_encoder(VIT, image_size=16, channels=1, num_classes=len(classes))
    shaken(encoder)
    card = card_of(classes, science={"task": task or "classification", "data.eval_crop_ratio": 1.0})
    write_export(tmp_path / "export", encoder.state_dict(), card)
    ours, timms = run_lines(tmp_path / "export", grey_image(tmp_path))
    assert ours == timms
    if task is None:
        assert ours == "torch.Size([1, 48])"
    else:
        assert any(name in ours for name in CLASSES)


def test_the_lines_that_load_a_head_run(tmp_path: Path) -> None:
    """timm has the encoder alone, and the card says so."""
    torch.manual_seed(0)
    head = SegmentationHeadCard(head="linear", width=32, classes=len(CLASSES))
    encoder = build_encoder(VIT, image_size=16, channels=1)
    head_weights = LastMapLinearHead(48, len(CLASSES)).state_dict()
    card = replace(card_of(), encoder=encoder_card(VIT, 16, 1), head=head.to_dict())
    write_export(tmp_path / "export", encoder.state_dict(), card, head_weights)
    assert find_task("segmentation").model_from_export(tmp_path / "export")
    text = (tmp_path / "export" / "README.md").read_text()
    assert "With timm alone, the encoder without its head:" in text
    assert "timm has no head for segmentation" in text
    assert run_lines(tmp_path / "export", grey_image(tmp_path)) == ["", "torch.Size([1, 48])"]
