"""Students, freshly drawn, for each kind of lesson."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from distill.compatibility import Pupil
from distill.plan import DistillPlan
from distill.target import LessonKind
from foveal.models.backbone import backbone_from_card, whole_alone, whole_and_places
from foveal.models.encode import features
from foveal.models.students import (
    ClassStudent,
    FeatureStudent,
    LayerStudent,
    RegisterStudent,
    RelationStudent,
    Students,
    TokenStudent,
)
from foveal.models.vit import encoder_from_card
from foveal.seeding import key


def build_students(plan: DistillPlan) -> Students:
    """All students of a plan. Each is drawn from the seed, as if it were alone."""
    return Students([_drawn(plan, pupil) for pupil in plan.pupils])


def _drawn(plan: DistillPlan, pupil: Pupil) -> nn.Module:
    torch.manual_seed(key(plan.cfg.seed, "weights"))
    made: Any = (encoder_from_card if pupil.backbone is None else backbone_from_card)(pupil.card, pupil.called)
    return _KINDS[plan.lesson.kind](plan, pupil, made)


def _features(plan: DistillPlan, pupil: Pupil, made: Any) -> nn.Module:
    assert pupil.shape is not None
    assert plan.taught.shape is not None
    looks = whole_and_places if plan.lesson.patches else whole_alone
    look = features if pupil.backbone is None else looks
    return FeatureStudent(made, look, pupil.shape.widths, plan.taught.shape.widths, patches=plan.lesson.patches)


def _layers(plan: DistillPlan, pupil: Pupil, made: Any) -> nn.Module:
    assert plan.taught.encoder is not None
    decoder = plan.cfg.decoder if plan.cfg.pixel_weight else None
    return LayerStudent(made, pupil.blocks, plan.taught.encoder.width, decoder)


def _relations(_plan: DistillPlan, pupil: Pupil, made: Any) -> nn.Module:
    return RelationStudent(made, pupil.blocks)


def _logits(_plan: DistillPlan, _pupil: Pupil, made: Any) -> nn.Module:
    return ClassStudent(made)


def _token(_plan: DistillPlan, pupil: Pupil, made: Any) -> nn.Module:
    return RegisterStudent(made) if pupil.backbone is None else TokenStudent(made)


_KINDS: dict[LessonKind, Callable[[DistillPlan, Pupil, Any], nn.Module]] = {
    "features": _features,
    "layers": _layers,
    "relations": _relations,
    "logits": _logits,
    "token": _token,
}
