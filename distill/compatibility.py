"""Whether students can follow a teacher: what cards and settings tell of both, and every sentence why not."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distill.config import DistillConfig
from distill.target import IN_BLOCKS, IN_CLASSES, Lesson
from foveal.data.sampling.sources import Source
from foveal.errors import ConfigError, DataError, ExportError
from foveal.models.backbone import (
    BackboneCard,
    backbone_card,
    backbone_outline,
    build_backbone,
    card_of,
    check_resizing,
    depends_on_others,
    has_distillation_token,
    set_recompute,
    shapes_of,
    width_of,
)
from foveal.models.patches import count_kept
from foveal.models.timm_vit import oddity_of_queries
from foveal.models.vit import EncoderCard, SizedVit, VitConfig, encoder_card
from foveal.weights.export import Card

_DEEP = 0.75  # of the depth: where DMAE and TinyMIM found the best layer


@dataclass(frozen=True)
class Shape:
    """Of what a model makes: numbers of a whole image's feature and of a place's, and the places as (rows, columns)."""

    whole: int
    place: int
    grid: tuple[int, int]

    @property
    def widths(self) -> tuple[int, int]:
        return self.whole, self.place


@dataclass(frozen=True)
class Taught:
    """A teacher as its card has it, and what it is asked. ``encoder`` is nothing for a model of timm as it is."""

    where: str
    lesson: Lesson
    shape: Shape | None
    encoder: EncoderCard | None
    classes: tuple[str, ...]
    named: bool
    resized_from: int | tuple[int, int] | None


@dataclass(frozen=True)
class Pupil:
    """A student with all its sizes, and the card of its export; ``blocks`` are those that are compared."""

    name: str
    model: SizedVit | None
    backbone: str | None
    shape: Shape | None
    blocks: tuple[int, ...]
    card: dict[str, Any]
    mixes: bool = False

    @property
    def called(self) -> str:
        """Its name, or that it is the only one."""
        return self.name or "the student"

    @property
    def says(self) -> str:
        """What it is, and how deep it is asked."""
        blocks = f", blocks {', '.join(map(str, self.blocks))}" if self.blocks else ""
        if self.model is None:
            return f": {self.backbone}{blocks}"
        return f": {self.model.name} of width {self.model.width} and depth {self.model.depth}{blocks}"


def taught_by(cfg: DistillConfig, card: Card) -> Taught:
    """What the teacher of this card is asked. Errors: ConfigError, ExportError."""
    where, size = cfg.teacher, cfg.data.image_size
    told = card_of(card.encoder, f"{where}/card.json")
    if told.channels != cfg.data.channels:
        raise _unequal(where, "channels", told.channels, "data.channels", cfg.data.channels)
    if cfg.lesson in IN_CLASSES and not told.classes:
        raise ExportError(
            f"the teacher {where} has no head, and lesson={cfg.lesson} is in classes; give the export of a fine-tuning"
        )
    encoder = told if isinstance(told, EncoderCard) else None
    if cfg.lesson in IN_BLOCKS and encoder is None:
        assert isinstance(told, BackboneCard)
        raise ExportError(
            f"the teacher {where} is timm's {told.timm} as it is, and lesson={cfg.lesson} reads the blocks of a plain "
            f"transformer; take lesson=features or logits"
        )
    if cfg.lesson == "features" and encoder is not None and encoder.pooling == "avg":
        raise ExportError(
            f"the teacher {where} was fine-tuned with pooling=avg and has no norm behind its tokens; "
            f"give a pretrained encoder, or one fine-tuned with pooling=token"
        )
    return Taught(
        where=where,
        lesson=_lesson(cfg, encoder),
        shape=_shape_of_card(cfg, told) if cfg.lesson == "features" else None,
        encoder=encoder,
        # Foreign weights need not say what their classes are called.
        classes=card.classes or tuple(map(str, range(told.classes))),
        named=bool(card.classes),
        resized_from=_resized_from(told, size, where),
    )


def fitted(cfg: DistillConfig, taught: Taught, name: str, model: VitConfig | None, backbone: str | None) -> Pupil:
    """A student that can follow. Errors: ConfigError, ExportError."""
    size, channels = cfg.data.image_size, cfg.data.channels
    called = f"students.{name}." if name else ""
    classes = len(taught.classes) if cfg.lesson in IN_CLASSES else 0
    if cfg.lesson == "token":
        _check_token(called, model, backbone, cfg)
    if backbone is not None:
        if cfg.lesson in IN_BLOCKS:
            raise ConfigError(
                f"lesson={cfg.lesson} reads the blocks of a plain transformer, and {called}backbone={backbone} is timm's "
                f"as it is; give {called}model instead"
            )
        shape = _shape_of_backbone(cfg, backbone) if cfg.lesson == "features" else None
        _check_grids(cfg, taught, f"{called}backbone={backbone}", shape)
        card = backbone_card(backbone, size, channels, classes)
        return Pupil(name, None, backbone, shape, (), card, mixes=_mixes(cfg, backbone))
    assert model is not None
    sizes = model.fitted(size)
    if taught.encoder is not None and sizes.patch != taught.encoder.patch and _compares_places(cfg):
        raise _unequal(taught.where, "patch", taught.encoder.patch, f"{called}model.patch", sizes.patch)
    shape = _shape_of_vit(sizes, size)
    _check_grids(cfg, taught, f"{called}model", shape)
    pooling = cfg.pooling if cfg.lesson == "logits" else "token"
    card = encoder_card(model, size, channels, pooling=pooling, classes=classes)
    return Pupil(name, sizes, None, shape, _blocks(cfg, taught, sizes, called), card)


def _lesson(cfg: DistillConfig, encoder: EncoderCard | None) -> Lesson:
    if cfg.lesson not in IN_BLOCKS:
        return Lesson(cfg.lesson, patches=cfg.patch_weight > 0)
    assert encoder is not None
    blocks = tuple(pair[0] for pair in cfg.layers) or (max(1, round(_DEEP * encoder.depth)),)
    if cfg.lesson == "layers":
        count_kept(encoder.grid(cfg.data.image_size)[0] * encoder.grid(cfg.data.image_size)[1], cfg.mask_ratio)
    elif oddity := oddity_of_queries(encoder.name):
        raise ExportError(f"the teacher {cfg.teacher}, '{encoder.name}', has no relations to tell: {oddity}")
    return Lesson(cfg.lesson, blocks, encoder.heads, encoder.patch)


def _blocks(cfg: DistillConfig, taught: Taught, student: SizedVit, called: str) -> tuple[int, ...]:
    """The student's blocks that are compared, once the pairs exist and can be."""
    if cfg.lesson not in IN_BLOCKS:
        return ()
    assert taught.encoder is not None
    deep = student.depth if cfg.lesson == "relations" else max(1, round(_DEEP * student.depth))
    blocks = tuple(pair[1] for pair in cfg.layers) or (deep,)
    for hers, his in zip(taught.lesson.blocks, blocks, strict=True):
        if not 1 <= hers <= taught.encoder.depth or not 1 <= his <= student.depth:
            raise ConfigError(
                f"layers has the pair [{hers}, {his}], but the teacher has blocks 1 to {taught.encoder.depth} and "
                f"{called}model has 1 to {student.depth}"
            )
    if cfg.lesson == "relations":
        heads = taught.encoder.heads
        if student.width % heads:
            nearest = heads * max(1, round(student.width / heads))
            raise ConfigError(
                f"{called}model.width={student.width} cannot be divided among the teacher's {heads} heads, in which "
                f"relations are compared; {nearest} can"
            )
        if oddity := oddity_of_queries(student.name):
            raise ConfigError(f"{called}model.name='{student.name}' has no relations to tell: {oddity}")
    return blocks


