"""Students of distillation: an encoder, or a model of timm, with the modules that each method puts on it.

Every student maps (images, visible_indices, masked_indices) to a tuple of tensors; the indices are None unless the
method masks patches. Every parameter takes part in the outputs, if only with a zero gradient: an engine that shards
weights or reduces gradients waits for all of them.
B images, L patches, K visible, M masked, D student width, T teacher width, P values per patch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foveal.models.backbone import FeatureFn, set_activation_checkpointing
from foveal.models.classify import build_distillation_head
from foveal.models.config import DecoderConfig
from foveal.models.encode import drop_registers, encode, encode_cls_and_patches, encode_layers, find_external_parameters
from foveal.models.mae import Decoder
from foveal.models.probes import encode_patch_mean
from foveal.models.timm_vit import Encoder, find_transformer_blocks
from foveal.models.token_positions import find_cross_module_parameters
from foveal.models.vit import init_linear_layers


class Students(nn.Module):
    """Students that share the teacher's targets and nothing else."""

    def __init__(
        self,
        students: Sequence[nn.Module],
        pool_features: Sequence[Callable[[Any, Tensor], Tensor]] | None = None,
    ) -> None:
        """``pool_features``: by student, its encoder's feature [B, D] of images; None: the patches' mean of each."""
        super().__init__()
        self._pool_features = pool_features or [encode_patch_mean] * len(students)
        # No ModuleList: FSDP2 would shard students of the same type as the blocks of one model.
        self.each = nn.ModuleDict({str(number): student for number, student in enumerate(students)})

    def forward(
        self,
        images: Tensor,
        visible_indices: Tensor | None = None,
        masked_indices: Tensor | None = None,
        *,
        features_only: bool = False,
    ) -> tuple[tuple[Tensor, ...], ...] | tuple[Tensor, ...]:
        """Return the outputs of each student for normalised images [B, C, H, W].

        ``features_only``: return the feature [B, D] of each student's encoder instead, as ``MaskedAutoencoder`` does.
        """
        if features_only:
            pairs = zip(self._pool_features, self._students(), strict=True)
            return tuple(pool(student.encoder, images) for pool, student in pairs)
        return tuple(student(images, visible_indices, masked_indices) for student in self.each.values())

    def set_grad_checkpointing(self, enable: bool) -> None:
        """Recompute the blocks' activations in the backward pass, as ``MaskedAutoencoder`` does."""
        for student in self._students():
            set_activation_checkpointing(student.encoder, enable)
            if getattr(student, "decoder", None) is not None:
                student.decoder.grad_checkpointing = enable

    def external_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that a forward reads outside their own module (see ``foveal.models.encode``)."""
        parameters: list[nn.Parameter] = []
        for student, pool in zip(self._students(), self._pool_features, strict=True):
            bypasses = student.bypasses_encoder_forward or pool is encode_patch_mean
            parameters += (find_external_parameters if bypasses else find_cross_module_parameters)(student.encoder)
        return parameters

    def transformer_blocks(self) -> list[nn.Module]:
        """Return the blocks that an engine may compile one by one, of every student."""
        return find_transformer_blocks(self)

    def _students(self) -> list[Any]:
        return list(self.each.values())


class FeatureStudent(nn.Module):
    """Linear maps from a model's image and patch features to the teacher's widths.

    ``extract_features`` returns the image feature and the patch features: ``encode_cls_and_patches`` of an encoder,
    ``forward_pooled_and_patches`` of a model of timm (``forward_pooled``: image feature only). Widths are (image,
    patches); ``with_patches=False`` ignores the patches.
    """

    def __init__(
        self,
        encoder: nn.Module,
        extract_features: FeatureFn,
        student_image_patch_widths: tuple[int, int],
        teacher_image_patch_widths: tuple[int, int],
        *,
        with_patches: bool,
    ) -> None:
        """Draw the linear maps from torch's global generator, after the encoder (``build_encoder``)."""
        super().__init__()
        self.encoder = encoder
        self.bypasses_encoder_forward = extract_features is encode_cls_and_patches
        self._extract_features = extract_features
        self.project_cls = nn.Linear(student_image_patch_widths[0], teacher_image_patch_widths[0])
        self.project_patches = (
            nn.Linear(student_image_patch_widths[1], teacher_image_patch_widths[1]) if with_patches else None
        )
        init_linear_layers(self.project_cls)
        if self.project_patches is not None:
            init_linear_layers(self.project_patches)

    def forward(
        self, images: Tensor, _visible_indices: Tensor | None = None, _masked_indices: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Return predictions of the teacher's class token [B, T] and patches [B, L, T], of images [B, C, H, W]."""
        image_features, *patch_features = self._extract_features(self.encoder, images)
        cls_pred = self.project_cls(image_features)
        return (cls_pred,) if self.project_patches is None else (cls_pred, self.project_patches(patch_features[0]))


class LayerStudent(nn.Module):
    """Linear maps from the tokens of some blocks to the teacher's width, and optionally an MAE decoder.

    Bai et al., "Masked Autoencoders Enable Efficient Knowledge Distillers", 2023, figure 2. Blocks count from 1.
    """

    bypasses_encoder_forward = True

    def __init__(
        self,
        encoder: Encoder,
        block_numbers: Sequence[int],
        teacher_width: int,
        pixel_decoder_cfg: DecoderConfig | None,
    ) -> None:
        """Draw the maps, then the decoder, from torch's global generator, after the encoder (``build_encoder``)."""
        super().__init__()
        self.encoder = encoder
        self._depths = (*block_numbers, len(encoder.blocks))
        self.project = nn.ModuleList(nn.Linear(encoder.embed_dim, teacher_width) for _ in block_numbers)
        init_linear_layers(self.project)
        self.decoder = None if pixel_decoder_cfg is None else Decoder(pixel_decoder_cfg, encoder)

    def forward(self, images: Tensor, visible_indices: Tensor, masked_indices: Tensor) -> tuple[Tensor, ...]:
        """Return predictions of the teacher's tokens [B, 1 + K, T] per block, and of the masked patches [B, M, P]."""
        *block_tokens, last = encode_layers(self.encoder, images, self._depths, visible_indices)
        pairs = zip(self.project, block_tokens, strict=True)
        first, *rest = (project(drop_registers(self.encoder, tokens)) for project, tokens in pairs)
        last = self.encoder.norm(last)
        if self.decoder is None:
            return (first + _zero_with_gradient(last), *rest)
        return (first, *rest, self.decoder(last, visible_indices, masked_indices))


class RelationStudent(nn.Module):
    """An encoder that returns the queries, keys and values of some blocks (Ren et al., "TinyMIM", 2023).

    These are the outputs of the blocks' qkv layers, before norms and rotary positions. Blocks count from 1.
    """

    bypasses_encoder_forward = True

    def __init__(self, encoder: Encoder, block_numbers: Sequence[int]) -> None:
        super().__init__()
        self.encoder = encoder
        self._block_numbers = tuple(block_numbers)
        self._captured_qkv: dict[int, Tensor] | None = None
        for number in sorted(set(block_numbers)):
            # A hook instead of a second computation: an engine that shards by block gathers a block's weights only
            # while that block runs.
            layer: Any = encoder.blocks[number - 1]
            layer.attn.qkv.register_forward_hook(self._make_capture_hook(number))

    def forward(
        self, images: Tensor, _visible_indices: Tensor | None = None, _masked_indices: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Return concatenated queries, keys and values [B, 1 + L, 3 D] per block, of images [B, C, H, W]."""
        self._captured_qkv = captured_qkv = {}
        last = encode(self.encoder, images)
        self._captured_qkv = None  # a recomputation in the backward pass is not captured
        first, *rest = (drop_registers(self.encoder, captured_qkv[number]) for number in self._block_numbers)
        return (first + _zero_with_gradient(last), *rest)

    def _make_capture_hook(self, number: int) -> Callable[[nn.Module, Any, Tensor], None]:
        def capture(_layer: nn.Module, _inputs: Any, qkv: Tensor) -> None:
            if self._captured_qkv is not None:
                self._captured_qkv[number] = qkv

        return capture


class LogitStudent(nn.Module):
    """A classifier: an encoder with a head, or a model of timm."""

    bypasses_encoder_forward = False

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(
        self, images: Tensor, _visible_indices: Tensor | None = None, _masked_indices: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Return logits [B, classes] of normalised images [B, C, H, W]."""
        return (self.encoder(images.to(next(self.encoder.parameters()).dtype)),)


class RegisterTokenStudent(nn.Module):
    """A classifier whose first register is its distillation token (Touvron et al., "DeiT", 2021).

    The head on the register is not exported.
    """

    bypasses_encoder_forward = True

    def __init__(self, encoder: Encoder) -> None:
        """Draw the head on the register, after the encoder (``build_encoder``)."""
        super().__init__()
        self.encoder = encoder
        self.head_dist = build_distillation_head(encoder)

    def forward(
        self, images: Tensor, _visible_indices: Tensor | None = None, _masked_indices: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Return logits [B, classes] of the class and the distillation token, of normalised images [B, C, H, W]."""
        tokens = encode(self.encoder, images)
        return self.encoder.forward_head(tokens), self.head_dist(tokens[:, 1])


class TimmTokenStudent(nn.Module):
    """A transformer of timm with a distillation token and a head on it (Touvron et al., "DeiT", 2021)."""

    bypasses_encoder_forward = False

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        encoder.set_distilled_training(True)

    def train(self, mode: bool = True) -> "TimmTokenStudent":
        """Set the mode of the encoder's modules, but not its own flag: timm returns both logits in training mode only."""
        super().train(mode)
        self.encoder.training = True
        return self

    def forward(
        self, images: Tensor, _visible_indices: Tensor | None = None, _masked_indices: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Return logits [B, classes] of the class and the distillation token, of normalised images [B, C, H, W]."""
        return self.encoder(images.to(next(self.encoder.parameters()).dtype))


def _zero_with_gradient(tokens: Tensor) -> Tensor:
    """Return zero [B, 1, 1] that depends on tokens [B, N, D]: their parameters get a zero gradient instead of none."""
    return 0.0 * tokens.mean(dim=(1, 2), keepdim=True, dtype=torch.float32)
