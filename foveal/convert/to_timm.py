"""A folder of timm's: ``config.json`` and ``model.safetensors``, opened by ``timm.create_model("local-dir:FOLDER")``."""

from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor

from foveal.convert.compare import Reopened
from foveal.convert.files import describe_library, write_config, write_weights
from foveal.convert.image_processor import describe_pixels, measure_pixels
from foveal.convert.outputs import NamedOutputs
from foveal.convert.request import Request
from foveal.errors import ExportError
from foveal.inference.exported_model import ExportedModel
from foveal.weights.timm_folder import build_timm_config, explain_not_timm

_LOADING = """\
import timm
model = timm.create_model("local-dir:{folder}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)"""


def write(request: Request, draft: Path) -> Reopened:
    """Write the folder and open it in timm. Raises: ExportError if timm has no such model."""
    source, model = request.source, request.model
    reason = explain_refusal(model)
    if reason is not None:
        raise ExportError(f"timm cannot hold {source.export}: {reason}")
    write_folder(model, draft)
    opened: Any = timm.create_model(f"local-dir:{draft}", pretrained=True).eval()
    outputs = NamedOutputs(model)

    @torch.no_grad()
    def run(pixels: Tensor) -> dict[str, Tensor]:
        return outputs.name([opened(outputs.to_input(pixels))])

    transform: Any = create_transform(**resolve_model_data_config(opened), is_training=False)
    difference = measure_pixels(transform, model.transform, request.images)
    note = describe_pixels("transform", model.transform, difference)
    classes = opened.pretrained_cfg.get("label_names") or () if model.classes else ()
    return Reopened(describe_library("timm"), outputs.from_pixels, run, tuple(classes), _LOADING, notes=(note,))


def explain_refusal(model: ExportedModel) -> str | None:
    """Return why timm cannot build a model; None if it can."""
    return explain_not_timm(model.card)


def write_folder(model: ExportedModel, draft: Path) -> None:
    """Write ``config.json`` and ``model.safetensors``. Raises: OSError."""
    write_config(draft / "config.json", build_timm_config(model.card))
    write_weights(draft / "model.safetensors", model.module.state_dict())
