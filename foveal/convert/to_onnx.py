"""ONNX: the model's graph, of any number of images, with class names and pixel statistics as metadata."""

import contextlib
import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveal.convert.compare import Reopened
from foveal.convert.files import describe_library, import_extra
from foveal.convert.outputs import NamedOutputs
from foveal.convert.request import Request
from foveal.convert.source import Source
from foveal.convert.trace import build_facts, explain_failure, trace, tracing
from foveal.errors import ExportError
from foveal.models.backbone import format_error_one_line

_INPUT = "images"
_LARGEST_FILE = 1_900_000_000  # bytes; a file of protobuf has less than 2 GiB, and larger weights lie beside it
_LOADING = """\
import onnxruntime
session = onnxruntime.InferenceSession("{folder}/model.onnx")
outputs = session.run(None, {{"images": batch}})  # batch: NumPy, {dtype} [B, C, H, W]"""


def write(request: Request, draft: Path) -> Reopened:
    """Write model.onnx, check it, open it in onnxruntime. Raises: ExportError if ONNX cannot hold the graph."""
    source, model, options, images = request.source, request.model, request.options, request.images
    onnx, runtime = import_extra("onnx"), import_extra("onnxruntime")
    import_extra("onnxscript")
    outputs = NamedOutputs(model, options)
    graph = _to_onnx(trace(outputs, images.pixels, source), outputs, source)
    facts = build_facts(model, outputs.names)
    graph.model.metadata_props.update(
        (name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for name, value in facts.items()
    )
    file = draft / "model.onnx"
    num_bytes = sum(value.nbytes for value in model.module.state_dict().values())
    graph.save(file, external_data=num_bytes > _LARGEST_FILE)
    try:
        onnx.checker.check_model(str(file), full_check=True)
        session = _open_session(runtime, file)
    except Exception as error:  # noqa: BLE001 - checker, inference of shapes and runtime have exceptions of their own
        raise ExportError(f"ONNX refuses the graph of {source.export}: {format_error_one_line(error)}") from None

    def run(pixels: Tensor) -> dict[str, Tensor]:
        values = session.run(list(outputs.names), {_INPUT: outputs.to_input(pixels).numpy()})
        return outputs.name([torch.from_numpy(value) for value in values])

    metadata = session.get_modelmeta().custom_metadata_map
    pixels = "pixels of" if options.preprocess else "normalised"
    shape = f"[B, {model.transform.channels}, {', '.join(map(str, model.transform.image_hw))}]"
    return Reopened(
        f"{describe_library('onnxruntime')} on the CPU",
        outputs.from_pixels,
        run,
        tuple(json.loads(metadata["classes"])),
        _LOADING.replace("{dtype}", "uint8" if options.preprocess else "float32"),
        notes=(f"input {_INPUT}: {pixels} images {shape}; outputs: {', '.join(outputs.names)}",),
    )


def _to_onnx(program: Any, outputs: NamedOutputs, source: Source) -> Any:
    with _silence():
        try:
            return torch.onnx.export(
                program,
                dynamo=True,
                input_names=[_INPUT],
                output_names=list(outputs.names),
                verbose=False,
            )
        except Exception as error:  # noqa: BLE001 - the exporter raises exceptions of many kinds, private ones too
            raise ExportError(f"ONNX cannot hold the model of {source.export}: {explain_failure(error)}") from None


def _open_session(runtime: Any, file: Path) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the exporter's log and progress off the terminal: they speak of its own internals."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with tracing(), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
