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

_CENTER_RADIUS = 1.5  # a place answers for an object whose centre is so many strides away, to each side
_SIZE_RANGE = (4.0, 8.0)  # and whose farthest side is so many strides away; those of the first and last map are open
_NO_BOX = -1.0  # the class of a row of labels that is no box
_EPSILON = 1e-7


class FCOSOutput(NamedTuple):
    """What a head says of a batch.

    ``logits`` [B, P, K]; ``reaches`` [B, P, 4] from a place to the sides of its box, in strides, at least 0; ``centred``
    [B, P], a logit; ``places`` float32 [P, 3]: across, down, stride, in pixels, from the finest map to the coarsest.
    """

    class_logits: Tensor
    box_distances: Tensor
    centerness_logits: Tensor
    locations: Tensor


class FCOSLosses(NamedTuple):
    """The three losses of every image [B], each over the number of places that answer for an object, or over 1."""

    class_loss: Tensor
    box_loss: Tensor
    centerness_loss: Tensor


@dataclass(frozen=True, slots=True)
class Detections:
    """The objects of one image, best first: boxes [N, 4], scores [N] in [0, 1], classes int64 [N]."""

    boxes: Tensor
    scores: Tensor
    classes: Tensor


def compute_locations(map_sizes: Sequence[tuple[int, int]], strides: Sequence[float], device: torch.device) -> Tensor:
    """The centres of the cells of maps of these (rows, columns), float32 [P, 3]: across, down, stride, in pixels."""
    found = []
    for (rows, columns), stride in zip(map_sizes, strides, strict=True):
        down = (torch.arange(rows, device=device, dtype=torch.float32) + 0.5) * stride
        across = (torch.arange(columns, device=device, dtype=torch.float32) + 0.5) * stride
        grid = torch.stack([across.expand(rows, columns), down[:, None].expand(rows, columns)], dim=-1).view(-1, 2)
        found.append(F.pad(grid, (0, 1), value=stride))
    return torch.cat(found)


def compute_fcos_losses(output: FCOSOutput, targets: Tensor) -> FCOSLosses:
    """The losses of images whose labels are ``marks`` [B, M, 5]: boxes and classes, -1 where there is no box.

    Focal loss of the classes (Lin et al., 2017), generalised IoU of the boxes (Rezatofighi et al., 2019) and
    cross-entropy of how centred a place is, as torchvision's FCOS has them. Each image is divided by its own number of
    places, or by 1 where it has none, so that it does not matter which images a rank holds beside it.
    """
    targets = F.pad(targets, (0, 0, 0, 1), value=_NO_BOX)  # a row of no box, so that there always is a row
    chosen_BP = torch.stack([_assign_boxes(output.locations, each) for each in targets])
    theirs_BP = chosen_BP >= 0
    taken_BP5 = targets.gather(1, chosen_BP.clamp(min=0)[:, :, None].expand(-1, -1, 5))
    classes_BP = torch.where(theirs_BP, taken_BP5[:, :, 4], _NO_BOX)
    points_P2, stride_P1 = output.locations[:, :2], output.locations[:, 2:]
    alone_P4 = torch.cat([points_P2 - stride_P1, points_P2 + stride_P1], dim=1)  # a box that no arithmetic fails on
    wanted_BP4 = torch.where(theirs_BP[:, :, None], taken_BP5[:, :, :4], alone_P4)
    logits = output.class_logits.float()
    hot_BPK = (classes_BP[:, :, None] == torch.arange(logits.shape[2], device=logits.device)).to(logits.dtype)
    each_B = theirs_BP.sum(dim=1).clamp(min=1)
    overlap_BP = 1 - generalised_iou(_distances_to_boxes(output.box_distances.float(), output.locations), wanted_BP4)
    centre_BP = F.binary_cross_entropy_with_logits(
        output.centerness_logits.float(), _centerness_targets(output.locations, wanted_BP4), reduction="none"
    )
    return FCOSLosses(
        sigmoid_focal_loss(logits, hot_BPK).sum(dim=(1, 2)) / each_B,
        torch.where(theirs_BP, overlap_BP, 0.0).sum(dim=1) / each_B,
        torch.where(theirs_BP, centre_BP, 0.0).sum(dim=1) / each_B,
    )


@torch.no_grad()
def decode_detections(
    output: FCOSOutput,
    image_size: tuple[int, int],
    *,
    score_threshold: float,
    iou_threshold: float,
    max_candidates: int,
    max_detections: int,
) -> list[Detections]:
    """The objects of each image of (height, width) pixels.

    A score is the geometric mean of class and centredness. Of the ``candidates`` best that reach ``lowest``, one that
    overlaps a better one of its class by more than ``overlap`` (IoU) goes; at most ``most`` stay.
    """
    each = zip(output.class_logits.float(), output.box_distances.float(), output.centerness_logits.float(), strict=True)
    return [
        _decode_image(
            *one,
            output.locations,
            image_size,
            score_threshold=score_threshold,
            iou_threshold=iou_threshold,
            max_candidates=max_candidates,
            max_detections=max_detections,
        )
        for one in each
    ]