def _compares_places(cfg: DistillConfig) -> bool:
    return cfg.lesson in IN_BLOCKS or (cfg.lesson == "features" and cfg.patch_weight > 0)


def _check_grids(cfg: DistillConfig, taught: Taught, student: str, shape: Shape | None) -> None:
    """Features are compared place by place. Errors: ConfigError."""
    if not _compares_places(cfg) or taught.shape is None or shape is None or taught.shape.grid == shape.grid:
        return
    hers, his = (f"{rows} x {columns}" for rows, columns in (taught.shape.grid, shape.grid))
    raise ConfigError(
        f"the teacher {taught.where} has features of {hers} places, {student} has {his}; patch_weight=0 compares the whole "
        f"image's alone"
    )


def _check_token(called: str, model: VitConfig | None, backbone: str | None, cfg: DistillConfig) -> None:
    if model is not None:
        fits = model.resolved().registers > 0
    else:
        fits = has_distillation_token(backbone_outline(backbone or "", cfg.data.image_size, cfg.data.channels))
    if not fits:
        raise ConfigError(
            f"lesson=token teaches a distillation token, which {called}{f'backbone={backbone}' if backbone else 'model'} has "
            f"not; give {called}model.registers=1, or a backbone such as deit_tiny_distilled_patch16_224"
        )


