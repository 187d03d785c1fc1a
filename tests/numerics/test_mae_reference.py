"""Our masked autoencoder is Hugging Face's ``ViTMAEForPreTraining``: same weights, same noise, same loss, same gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from foveal.models.config import DecoderConfig, VitConfig
from foveal.models.mae import MaskedAutoencoder
from foveal.models.patches import build_reconstruction_targets, reconstruction_loss
from foveal.models.vit import build_encoder

transformers = pytest.importorskip("transformers", reason="needs transformers, of the test extra")

PATCH, SIDE, CHANNELS, RATIO = 4, 32, 3, 0.75
NEW = {
    "layers": "vit.layers",
    "query": "attention.q_proj",
    "key": "attention.k_proj",
    "value": "attention.v_proj",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
OLD = {  # what transformers wrote before version 5, and what the published checkpoints hold
    "layers": "vit.encoder.layer",
    "query": "attention.attention.query",
    "key": "attention.attention.key",
    "value": "attention.attention.value",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
TOPS = {
    "encoder.cls_token": "vit.embeddings.cls_token",
    "encoder.pos_embed": "vit.embeddings.position_embeddings",
    "encoder.patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "encoder.norm": "vit.layernorm",
    "decoder.embed": "decoder.decoder_embed",
    "decoder.mask_token": "decoder.mask_token",
    "decoder.norm": "decoder.decoder_norm",
    "decoder.predict": "decoder.decoder_pred",
}


def to_hugging_face(tensors: dict[str, torch.Tensor], names: dict[str, str]) -> dict[str, torch.Tensor]:
    """Our weights or gradients under their names; linear, so that it serves both."""
    found = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        if ".blocks." not in name:
            if name.startswith("decoder.predict"):  # they order a patch (row, column, channel)
                found[f"{TOPS[stem]}.{kind}"] = (
                    tensor.unflatten(0, (CHANNELS, PATCH, PATCH)).movedim(0, 2).flatten(0, 2)
                )
            else:
                found[TOPS[name] if name in TOPS else f"{TOPS[stem]}.{kind}"] = tensor
            continue
        part, _, index, *inner = stem.split(".")
        layer = f"{names['layers'] if part == 'encoder' else 'decoder.decoder_layers'}.{index}"
        match ".".join(inner):
            case "attn.qkv":
                for which, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                    found[f"{layer}.{names[which]}.{kind}"] = third
            case "norm1":
                found[f"{layer}.layernorm_before.{kind}"] = tensor
            case "norm2":
                found[f"{layer}.layernorm_after.{kind}"] = tensor
            case plain:
                found[f"{layer}.{names[plain]}.{kind}"] = tensor
    return found


def ours() -> MaskedAutoencoder:
    torch.manual_seed(0)
    encoder = build_encoder(VitConfig(patch=PATCH, width=48, depth=3, heads=3), image_size=SIDE, channels=CHANNELS)
    model = MaskedAutoencoder(encoder, DecoderConfig(width=32, depth=2, heads=4))
    for parameter in model.parameters():  # biases and norms that are not 0 and 1 leave no mistake unseen
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def theirs(model: MaskedAutoencoder, normalise: bool, names: dict[str, str], folder: Path) -> Any:
    config = transformers.ViTMAEConfig(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=192,
        layer_norm_eps=1e-6,
        image_size=SIDE,
        patch_size=PATCH,
        num_channels=CHANNELS,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=128,
        mask_ratio=RATIO,
        norm_pix_loss=normalise,
    )
    state = to_hugging_face(dict(model.state_dict()), names)
    state["decoder.decoder_pos_embed"] = torch.cat([torch.zeros(1, 32), model.decoder.positions])[None]
    config.save_pretrained(folder)
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    reference, report = transformers.ViTMAEForPreTraining.from_pretrained(
        folder, output_loading_info=True, local_files_only=True
    )
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return reference.float().train()


@pytest.mark.parametrize("names", [NEW, OLD], ids=["transformers-5", "before"])
@pytest.mark.parametrize("normalise", [False, True], ids=["pixels", "normalised"])
def test_same_weights_and_noise_give_the_same_loss_and_gradients(
    normalise: bool, names: dict[str, str], tmp_path: Path
) -> None:
    model = ours()
    reference = theirs(model, normalise, names, tmp_path)
    images, noise = torch.randn(4, CHANNELS, SIDE, SIDE), torch.rand(4, (SIDE // PATCH) ** 2)

    pred, masked, *_ = model(images, noise, RATIO)
    total, weight = reconstruction_loss(pred, build_reconstruction_targets(images, masked, PATCH, normalise))
    loss = total / weight
    loss.backward()
    expected = reference(images, noise=noise)
    expected.loss.backward()

    their_masks = [row.nonzero().flatten().tolist() for row in expected.mask]
    assert [sorted(row) for row in masked.tolist()] == their_masks
    assert abs(loss.item() - expected.loss.item()) < 1e-6
    found = to_hugging_face({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, NEW)
    wanted = {
        n: p.grad for n, p in reference.named_parameters() if not n.endswith(("position_embeddings", "pos_embed"))
    }
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
