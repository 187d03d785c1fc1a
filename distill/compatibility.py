"""Whether students can follow a teacher: what cards and settings tell of both, and every sentence why not."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distill.config import DistillConfig
from distill.target import BLOCK_METHODS, CLASS_METHODS, TeacherTarget
from foveal.data.sampling.sources import SampleSource
from foveal.errors import ConfigError, DataError, ExportError
from foveal.models.backbone import (
    BackboneCard,
    backbone_card,
    build_backbone,
    build_meta_backbone,
    check_resizable,
    has_batch_norm,
    has_distillation_token,
    infer_feature_shapes,
    infer_pooled_width,
    parse_encoder_card,
    set_activation_checkpointing,
)
from foveal.models.patches import count_visible
from foveal.models.timm_vit import explain_no_fused_qkv
from foveal.models.vit import EncoderCard, ResolvedVitConfig, VitConfig, encoder_card
from foveal.weights.export import Card

_DEFAULT_DEPTH_FRACTION = 0.75  # of the depth: where DMAE and TinyMIM found the best layer


@dataclass(frozen=True)
class FeatureShape:
    """Of what a model makes: numbers of a whole image's feature and of a place's, and the places as (rows, columns)."""

    pooled_width: int
    patch_width: int
    grid: tuple[int, int]

    @property
    def widths(self) -> tuple[int, int]:
        return self.pooled_width, self.patch_width


@dataclass(frozen=True)
class TeacherSpec:
    """A teacher as its card has it, and what it is asked. ``encoder`` is nothing for a model of timm as it is."""

    path: str
    target: TeacherTarget
    feature_shape: FeatureShape | None
    encoder: EncoderCard | None
    classes: tuple[str, ...]
    has_class_names: bool
    resized_from: int | tuple[int, int] | None


@dataclass(frozen=True)
class StudentSpec:
    """A student with all its sizes, and the card of its export; ``blocks`` are those that are compared."""

    name: str
    model: ResolvedVitConfig | None
    backbone: str | None
    feature_shape: FeatureShape | None
    blocks: tuple[int, ...]
    card: dict[str, Any]
    has_batch_norm: bool = False

    @property
    def display_name(self) -> str:
        """Its name, or that it is the only one."""
        return self.name or "the student"

    @property
    def description(self) -> str:
        """What it is, and how deep it is asked."""
        blocks = f", blocks {', '.join(map(str, self.blocks))}" if self.blocks else ""
        if self.model is None:
            return f": {self.backbone}{blocks}"
        return f": {self.model.name} of width {self.model.width} and depth {self.model.depth}{blocks}"


def build_teacher_spec(cfg: DistillConfig, card: Card) -> TeacherSpec:
    """What the teacher of this card is asked. Raises: ConfigError, ExportError."""
    where, size = cfg.teacher, cfg.data.image_size
    told = parse_encoder_card(card.encoder, f"{where}/card.json")
    if told.channels != cfg.data.channels:
        raise _mismatch_error(where, "channels", told.channels, "data.channels", cfg.data.channels)
    if cfg.lesson in CLASS_METHODS and not told.classes:
        raise ExportError(
            f"the teacher {where} has no head, and lesson={cfg.lesson} is in classes; give the export of a fine-tuning"
        )
    encoder = told if isinstance(told, EncoderCard) else None
    if cfg.lesson in BLOCK_METHODS and encoder is None:
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
    return TeacherSpec(
        path=where,
        target=_build_target(cfg, encoder),
        feature_shape=_card_feature_shape(cfg, told) if cfg.lesson == "features" else None,
        encoder=encoder,
        # Foreign weights need not say what their classes are called.
        classes=card.classes or tuple(map(str, range(told.classes))),
        has_class_names=bool(card.classes),
        resized_from=_teacher_trained_size(told, size, where),
    )


def check_compatible(
    cfg: DistillConfig, teacher: TeacherSpec, name: str, model: VitConfig | None, backbone: str | None
) -> StudentSpec:
    """A student that can follow. Raises: ConfigError, ExportError."""
    size, channels = cfg.data.image_size, cfg.data.channels
    called = f"students.{name}." if name else ""
    classes = len(teacher.classes) if cfg.lesson in CLASS_METHODS else 0
    if cfg.lesson == "token":
        _check_distillation_token(called, model, backbone, cfg)
    if backbone is not None:
        if cfg.lesson in BLOCK_METHODS:
            raise ConfigError(
                f"lesson={cfg.lesson} reads the blocks of a plain transformer, and {called}backbone={backbone} is timm's "
                f"as it is; give {called}model instead"
            )
        shape = _backbone_feature_shape(cfg, backbone) if cfg.lesson == "features" else None
        _check_grids(cfg, teacher, f"{called}backbone={backbone}", shape)
        card = backbone_card(backbone, size, channels, classes)
        return StudentSpec(name, None, backbone, shape, (), card, has_batch_norm=_check_batch_norm(cfg, backbone))
    assert model is not None
    sizes = model.resolve_for_image(size)
    if teacher.encoder is not None and sizes.patch != teacher.encoder.patch and _compares_patches(cfg):
        raise _mismatch_error(teacher.path, "patch", teacher.encoder.patch, f"{called}model.patch", sizes.patch)
    shape = _vit_feature_shape(sizes, size)
    _check_grids(cfg, teacher, f"{called}model", shape)
    pooling = cfg.pooling if cfg.lesson == "logits" else "token"
    card = encoder_card(model, size, channels, pooling=pooling, num_classes=classes)
    return StudentSpec(name, sizes, None, shape, _resolve_student_blocks(cfg, teacher, sizes, called), card)


def _build_target(cfg: DistillConfig, encoder: EncoderCard | None) -> TeacherTarget:
    if cfg.lesson not in BLOCK_METHODS:
        return TeacherTarget(cfg.lesson, patches=cfg.patch_weight > 0)
    assert encoder is not None
    blocks = tuple(pair[0] for pair in cfg.layers) or (max(1, round(_DEFAULT_DEPTH_FRACTION * encoder.depth)),)
    if cfg.lesson == "layers":
        count_visible(
            encoder.patch_grid(cfg.data.image_size)[0] * encoder.patch_grid(cfg.data.image_size)[1], cfg.mask_ratio
        )
    elif oddity := explain_no_fused_qkv(encoder.name):
        raise ExportError(f"the teacher {cfg.teacher}, '{encoder.name}', has no relations to tell: {oddity}")
    return TeacherTarget(cfg.lesson, blocks, encoder.heads, encoder.patch)


def _resolve_student_blocks(
    cfg: DistillConfig, teacher: TeacherSpec, student: ResolvedVitConfig, prefix: str
) -> tuple[int, ...]:
    """The student's blocks that are compared, once the pairs exist and can be."""
    if cfg.lesson not in BLOCK_METHODS:
        return ()
    assert teacher.encoder is not None
    deep = student.depth if cfg.lesson == "relations" else max(1, round(_DEFAULT_DEPTH_FRACTION * student.depth))
    blocks = tuple(pair[1] for pair in cfg.layers) or (deep,)
    for hers, his in zip(teacher.target.blocks, blocks, strict=True):
        if not 1 <= hers <= teacher.encoder.depth or not 1 <= his <= student.depth:
            raise ConfigError(
                f"layers has the pair [{hers}, {his}], but the teacher has blocks 1 to {teacher.encoder.depth} and "
                f"{prefix}model has 1 to {student.depth}"
            )
    if cfg.lesson == "relations":
        heads = teacher.encoder.heads
        if student.width % heads:
            nearest = heads * max(1, round(student.width / heads))
            raise ConfigError(
                f"{prefix}model.width={student.width} cannot be divided among the teacher's {heads} heads, in which "
                f"relations are compared; {nearest} can"
            )
        if oddity := explain_no_fused_qkv(student.name):
            raise ConfigError(f"{prefix}model.name='{student.name}' has no relations to tell: {oddity}")
    return blocks


