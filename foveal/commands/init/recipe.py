"""The choices that all stages share: sizes of models, images and batches, and what was asked for.

Numbers without a source were tried on small sets in minutes (docs/results.md); those for GPUs are MAE's (He et al., 2022).
"""

from dataclasses import dataclass
from typing import Any

from foveal.commands.init.data_facts import DataFacts
from foveal.commands.init.draft import Draft
from foveal.errors import ConfigError

# Encoders by name. "micro" is for minutes on a CPU: a tenth of the weights of a ViT-Ti with half of its blocks.
MODELS: dict[str, dict[str, Any]] = {
    "micro": {"name": "vit_tiny_patch16_224", "width": 128, "depth": 6, "heads": 4},
    "tiny": {"name": "vit_tiny_patch16_224"},
    "small": {"name": "vit_small_patch16_224"},
    "base": {"name": "vit_base_patch16_224"},
    "large": {"name": "vit_large_patch16_224"},
}
_IMAGE_SIZES = (16, 32, 64, 96, 128, 160, 192, 224)
COMPARED_SEEDS = 3
_LONG_CPU_SECONDS = 3600.0  # from here on a CPU has time for larger images and models
_LARGE_SET = 20_000  # images; on a CPU an epoch of more takes minutes


@dataclass(frozen=True)
class Request:
    """What the command line asks for, and the machine that it is for.

    ``init``, ``teacher``: folders of exports. ``on_gpu``: the run will have GPUs. ``seconds``: of a run, start included.
    ``compare``: a fine-tuning from ``init`` and one from scratch, on several seeds.
    """

    stage: str
    seconds: float
    ranks: int
    on_gpu: bool
    model: str | None = None
    init: str | None = None
    teacher: str | None = None
    task: str | None = None
    samples_per_class: int | None = None
    compare: bool = False

    @property
    def num_trainings(self) -> int:
        """The trainings that share the time."""
        return 2 * COMPARED_SEEDS if self.compare else 1

    @property
    def is_short(self) -> bool:
        """Whether only small models and images fit."""
        return not self.on_gpu and self.seconds < _LONG_CPU_SECONDS


def choose_model(facts: DataFacts, request: Request) -> dict[str, Any]:
    """Return the settings of an encoder, without its patch: as asked for, or by data set and hardware."""
    if request.model is not None:
        if request.model not in MODELS and "_" not in request.model:
            raise ConfigError(
                f"--model {request.model} does not exist; there are {', '.join(MODELS)}, and timm's names such as "
                f"vit_base_patch16_224"
            )
        return dict(MODELS.get(request.model, {"name": request.model}))
    if not request.on_gpu:
        return dict(MODELS["micro" if request.is_short else "tiny"])
    return dict(MODELS["tiny" if facts.num_train < 10_000 else "small" if facts.num_train < 200_000 else "base"])


def choose_image_size(facts: DataFacts, request: Request, *, is_dense: bool = False) -> int:
    """Return the side of the model's input: at most that of the images and what the hardware has time for.

    ``is_dense``: labels lie within the image, and a small image hides them.
    """
    limit = 224 if request.on_gpu else 64 if request.is_short and not is_dense else 96
    return max(size for size in _IMAGE_SIZES if size <= max(_IMAGE_SIZES[0], min(limit, facts.short_side)))


def choose_patch(facts: DataFacts, request: Request, image_size: int) -> tuple[int, str]:
    """Return the side of a patch, and why."""
    if image_size < 32:
        return 4, ""
    if request.is_short and facts.num_train > _LARGE_SET:
        return image_size // 4, "16 patches an image, so that minutes suffice for some epochs of so many images"
    if image_size <= 128:
        return max(4, image_size // 8 if image_size <= 64 else 8), ""
    return 16, ""


def largest_power_of_two(limit: float) -> int:
    """Return the largest power of two that is at most ``limit``; at least 1."""
    return 1 << max(0, int(limit).bit_length() - 1)


def choose_pretraining_batch(facts: DataFacts, request: Request) -> tuple[int, str]:
    """Return the images of a step, and why."""
    if not request.on_gpu:
        wanted, reason = 64, "small, so that minutes hold many steps"
    elif facts.num_train < 20_000:
        wanted, reason = 256, ""
    else:
        wanted, reason = (1024, "") if facts.num_train < 500_000 else (4096, "MAE's")
    return fit_batch(min(wanted, facts.num_train), request.ranks), reason


def fit_batch(limit: float, ranks: int) -> int:
    """Return a batch size of at most ``limit`` that the ranks divide, and powers of two too: the largest such one."""
    odd_part = ranks // (ranks & -ranks)
    return largest_power_of_two(limit / odd_part) * odd_part


def set_data(draft: Draft, facts: DataFacts, image_size: int | list[int], channels: int, *, own_stats: bool) -> None:
    """Set the section ``data`` but for augmentation; ``own_stats``: pixels are normalised by the data's statistics."""
    draft.set("data.path", facts.path)
    if facts.index is not None:
        draft.set("data.index", facts.index)
    draft.set("data.image_size", image_size, f"pixels; the images have {facts.image_hw[1]} x {facts.image_hw[0]}")
    if channels == 1:
        draft.set("data.channels", 1, "gray")
    if own_stats and not facts.has_pixel_stats:
        mean, std = facts.pixel_stats
        draft.set("data.mean", list(mean), f"of {facts.num_looked_at} images: the manifest has no statistics")
        draft.set("data.std", list(std))


def set_augmentation(draft: Draft, facts: DataFacts, channels: int, scale: list[float]) -> None:
    """Set crops and flips."""
    if facts.short_side <= 16:
        scale = [0.6, 1.0]  # a smaller crop of so few pixels shows nothing
    flip = 0.0 if channels == 1 else 0.5
    reason = "gray images are often text or scans, which are not mirrored; photographs: 0.5" if channels == 1 else ""
    draft.set("data.augment", {"scale": scale, "hflip": flip}, reason)


def set_engine(draft: Draft, request: Request, kind: str) -> None:
    """Set the engine, which runs on one rank and on many, and its precision."""
    draft.set("engine.kind", kind)
    draft.set("engine.precision", "bf16" if request.on_gpu else "fp32")


def lr_per_256(peak: float, batch_size: int) -> float:
    """Return the setting that gives this peak learning rate at a batch size, to two digits."""
    return float(f"{peak * 256 / batch_size:.1e}")
