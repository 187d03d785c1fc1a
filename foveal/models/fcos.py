"""Detection without anchors (Tian et al., "FCOS: A Simple and Strong Anchor-Free Object Detector", 2020).

Every place of every map answers: which class an object over me has, how far its sides are from me, and how near I am to
its centre. Which place answers for which object is a function of the labels alone, and nothing is sampled.
B images, P places of all maps, K classes, M the most boxes of an image. Boxes are left, top, right, bottom in pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import batched_nms, clip_boxes_to_image, sigmoid_focal_loss

_RADIUS = 1.5  # a place answers for an object whose centre is so many strides away, to each side
_REACH = (4.0, 8.0)  # and whose farthest side is so many strides away; those of the first and last map are open
_NOTHING = -1.0  # the class of a row of labels that is no box
_EPSILON = 1e-7


class Answers(NamedTuple):
    """What a head says of a batch.

    ``logits`` [B, P, K]; ``reaches`` [B, P, 4] from a place to the sides of its box, in strides, at least 0; ``centred``
    [B, P], a logit; ``places`` float32 [P, 3]: across, down, stride, in pixels, from the finest map to the coarsest.
    """

    logits: Tensor
    reaches: Tensor
    centred: Tensor
    places: Tensor


class Losses(NamedTuple):
    """The three losses of every image [B], each over the number of places that answer for an object, or over 1."""

    classes: Tensor
    boxes: Tensor
    centres: Tensor


@dataclass(frozen=True, slots=True)
class Found:
    """The objects of one image, best first: boxes [N, 4], scores [N] in [0, 1], classes int64 [N]."""

    boxes: Tensor
    scores: Tensor
    classes: Tensor


def places_of(sides: Sequence[tuple[int, int]], strides: Sequence[float], device: torch.device) -> Tensor:
    """The centres of the cells of maps of these (rows, columns), float32 [P, 3]: across, down, stride, in pixels."""
    found = []
    for (rows, columns), stride in zip(sides, strides, strict=True):
        down = (torch.arange(rows, device=device, dtype=torch.float32) + 0.5) * stride
        across = (torch.arange(columns, device=device, dtype=torch.float32) + 0.5) * stride
        grid = torch.stack([across.expand(rows, columns), down[:, None].expand(rows, columns)], dim=-1).view(-1, 2)
        found.append(F.pad(grid, (0, 1), value=stride))
    return torch.cat(found)


def losses(answers: Answers, marks: Tensor) -> Losses:
    """The losses of images whose labels are ``marks`` [B, M, 5]: boxes and classes, -1 where there is no box.

    Focal loss of the classes (Lin et al., 2017), generalised IoU of the boxes (Rezatofighi et al., 2019) and
    cross-entropy of how centred a place is, as torchvision's FCOS has them. Each image is divided by its own number of
    places, or by 1 where it has none, so that it does not matter which images a rank holds beside it.
    """
    marks = F.pad(marks, (0, 0, 0, 1), value=_NOTHING)  # a row of no box, so that there always is a row
    chosen_BP = torch.stack([_chosen(answers.places, each) for each in marks])
    theirs_BP = chosen_BP >= 0
    taken_BP5 = marks.gather(1, chosen_BP.clamp(min=0)[:, :, None].expand(-1, -1, 5))
    classes_BP = torch.where(theirs_BP, taken_BP5[:, :, 4], _NOTHING)
    points_P2, stride_P1 = answers.places[:, :2], answers.places[:, 2:]
    alone_P4 = torch.cat([points_P2 - stride_P1, points_P2 + stride_P1], dim=1)  # a box that no arithmetic fails on
    wanted_BP4 = torch.where(theirs_BP[:, :, None], taken_BP5[:, :, :4], alone_P4)
    logits = answers.logits.float()
    hot_BPK = (classes_BP[:, :, None] == torch.arange(logits.shape[2], device=logits.device)).to(logits.dtype)
    each_B = theirs_BP.sum(dim=1).clamp(min=1)
    overlap_BP = 1 - generalised_iou(_boxes(answers.reaches.float(), answers.places), wanted_BP4)
    centre_BP = F.binary_cross_entropy_with_logits(
        answers.centred.float(), _centredness(answers.places, wanted_BP4), reduction="none"
    )
    return Losses(
        sigmoid_focal_loss(logits, hot_BPK).sum(dim=(1, 2)) / each_B,
        torch.where(theirs_BP, overlap_BP, 0.0).sum(dim=1) / each_B,
        torch.where(theirs_BP, centre_BP, 0.0).sum(dim=1) / each_B,
    )


@torch.no_grad()
def found(
    answers: Answers, sides: tuple[int, int], *, lowest: float, overlap: float, candidates: int, most: int
) -> list[Found]:
    """The objects of each image of (height, width) pixels.

    A score is the geometric mean of class and centredness. Of the ``candidates`` best that reach ``lowest``, one that
    overlaps a better one of its class by more than ``overlap`` (IoU) goes; at most ``most`` stay.
    """
    each = zip(answers.logits.float(), answers.reaches.float(), answers.centred.float(), strict=True)
    return [
        _found_in_one(*one, answers.places, sides, lowest=lowest, overlap=overlap, candidates=candidates, most=most)
        for one in each
    ]


def _found_in_one(
    logits: Tensor,
    reaches: Tensor,
    centred: Tensor,
    places: Tensor,
    sides: tuple[int, int],
    *,
    lowest: float,
    overlap: float,
    candidates: int,
    most: int,
) -> Found:
    scores_PK = (logits.sigmoid() * centred.sigmoid()[:, None]).sqrt()
    scores, order = scores_PK.flatten().topk(min(candidates, scores_PK.numel()))
    scores, order = scores[scores > lowest], order[scores > lowest]
    place, classes = order // logits.shape[1], order % logits.shape[1]
    boxes = clip_boxes_to_image(_boxes(reaches[place], places[place]), sides)
    kept = batched_nms(boxes, scores, classes, overlap)[:most]
    return Found(boxes[kept], scores[kept], classes[kept])


def _boxes(reaches: Tensor, places: Tensor) -> Tensor:
    """Boxes [..., P, 4] whose sides are so many strides [..., P, 4] from their places [P, 3]."""
    points, pixels = places[:, :2], reaches * places[:, 2:]
    return torch.cat([points - pixels[..., :2], points + pixels[..., 2:]], dim=-1)


@torch.no_grad()
def _chosen(places: Tensor, marks: Tensor) -> Tensor:
    """For each place the row [P] of the box that it answers for, the smallest of several; -1: none. ``marks`` [M, 5]."""
    points_P12, stride_P1 = places[:, None, :2], places[:, 2:]
    first, last = marks[:, :2], marks[:, 2:4]
    reaches_PM4 = torch.cat([points_P12 - first, last - points_P12], dim=2)
    off_PM = (points_P12 - (first + last) / 2).abs().amax(dim=2)
    lowest_P1 = torch.where(stride_P1 == places[0, 2], 0.0, _REACH[0] * stride_P1)
    highest_P1 = torch.where(stride_P1 == places[-1, 2], torch.inf, _REACH[1] * stride_P1)
    farthest_PM = reaches_PM4.amax(dim=2)
    fits_PM = (reaches_PM4.amin(dim=2) > 0) & (off_PM < _RADIUS * stride_P1)
    fits_PM &= (farthest_PM > lowest_P1) & (farthest_PM < highest_P1) & (marks[:, 4] != _NOTHING)
    area_M = _product(last - first)
    smallest_P, row_P = torch.where(fits_PM, area_M, torch.inf).min(dim=1)
    return torch.where(smallest_P.isfinite(), row_P, -1)


@torch.no_grad()
def _centredness(places: Tensor, boxes: Tensor) -> Tensor:
    """How near places [P, 3] are to the centres of boxes [B, P, 4] that they lie in: 1 in the centre, 0 at a side."""
    before, behind = places[:, :2] - boxes[..., :2], boxes[..., 2:] - places[:, :2]
    return _product(torch.minimum(before, behind) / torch.maximum(before, behind)).sqrt()


def generalised_iou(ours: Tensor, theirs: Tensor) -> Tensor:
    """Generalised intersection over union [...] of boxes [..., 4], each with the one at its place: in (-1, 1].

    As torchvision's ``generalized_box_iou_loss``, which picks out what overlaps and has no size before it is run.
    """
    inside = (torch.minimum(ours[..., 2:], theirs[..., 2:]) - torch.maximum(ours[..., :2], theirs[..., :2])).clamp(
        min=0
    )
    around = torch.maximum(ours[..., 2:], theirs[..., 2:]) - torch.minimum(ours[..., :2], theirs[..., :2])
    shared, hull = _product(inside), _product(around)
    union = _product(ours[..., 2:] - ours[..., :2]) + _product(theirs[..., 2:] - theirs[..., :2]) - shared
    return shared / (union + _EPSILON) - (hull - union) / (hull + _EPSILON)


def _product(pairs: Tensor) -> Tensor:
    """The products [...] of pairs [..., 2]. torch's own ``prod`` asks the device for zeros in its backward."""
    return pairs[..., 0] * pairs[..., 1]