def _mixes(cfg: DistillConfig, backbone: str) -> bool:
    """Whether a model of timm has BatchNorm. Errors: ConfigError where it is to recompute activations and cannot."""
    size, channels = cfg.data.image_size, cfg.data.channels
    if cfg.engine.recompute:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            set_recompute(build_backbone(backbone, image_size=size, channels=channels), enable=True)
    return depends_on_others(backbone_outline(backbone, size, channels))


def agreed_classes(cfg: DistillConfig, taught: Taught, sources: Sequence[Source]) -> tuple[str, ...]:
    """The names of the classes: the data's are the teacher's, and labels are among them. Errors: DataError, ConfigError."""
    ours = sources[0].dataset.classes
    names = taught.classes if taught.named or ours is None else ours
    if len(names) != len(taught.classes):
        raise ConfigError(
            f"the teacher {taught.where} knows {len(taught.classes)} classes, {sources[0].dataset.folder} has {len(names)}; "
            f"they must be equal"
        )
    for source in sources:
        if source.dataset.classes is not None:
            _check_same(cfg.teacher, names, str(source.dataset.folder), source.dataset.classes)
    _check_labels(cfg, names, sources)
    return names


def _check_labels(cfg: DistillConfig, classes: tuple[str, ...], sources: Sequence[Source]) -> None:
    if not cfg.label_weight:
        return
    folder, weight = sources[0].dataset.folder, f"label_weight={cfg.label_weight:g}"
    if all(source.dataset.classes is None for source in sources):
        way = "" if cfg.lesson == "token" else ", or set label_weight=0"
        raise ConfigError(
            f"{weight}, but the samples of {folder} have no classes; index shards that hold .cls members{way}"
        )
    highest = [int(source.dataset.labels(source.split).max()) for source in sources]
    if max(highest) < 0:
        raise DataError(f"{weight}, but no sample of split '{cfg.data.train}' of {folder} has a label")
    for source, label in zip(sources, highest, strict=True):
        if label >= len(classes):
            raise DataError(
                f"{source.dataset.folder}: split '{source.split}' has label {label}, but there are {len(classes)} classes"
            )


def _check_same(teacher: str, hers: tuple[str, ...], folder: str, ours: tuple[str, ...]) -> None:
    different = next((at for at, (a, b) in enumerate(zip(hers, ours, strict=False)) if a != b), None)
    if different is not None:
        raise ConfigError(
            f"class {different} is '{hers[different]}' for the teacher {teacher} and '{ours[different]}' in {folder}; "
            f"names and order must be equal"
        )
    if len(hers) != len(ours):
        raise ConfigError(
            f"the teacher {teacher} knows {len(hers)} classes, {folder} has {len(ours)}; names and order must be equal"
        )


def _shape_of_vit(sizes: SizedVit, size: int | tuple[int, int]) -> Shape:
    return Shape(sizes.width, sizes.width, sizes.grid(size))


def _shape_of_backbone(cfg: DistillConfig, name: str) -> Shape:
    """Without patches its last map, if it has one, is not looked at."""
    size, channels = cfg.data.image_size, cfg.data.channels
    if not cfg.patch_weight:
        return Shape(width_of(name, size, channels), 0, (0, 0))
    whole, (place, rows, columns) = shapes_of(name, size, channels)
    return Shape(whole, place, (rows, columns))


def _shape_of_card(cfg: DistillConfig, told: EncoderCard | BackboneCard) -> Shape:
    if isinstance(told, EncoderCard):
        return _shape_of_vit(told, cfg.data.image_size)
    return _shape_of_backbone(cfg, told.timm)


def _resized_from(
    told: EncoderCard | BackboneCard, size: int | tuple[int, int], where: str
) -> int | tuple[int, int] | None:
    """The size of the teacher's own images, if it is another. Errors: ConfigError, ExportError where it cannot be."""
    if isinstance(told, EncoderCard):
        return told.resized_from(size)
    check_resizing(told, size, f"the teacher {where}")
    return None if told.image_size == size else told.image_size


def _unequal(where: str, name: str, hers: int, setting: str, his: int) -> ExportError:
    return ExportError(f"the teacher {where} has {name} {hers}, the student's {setting} is {his}; they must be equal")
