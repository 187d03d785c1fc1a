"""A program of torch.export: the model's graph and weights in one file that PyTorch runs without foveal and timm."""

import io
import json
from pathlib import Path

import torch

from foveal.convert.compare import Reopened
from foveal.convert.outputs import NamedOutputs
from foveal.convert.request import Request
from foveal.convert.trace import build_facts, trace

_LOADING = """\
import torch
model = torch.export.load("{folder}/model.pt2").module()"""
_FACTS = "foveal.json"


def write(request: Request, draft: Path) -> Reopened:
    """Trace the model with any batch size, save it, load it again. Raises: ExportError if it cannot be traced."""
    source, model, options, images = request.source, request.model, request.options, request.images
    outputs = NamedOutputs(model, options)
    program = trace(outputs, images.pixels, source)
    file = draft / "model.pt2"
    facts = json.dumps(build_facts(model, outputs.names), ensure_ascii=False)
    archive = io.BytesIO()  # on a disk that is full, torch's own writer of files ends the process
    torch.export.save(program, archive, extra_files={_FACTS: facts})
    file.write_bytes(archive.getbuffer())
    extra_files = {_FACTS: ""}
    loaded = torch.export.load(file, extra_files=extra_files).module()

    @torch.no_grad()
    def run(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        return outputs.name(loaded(outputs.to_input(pixels)))

    return Reopened(
        f"torch {torch.__version__} (torch.export.load)",
        outputs.from_pixels,
        run,
        tuple(json.loads(extra_files[_FACTS])["classes"]),
        _LOADING,
        notes=(
            f"outputs in this order: {', '.join(outputs.names)}; classes and pixel statistics: {_FACTS} in the file",
        ),
    )
