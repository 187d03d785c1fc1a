"""Compatibility of teacher and students, checked from cards and settings before a run begins."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distill.config import DistillConfig
from distill.target import (
    BLOCK_METHODS,
    CLASS_METHODS,
    TeacherTarget,
    default_student_block,
    default_teacher_block,
)
from foveal.data.sampling.sources import SampleSource
from foveal.errors import ConfigError, DataError, ExportError
from foveal.models.backbone import (
    BackboneCard,
    backbone_card,
    build_backbone,
    build_meta_backbone,
    has_batch_norm,
    has_distillation_token,
    infer_pooled_map_shapes,
    infer_pooled_width,
    parse_encoder_card,
    set_activation_checkpointing,
)
from foveal.models.config import ResolvedVitConfig, VitConfig
from foveal.models.patches import count_visible
from foveal.models.resizable import check_resizable
from foveal.models.timm_vit import explain_no_fused_qkv
from foveal.models.vit import EncoderCard, encoder_card, resolve_sizes, resolve_sizes_for_image
from foveal.weights.export import Card


@dataclass(frozen=True)
class FeatureShape:
    """Widths of a model's pooled feature and of its patch features, and the patch grid as (rows, columns)."""

    pooled_width: int
    patch_width: int
    patch_grid: tuple[int, int]

    @property
    def pooled_and_patch_widths(self) -> tuple[int, int]:
        return self.pooled_width, self.patch_width


@dataclass(frozen=True)
class TeacherSpec:
    """A teacher as its card describes it, and the target it computes. ``encoder`` is None for a timm backbone."""

    path: str
    target: TeacherTarget
    feature_shape: FeatureShape | None
    encoder: EncoderCard | None
    classes: tuple[str, ...]
    has_class_names: bool
    resized_from: int | tuple[int, int] | None


@dataclass(frozen=True)
class StudentSpec:
    """A student with its resolved sizes and the card of its export; ``blocks`` are the compared blocks, from 1."""

    name: str
    model: ResolvedVitConfig | None
    backbone: str | None
    feature_shape: FeatureShape | None
    block_numbers: tuple[int, ...]
    card: dict[str, Any]
    has_batch_norm: bool = False

    @property
    def display_name(self) -> str:
        """The student's name, or "the student" for a single one."""
        return self.name or "the student"

    @property
    def description_suffix(self) -> str:
        """Model, sizes and compared blocks, as shown in the plan."""
        blocks = f", blocks {', '.join(map(str, self.block_numbers))}" if self.block_numbers else ""
        if self.model is None:
            return f": {self.backbone}{blocks}"
        return f": {self.model.name} of width {self.model.width} and depth {self.model.depth}{blocks}"


def build_teacher_spec(cfg: DistillConfig, card: Card, student_models: Sequence[VitConfig] = ()) -> TeacherSpec:
    """Return the teacher of this card with the target it computes.

    ``student_models`` are the students that are encoders. Raises: ConfigError, ExportError.
    """
    path = cfg.teacher
    model_card = parse_encoder_card(card.encoder, f"{path}/card.json")
    if model_card.channels != cfg.data.channels:
        raise _mismatch_error(path, "channels", model_card.channels, "data.channels", cfg.data.channels)
    if cfg.method in CLASS_METHODS and not model_card.classes:
        raise ExportError(
            f"the teacher {path} has no classification head, and method={cfg.method} needs one; give the export of a "
            f"fine-tuning run"
        )
    encoder = model_card if isinstance(model_card, EncoderCard) else None
    if cfg.method in BLOCK_METHODS and encoder is None:
        assert isinstance(model_card, BackboneCard)
        raise ExportError(
            f"the teacher {path} is the timm backbone {model_card.timm}, and method={cfg.method} reads the blocks of a "
            f"foveal encoder; use method=features or logits"
        )
    if cfg.method == "features" and encoder is not None and encoder.pooling == "avg":
        raise ExportError(
            f"the teacher {path} was fine-tuned with pooling=avg and has no norm after its tokens; "
            f"give a pretrained encoder, or one fine-tuned with pooling=token"
        )
    return TeacherSpec(
        path=path,
        target=_build_target(cfg, encoder, student_models),
        feature_shape=_card_feature_shape(cfg, model_card) if cfg.method == "features" else None,
        encoder=encoder,
        # Foreign weights may have no class names.
        classes=card.classes or tuple(map(str, range(model_card.classes))),
        has_class_names=bool(card.classes),
        resized_from=_teacher_trained_size(model_card, cfg.data.image_size, path),
    )


