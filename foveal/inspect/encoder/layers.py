"""The layers of an encoder whose outputs are looked at. B images, N tokens, D width, L = rows * columns patches."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_MAX_LAYERS = 64  # deeper models of unknown structure have outputs of too many modules for a chart


def has_patch_tokens(encoder: Any) -> bool:
    """Return whether an encoder's blocks all have the tokens of one grid of patches, as those of a plain ViT."""
    grid = getattr(getattr(encoder, "patch_embed", None), "grid_size", None)
    return (
        grid is not None
        and hasattr(encoder, "num_prefix_tokens")
        and isinstance(getattr(encoder, "blocks", None), nn.Module)
    )


def find_layers(encoder: Any) -> dict[str, nn.Module]:
    """Return the layers of an encoder by name, in their order: the blocks of a ViT, or the stages that timm names."""
    if has_patch_tokens(encoder):
        return {f"block {number}": block for number, block in enumerate(encoder.blocks, 1)}
    names = [info["module"] for info in _feature_info(encoder)]
    modules = dict(encoder.named_modules())
    stages = {name: modules[name] for name in names if name in modules}
    return stages or dict(list(encoder.named_children())[:_MAX_LAYERS])


def has_class_token(encoder: Any) -> bool:
    """Return whether the first token of an encoder is a class token."""
    return getattr(encoder, "cls_token", None) is not None


def to_feature_map(encoder: Any, output: Any) -> Tensor | None:
    """Return a layer's output as a map [B, D, rows, columns]; None if it has no places."""
    if not isinstance(output, Tensor):
        return None
    if output.ndim == 3 and has_patch_tokens(encoder):
        patches, grid_hw = output[:, encoder.num_prefix_tokens :], encoder.patch_embed.grid_size
        return patches.transpose(1, 2).unflatten(2, grid_hw) if patches.shape[1] == grid_hw[0] * grid_hw[1] else None
    if output.ndim != 4:
        return None
    return output.permute(0, 3, 1, 2) if getattr(encoder, "output_fmt", "NCHW") == "NHWC" else output


@contextmanager
def captured_outputs(layers: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that holds the outputs of a forward's layers, those of the newest one."""
    outputs: dict[str, Tensor] = {}

    def capture(name: str, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple | list) and output else output
        if isinstance(tensor, Tensor):
            outputs[name] = tensor.detach()

    handles = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: capture(name, output))
        for name, module in layers.items()
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _feature_info(encoder: Any) -> list[dict[str, Any]]:
    """Return timm's list of stages; empty if it has none."""
    info = getattr(encoder, "feature_info", None)
    entries = getattr(info, "info", info)
    return [entry for entry in entries if entry.get("module")] if isinstance(entries, list) else []
