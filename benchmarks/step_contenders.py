"""Training steps of masked autoencoders: foveal's own loop and engine, and peers in a textbook loop. Run by step.py.

Every contender gets the same photographs, has the same sizes, and makes whole steps: masks, forward, backward, AdamW.
foveal's step also normalises uint8 images, which the peers get normalised.
"""
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportIndexIssue=false
# The peers are no dependencies, and their modules have no types.

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import timm
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from foveal.data.batch import Batch
from foveal.data.image.transforms import normalise
from foveal.distributed.world import World
from foveal.engines.attention import choose_max_explicit_tokens
from foveal.engines.build import build_engine
from foveal.engines.config import EngineConfig, Precision
from foveal.models.config import DecoderConfig, VitConfig
from foveal.models.mae import MaskedAutoencoder
from foveal.models.patches import patchify
from foveal.models.sincos import sincos_positions
from foveal.models.vit import build_encoder
from foveal.optim.config import OptimConfig
from foveal.optim.optimizers import parameter_groups
from foveal.training.loop import LoopContext, run_steps
from foveal.training.meters.metric_accumulator import MetricAccumulator
from foveal.training.meters.stragglers import StragglerMeter
from foveal.training.meters.throughput import ThroughputMeter
from pretrain.objective import MaskedModelingLoss

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MASK_RATIO, LR, BETAS, WEIGHT_DECAY = 0.75, 1.5e-4, (0.9, 0.95), 0.05


@dataclass(frozen=True)
class Contender:
    """A model in training: ``train`` makes so many whole steps and returns the last loss."""

    train: Callable[[int], float]
    num_parameters: int


@dataclass(frozen=True)
class Shape:
    """A model of timm and MAE's decoder: image and patch in pixels, images a step."""

    model: str
    image: int
    patch: int
    decoder: tuple[int, int, int]  # width, depth, heads
    batch: int

    @property
    def grid(self) -> tuple[int, int]:
        return self.image // self.patch, self.image // self.patch


@dataclass(frozen=True)
class Switches:
    """How a peer is run: as its documentation has it, or with what foveal's settings switch on."""

    explicit_attention: bool | None = None  # None: a peer's as published, foveal's as its rule has it
    matmul: Literal["highest", "medium"] = "highest"
    fused_adamw: bool = False
    compiled: bool = False
    reads_every_loss: bool = True


def foveal_step(shape: Shape, images: Tensor, precision: Precision, switches: Switches) -> Contender:
    """The product's loop, plain engine and objective; ``images``: uint8."""
    device = images.device
    torch.manual_seed(0)
    encoder = build_encoder(VitConfig(name=shape.model, patch=shape.patch), image_size=shape.image, channels=3)
    width, depth, heads = shape.decoder
    model = MaskedAutoencoder(encoder, DecoderConfig(width=width, depth=depth, heads=heads))
    _start_from_zero(model.decoder.predict)
    optim = OptimConfig(lr_per_256=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, max_grad_norm=None)
    world = World(0, 1, 0, "none", device)
    engine_cfg = EngineConfig(
        kind="plain", precision=precision, float32_matmul_precision=switches.matmul, compile=switches.compiled
    )
    tokens = sys.maxsize if switches.explicit_attention else 0
    if switches.explicit_attention is None:
        tokens = choose_max_explicit_tokens(engine_cfg, device.type)
    engine_cfg = engine_cfg.model_copy(update={"max_explicit_attention_tokens": tokens})
    engine = build_engine(
        model,
        parameter_groups(model, optim),
        optim,
        engine_cfg,
        world,
        microbatch_size=shape.batch,
        accumulation_steps=1,
    )
    objective = MaskedModelingLoss(0, "random", MASK_RATIO, 1, True, shape.patch, shape.grid, MEAN, STD)
    meters = MetricAccumulator(), ThroughputMeter(), StragglerMeter(device, "here")
    context = LoopContext(0, 10**9, 1, lambda _: LR, world, *meters, lambda *_: None, lambda *_: None)
    steps = run_steps(engine, _batches(images), objective, context)

    def train(count: int) -> float:
        for _ in range(count):
            next(steps)
        return context.metric_accumulator.pop_rows(world.all_reduce_sum)[-1]["loss"]

    return Contender(train, _count_trainable(model))


