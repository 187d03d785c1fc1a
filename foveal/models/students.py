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

from foveal.models.backbone import set_recompute
from foveal.models.classify import distillation_head
from foveal.models.encode import borrowed, encode, encode_layers, features, without_registers
from foveal.models.mae import Decoder, DecoderConfig
from foveal.models.timm_vit import Encoder
from foveal.models.token_positions import read_across
from foveal.models.vit import initialise_linear

Look = Callable[[Any, Tensor], tuple[Tensor, ...]]


class Students(nn.Module):
    """Students that share a lesson and nothing else."""

    def __init__(self, students: Sequence[nn.Module]) -> None:
        super().__init__()
        # No ModuleList: FSDP2 would take students of one type for the blocks of one model.
        self.each = nn.ModuleDict({str(number): student for number, student in enumerate(students)})

    def forward(
        self, images: Tensor, kept: Tensor | None = None, masked: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], ...]:
        """The answers of each student to normalised images [B, C, H, W]."""
        return tuple(student(images, kept, masked) for student in self.each.values())

    def set_grad_checkpointing(self, enable: bool) -> None:
        """Recompute the blocks in the backward pass, as ``MaskedAutoencoder`` does."""
        for student in self._students():
            set_recompute(student.encoder, enable)
            if getattr(student, "decoder", None) is not None:
                student.decoder.grad_checkpointing = enable

    def borrowed_parameters(self) -> list[nn.Parameter]:
        """The parameters that a forward reads outside the module that owns them (see ``foveal.models.encode``)."""
        return [
            each
            for student in self._students()
            for each in (borrowed if student.opened else read_across)(student.encoder)
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
        self, encoder: nn.Module, look: Look, widths: tuple[int, int], wanted: tuple[int, int], *, patches: bool
    ) -> None:
        """The maps are drawn from torch's global generator, after the encoder (``build_encoder``)."""
        super().__init__()
        self.encoder = encoder
        self.opened = look is features
        self._look = look
        self.project_cls = nn.Linear(widths[0], wanted[0])
        self.project_patches = nn.Linear(widths[1], wanted[1]) if patches else None
        initialise_linear(self.project_cls)
        if self.project_patches is not None:
            initialise_linear(self.project_patches)

    def forward(self, images: Tensor, _kept: Tensor | None = None, _masked: Tensor | None = None) -> tuple[Tensor, ...]:
        """Guesses of the teacher's class token [B, T] and patches [B, L, T], of images [B, C, H, W]."""
        whole, *places = self._look(self.encoder, images)
        answer = self.project_cls(whole)
        return (answer,) if self.project_patches is None else (answer, self.project_patches(places[0]))


class LayerStudent(nn.Module):
    """Linear maps from the tokens of some blocks to a teacher's width, beside the student's own decoder, if it has one.

    Bai et al., "Masked Autoencoders Enable Efficient Knowledge Distillers", 2023, figure 2. Blocks count from 1.
    """

    opened = True

    def __init__(
        self, encoder: Encoder, blocks: Sequence[int], teacher_width: int, decoder: DecoderConfig | None
    ) -> None:
        """Maps, then decoder, are drawn from torch's global generator, after the encoder (``build_encoder``)."""
        super().__init__()
        self.encoder = encoder
        self._depths = (*blocks, len(encoder.blocks))
        self.project = nn.ModuleList(nn.Linear(encoder.embed_dim, teacher_width) for _ in blocks)
        initialise_linear(self.project)
        self.decoder = None if decoder is None else Decoder(decoder, encoder)

    def forward(self, images: Tensor, kept: Tensor, masked: Tensor) -> tuple[Tensor, ...]:
        """Guesses of the teacher's tokens [B, 1 + K, T], one for each block, and of the masked patches [B, M, P]."""
        *tokens, last = encode_layers(self.encoder, images, self._depths, kept)
        pairs = zip(self.project, tokens, strict=True)
        first, *others = (project(without_registers(self.encoder, each)) for project, each in pairs)
        last = self.encoder.norm(last)
        if self.decoder is None:
            return (first + _nothing_of(last), *others)
        return (first, *others, self.decoder(last, kept, masked))


class RelationStudent(nn.Module):
    """An encoder that tells the queries, keys and values of some of its blocks (Ren et al., "TinyMIM", 2023).

    They are what the block's layer makes of the tokens that enter it, before norms of queries and keys and before they
    are turned by their places. Blocks count from 1.
    """

    opened = True

    def __init__(self, encoder: Encoder, blocks: Sequence[int]) -> None:
        super().__init__()
        self.encoder = encoder
        self._numbers = tuple(blocks)
        self._heard: dict[int, Tensor] | None = None
        for number in sorted(set(blocks)):
            # Listened to, not computed beside: an engine that shards block by block gathers a block's weights only while
            # that block runs.
            layer: Any = encoder.blocks[number - 1]
            layer.attn.qkv.register_forward_hook(self._listener(number))

    def forward(self, images: Tensor, _kept: Tensor | None = None, _masked: Tensor | None = None) -> tuple[Tensor, ...]:
        """Queries, keys and values side by side [B, 1 + L, 3 D], one for each block, of images [B, C, H, W]."""
        self._heard = heard = {}
        last = encode(self.encoder, images)
        self._heard = None  # a recomputation in the backward pass is not listened to
        first, *others = (without_registers(self.encoder, heard[number]) for number in self._numbers)
        return (first + _nothing_of(last), *others)

    def _listener(self, number: int) -> Callable[[nn.Module, Any, Tensor], None]:
        def listen(_layer: nn.Module, _entering: Any, made: Tensor) -> None:
            if self._heard is not None:
                self._heard[number] = made

        return listen


class ClassStudent(nn.Module):
    """A classifier: an encoder with a head, or a model of timm."""

    opened = False

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor, _kept: Tensor | None = None, _masked: Tensor | None = None) -> tuple[Tensor, ...]:
        """Logits [B, classes] of normalised images [B, C, H, W]."""
        return (self.encoder(images.to(next(self.encoder.parameters()).dtype)),)


class RegisterStudent(nn.Module):
    """A classifier whose first register is its distillation token (Touvron et al., "DeiT", 2021); the head on it is not kept."""

    opened = True

    def __init__(self, encoder: Encoder) -> None:
        """The head on the register is drawn after the encoder (``build_encoder``)."""
        super().__init__()
        self.encoder = encoder
        self.head_dist = distillation_head(encoder)

    def forward(self, images: Tensor, _kept: Tensor | None = None, _masked: Tensor | None = None) -> tuple[Tensor, ...]:
        """Logits [B, classes] of the class token and of the distillation token, of normalised images [B, C, H, W]."""
        tokens = encode(self.encoder, images)
        return self.encoder.forward_head(tokens), self.head_dist(tokens[:, 1])


class TokenStudent(nn.Module):
    """A transformer of timm's with a distillation token and a head on it (Touvron et al., "DeiT", 2021)."""

    opened = False

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        encoder.set_distilled_training(True)

    def forward(self, images: Tensor, _kept: Tensor | None = None, _masked: Tensor | None = None) -> tuple[Tensor, ...]:
        """Logits [B, classes] of the class token and of the distillation token, in training."""
        return self.encoder(images.to(next(self.encoder.parameters()).dtype))


def _nothing_of(tokens: Tensor) -> Tensor:
    """Zero [B, 1, 1]: the gradient of what made the tokens [B, N, D] is zero with it, and missing without."""
    return 0.0 * tokens.mean(dim=(1, 2), keepdim=True, dtype=torch.float32)
