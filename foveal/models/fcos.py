"""Anchor-free detection (Tian et al., "FCOS: A Simple and Strong Anchor-Free Object Detector", 2020).

Every location of every map predicts the class of an object over it, the distances to the sides of the object's box, and
its centerness. The assignment of objects to locations depends on the labels only; nothing is sampled.
B images, P locations of all maps, K classes, M maximum boxes per image. Boxes are (left, top, right, bottom) in pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import batched_nms, clip_boxes_to_image, sigmoid_focal_loss

_CENTER_RADIUS = 1.5  # strides: the largest distance, in each axis, from a location to the centre of its object
_SIZE_RANGE = (4.0, 8.0)  # strides: range of the distance to the farthest side; open for the first and the last map
_NO_BOX = -1.0  # class of a padding row of the targets
_EPSILON = 1e-7


class FCOSOutput(NamedTuple):
    """The head's output for a batch.

    ``class_logits`` [B, P, K]; ``box_distances`` [B, P, 4] from a location to the sides of its box, in strides, >= 0;
    ``centerness_logits`` [B, P]; ``locations`` float32 [P, 3]: (x, y, stride) in pixels, from the finest map to the
    coarsest.
    """

    class_logits: Tensor
    box_distances_in_strides: Tensor
    centerness_logits: Tensor
    locations: Tensor


class FCOSLosses(NamedTuple):
    """The three losses of every image [B], each divided by the image's number of assigned locations (at least 1)."""

    class_loss: Tensor
    box_loss: Tensor
    centerness_loss: Tensor


@dataclass(frozen=True, slots=True)
class Detections:
    """The detections of an image, best first: boxes [N, 4], scores [N] in [0, 1], classes int64 [N]."""

    boxes: Tensor
    scores: Tensor
    classes: Tensor


def compute_locations_with_strides(
    map_sizes: Sequence[tuple[int, int]], strides: Sequence[float], device: torch.device
) -> Tensor:
    """Return the cell centres of maps of these (rows, columns), float32 [P, 3]: (x, y, stride) in pixels."""
    locations = []
    for (rows, columns), stride in zip(map_sizes, strides, strict=True):
        y = (torch.arange(rows, device=device, dtype=torch.float32) + 0.5) * stride
        x = (torch.arange(columns, device=device, dtype=torch.float32) + 0.5) * stride
        grid = torch.stack([x.expand(rows, columns), y[:, None].expand(rows, columns)], dim=-1).view(-1, 2)
        locations.append(F.pad(grid, (0, 1), value=stride))
    return torch.cat(locations)


def fcos_losses_per_image(output: FCOSOutput, padded_targets: Tensor) -> FCOSLosses:
    """Return the losses of images with targets [B, M, 5]: boxes and their classes, class -1 for padding.

    Focal loss of the classes (Lin et al., 2017), generalised IoU of the boxes (Rezatofighi et al., 2019) and
    cross-entropy of the centerness, as in torchvision's FCOS. Each image's losses are divided by its own number of
    assigned locations, or by 1 without any, so that they do not depend on the other images of a rank.
    """
    padded_targets = F.pad(padded_targets, (0, 0, 0, 1), value=_NO_BOX)  # a padding row, so that M is at least 1
    assigned_BP = torch.stack([_assign_boxes(output.locations, image_targets) for image_targets in padded_targets])
    positive_BP = assigned_BP >= 0
    target_BP5 = padded_targets.gather(1, assigned_BP.clamp(min=0)[:, :, None].expand(-1, -1, 5))
    classes_BP = torch.where(positive_BP, target_BP5[:, :, 4], _NO_BOX)
    points_P2, stride_P1 = output.locations[:, :2], output.locations[:, 2:]
    # A valid box for unassigned locations keeps the masked losses finite.
    dummy_boxes_P4 = torch.cat([points_P2 - stride_P1, points_P2 + stride_P1], dim=1)
    boxes_BP4 = torch.where(positive_BP[:, :, None], target_BP5[:, :, :4], dummy_boxes_P4)
    logits = output.class_logits.float()
    one_hot_BPK = (classes_BP[:, :, None] == torch.arange(logits.shape[2], device=logits.device)).to(logits.dtype)
    num_positive_B = positive_BP.sum(dim=1).clamp(min=1)
    box_loss_BP = 1 - elementwise_generalised_iou(
        _distances_to_boxes(output.box_distances_in_strides.float(), output.locations), boxes_BP4
    )
    centerness_loss_BP = F.binary_cross_entropy_with_logits(
        output.centerness_logits.float(), _centerness_targets(output.locations, boxes_BP4), reduction="none"
    )
    return FCOSLosses(
        sigmoid_focal_loss(logits, one_hot_BPK).sum(dim=(1, 2)) / num_positive_B,
        torch.where(positive_BP, box_loss_BP, 0.0).sum(dim=1) / num_positive_B,
        torch.where(positive_BP, centerness_loss_BP, 0.0).sum(dim=1) / num_positive_B,
    )


