"""A folder of transformers': ``from_pretrained(FOLDER)`` gives the model, its image processor and its class names.

A pretraining run becomes ``ViTMAEForPreTraining``, with its decoder; a plain encoder ``ViTModel``; a classifier on the
class token ``ViTForImageClassification``. What these do not hold, such as registers, rotary positions or a network of
convolutions, becomes a folder of timm's, which transformers opens as ``TimmWrapperModel``.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveal.convert import to_timm
from foveal.convert.compare import Reopened
from foveal.convert.files import describe_library, import_extra, write_config, write_weights
from foveal.convert.image_processor import describe_pixels, measure_pixels, open_processor, write_image_processor
from foveal.convert.images import ComparisonImages
from foveal.convert.outputs import NamedOutputs
from foveal.convert.request import Request
from foveal.convert.to_vit_mae import write_autoencoder
from foveal.convert.vit_names import build_vit_settings, explain_not_vit, to_vit_weights
from foveal.errors import ExportError
from foveal.inference.exported_model import ENCODER, ExportedModel

_MULTILABEL = "multilabel"  # the task whose classes exclude no other class
_LOADING = """\
from transformers import AutoImageProcessor, {auto}
model = {auto}.from_pretrained("{{folder}}").eval()
processor = AutoImageProcessor.from_pretrained("{{folder}}")"""


def write(request: Request, draft: Path) -> Reopened:
    """Write the folder and open it in transformers. Raises: ExportError if no class of transformers holds the model."""
    source, model, images = request.source, request.model, request.images
    with quiet_transformers():
        if source.run is not None and model.card.stage == "pretrain":
            return write_autoencoder(source.run, model, draft, images)
        if model.card.head is not None:
            raise ExportError(
                f"transformers cannot hold {source.export}: it has no head of foveal's for task {model.task}; onnx, pt2 "
                f"and safetensors hold it"
            )
        why_not_vit = explain_not_vit(model.module)
        if why_not_vit is None:
            return _write_vit(model, draft, images)
        why_not_timm = to_timm.explain_refusal(model)
        if why_not_timm is not None:
            raise ExportError(
                f"transformers cannot hold {source.export}: {why_not_vit}; as a model of timm: {why_not_timm}"
            )
        return _write_timm_wrapper(model, draft, why_not_vit, images)


def _write_vit(model: ExportedModel, draft: Path, images: ComparisonImages) -> Reopened:
    encoder: Any = model.module
    weights, settings = to_vit_weights(encoder), build_vit_settings(encoder)
    if _has_head(model):
        name = "ViTForImageClassification"
        weights = {f"vit.{key}": value for key, value in weights.items()}
        weights |= {f"classifier.{kind}": value for kind, value in encoder.head.state_dict().items()}
        settings |= _label_settings(model)
    else:
        # The pooler is the identity, so that pooler_output is foveal's feature, the class token.
        name, width = "ViTModel", encoder.embed_dim
        weights |= {"pooler.dense.weight": torch.eye(width), "pooler.dense.bias": torch.zeros(width)}
        settings |= {"pooler_act": "linear"}
    config = {"architectures": [name], "model_type": "vit", "dtype": "float32"} | settings
    write_config(draft / "config.json", config)
    write_weights(draft / "model.safetensors", weights)
    note = write_image_processor(model.transform, draft, images)
    return _reopen(model, draft, name, (note,))


def _has_head(model: ExportedModel) -> bool:
    return model.task != ENCODER  # foreign heads may have no class names


def _label_settings(model: ExportedModel) -> dict[str, Any]:
    problem = "multi_label_classification" if model.task == _MULTILABEL else "single_label_classification"
    if not model.classes:
        own: Any = model.module
        return {"num_labels": own.num_classes, "problem_type": problem}
    return {
        "id2label": {str(number): name for number, name in enumerate(model.classes)},
        "label2id": {name: number for number, name in enumerate(model.classes)},
        "problem_type": problem,
    }


def _write_timm_wrapper(model: ExportedModel, draft: Path, why_not_vit: str, images: ComparisonImages) -> Reopened:
    to_timm.write_folder(model, draft)
    name = "TimmWrapperForImageClassification" if _has_head(model) else "TimmWrapperModel"
    note = f"as a model of timm, which must be installed to open it: {why_not_vit}"
    difference = measure_pixels(open_processor(draft), model.transform, images)
    return _reopen(model, draft, name, (note, describe_pixels("image processor", model.transform, difference)))


def _reopen(model: ExportedModel, draft: Path, name: str, notes: tuple[str, ...]) -> Reopened:
    transformers = import_extra("transformers")
    auto = "AutoModelForImageClassification" if _has_head(model) else "AutoModel"
    opened, report = getattr(transformers, auto).from_pretrained(
        draft, local_files_only=True, output_loading_info=True, dtype=torch.float32
    )
    check_loading_report(report, name)
    if type(opened).__name__ != name:
        raise ExportError(f"transformers opens the folder as {type(opened).__name__}, and {name} was written")
    opened.eval()
    outputs = NamedOutputs(model)

    @torch.no_grad()
    def run(pixels: Tensor) -> dict[str, Tensor]:
        answer = opened(outputs.to_input(pixels))
        return outputs.name([answer.logits if _has_head(model) else answer.pooler_output])

    labels = opened.config.id2label if model.classes else {}
    return Reopened(
        f"{describe_library('transformers')} as {name}",
        outputs.from_pixels,
        run,
        tuple(labels[number] for number in range(len(labels))),
        _LOADING.format(auto=auto),
        notes=notes,
    )


def check_loading_report(report: dict[str, Any], name: str) -> None:
    """Raise ExportError if transformers missed weights, or left some over."""
    problems = {problem: sorted(map(str, names))[:3] for problem, names in report.items() if names}
    if problems:
        raise ExportError(f"{name} does not take the weights as written: {problems}")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and advice off the terminal."""
    transformers = import_extra("transformers")
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        with contextlib.suppress(AttributeError):
            if bars:
                transformers.utils.logging.enable_progress_bar()
