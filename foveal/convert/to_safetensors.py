"""One safetensors file: encoder and head, and as metadata all that a reader needs beside them."""

import copy
import json
from pathlib import Path

import torch
from safetensors import safe_open

from foveal.convert.compare import TOLERANCE, Reopened
from foveal.convert.files import describe_library, write_weights
from foveal.convert.outputs import NamedOutputs
from foveal.convert.request import Request
from foveal.errors import ExportError
from foveal.inference.exported_model import ExportedModel

# By name: the type, the largest relative error of a weight that is rounded to it, and the largest error near 0.
_DTYPES = {
    "fp32": (torch.float32, 0.0, 0.0),
    "bf16": (torch.bfloat16, 2**-8, 2**-134),
    "fp16": (torch.float16, 2**-11, 2**-25),
}
_LOADING = """\
from safetensors import safe_open
with safe_open("{folder}/model.safetensors", "pt") as file:
    weights, facts = {{name: file.get_tensor(name) for name in file.keys()}}, file.metadata()"""


def write(request: Request, draft: Path) -> Reopened:
    """Write the weights under the module's names, read them back into a copy of the module. Raises: ExportError."""
    source, model, options = request.source, request.model, request.options
    dtype, rounding, smallest = _DTYPES[options.dtype]
    weights = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in model.module.state_dict().items()
    }
    overflowing = [name for name, value in weights.items() if not value.isfinite().all()]
    if overflowing:
        raise ExportError(
            f"{options.dtype} cannot hold {overflowing[0]} of {source.export}: it has values beyond its range"
        )
    card = model.card
    facts = {
        "classes": list(model.classes),
        "mean": list(card.mean),
        "std": list(card.std),
        "image_size": list(model.transform.image_hw),
        "task": model.task,
        "encoder": card.encoder,
        "head": card.head,
    }
    metadata = {name: json.dumps(value, ensure_ascii=False) for name, value in facts.items()}
    write_weights(draft / "model.safetensors", weights, metadata)
    with safe_open(draft / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the handle is not iterable
        classes = tuple(json.loads(file.metadata()["classes"]))
    if any(not torch.equal(stored[name], value) for name, value in weights.items()):
        raise ExportError(f"{draft.name}/model.safetensors has other weights than were written")
    copied = copy.deepcopy(model.module)
    for parameter in copied.parameters():
        torch.nn.init.zeros_(parameter.requires_grad_(False))
    copied.load_state_dict(stored)
    reopened = NamedOutputs(ExportedModel(model.path, card, model.task, copied, model.transform, model.classes))
    note = f"weights are rounded to {options.dtype}: each by at most {rounding:.1e} of its value, or by {smallest:.1e}"
    return Reopened(
        describe_library("safetensors"),
        NamedOutputs(model).from_pixels,
        reopened.from_pixels,
        classes,
        _LOADING,
        TOLERANCE if options.dtype == "fp32" else None,
        () if options.dtype == "fp32" else (note,),
    )
