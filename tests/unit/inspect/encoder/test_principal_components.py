"""Features as colours: planted components are found, and shares of variance are what was planted."""

import pytest
import torch

from foveal.inspect.encoder.principal_components import compute_position_share, project_to_colors


@pytest.mark.parametrize("width", [8, 200])  # fewer and more channels than places
def test_the_strongest_direction_is_red(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(width, 3, generator=generator)).Q.T
    scores = torch.randn(2, 4, 4, 3, generator=generator)
    scores -= scores.mean((0, 1, 2))
    scores = torch.linalg.qr(scores.reshape(32, 3)).Q.reshape(2, 4, 4, 3) * torch.tensor([3.0, 2.0, 1.0])
    colors, shares = project_to_colors((5 + scores @ axes).permute(0, 3, 1, 2))
    assert shares == pytest.approx([9 / 14, 4 / 14, 1 / 14], abs=1e-5)
    assert colors.shape == (2, 3, 4, 4)
    assert colors.dtype == torch.uint8
    for component in range(3):
        drawn, planted = colors[:, component].flatten().double(), scores[..., component].flatten().double()
        assert abs(float(torch.corrcoef(torch.stack([drawn, planted]))[0, 1])) > 0.99


def test_the_same_features_have_the_same_colours_in_every_image() -> None:
    features = torch.randn(1, 16, 3, 5, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1, -1)
    colors, _ = project_to_colors(features)
    assert torch.equal(colors[0], colors[2])
    assert torch.equal(project_to_colors(-features)[0], project_to_colors(-features)[0])


def test_what_does_not_vary_is_grey() -> None:
    colors, shares = project_to_colors(torch.ones(2, 4, 3, 3))
    assert bool((colors == 128).all())
    assert shares == [0, 0, 0]
    assert project_to_colors(torch.randn(1, 2, 1, 1))[0].unique().tolist() == [128]  # one place
    assert project_to_colors(torch.randn(2, 1, 4, 4))[1][1:] == [0, 0]  # one channel


def test_the_share_of_the_position() -> None:
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(6, 64, 8, 8, generator=generator)
    position = torch.randn(1, 64, 8, 8, generator=generator)
    assert compute_position_share(position.expand(6, -1, -1, -1)) == pytest.approx(1)
    assert compute_position_share(own) == pytest.approx(0, abs=0.02)
    assert compute_position_share(own + position) == pytest.approx(0.5, abs=0.03)
    assert compute_position_share(own[:1]) is None
    assert compute_position_share(torch.ones(2, 3, 4, 4)) is None