def _compares_patches(cfg: DistillConfig) -> bool:
    return cfg.lesson in BLOCK_METHODS or (cfg.lesson == "features" and cfg.patch_weight > 0)


def _check_grids(cfg: DistillConfig, teacher: TeacherSpec, student: str, student_shape: FeatureShape | None) -> None:
    """Features are compared place by place. Raises: ConfigError."""
    if (
        not _compares_patches(cfg)
        or teacher.feature_shape is None
        or student_shape is None
        or teacher.feature_shape.grid == student_shape.grid
    ):
        return
    hers, his = (f"{rows} x {columns}" for rows, columns in (teacher.feature_shape.grid, student_shape.grid))
    raise ConfigError(
        f"the teacher {teacher.path} has features of {hers} places, {student} has {his}; patch_weight=0 compares the whole "
        f"image's alone"
    )


def _check_distillation_token(prefix: str, model: VitConfig | None, backbone: str | None, cfg: DistillConfig) -> None:
    if model is not None:
        fits = model.resolve().registers > 0
    else:
        fits = has_distillation_token(build_meta_backbone(backbone or "", cfg.data.image_size, cfg.data.channels))
    if not fits:
        raise ConfigError(
            f"lesson=token teaches a distillation token, which {prefix}{f'backbone={backbone}' if backbone else 'model'} has "
            f"not; give {prefix}model.registers=1, or a backbone such as deit_tiny_distilled_patch16_224"
        )


