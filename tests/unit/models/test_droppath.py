"""Drop path: a sample's dropped branches depend on its own noise only."""

from typing import Any, cast

import pytest
import torch
from encoders import KINDS, encoder_of
from timm.layers.drop import DropPath

from foveal.models.classify import Classifier
from foveal.models.config import Positions, VitConfig
from foveal.models.droppath import DropPathFromNoise, count_drop_paths, set_drop_path_noise
from foveal.models.vit import build_encoder

TINY = VitConfig(patch=4, width=32, depth=4, heads=2)


@pytest.fixture
def classifier() -> Classifier:
    torch.manual_seed(0)
    encoder = build_encoder(TINY, image_size=16, channels=3, drop_path=0.5, num_classes=5)
    torch.nn.init.normal_(encoder.get_parameter("head.weight"))  # a fresh head's logits are nearly 0
    return Classifier(encoder).train()


def test_one_branch_against_a_loop() -> None:
    drop_path = DropPathFromNoise(0.25).train()
    branch = torch.rand(4, 3, 2)
    noises = torch.tensor([0.0, 0.2499, 0.25, 0.9])
    drop_path.set_noise(noises)
    out = drop_path(branch)
    for sample, noise in enumerate(noises.tolist()):
        torch.testing.assert_close(out[sample], branch[sample] * (0 if noise < 0.25 else 1 / 0.75), rtol=1e-6, atol=0)


def test_every_drop_of_the_encoder_is_a_given_one(classifier: Classifier) -> None:
    encoder = classifier.encoder
    assert not any(isinstance(module, DropPath) for module in encoder.modules())
    rates = [module.rate for module in encoder.modules() if isinstance(module, DropPathFromNoise)]
    assert rates == pytest.approx([0.5 / 3, 0.5 / 3, 1 / 3, 1 / 3, 0.5, 0.5])  # two per block; the first never drops
    assert count_drop_paths(encoder) == len(rates)


def test_the_same_rows_give_the_same_outputs_whatever_the_split(classifier: Classifier) -> None:
    images, noise = torch.rand(6, 3, 16, 16), torch.rand(6, count_drop_paths(classifier.encoder))
    expected = classifier(images, noise)
    for size in (1, 2, 3):
        logits = [classifier(*part) for part in zip(images.split(size), noise.split(size), strict=True)]
        torch.testing.assert_close(torch.cat(logits), expected, rtol=1e-5, atol=1e-6)
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    torch.testing.assert_close(classifier(images[order], noise[order]), expected[order], rtol=1e-5, atol=1e-6)


def test_a_sample_whose_branches_all_drop_leaves_only_the_first_block(classifier: Classifier) -> None:
    images = torch.rand(2, 3, 16, 16)
    noise = torch.stack([torch.zeros(6), torch.ones(6)])
    logits = classifier(images, noise)
    encoder: Any = classifier.eval().encoder
    encoder.blocks = encoder.blocks[:1]
    shallow = classifier(images)
    torch.testing.assert_close(logits[0], shallow[0], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(logits[1], shallow[1], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("name", "positions"), KINDS)
def test_every_kind_drops_by_given_numbers(name: str, positions: Positions | None) -> None:
    """Two blocks with rates 0 and 0.5: the first image loses both branches of the second block, the second image none."""
    encoder = encoder_of(name, positions, drop_path=0.5, classes=5)
    model = Classifier(encoder).train()
    images, noise = torch.rand(2, 3, 16, 16), torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    assert count_drop_paths(encoder) == 2
    logits = model(images, noise)
    torch.testing.assert_close(model(images.flip(0), noise.flip(0)).flip(0), logits, rtol=1e-4, atol=1e-5)
    shallow = Classifier(encoder_of(name, positions, drop_path=0.5, classes=5)).eval()
    cast(Any, shallow.encoder).blocks = shallow.encoder.blocks[:1]
    torch.testing.assert_close(shallow(images)[0], logits[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(shallow(images)[1], logits[1], rtol=1e-2, atol=1e-2)


def test_evaluation_drops_nothing_and_needs_no_numbers(classifier: Classifier) -> None:
    images = torch.rand(2, 3, 16, 16)
    classifier.eval()
    assert torch.equal(classifier(images), classifier(images, torch.zeros(2, 6)))


def test_training_without_numbers_or_with_another_batch_is_a_mistake(classifier: Classifier) -> None:
    images = torch.rand(2, 3, 16, 16)
    with pytest.raises(AssertionError, match="set_drop_path_noise"):
        classifier(images)
    with pytest.raises(AssertionError, match="set_drop_path_noise"):
        classifier(images, torch.rand(3, 6))
    with pytest.raises(AssertionError, match="6 drop paths"):
        set_drop_path_noise(classifier.encoder, torch.rand(2, 5))


def test_recomputed_activations_see_the_same_drops(classifier: Classifier) -> None:
    images, noise = torch.rand(3, 3, 16, 16), torch.rand(3, 6)

    def gradients() -> list[torch.Tensor]:
        classifier.zero_grad()
        classifier(images, noise).square().sum().backward()
        return [parameter.grad.clone() for parameter in classifier.parameters() if parameter.grad is not None]

    expected = gradients()
    classifier.encoder.set_grad_checkpointing(True)
    for gradient, expected_gradient in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=0)
