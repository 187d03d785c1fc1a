"""Detection without anchors: losses, gradients and what is found against torchvision's FCOS, image by image."""

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOS

from foveal.models.fcos import FCOSOutput, compute_fcos_losses, compute_locations, decode_detections, generalised_iou

SIDES, STRIDES, CLASSES = (96, 128), (8, 16, 32), 3
MAPS = [(SIDES[0] // stride, SIDES[1] // stride) for stride in STRIDES]
MARKS = torch.tensor(
    [
        [[3, 5, 60, 70, 1], [20, 20, 34, 41, 2], [70, 8, 125, 95, 0], [70.5, 30, 83, 44.25, 0]],
        [[0, 0, 0, 0, -1]] * 4,
        [[10, 12, 21, 30, 2], [0, 0, 128, 96, 1], [0, 0, 0, 0, -1], [0, 0, 0, 0, -1]],
    ]
)


def answers(images: int = len(MARKS)) -> FCOSOutput:
    """What an untrained head might say; leaves of autograd."""
    places, draw = compute_locations(MAPS, STRIDES, torch.device("cpu")), torch.Generator().manual_seed(0)
    logits, reaches, centred = (torch.randn(images, len(places), last, generator=draw) for last in (CLASSES, 4, 1))
    given = [each.requires_grad_() for each in (logits - 1, 2 * reaches.abs(), centred[..., 0])]
    return FCOSOutput(given[0], given[1], given[2], places)


def gradients(said: FCOSOutput, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, said[:3], materialize_grads=True))


@pytest.fixture(scope="module")
def theirs() -> Any:
    backbone: Any = nn.Identity()
    backbone.out_channels = cast(Any, 32)
    sizes = tuple((stride,) for stride in STRIDES)
    settings = {"score_thresh": 0.05, "nms_thresh": 0.6, "detections_per_img": 100, "topk_candidates": 1000}
    return FCOS(backbone, CLASSES, anchor_generator=AnchorGenerator(sizes, ((1.0,),) * 3), **settings)


def told(said: FCOSOutput, image: int) -> dict[str, Tensor]:
    return {
        "cls_logits": said.class_logits[image : image + 1],
        "bbox_regression": said.box_distances[image : image + 1],
        "bbox_ctrness": said.centerness_logits[image : image + 1, :, None],
    }


def anchors_of(said: FCOSOutput) -> Tensor:
    """Theirs are centred on the corners of cells; the boxes are all that its arithmetic sees of them."""
    half = said.locations[:, 2:] / 2
    return torch.cat([said.locations[:, :2] - half, said.locations[:, :2] + half], dim=1)


@pytest.mark.parametrize("image", range(len(MARKS)))
def test_losses_and_gradients_of_an_image(image: int, theirs: FCOS) -> None:
    ours, other = answers(), answers()
    mine = compute_fcos_losses(ours, MARKS)
    boxes = MARKS[image][MARKS[image, :, 4] >= 0]
    targets = [{"boxes": boxes[:, :4], "labels": boxes[:, 4].long()}]
    places = [rows * columns for rows, columns in MAPS]
    wanted = theirs.compute_loss(targets, told(other, image), [anchors_of(other)], places)
    for each, name in zip(mine, ("classification", "bbox_regression", "bbox_ctrness"), strict=True):
        assert each[image].item() == pytest.approx(wanted[name].item(), rel=1e-5), name
    ours_and_theirs = zip(
        gradients(ours, torch.stack([each[image] for each in mine]).sum()),
        gradients(other, torch.stack(list(wanted.values())).sum()),
        strict=True,
    )
    for one, two in ours_and_theirs:
        assert one.isfinite().all()
        torch.testing.assert_close(one, two)


def test_an_image_does_not_depend_on_the_others() -> None:
    said = answers()
    one = [FCOSOutput(said[0][i : i + 1], said[1][i : i + 1], said[2][i : i + 1], said.locations) for i in range(3)]
    alone = [compute_fcos_losses(each, MARKS[i : i + 1]) for i, each in enumerate(one)]
    for each, ones in zip(compute_fcos_losses(said, MARKS), zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(each, torch.cat(ones))


@pytest.mark.parametrize("rows", [0, 2])
def test_images_without_boxes_teach_the_background_alone(rows: int) -> None:
    said = answers(2)
    classes, boxes, centres = compute_fcos_losses(said, torch.full((2, rows, 5), -1.0))
    assert (classes > 0).all()
    assert boxes.tolist() == centres.tolist() == [0, 0]
    logits, reaches, centred = gradients(said, (classes + boxes + centres).sum())
    assert logits.abs().sum() > 0
    assert reaches.abs().sum() == centred.abs().sum() == 0


def test_what_is_found(theirs: FCOS) -> None:
    said = answers(1)
    theirs.topk_candidates = 10_000  # theirs are of each map
    split = {name: list(each.split([r * c for r, c in MAPS], dim=1)) for name, each in told(said, 0).items()}
    places = list(anchors_of(said).split([r * c for r, c in MAPS]))
    (wanted,) = theirs.postprocess_detections(split, [places], [SIDES])
    (ours,) = decode_detections(
        said, SIDES, score_threshold=0.05, iou_threshold=0.6, max_candidates=10_000, max_detections=100
    )
    assert len(ours.boxes) == 100
    torch.testing.assert_close(ours.boxes, wanted["boxes"])
    torch.testing.assert_close(ours.scores, wanted["scores"])
    assert ours.classes.tolist() == wanted["labels"].tolist()


def test_generalised_iou_by_hand() -> None:
    one, same, beside = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2], [2, 0, 4, 2]])
    assert generalised_iou(one, same).item() == pytest.approx(1)
    assert generalised_iou(one, beside).item() == pytest.approx(0, abs=1e-6)
    assert generalised_iou(one, beside + torch.tensor([2.0, 0, 2, 0])).item() == pytest.approx(-1 / 3)