def _batches(images: Tensor) -> Iterator[Batch]:
    ids = torch.arange(len(images))
    valid = torch.ones(len(images), dtype=torch.bool)
    for step in itertools.count():
        yield Batch(images, torch.zeros_like(ids), ids, ids + step * len(ids), valid, step, 0, 0)


def textbook_step(shape: Shape, images: Tensor, precision: Precision, switches: Switches) -> Contender:
    """timm's blocks and torch, as MAE's paper describes it."""
    model = TextbookMAE(shape)
    return _peer_step(model, model.predict, shape, images, precision, switches)


def huggingface_step(shape: Shape, images: Tensor, precision: Precision, switches: Switches) -> Contender:
    """transformers' ViTMAEForPreTraining."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    reference = timm.create_model(shape.model, img_size=shape.image, patch_size=shape.patch, num_classes=0)
    width, depth, heads = shape.decoder
    config = ViTMAEConfig(
        hidden_size=reference.embed_dim,
        num_hidden_layers=len(reference.blocks),
        num_attention_heads=reference.blocks[0].attn.num_heads,
        intermediate_size=4 * reference.embed_dim,
        decoder_hidden_size=width,
        decoder_num_hidden_layers=depth,
        decoder_num_attention_heads=heads,
        decoder_intermediate_size=4 * width,
        image_size=shape.image,
        patch_size=shape.patch,
        mask_ratio=MASK_RATIO,
        norm_pix_loss=True,
        layer_norm_eps=1e-6,
        attn_implementation="eager" if switches.explicit_attention else "sdpa",
    )
    model = ViTMAEForPreTraining(config)

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixels: Tensor) -> Tensor:
            return self.model(pixel_values=pixels).loss

    return _peer_step(WithLoss(), model.decoder.decoder_pred, shape, images, precision, switches)


def lightly_step(shape: Shape, images: Tensor, precision: Precision, switches: Switches) -> Contender:
    """lightly's MAE with timm's transformer, as its example has it."""
    model = LightlyMAE(shape)
    return _peer_step(model, model.decoder.decoder_pred, shape, images, precision, switches)


CONTENDERS: dict[str, Callable[[Shape, Tensor, Precision, Switches], Contender]] = {
    "foveal": foveal_step,
    "textbook": textbook_step,
    "transformers": huggingface_step,
    "lightly": lightly_step,
}


def _peer_step(
    model: nn.Module, predictor: nn.Linear, shape: Shape, images: Tensor, precision: Precision, switches: Switches
) -> Contender:
    device, pixels = images.device, normalise(images, MEAN, STD)
    model.to(device).train()
    _start_from_zero(predictor)
    if switches.explicit_attention:
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
    decayed = [value for value in model.parameters() if value.requires_grad and value.ndim > 1]
    others = [value for value in model.parameters() if value.requires_grad and value.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=switches.fused_adamw or None)
    if switches.compiled:
        model.compile(dynamic=False)
    assert pixels.shape == (shape.batch, 3, shape.image, shape.image)

    def train(count: int) -> float:
        loss = torch.zeros(())
        for _ in range(count):
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                loss = model(pixels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if switches.reads_every_loss:
                loss.item()
        return loss.item()

    return Contender(train, _count_trainable(model))


def _start_from_zero(predictor: nn.Linear) -> None:
    """Begin with the same loss whatever the other weights are: predictions of zero."""
    nn.init.zeros_(predictor.weight)
    nn.init.zeros_(predictor.bias)


def _count_trainable(model: nn.Module) -> int:
    return sum(value.numel() for value in model.parameters() if value.requires_grad)


def _pixel_loss(pred: Tensor, pixels: Tensor, patch: int, is_masked: Tensor) -> Tensor:
    """Mean over masked patches of the squared distance to normalised pixels; ``is_masked`` [B, L] of 0 and 1."""
    target = patchify(pixels, patch)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    return (((pred - target) ** 2).mean(-1) * is_masked).sum() / is_masked.sum()


class TextbookMAE(nn.Module):
    """MAE in the order of its paper: shuffle, drop, encode, add mask tokens, unshuffle, decode all patches."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        encoder = timm.create_model(shape.model, img_size=shape.image, patch_size=shape.patch, num_classes=0)
        width, depth, heads = shape.decoder
        self.patch = shape.patch
        self.patch_embed, self.blocks, self.norm = encoder.patch_embed, encoder.blocks, encoder.norm
        self.cls_token = nn.Parameter(torch.randn(1, 1, encoder.embed_dim) * 0.02)
        self.positions = nn.Parameter(_with_class(shape, encoder.embed_dim), requires_grad=False)
        self.decoder_embed = nn.Linear(encoder.embed_dim, width)
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.decoder_positions = nn.Parameter(_with_class(shape, width), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(width, heads, 4.0, qkv_bias=True) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.predict = nn.Linear(width, shape.patch**2 * 3)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed(pixels) + self.positions[:, 1:]
        count, length, dim = x.shape
        shuffled = torch.rand(count, length, device=x.device).argsort(1)
        restored = shuffled.argsort(1)
        num_kept = int(length * (1 - MASK_RATIO))
        x = torch.gather(x, 1, shuffled[:, :num_kept, None].expand(-1, -1, dim))
        x = torch.cat([(self.cls_token + self.positions[:, :1]).expand(count, -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_embed(self.norm(x))
        masked = self.mask_token.expand(count, length - num_kept, -1)
        patches = torch.cat([x[:, 1:], masked], 1)
        patches = torch.gather(patches, 1, restored[..., None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], patches], 1) + self.decoder_positions
        for block in self.decoder_blocks:
            x = block(x)
        pred = self.predict(self.decoder_norm(x))[:, 1:]
        return _pixel_loss(pred, pixels, self.patch, (restored >= num_kept).to(pred.dtype))


class LightlyMAE(nn.Module):
    """The model of lightly's example: its masked transformer, its decoder, its mask and its patches."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM

        encoder = timm.create_model(shape.model, img_size=shape.image, patch_size=shape.patch, num_classes=0)
        width, depth, heads = shape.decoder
        self.patch, self.length = shape.patch, encoder.patch_embed.num_patches + encoder.num_prefix_tokens
        self.backbone = MaskedVisionTransformerTIMM(vit=encoder)
        self.decoder = MAEDecoderTIMM(
            num_patches=encoder.patch_embed.num_patches,
            patch_size=shape.patch,
            embed_dim=encoder.embed_dim,
            decoder_embed_dim=width,
            decoder_depth=depth,
            decoder_num_heads=heads,
        )

    def forward(self, pixels: Tensor) -> Tensor:
        from lightly.models import utils

        count = len(pixels)
        kept, masked = utils.random_token_mask((count, self.length), mask_ratio=MASK_RATIO, device=pixels.device)
        x = self.decoder.embed(self.backbone.encode(images=pixels, idx_keep=kept))
        tokens = utils.repeat_token(self.decoder.mask_token, (count, self.length))
        tokens = utils.set_at_index(tokens, kept, x.type_as(tokens))
        pred = self.decoder.predict(utils.get_at_index(self.decoder.decode(tokens), masked))
        target = utils.get_at_index(utils.patchify(pixels, self.patch), masked - 1)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return nn.functional.mse_loss(pred, target)


def _with_class(shape: Shape, width: int) -> Tensor:
    positions = sincos_positions(*shape.grid, width)
    return torch.cat([torch.zeros(1, width), positions])[None]
