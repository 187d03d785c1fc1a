"""Build the students of a plan, freshly initialised, for each method."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from distill.compatibility import StudentSpec
from distill.plan import DistillPlan
from distill.target import DistillMethod
from foveal.models.backbone import backbone_from_card, forward_pooled, forward_pooled_and_patches
from foveal.models.encode import encode_cls_and_patches
from foveal.models.probes import encode_patch_mean
from foveal.models.students import (
    FeatureStudent,
    LayerStudent,
    LogitStudent,
    RegisterTokenStudent,
    RelationStudent,
    Students,
    TimmTokenStudent,
)
from foveal.models.vit import encoder_from_card
from foveal.seeding import derive_key


def build_students(plan: DistillPlan) -> Students:
    """Return all students of a plan. Each is initialised from the seed as if it were the only one."""
    return Students(
        [_build_student(plan, student) for student in plan.student_specs],
        [encode_patch_mean if student.backbone is None else _pool_backbone for student in plan.student_specs],
    )


def _pool_backbone(backbone: Any, images: Tensor) -> Tensor:
    return forward_pooled(backbone, images)[0]


def _build_student(plan: DistillPlan, student: StudentSpec) -> nn.Module:
    torch.manual_seed(derive_key(plan.cfg.seed, "weights"))
    from_card = encoder_from_card if student.backbone is None else backbone_from_card
    encoder: Any = from_card(student.card, student.display_name)
    return _STUDENT_BUILDERS[plan.target.kind](plan, student, encoder)


def _build_feature_student(plan: DistillPlan, student: StudentSpec, encoder: Any) -> nn.Module:
    assert student.feature_shape is not None
    assert plan.teacher_spec.feature_shape is not None
    backbone_features = forward_pooled_and_patches if plan.target.patches else forward_pooled
    return FeatureStudent(
        encoder,
        encode_cls_and_patches if student.backbone is None else backbone_features,
        student.feature_shape.pooled_and_patch_widths,
        plan.teacher_spec.feature_shape.pooled_and_patch_widths,
        with_patches=plan.target.patches,
    )


def _build_layer_student(plan: DistillPlan, student: StudentSpec, encoder: Any) -> nn.Module:
    assert plan.teacher_spec.encoder is not None
    decoder = plan.cfg.decoder if plan.cfg.pixel_weight else None
    return LayerStudent(encoder, student.block_numbers, plan.teacher_spec.encoder.width, decoder)


def _build_relation_student(_plan: DistillPlan, student: StudentSpec, encoder: Any) -> nn.Module:
    return RelationStudent(encoder, student.block_numbers)


def _build_logit_student(_plan: DistillPlan, _student: StudentSpec, encoder: Any) -> nn.Module:
    return LogitStudent(encoder)


def _build_token_student(_plan: DistillPlan, student: StudentSpec, encoder: Any) -> nn.Module:
    return RegisterTokenStudent(encoder) if student.backbone is None else TimmTokenStudent(encoder)


_STUDENT_BUILDERS: dict[DistillMethod, Callable[[DistillPlan, StudentSpec, Any], nn.Module]] = {
    "features": _build_feature_student,
    "layers": _build_layer_student,
    "relations": _build_relation_student,
    "logits": _build_logit_student,
    "token": _build_token_student,
}
