"""What learns in distillation: an encoder, or a model of timm, and what each kind of lesson puts on it.

Every student takes (images, kept, masked), of which the last two are places of patches where a lesson masks any, and
answers with a tuple of tensors. Every parameter has a part in the answers, if only a zero one: an engine that shards
weights or reduces gradients waits for all of them.
B images, L patches, K kept, M masked, D student width, T teacher width, P numbers per patch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foveal.models.backbone import set_activation_checkpointing
from foveal.models.classify import build_distillation_head
from foveal.models.encode import drop_registers, encode, encode_cls_and_patches, encode_layers, find_external_parameters
from foveal.models.mae import Decoder, DecoderConfig
from foveal.models.timm_vit import Encoder
from foveal.models.token_positions import find_cross_module_parameters
from foveal.models.vit import init_linear_layers

FeatureFn = Callable[[Any, Tensor], tuple[Tensor, ...]]


class Students(nn.Module):
    """Students that share a lesson and nothing else."""

    def __init__(self, students: Sequence[nn.Module]) -> None:
        super().__init__()
        # No ModuleList: FSDP2 would take students of one type for the blocks of one model.
        self.each = nn.ModuleDict({str(number): student for number, student in enumerate(students)})

    def forward(
        self, images: Tensor, visible_indices: Tensor | None = None, masked_indices: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], ...]:
        """The answers of each student to normalised images [B, C, H, W]."""
        return tuple(student(images, visible_indices, masked_indices) for student in self.each.values())

    def set_grad_checkpointing(self, enable: bool) -> None:
        """Recompute the blocks in the backward pass, as ``MaskedAutoencoder`` does."""
        for student in self._students():
            set_activation_checkpointing(student.encoder, enable)
            if getattr(student, "decoder", None) is not None:
                student.decoder.grad_checkpointing = enable

    def external_parameters(self) -> list[nn.Parameter]:
        """The parameters that a forward reads outside the module that owns them (see ``foveal.models.encode``)."""
        return [
            each
            for student in self._students()
            for each in (
                find_external_parameters if student.bypasses_encoder_forward else find_cross_module_parameters
            )(student.encoder)
        ]

    def _students(self) -> list[Any]:
        return list(self.each.values())


class FeatureStudent(nn.Module):
    """Linear maps from what a model makes of an image to a teacher's width.

    ``look`` gives the feature of the whole image and those of its places: ``foveal.models.encode.features`` of an
    encoder, ``foveal.models.backbone.whole_and_places`` of a model of timm (``whole_alone``: without the latter). ``widths`` are theirs, ``wanted`` the
    teacher's; without ``patches`` the places are not asked.
    """

    def __init__(
        self,
        encoder: nn.Module,
        extract_features: FeatureFn,
        student_widths: tuple[int, int],
        teacher_widths: tuple[int, int],
        *,
        with_patches: bool,
    ) -> None:
        """The maps are drawn from torch's global generator, after the encoder (``build_encoder``)."""
        super().__init__()
        self.encoder = encoder
        self.bypasses_encoder_forward = extract_features is encode_cls_and_patches
        self._extract_features = extract_features
        self.project_cls = nn.Linear(student_widths[0], teacher_widths[0])
        self.project_patches = nn.Linear(student_widths[1], teacher_widths[1]) if with_patches else None
        init_linear_layers(self.project_cls)
        if self.project_patches is not None:
            init_linear_layers(self.project_patches)

    def forward(
        self, images: Tensor, _visible_indices: Tensor | None = None, _masked_indices: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Guesses of the teacher's class token [B, T] and patches [B, L, T], of images [B, C, H, W]."""
        whole, *places = self._extract_features(self.encoder, images)
        answer = self.project_cls(whole)
        return (answer,) if self.project_patches is None else (answer, self.project_patches(places[0]))


class LayerStudent(nn.Module):
    """Linear maps from the tokens of some blocks to a teacher's width, beside the student's own decoder, if it has one.

    Bai et al., "Masked Autoencoders Enable Efficient Knowledge Distillers", 2023, figure 2. Blocks count from 1.
    """

    bypasses_encoder_forward = True

    def __init__(
        self, encoder: Encoder, blocks: Sequence[int], teacher_width: int, decoder_cfg: DecoderConfig | None
    ) -> None:
        """Maps, then decoder, are drawn from torch's global generator, after the encoder (``build_encoder``)."""
        super().__init__()
        self.encoder = encoder
        self._depths = (*blocks, len(encoder.blocks))
        self.project = nn.ModuleList(nn.Linear(encoder.embed_dim, teacher_width) for _ in blocks)
        init_linear_layers(self.project)
        self.decoder = None if decoder_cfg is None else Decoder(decoder_cfg, encoder)

    def forward(self, images: Tensor, visible_indices: Tensor, masked_indices: Tensor) -> tuple[Tensor, ...]:
        """Guesses of the teacher's tokens [B, 1 + K, T], one for each block, and of the masked patches [B, M, P]."""
        *tokens, last = encode_layers(self.encoder, images, self._depths, visible_indices)
        pairs = zip(self.project, tokens, strict=True)
        first, *others = (project(drop_registers(self.encoder, each)) for project, each in pairs)
        last = self.encoder.norm(last)
        if self.decoder is None:
            return (first + _zero_with_gradient(last), *others)
        return (first, *others, self.decoder(last, visible_indices, masked_indices))


class RelationStudent(nn.Module):
    """An encoder that tells the queries, keys and values of some of its blocks (Ren et al., "TinyMIM", 2023).

    They are what the block's layer makes of the tokens that enter it, before norms of queries and keys and before they
    are turned by their places. Blocks count from 1.
    """

    bypasses_encoder_forward = True

    def __init__(self, encoder: Encoder, blocks: Sequence[int]) -> None:
        super().__init__()
        self.encoder = encoder
        self._block_numbers = tuple(blocks)
        self._captured_qkv: dict[int, Tensor] | None = None
        for number in sorted(set(blocks)):
            # Listened to, not computed beside: an engine that shards block by block gathers a block's weights only while
            # that block runs.
            layer: Any = encoder.blocks[number - 1]
            layer.attn.qkv.register_forward_hook(self._make_capture_hook(number))

    def forward(
        self, images: Tensor, _visible_indices: Tensor | None = None, _masked_indices: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Queries, keys and values side by side [B, 1 + L, 3 D], one for each block, of images [B, C, H, W]."""
        self._captured_qkv = heard = {}
        last = encode(self.encoder, images)
        self._captured_qkv = None  # a recomputation in the backward pass is not listened to
        first, *others = (drop_registers(self.encoder, heard[number]) for number in self._block_numbers)
        return (first + _zero_with_gradient(last), *others)

    def _make_capture_hook(self, number: int) -> Callable[[nn.Module, Any, Tensor], None]:
        def listen(_layer: nn.Module, _entering: Any, made: Tensor) -> None:
            if self._captured_qkv is not None:
                self._captured_qkv[number] = made

        return listen


class LogitStudent(nn.Module):
    """A classifier: an encoder with a head, or a model of timm."""

    bypasses_encoder_forward = False

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(
        self, images: Tensor, _visible_indices: Tensor | None = None, _masked_indices: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Logits [B, classes] of normalised images [B, C, H, W]."""
        return (self.encoder(images.to(next(self.encoder.parameters()).dtype)),)


class RegisterTokenStudent(nn.Module):
    """A classifier whose first register is its distillation token (Touvron et al., "DeiT", 2021); the head on it is not kept."""

    bypasses_encoder_forward = True

    def __init__(self, encoder: Encoder) -> None:
        """The head on the register is drawn after the encoder (``build_encoder``)."""
        super().__init__()
        self.encoder = encoder
        self.head_dist = build_distillation_head(encoder)

    def forward(
        self, images: Tensor, _visible_indices: Tensor | None = None, _masked_indices: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Logits [B, classes] of the class token and of the distillation token, of normalised images [B, C, H, W]."""
        tokens = encode(self.encoder, images)
        return self.encoder.forward_head(tokens), self.head_dist(tokens[:, 1])


class TimmTokenStudent(nn.Module):
    """A transformer of timm's with a distillation token and a head on it (Touvron et al., "DeiT", 2021)."""

    bypasses_encoder_forward = False

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        encoder.set_distilled_training(True)

    def forward(
        self, images: Tensor, _visible_indices: Tensor | None = None, _masked_indices: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Logits [B, classes] of the class token and of the distillation token, in training."""
        return self.encoder(images.to(next(self.encoder.parameters()).dtype))


def _zero_with_gradient(tokens: Tensor) -> Tensor:
    """Zero [B, 1, 1]: the gradient of what made the tokens [B, N, D] is zero with it, and missing without."""
    return 0.0 * tokens.mean(dim=(1, 2), keepdim=True, dtype=torch.float32)