def build_student_spec(
    cfg: DistillConfig, teacher: TeacherSpec, name: str, model: VitConfig | None, backbone: str | None
) -> StudentSpec:
    """Return the student with its resolved sizes. Raises: ConfigError, ExportError if it does not fit the teacher."""
    size, channels = cfg.data.image_size, cfg.data.channels
    prefix = f"students.{name}." if name else ""
    num_classes = len(teacher.classes) if cfg.method in CLASS_METHODS else 0
    if cfg.method == "token":
        _check_distillation_token(prefix, model, backbone, cfg)
    if backbone is not None:
        if cfg.method in BLOCK_METHODS:
            raise ConfigError(
                f"method={cfg.method} reads the blocks of a foveal encoder, and {prefix}backbone={backbone} is a timm "
                f"backbone; set {prefix}model instead"
            )
        shape = _backbone_feature_shape(cfg, backbone) if cfg.method == "features" else None
        _check_grids(cfg, teacher, f"{prefix}backbone={backbone}", shape)
        card = backbone_card(backbone, size, channels, num_classes)
        return StudentSpec(name, None, backbone, shape, (), card, has_batch_norm=_check_batch_norm(cfg, backbone))
    assert model is not None
    sizes = resolve_sizes_for_image(model, size)
    if teacher.encoder is not None and sizes.patch != teacher.encoder.patch and _compares_patches(cfg):
        raise _mismatch_error(teacher.path, "patch", teacher.encoder.patch, f"{prefix}model.patch", sizes.patch)
    shape = _vit_feature_shape(sizes, size)
    _check_grids(cfg, teacher, f"{prefix}model", shape)
    pooling = cfg.pooling if cfg.method == "logits" else "token"
    card = encoder_card(model, size, channels, pooling=pooling, num_classes=num_classes)
    return StudentSpec(name, sizes, None, shape, _resolve_student_blocks(cfg, teacher, sizes, prefix), card)


def _build_target(
    cfg: DistillConfig, encoder: EncoderCard | None, student_models: Sequence[VitConfig]
) -> TeacherTarget:
    if cfg.method not in BLOCK_METHODS:
        return TeacherTarget(cfg.method, patches=cfg.patch_weight > 0)
    assert encoder is not None
    blocks = tuple(pair[0] for pair in cfg.layers)
    if not blocks:
        depths = [resolve_sizes(model).depth for model in student_models]
        blocks = (default_teacher_block(cfg.method, encoder.depth, depths, cfg.layers_version),)
    if cfg.method == "layers":
        rows, columns = encoder.patch_grid(cfg.data.image_size)
        count_visible(rows * columns, cfg.mask_ratio)  # raises for an unusable ratio
    elif reason := explain_no_fused_qkv(encoder.name):
        raise ExportError(f"the teacher {cfg.teacher}, '{encoder.name}', does not support method=relations: {reason}")
    return TeacherTarget(cfg.method, blocks, encoder.heads, encoder.patch)


def _resolve_student_blocks(
    cfg: DistillConfig, teacher: TeacherSpec, student: ResolvedVitConfig, prefix: str
) -> tuple[int, ...]:
    """Return the student's compared blocks. Raises: ConfigError if a pair does not exist or cannot be compared."""
    if cfg.method not in BLOCK_METHODS:
        return ()
    assert teacher.encoder is not None
    blocks = tuple(pair[1] for pair in cfg.layers) or (default_student_block(cfg.method, student.depth),)
    for teacher_block, student_block in zip(teacher.target.blocks, blocks, strict=True):
        if not 1 <= teacher_block <= teacher.encoder.depth or not 1 <= student_block <= student.depth:
            raise ConfigError(
                f"layers has the pair [{teacher_block}, {student_block}], but the teacher has blocks 1 to "
                f"{teacher.encoder.depth} and {prefix}model has 1 to {student.depth}"
            )
    if cfg.method == "relations":
        heads = teacher.encoder.heads
        if student.width % heads:
            nearest = heads * max(1, round(student.width / heads))
            raise ConfigError(
                f"{prefix}model.width={student.width} is not divisible by the teacher's {heads} heads, in which "
                f"relations are compared; {nearest} is"
            )
        if reason := explain_no_fused_qkv(student.name):
            raise ConfigError(f"{prefix}model.name='{student.name}' does not support method=relations: {reason}")
    return blocks


def _compares_patches(cfg: DistillConfig) -> bool:
    return cfg.method in BLOCK_METHODS or (cfg.method == "features" and cfg.patch_weight > 0)


def _check_grids(cfg: DistillConfig, teacher: TeacherSpec, student: str, student_shape: FeatureShape | None) -> None:
    """Raise: ConfigError if patch features are compared and the grids differ."""
    if (
        not _compares_patches(cfg)
        or teacher.feature_shape is None
        or student_shape is None
        or teacher.feature_shape.patch_grid == student_shape.patch_grid
    ):
        return
    teacher_grid, student_grid = (
        f"{rows} x {columns}" for rows, columns in (teacher.feature_shape.patch_grid, student_shape.patch_grid)
    )
    raise ConfigError(
        f"the teacher {teacher.path} has {teacher_grid} patch features, {student} has {student_grid}; patch_weight=0 "
        f"compares pooled features only"
    )