@torch.no_grad()
def decode_detections(
    output: FCOSOutput,
    image_hw: tuple[int, int],
    *,
    score_threshold: float,
    iou_threshold: float,
    max_candidates: int,
    max_detections: int,
) -> list[Detections]:
    """Return the detections of each image of (height, width) pixels.

    A score is the geometric mean of class probability and centerness. Non-maximum suppression per class (IoU above
    ``iou_threshold``) keeps at most ``max_detections`` of the ``max_candidates`` best above ``score_threshold``.
    """
    outputs = (output.class_logits.float(), output.box_distances_in_strides.float(), output.centerness_logits.float())
    return [
        _decode_image(
            class_logits,
            box_distances,
            centerness_logits,
            output.locations,
            image_hw,
            score_threshold=score_threshold,
            iou_threshold=iou_threshold,
            max_candidates=max_candidates,
            max_detections=max_detections,
        )
        for class_logits, box_distances, centerness_logits in zip(*outputs, strict=True)
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
    location_indices, classes = order // class_logits.shape[1], order % class_logits.shape[1]
    boxes = _distances_to_boxes(box_distances[location_indices], locations[location_indices])
    boxes = clip_boxes_to_image(boxes, image_size)
    selected = batched_nms(boxes, scores, classes, iou_threshold)[:max_detections]
    return Detections(boxes[selected], scores[selected], classes[selected])


def _distances_to_boxes(box_distances: Tensor, locations: Tensor) -> Tensor:
    """Return boxes [..., P, 4] from distances [..., P, 4], in strides, to locations [P, 3]."""
    points, pixel_distances = locations[:, :2], box_distances * locations[:, 2:]
    return torch.cat([points - pixel_distances[..., :2], points + pixel_distances[..., 2:]], dim=-1)


@torch.no_grad()
def _assign_boxes(locations: Tensor, targets: Tensor) -> Tensor:
    """Return for each location the row [P] of ``targets`` [M, 5] assigned to it: the smallest fitting box; -1: none."""
    points_P12, stride_P1 = locations[:, None, :2], locations[:, 2:]
    top_left_M2, bottom_right_M2 = targets[:, :2], targets[:, 2:4]
    distances_PM4 = torch.cat([points_P12 - top_left_M2, bottom_right_M2 - points_P12], dim=2)
    center_distance_PM = (points_P12 - (top_left_M2 + bottom_right_M2) / 2).abs().amax(dim=2)
    min_size_P1 = torch.where(stride_P1 == locations[0, 2], 0.0, _SIZE_RANGE[0] * stride_P1)
    max_size_P1 = torch.where(stride_P1 == locations[-1, 2], torch.inf, _SIZE_RANGE[1] * stride_P1)
    farthest_PM = distances_PM4.amax(dim=2)
    fits_PM = (distances_PM4.amin(dim=2) > 0) & (center_distance_PM < _CENTER_RADIUS * stride_P1)
    fits_PM &= (farthest_PM > min_size_P1) & (farthest_PM < max_size_P1) & (targets[:, 4] != _NO_BOX)
    area_M = _product(bottom_right_M2 - top_left_M2)
    smallest_area_P, row_P = torch.where(fits_PM, area_M, torch.inf).min(dim=1)
    return torch.where(smallest_area_P.isfinite(), row_P, -1)


@torch.no_grad()
def _centerness_targets(locations: Tensor, boxes: Tensor) -> Tensor:
    """Return the centerness [B, P] of locations [P, 3] inside boxes [B, P, 4]: 1 in the centre, 0 at a side."""
    to_top_left, to_bottom_right = locations[:, :2] - boxes[..., :2], boxes[..., 2:] - locations[:, :2]
    ratios = torch.minimum(to_top_left, to_bottom_right) / torch.maximum(to_top_left, to_bottom_right)
    return _product(ratios).sqrt()


def elementwise_generalised_iou(boxes: Tensor, other_boxes: Tensor) -> Tensor:
    """Return the element-wise generalised intersection over union [...] of boxes [..., 4], in (-1, 1].

    As torchvision's ``generalized_box_iou_loss``, without its boolean indexing, whose output size depends on data.
    """
    inner_sides = (
        torch.minimum(boxes[..., 2:], other_boxes[..., 2:]) - torch.maximum(boxes[..., :2], other_boxes[..., :2])
    ).clamp(min=0)
    outer_sides = torch.maximum(boxes[..., 2:], other_boxes[..., 2:]) - torch.minimum(
        boxes[..., :2], other_boxes[..., :2]
    )
    intersection, hull = _product(inner_sides), _product(outer_sides)
    areas = _product(boxes[..., 2:] - boxes[..., :2]) + _product(other_boxes[..., 2:] - other_boxes[..., :2])
    union = areas - intersection
    return intersection / (union + _EPSILON) - (hull - union) / (hull + _EPSILON)


def _product(pairs: Tensor) -> Tensor:
    """Return the products [...] of pairs [..., 2]; torch's ``prod`` synchronises in its backward to find zeros."""
    return pairs[..., 0] * pairs[..., 1]
