"""The graph of an exported model, of any number of images, by torch.export."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from foveal.convert.outputs import NamedOutputs
from foveal.convert.source import Source
from foveal.errors import ExportError
from foveal.inference.exported_model import ExportedModel
from foveal.models.backbone import format_error_one_line


def trace(outputs: NamedOutputs, pixels: Tensor, source: Source) -> Any:
    """Return the program of ``outputs``, whose input's first dimension is free. Raises: ExportError.

    ``pixels`` uint8 [N, C, H, W], at least two: torch.export takes a single image for a constant.
    """
    example = outputs.to_input(pixels[:2])
    with tracing():
        try:
            return torch.export.export(
                outputs.eval(), (example,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}}
            )
        except Exception as error:  # noqa: BLE001 - torch.export raises exceptions of many kinds, private ones too
            reason = explain_failure(error)
            raise ExportError(f"torch.export cannot trace the model of {source.export}: {reason}") from None


@contextmanager
def tracing() -> Iterator[None]:
    """Trace without gradients and without torch's warnings about its own internals.

    Attention is that of torch's formula: the layouts in memory that a fused kernel of this processor promises would be
    part of the graph, and ONNX cannot keep them.
    """
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def build_facts(model: ExportedModel, names: tuple[str, ...]) -> dict[str, Any]:
    """Return what a user of the graph needs beside it."""
    return {
        "task": model.task,
        "classes": list(model.classes),
        "mean": list(model.card.mean),
        "std": list(model.card.std),
        "image_size": list(model.transform.image_hw),
        "crop_ratio": model.transform.crop_ratio,
        "interpolation": model.transform.interpolation,
        "outputs": list(names),
    }


def explain_failure(error: BaseException) -> str:
    """Return the message of the first error of a chain, in a line: torch's own advice stands around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return format_error_one_line(error)[:300] if isinstance(error, Exception) else type(error).__name__