def _check_distillation_token(prefix: str, model: VitConfig | None, backbone: str | None, cfg: DistillConfig) -> None:
    if model is not None:
        has_token = resolve_sizes(model).registers > 0
    else:
        has_token = has_distillation_token(build_meta_backbone(backbone or "", cfg.data.image_size, cfg.data.channels))
    if not has_token:
        student = f"{prefix}backbone={backbone}" if backbone else f"{prefix}model"
        raise ConfigError(
            f"method=token trains a distillation token, and {student} has none; set {prefix}model.registers=1, or a "
            f"backbone such as deit_tiny_distilled_patch16_224"
        )


def _check_batch_norm(cfg: DistillConfig, backbone: str) -> bool:
    """Return whether a timm backbone has BatchNorm.

    Raises: ConfigError if engine.activation_checkpointing is set and the backbone does not support it.
    """
    size, channels = cfg.data.image_size, cfg.data.channels
    if cfg.engine.activation_checkpointing:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            set_activation_checkpointing(build_backbone(backbone, image_size=size, channels=channels), enable=True)
    return has_batch_norm(build_meta_backbone(backbone, size, channels))


def resolve_class_names(cfg: DistillConfig, teacher: TeacherSpec, sources: Sequence[SampleSource]) -> tuple[str, ...]:
    """Return the class names, those of the teacher if it has any.

    Raises: ConfigError, DataError if the data's classes differ from the teacher's, or labels are missing or too high.
    """
    data_classes = sources[0].dataset.classes
    names = teacher.classes if teacher.has_class_names or data_classes is None else data_classes
    if len(names) != len(teacher.classes):
        raise ConfigError(
            f"the teacher {teacher.path} has {len(teacher.classes)} classes, {sources[0].dataset.folder} has "
            f"{len(names)}; they must be equal"
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
        alternative = "" if cfg.method == "token" else ", or set label_weight=0"
        raise ConfigError(
            f"{weight}, but the samples of {folder} have no classes; pack or index them with labels{alternative}"
        )
    highest = [int(source.dataset.labels(source.split).max()) for source in sources]
    if max(highest) < 0:
        raise DataError(f"{weight}, but no sample of split '{cfg.data.train}' of {folder} has a label")
    for source, label in zip(sources, highest, strict=True):
        if label >= len(classes):
            raise DataError(
                f"{source.dataset.folder}: split '{source.split}' has label {label}, but there are {len(classes)} "
                f"classes"
            )


def _check_same_classes(
    teacher: str, teacher_classes: tuple[str, ...], folder: str, data_classes: tuple[str, ...]
) -> None:
    pairs = enumerate(zip(teacher_classes, data_classes, strict=False))
    mismatch = next((index for index, (a, b) in pairs if a != b), None)
    if mismatch is not None:
        raise ConfigError(
            f"class {mismatch} is '{teacher_classes[mismatch]}' for the teacher {teacher} and "
            f"'{data_classes[mismatch]}' in {folder}; names and order must be equal (weights of others name their classes "
            f"in config.json: label_names, id2label)"
        )
    if len(teacher_classes) != len(data_classes):
        raise ConfigError(
            f"the teacher {teacher} has {len(teacher_classes)} classes, {folder} has {len(data_classes)}; names and "
            f"order must be equal"
        )


def _vit_feature_shape(sizes: ResolvedVitConfig, size: int | tuple[int, int]) -> FeatureShape:
    return FeatureShape(sizes.width, sizes.width, sizes.patch_grid(size))


def _backbone_feature_shape(cfg: DistillConfig, name: str) -> FeatureShape:
    """Return the feature shape of a timm backbone; without patch_weight it may have no feature map."""
    size, channels = cfg.data.image_size, cfg.data.channels
    if not cfg.patch_weight:
        return FeatureShape(infer_pooled_width(name, size, channels), 0, (0, 0))
    pooled_width, (patch_width, rows, columns) = infer_pooled_map_shapes(name, size, channels)
    return FeatureShape(pooled_width, patch_width, (rows, columns))


def _card_feature_shape(cfg: DistillConfig, card: EncoderCard | BackboneCard) -> FeatureShape:
    if isinstance(card, EncoderCard):
        return _vit_feature_shape(card, cfg.data.image_size)
    return _backbone_feature_shape(cfg, card.timm)


def _teacher_trained_size(
    card: EncoderCard | BackboneCard, size: int | tuple[int, int], path: str
) -> int | tuple[int, int] | None:
    """Return the teacher's training image size if it is not ``size``.

    Raises: ConfigError, ExportError if the teacher cannot be resized.
    """
    if isinstance(card, EncoderCard):
        return card.trained_size_if_different(size)
    check_resizable(card, size, f"the teacher {path}")
    return None if card.image_size == size else card.image_size


def _mismatch_error(path: str, name: str, teacher_value: int, setting: str, student_value: int) -> ExportError:
    return ExportError(
        f"the teacher {path} has {name} {teacher_value}, the student's {setting} is {student_value}; they must be equal"
    )
