"""The ImageNet configs run on the clusters that their headers name: the arithmetic, without the images."""

import re
from pathlib import Path

import numpy as np
import pytest
from processes import ROOT

from distill.config import DistillConfig
from finetune.config import FinetuneConfig
from foveal.data.sampling.order import SampleOrder, rank_slot_range
from foveal.errors import ConfigError
from foveal.models.vit import resolve_sizes_for_image
from foveal.training.config import StageConfig
from pretrain.config import PretrainConfig

# ImageNet-1k about as `foveal data pack folder` deals it: 1,281,167 images of 110 kB in shards of at most 256 MB.
COUNTS = np.array([len(part) for part in np.array_split(np.arange(1_281_167), 551)], dtype=np.int64)
FILES = {
    name: ROOT / "configs" / name
    for name in (
        "pretrain/mae_vit_b16.yaml",
        "pretrain/mae_vit_b16_b5760.yaml",
        "pretrain/mae_vit_l16.yaml",
        "pretrain/mae_vit_h14.yaml",
        "distill/mae_vit_s16.yaml",
        "finetune/vit_b16.yaml",
    )
}
POWERS = {"pretrain": 4096, "distill": 4096, "finetune": 1024}
ODD = (24, 48, 72, 96, 120, 192)


CLASSES = {"pretrain": PretrainConfig, "distill": DistillConfig, "finetune": FinetuneConfig}


def loaded(name: str) -> StageConfig:
    return CLASSES[name.partition("/")[0]].load(FILES[name])


def clusters(name: str) -> list[int]:
    if "b5760" in name:
        return [*ODD, 64, 128]
    return [1 << power for power in range(13) if 1 << power <= POWERS[name.partition("/")[0]]]


@pytest.mark.parametrize("name", FILES)
def test_every_cluster_of_the_header_divides_the_batch(name: str) -> None:
    cfg = loaded(name)
    assert cfg.data.lanes is not None
    order = SampleOrder(COUNTS, cfg.batch.global_size, cfg.data.lanes, cfg.data.window, cfg.seed)
    for ranks in clusters(name):
        rank_slot_range(cfg.batch.global_size, cfg.data.lanes, ranks - 1, ranks)
        at_once, micros = cfg.batch.microbatch_size_and_count(ranks)
        assert at_once * micros * ranks == cfg.batch.global_size
        assert at_once > 1 or cfg.batch.global_size == ranks
    header = FILES[name].read_text()
    for ranks in ODD if "b5760" in name else ():
        assert str(ranks) in header
    # A checkpoint falls on the end of an epoch, so that its step is easy to tell; one that is kept for good is one of them.
    assert cfg.checkpoint.every % order.steps_per_epoch == 0
    assert cfg.checkpoint.keep_every % cfg.checkpoint.every == 0


@pytest.mark.parametrize("ranks", ODD)
def test_a_batch_of_4096_refuses_what_5760_is_for(ranks: int) -> None:
    cfg = loaded("pretrain/mae_vit_b16.yaml")
    assert cfg.data.lanes is not None
    with pytest.raises(ConfigError, match="the nearest batch that fits is"):
        rank_slot_range(cfg.batch.global_size, cfg.data.lanes, 0, ranks)


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("finetune")])
def test_the_encoders_fit_their_images(name: str) -> None:
    cfg = loaded(name)
    assert isinstance(cfg, PretrainConfig | DistillConfig)
    found = re.search(r"_([bslh])(\d+)", Path(name).stem)
    assert found is not None
    assert cfg.model is not None
    sizes = resolve_sizes_for_image(cfg.model, cfg.data.image_size)
    assert sizes.patch == int(found[2])
    assert sizes.width == {"s": 384, "b": 768, "l": 1024, "h": 1280}[found[1]]
