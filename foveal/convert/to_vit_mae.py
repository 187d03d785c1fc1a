"""``ViTMAEForPreTraining`` of a pretraining run: encoder and decoder of its newest checkpoint. L patches."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveal.convert.autoencoder import Autoencoder, load_autoencoder
from foveal.convert.compare import Reopened
from foveal.convert.files import describe_library, import_extra, write_config, write_weights
from foveal.convert.image_processor import write_image_processor
from foveal.convert.images import ComparisonImages
from foveal.convert.vit_names import (
    build_vit_settings,
    explain_not_vit,
    reorder_patch_values,
    to_decoder_weights,
    to_vit_weights,
)
from foveal.data.image.transforms import normalise
from foveal.errors import ExportError
from foveal.inference.exported_model import ExportedModel
from foveal.models.patches import build_reconstruction_targets, count_visible, patchify, reconstruction_loss

_NOISE_SEED = 0
_LOADING = """\
from transformers import AutoImageProcessor, ViTMAEForPreTraining
model = ViTMAEForPreTraining.from_pretrained("{folder}").eval()
processor = AutoImageProcessor.from_pretrained("{folder}")"""


def write_autoencoder(run: Path, model: ExportedModel, draft: Path, images: ComparisonImages) -> Reopened:
    """Write the folder and open it in transformers. Raises: ExportError if ``ViTMAEForPreTraining`` cannot hold it."""
    autoencoder = load_autoencoder(run)
    if autoencoder.step != model.card.step:
        raise ExportError(
            f"{run} has an export of step {model.card.step}, and its newest whole checkpoint, which has the decoder, is of "
            f"step {autoencoder.step}; give {model.path} for the encoder alone"
        )
    reason = _explain_refusal(autoencoder)
    if reason is not None:
        raise ExportError(
            f"ViTMAEForPreTraining cannot hold {run}: {reason}; {model.path} has the encoder alone, which "
            f"`foveal export {model.path} --to hf` writes"
        )
    encoder, decoder = autoencoder.model.encoder, autoencoder.model.decoder
    settings = build_vit_settings(encoder) | _decoder_settings(autoencoder)
    weights = {f"vit.{name}": value for name, value in to_vit_weights(encoder).items()}
    weights |= to_decoder_weights(decoder, settings["num_channels"], settings["patch_size"])
    config = {"architectures": ["ViTMAEForPreTraining"], "model_type": "vit_mae", "dtype": "float32"} | settings
    write_config(draft / "config.json", config)
    write_weights(draft / "model.safetensors", weights)
    note = write_image_processor(model.transform, draft, images)
    opened, report = import_extra("transformers").ViTMAEForPreTraining.from_pretrained(
        draft, local_files_only=True, output_loading_info=True, dtype=torch.float32
    )
    if any(report.values()):
        raise ExportError(f"ViTMAEForPreTraining does not take the weights as written: {report}")
    checkpoint = f"encoder and decoder of step {autoencoder.step}, the run's newest checkpoint"
    return _reopen(autoencoder, model, opened.eval(), (checkpoint, note))


def _explain_refusal(autoencoder: Autoencoder) -> str | None:
    encoder: Any = autoencoder.model.encoder
    reason = explain_not_vit(encoder)
    if reason is not None:
        return reason
    rows, columns = encoder.patch_embed.img_size
    if rows != columns:
        return "it takes square images"
    if autoencoder.predicts_features:
        return "it predicts pixels, and target=features predicts features"
    num_patches, ratio = encoder.patch_embed.num_patches, autoencoder.mask_ratio
    if int(num_patches * (1 - ratio)) != count_visible(num_patches, ratio):
        return f"it shows another number of {num_patches} patches at mask_ratio={ratio}"
    norm, decoder = encoder.norm.eps, autoencoder.model.decoder
    if decoder.norm.eps != norm or build_vit_settings(encoder)["hidden_act"] != "gelu":
        return "its encoder and decoder have one kind of norm and activation"
    return None if encoder.blocks[0].attn.qkv.bias is not None else "its encoder has biases if its decoder has"


def _decoder_settings(autoencoder: Autoencoder) -> dict[str, Any]:
    decoder: Any = autoencoder.model.decoder
    block = decoder.blocks[0]
    return {
        "decoder_hidden_size": decoder.embed.out_features,
        "decoder_num_hidden_layers": len(decoder.blocks),
        "decoder_num_attention_heads": block.attn.num_heads,
        "decoder_intermediate_size": block.mlp.fc1.out_features,
        "mask_ratio": autoencoder.mask_ratio,
        "norm_pix_loss": autoencoder.norm_pix,
    }


def _reopen(autoencoder: Autoencoder, model: ExportedModel, opened: Any, notes: tuple[str, ...]) -> Reopened:
    """Compare predictions and loss under the same mask noise."""
    own, mean, std = autoencoder.model, model.card.mean, model.card.std
    patch_embed: Any = own.encoder.patch_embed
    patch, channels = patch_embed.patch_size[0], patch_embed.proj.in_channels

    def draw_noise(pixels: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(_NOISE_SEED)
        return torch.rand(len(pixels), patch_embed.num_patches, generator=generator)

    @torch.no_grad()
    def run_own(pixels: Tensor) -> dict[str, Tensor]:
        images = normalise(pixels, mean, std)
        output = own(images, draw_noise(pixels), autoencoder.mask_ratio)
        targets = build_reconstruction_targets(images, output.masked_indices, patch, autoencoder.norm_pix)
        total, count = reconstruction_loss(output.masked_patch_pred, targets)
        predictions = torch.zeros_like(patchify(images, patch))
        indices = output.masked_indices[:, :, None].expand_as(output.masked_patch_pred)
        predictions.scatter_(1, indices, output.masked_patch_pred)
        return {
            "predictions of masked patches": reorder_patch_values(predictions, channels, patch, dim=2),
            "loss": (total / count)[None],
        }

    @torch.no_grad()
    def run_opened(pixels: Tensor) -> dict[str, Tensor]:
        answer = opened(normalise(pixels, mean, std), noise=draw_noise(pixels))
        predictions = answer.logits * answer.mask[:, :, None]
        return {"predictions of masked patches": predictions, "loss": answer.loss[None]}

    library = f"{describe_library('transformers')} as ViTMAEForPreTraining"
    return Reopened(library, run_own, run_opened, (), _LOADING, notes=notes)
