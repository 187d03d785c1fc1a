"""Sections that are left out, and settings that are looked for in the wrong section."""

from pathlib import Path

import pytest

from foveal.errors import ConfigError
from pretrain.config import PretrainConfig

MINIMAL = """\
epochs: 2
data: {path: here, image_size: 32}
batch: {global_size: 64}
model: {name: vit_tiny_patch16_224}
"""


def load(folder: Path, text: str, *overrides: str) -> PretrainConfig:
    file = folder / "mine.yaml"
    file.write_text(text)
    return PretrainConfig.load(file, overrides)


def test_an_empty_section_counts_as_left_out(tmp_path: Path) -> None:
    cfg = load(tmp_path, MINIMAL)
    assert load(tmp_path, MINIMAL + "engine:\noptim:\ndecoder:\n") == cfg
    assert load(tmp_path, MINIMAL.replace("32}", "32, augment: , mix: , fold: }")) == cfg
    assert load(tmp_path, "epochs: 2\ndata:\nbatch:\n", "data={path: here, image_size: 32}", "batch.global_size=64")
    assert load(tmp_path, MINIMAL + "optim: {lr_per_256: 1.0e-3}\n", "optim=null").optim == cfg.optim


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("epochs:\ndata: {path: here, image_size: 32}\nbatch: {global_size: 64}", "epochs is missing and has no default (n"),
        ("epochs: 2\ndata: {path: here}", "data.image_size is missing and has no default (model input size in pixels"),
        ("epochs: 2\ndata: {path: here}", "batch.global_size is missing and has no default (images per optimizer step"),
        (MINIMAL + "lr: 0.1", "lr is not a setting. Did you mean 'optim.lr_per_256'?"),
        (MINIMAL + "max_micro_size: 4", "max_micro_size is not a setting. Did you mean 'batch.max_micro_size'?"),
        (MINIMAL + "decoder: 8", "decoder: a section is expected, such as decoder.width=... (given: 8)"),
    ],
)  # fmt: skip
def test_what_is_missing_or_misplaced_is_named(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert sentence in str(caught.value)
