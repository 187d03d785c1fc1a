"""Our encoders are timm's: the same names, and the same features when nothing is masked, for each of its classes."""

from typing import Any, Literal

import pytest
import timm
import torch
from encoders import BOTH, KINDS, PLAIN, RELATIVE, ROTARY, autoencoder_of, encoder_of, shaken
from timm.layers.pos_embed_rel import RelPosMlp

from foveal.config import height_and_width
from foveal.models.config import Positions
from foveal.models.resize import resize_position_embeddings
from foveal.models.token_positions import VisibleRelPosMlp


@pytest.mark.parametrize("size", [24, (16, 36)])
@pytest.mark.parametrize(("name", "positions"), KINDS)
def test_masking_nothing_is_timm(name: str, positions: Positions | None, size: int | tuple[int, int]) -> None:
    model = autoencoder_of(name, positions, size).double().eval()
    images = torch.randn(2, 3, *height_and_width(size), dtype=torch.float64)
    expected = model.encoder.forward_features(images)
    torch.testing.assert_close(model.encode(images), expected, rtol=0, atol=1e-12)
    shuffled = torch.rand(2, 36).argsort(dim=1)
    found = model.encode(images, shuffled)
    first = model.encoder.num_prefix_tokens
    torch.testing.assert_close(found[:, :first], expected[:, :first], rtol=0, atol=1e-12)
    for image in range(2):
        torch.testing.assert_close(found[image, first:], expected[image, first:][shuffled[image]], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "positions"), KINDS)
def test_every_kind_knows_where_its_patches_are(name: str, positions: Positions | None) -> None:
    """The same two patches at another distance are other features, by more than rounding."""
    model = autoencoder_of(name, positions).double().eval()
    images = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    moved = images.clone()
    moved[:, :, 4:8, 4:8] = images[:, :, :4, 4:8]  # the second patch of the first row, a row further down
    near, far = model.encode(images, torch.tensor([[0, 1]])), model.encode(moved, torch.tensor([[0, 5]]))
    assert (near - far).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "positions"), KINDS)
def test_an_image_of_a_batch_is_encoded_as_if_it_were_alone(name: str, positions: Positions | None) -> None:
    """Two images that keep other patches."""
    model = autoencoder_of(name, positions).double().eval()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    kept = torch.tensor([[3, 0, 14], [7, 9, 2]])
    together = model.encode(images, kept)
    for image in range(2):
        alone = model.encode(images[image : image + 1], kept[image : image + 1])
        torch.testing.assert_close(together[image], alone[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("classes", [0, 7])
@pytest.mark.parametrize("pooling", ["token", "avg"])
@pytest.mark.parametrize("name", [*PLAIN, *RELATIVE, *ROTARY, *BOTH])
def test_names_and_shapes_are_timms(name: str, pooling: Literal["token", "avg"], classes: int) -> None:
    sizes: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 4}
    positions: Positions | None = None if name in (*RELATIVE, *ROTARY) else "learned"
    ours = encoder_of(name, positions, 24, drop_path=0.1, pooling=pooling, classes=classes)
    behind = pooling == "avg"
    norms: dict[str, Any] = {"fc_norm": behind} if name in RELATIVE else {}
    if name in (*ROTARY, *BOTH):
        norms = {"use_fc_norm": behind, "use_post_transformer_norm": not behind}
    theirs = timm.create_model(name, img_size=24, num_classes=classes, global_pool=pooling, **sizes, **norms)
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == [
        (k, v.shape) for k, v in theirs.state_dict().items()
    ]
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 24, 24)
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), rtol=0, atol=0)


@pytest.mark.parametrize("size", [(24, 16), (8, 40), 32])
@pytest.mark.parametrize(("name", "positions"), KINDS)
def test_another_grid_is_timms(name: str, positions: Positions | None, size: int | tuple[int, int]) -> None:
    """Weights of 4 x 4 patches on another grid give what timm's own model gives after ``set_input_size``."""
    sides = height_and_width(size)
    trained, theirs, ours = encoder_of(name, positions), encoder_of(name, positions), encoder_of(name, positions, size)
    for parameter in ours.parameters():
        if parameter.requires_grad:
            torch.nn.init.zeros_(parameter)
    ours.load_state_dict(resize_position_embeddings(trained.state_dict(), ours, positions, (4, 4)))
    theirs.set_input_size(img_size=sides)
    if positions == "sincos":  # a formula, which timm does not know of
        with torch.no_grad():
            theirs.get_parameter("pos_embed").copy_(encoder_of(name, positions, size).get_parameter("pos_embed"))
    images = torch.randn(2, 3, *sides)
    found, expected = (encoder.eval().forward_features(images) for encoder in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_same_grid_changes_nothing() -> None:
    encoder = encoder_of("vit_tiny_patch16_224", "learned")
    weights = encoder.state_dict()
    assert resize_position_embeddings(weights, encoder, "learned", (4, 4)) is weights
    wrong = resize_position_embeddings(weights, encoder_of("vit_tiny_patch16_224", "learned", 32), "learned", (5, 5))
    assert wrong is weights  # no table of 25 patches: it is left to the loading to say so


def test_a_relative_bias_of_some_patches_is_timms_at_their_places() -> None:
    theirs = RelPosMlp((3, 5), num_heads=2, hidden_dim=8, prefix_tokens=1).eval()
    ours = VisibleRelPosMlp(theirs).eval()
    assert ours.load_state_dict(theirs.state_dict())
    shaken(ours)
    theirs.load_state_dict(ours.state_dict())
    whole = theirs.get_bias()
    assert ours.get_bias().equal(whole)
    ours.visible_indices = torch.tensor([[4, 0, 14], [2, 9, 7]])
    found = ours.get_bias()
    assert found.shape == (2, 2, 4, 4)
    for image, places in enumerate(ours.visible_indices.tolist()):
        rows = [0, *(place + 1 for place in places)]
        for query, row in enumerate(rows):
            for key, column in enumerate(rows):
                assert found[image, :, query, key].equal(whole[0, :, row, column])
