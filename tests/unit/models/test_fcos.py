"""Anchor-free detection: losses, gradients and detections compared with torchvision's FCOS, image by image."""

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOS

from foveal.models.fcos import (
    FCOSOutput,
    compute_locations_with_strides,
    decode_detections,
    elementwise_generalised_iou,
    fcos_losses_per_image,
)

SIDES, STRIDES, CLASSES = (96, 128), (8, 16, 32), 3
MAPS = [(SIDES[0] // stride, SIDES[1] // stride) for stride in STRIDES]
TARGETS = torch.tensor(
    [
        [[3, 5, 60, 70, 1], [20, 20, 34, 41, 2], [70, 8, 125, 95, 0], [70.5, 30, 83, 44.25, 0]],
        [[0, 0, 0, 0, -1]] * 4,
        [[10, 12, 21, 30, 2], [0, 0, 128, 96, 1], [0, 0, 0, 0, -1], [0, 0, 0, 0, -1]],
    ]
)


def random_output(images: int = len(TARGETS)) -> FCOSOutput:
    """Return a random head output whose tensors are leaves of autograd."""
    locations = compute_locations_with_strides(MAPS, STRIDES, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    class_logits, distances, centerness = (
        torch.randn(images, len(locations), size, generator=generator) for size in (CLASSES, 4, 1)
    )
    return FCOSOutput(
        (class_logits - 1).requires_grad_(),
        (2 * distances.abs()).requires_grad_(),
        centerness[..., 0].requires_grad_(),
        locations,
    )


def gradients(output: FCOSOutput, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, output[:3], materialize_grads=True))


@pytest.fixture(scope="module")
def reference() -> Any:
    backbone: Any = nn.Identity()
    backbone.out_channels = cast(Any, 32)
    sizes = tuple((stride,) for stride in STRIDES)
    settings = {"score_thresh": 0.05, "nms_thresh": 0.6, "detections_per_img": 100, "topk_candidates": 1000}
    return FCOS(backbone, CLASSES, anchor_generator=AnchorGenerator(sizes, ((1.0,),) * 3), **settings)


def torchvision_output(output: FCOSOutput, image: int) -> dict[str, Tensor]:
    return {
        "cls_logits": output.class_logits[image : image + 1],
        "bbox_regression": output.box_distances_in_strides[image : image + 1],
        "bbox_ctrness": output.centerness_logits[image : image + 1, :, None],
    }


def anchors_of(output: FCOSOutput) -> Tensor:
    """Return anchors centred on the cells; torchvision centres them on the cells' corners, but accepts any boxes."""
    half = output.locations[:, 2:] / 2
    return torch.cat([output.locations[:, :2] - half, output.locations[:, :2] + half], dim=1)


@pytest.mark.parametrize("image", range(len(TARGETS)))
def test_losses_and_gradients_of_an_image(image: int, reference: FCOS) -> None:
    output, reference_output = random_output(), random_output()
    losses = fcos_losses_per_image(output, TARGETS)
    boxes = TARGETS[image][TARGETS[image, :, 4] >= 0]
    reference_targets = [{"boxes": boxes[:, :4], "labels": boxes[:, 4].long()}]
    expected = reference.compute_loss(
        reference_targets,
        torchvision_output(reference_output, image),
        [anchors_of(reference_output)],
        [rows * columns for rows, columns in MAPS],
    )
    for loss, name in zip(losses, ("classification", "bbox_regression", "bbox_ctrness"), strict=True):
        assert loss[image].item() == pytest.approx(expected[name].item(), rel=1e-5), name
    gradient_pairs = zip(
        gradients(output, torch.stack([loss[image] for loss in losses]).sum()),
        gradients(reference_output, torch.stack(list(expected.values())).sum()),
        strict=True,
    )
    for gradient, expected_gradient in gradient_pairs:
        assert gradient.isfinite().all()
        torch.testing.assert_close(gradient, expected_gradient)


def test_an_image_does_not_depend_on_the_others() -> None:
    output = random_output()
    losses_per_image = []
    for image in range(3):
        class_logits, box_distances, centerness_logits = (tensor[image : image + 1] for tensor in output[:3])
        single = FCOSOutput(class_logits, box_distances, centerness_logits, output.locations)
        losses_per_image.append(fcos_losses_per_image(single, TARGETS[image : image + 1]))
    batch_losses = fcos_losses_per_image(output, TARGETS)
    for loss, single_losses in zip(batch_losses, zip(*losses_per_image, strict=True), strict=True):
        torch.testing.assert_close(loss, torch.cat(single_losses))


@pytest.mark.parametrize("rows", [0, 2])
def test_images_without_boxes_teach_the_background_alone(rows: int) -> None:
    output = random_output(2)
    class_loss, box_loss, centerness_loss = fcos_losses_per_image(output, torch.full((2, rows, 5), -1.0))
    assert (class_loss > 0).all()
    assert box_loss.tolist() == centerness_loss.tolist() == [0, 0]
    class_gradient, box_gradient, centerness_gradient = gradients(
        output, (class_loss + box_loss + centerness_loss).sum()
    )
    assert class_gradient.abs().sum() > 0
    assert box_gradient.abs().sum() == centerness_gradient.abs().sum() == 0


def test_detections_equal_torchvisions(reference: FCOS) -> None:
    output = random_output(1)
    reference.topk_candidates = 10_000  # torchvision's limit is per map
    sizes = [rows * columns for rows, columns in MAPS]
    output_by_map = {name: list(tensor.split(sizes, dim=1)) for name, tensor in torchvision_output(output, 0).items()}
    anchors_by_map = list(anchors_of(output).split(sizes))
    (expected,) = reference.postprocess_detections(output_by_map, [anchors_by_map], [SIDES])
    (detections,) = decode_detections(
        output, SIDES, score_threshold=0.05, iou_threshold=0.6, max_candidates=10_000, max_detections=100
    )
    assert len(detections.boxes) == 100
    torch.testing.assert_close(detections.boxes, expected["boxes"])
    torch.testing.assert_close(detections.scores, expected["scores"])
    assert detections.classes.tolist() == expected["labels"].tolist()


def test_generalised_iou_by_hand() -> None:
    box, equal_box, adjacent_box = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2], [2, 0, 4, 2]])
    assert elementwise_generalised_iou(box, equal_box).item() == pytest.approx(1)
    assert elementwise_generalised_iou(box, adjacent_box).item() == pytest.approx(0, abs=1e-6)
    assert elementwise_generalised_iou(box, adjacent_box + torch.tensor([2.0, 0, 2, 0])).item() == pytest.approx(-1 / 3)