def _check_batch_norm(cfg: DistillConfig, backbone: str) -> bool:
    """Whether a model of timm has BatchNorm. Raises: ConfigError where it is to recompute activations and cannot."""
    size, channels = cfg.data.image_size, cfg.data.channels
    if cfg.engine.recompute:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            set_activation_checkpointing(build_backbone(backbone, image_size=size, channels=channels), enable=True)
    return has_batch_norm(build_meta_backbone(backbone, size, channels))


def resolve_class_names(cfg: DistillConfig, teacher: TeacherSpec, sources: Sequence[SampleSource]) -> tuple[str, ...]:
    """The names of the classes: the data's are the teacher's, and labels are among them. Raises: DataError, ConfigError."""
    ours = sources[0].dataset.classes
    names = teacher.classes if teacher.has_class_names or ours is None else ours
    if len(names) != len(teacher.classes):
        raise ConfigError(
            f"the teacher {teacher.path} knows {len(teacher.classes)} classes, {sources[0].dataset.folder} has {len(names)}; "
            f"they must be equal"
        )
    for source in sources:
        if source.dataset.classes is not None:
            _check_same_classes(cfg.teacher, names, str(source.dataset.folder), source.dataset.classes)
    _check_labels(cfg, names, sources)
    return names


def _check_labels(cfg: DistillConfig, classes: tuple[str, ...], sources: Sequence[SampleSource]) -> None:
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


def _check_same_classes(
    teacher: str, teacher_classes: tuple[str, ...], folder: str, data_classes: tuple[str, ...]
) -> None:
    different = next((at for at, (a, b) in enumerate(zip(teacher_classes, data_classes, strict=False)) if a != b), None)
    if different is not None:
        raise ConfigError(
            f"class {different} is '{teacher_classes[different]}' for the teacher {teacher} and '{data_classes[different]}' in {folder}; "
            f"names and order must be equal"
        )
    if len(teacher_classes) != len(data_classes):
        raise ConfigError(
            f"the teacher {teacher} knows {len(teacher_classes)} classes, {folder} has {len(data_classes)}; names and order must be equal"
        )


def _vit_feature_shape(sizes: ResolvedVitConfig, size: int | tuple[int, int]) -> FeatureShape:
    return FeatureShape(sizes.width, sizes.width, sizes.patch_grid(size))


def _backbone_feature_shape(cfg: DistillConfig, name: str) -> FeatureShape:
    """Without patches its last map, if it has one, is not looked at."""
    size, channels = cfg.data.image_size, cfg.data.channels
    if not cfg.patch_weight:
        return FeatureShape(infer_pooled_width(name, size, channels), 0, (0, 0))
    whole, (place, rows, columns) = infer_feature_shapes(name, size, channels)
    return FeatureShape(whole, place, (rows, columns))


def _card_feature_shape(cfg: DistillConfig, card: EncoderCard | BackboneCard) -> FeatureShape:
    if isinstance(card, EncoderCard):
        return _vit_feature_shape(card, cfg.data.image_size)
    return _backbone_feature_shape(cfg, card.timm)


def _teacher_trained_size(
    card: EncoderCard | BackboneCard, size: int | tuple[int, int], where: str
) -> int | tuple[int, int] | None:
    """The size of the teacher's own images, if it is another. Raises: ConfigError, ExportError where it cannot be."""
    if isinstance(card, EncoderCard):
        return card.trained_size_if_different(size)
    check_resizable(card, size, f"the teacher {where}")
    return None if card.image_size == size else card.image_size


def _mismatch_error(where: str, name: str, teacher_value: int, setting: str, student_value: int) -> ExportError:
    return ExportError(
        f"the teacher {where} has {name} {teacher_value}, the student's {setting} is {student_value}; they must be equal"
    )