def _decode_image(
    class_logits: Tensor,
    box_distances: Tensor,
    centerness_logits: Tensor,
    locations: Tensor,
    image_size: tuple[int, int],
    *,
    score_threshold: float,
    iou_threshold: float,
    max_candidates: int,
    max_detections: int,
) -> Detections:
    scores_PK = (class_logits.sigmoid() * centerness_logits.sigmoid()[:, None]).sqrt()
    scores, order = scores_PK.flatten().topk(min(max_candidates, scores_PK.numel()))
    scores, order = scores[scores > score_threshold], order[scores > score_threshold]
    place, classes = order // class_logits.shape[1], order % class_logits.shape[1]
    boxes = clip_boxes_to_image(_distances_to_boxes(box_distances[place], locations[place]), image_size)
    kept = batched_nms(boxes, scores, classes, iou_threshold)[:max_detections]
    return Detections(boxes[kept], scores[kept], classes[kept])


def _distances_to_boxes(box_distances: Tensor, locations: Tensor) -> Tensor:
    """Boxes [..., P, 4] whose sides are so many strides [..., P, 4] from their places [P, 3]."""
    points, pixels = locations[:, :2], box_distances * locations[:, 2:]
    return torch.cat([points - pixels[..., :2], points + pixels[..., 2:]], dim=-1)


@torch.no_grad()
def _assign_boxes(locations: Tensor, targets: Tensor) -> Tensor:
    """For each place the row [P] of the box that it answers for, the smallest of several; -1: none. ``marks`` [M, 5]."""
    points_P12, stride_P1 = locations[:, None, :2], locations[:, 2:]
    first, last = targets[:, :2], targets[:, 2:4]
    reaches_PM4 = torch.cat([points_P12 - first, last - points_P12], dim=2)
    off_PM = (points_P12 - (first + last) / 2).abs().amax(dim=2)
    lowest_P1 = torch.where(stride_P1 == locations[0, 2], 0.0, _SIZE_RANGE[0] * stride_P1)
    highest_P1 = torch.where(stride_P1 == locations[-1, 2], torch.inf, _SIZE_RANGE[1] * stride_P1)
    farthest_PM = reaches_PM4.amax(dim=2)
    fits_PM = (reaches_PM4.amin(dim=2) > 0) & (off_PM < _CENTER_RADIUS * stride_P1)
    fits_PM &= (farthest_PM > lowest_P1) & (farthest_PM < highest_P1) & (targets[:, 4] != _NO_BOX)
    area_M = _product(last - first)
    smallest_P, row_P = torch.where(fits_PM, area_M, torch.inf).min(dim=1)
    return torch.where(smallest_P.isfinite(), row_P, -1)


@torch.no_grad()
def _centerness_targets(locations: Tensor, boxes: Tensor) -> Tensor:
    """How near places [P, 3] are to the centres of boxes [B, P, 4] that they lie in: 1 in the centre, 0 at a side."""
    before, behind = locations[:, :2] - boxes[..., :2], boxes[..., 2:] - locations[:, :2]
    return _product(torch.minimum(before, behind) / torch.maximum(before, behind)).sqrt()


def generalised_iou(boxes: Tensor, other_boxes: Tensor) -> Tensor:
    """Generalised intersection over union [...] of boxes [..., 4], each with the one at its place: in (-1, 1].

    As torchvision's ``generalized_box_iou_loss``, which picks out what overlaps and has no size before it is run.
    """
    inside = (
        torch.minimum(boxes[..., 2:], other_boxes[..., 2:]) - torch.maximum(boxes[..., :2], other_boxes[..., :2])
    ).clamp(min=0)
    around = torch.maximum(boxes[..., 2:], other_boxes[..., 2:]) - torch.minimum(boxes[..., :2], other_boxes[..., :2])
    shared, hull = _product(inside), _product(around)
    union = _product(boxes[..., 2:] - boxes[..., :2]) + _product(other_boxes[..., 2:] - other_boxes[..., :2]) - shared
    return shared / (union + _EPSILON) - (hull - union) / (hull + _EPSILON)


def _product(pairs: Tensor) -> Tensor:
    """The products [...] of pairs [..., 2]. torch's own ``prod`` asks the device for zeros in its backward."""
    return pairs[..., 0] * pairs[..., 1]
