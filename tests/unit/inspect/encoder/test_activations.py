"""Sizes of activations and their change from image to image, against numbers that are known."""

import math

import numpy as np
import pytest
import torch

from foveal.inspect.encoder.activations import ActivationMeter


def meter_of(*outputs: torch.Tensor) -> ActivationMeter:
    meter = ActivationMeter("block 1")
    for output in outputs:
        meter.add(output)
    return meter


def test_root_mean_square_extent_and_quantiles() -> None:
    values = torch.linspace(-3, 5, 8001)
    meter = meter_of(values, values)
    assert meter.rms == pytest.approx(float(values.square().mean().sqrt()))
    np.testing.assert_allclose(meter.extent(), (-3, 5), rtol=0.01)
    assert meter.largest() == pytest.approx(5, rel=0.01)
    for fraction in (0.01, 0.5, 0.99):
        assert meter.quantile(fraction) == pytest.approx(float(values.quantile(fraction)), rel=0.02)
    assert meter.counts.sum() == 2 * 8001


def test_values_of_any_size_are_counted() -> None:
    meter = meter_of(torch.tensor([0.0, 1e-9, -1e5, 1e30]))
    assert meter.counts.sum() == 4
    assert meter.extent()[0] == pytest.approx(-1e5, rel=0.01)


def test_variation_between_images() -> None:
    generator = torch.Generator().manual_seed(0)
    constant = torch.randn(100_000, generator=generator)
    own = [torch.randn(100_000, generator=generator) for _ in range(6)]
    assert meter_of(constant, constant, constant).variation == pytest.approx(0, abs=1e-3)
    assert meter_of(*own).variation == pytest.approx(1, rel=0.01)  # without bias in the number of images
    assert meter_of(*own[:2]).variation == pytest.approx(1, rel=0.01)
    mixed = meter_of(*(constant + 2 * values for values in own)).variation
    assert mixed == pytest.approx(2 / math.sqrt(5), rel=0.01)
    assert meter_of(constant).variation is None
    assert meter_of(torch.zeros(4), torch.zeros(4)).variation is None
