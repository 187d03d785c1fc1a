"""Models of fine-tuning: construction from a plan or an export, and their parameter groups."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.config import FinetuneConfig
from finetune.task import FinetunePlan
from foveal.inference.exported_model import build_exported_encoder
from foveal.models.backbone import backbone_from_card, get_layer_ids, get_no_weight_decay_names, head_parameter_names
from foveal.models.classify import Classifier
from foveal.models.resize import resize_positions_from_card
from foveal.models.vit import encoder_from_card
from foveal.optim.optimizers import parameter_groups
from foveal.seeding import derive_key
from foveal.weights.export import load_weights_strict, read_card, read_head
from foveal.weights.teacher import freeze_in_eval_mode


def classifier_from_plan(plan: FinetunePlan) -> Classifier:
    """Return the plan's encoder or backbone as a classifier."""
    cfg = plan.cfg
    return Classifier(
        encoder_from_plan(plan),
        dropout=cfg.dropout,
        trainable_prefixes=_head_prefixes(plan) if cfg.freeze_encoder else None,
        with_ema=cfg.ema_decay is not None,
        with_auxiliary_batch_norms=cfg.adversarial is not None and cfg.adversarial.separate_batchnorm,
        with_distillation_token=cfg.teacher is not None and cfg.teacher.kind == "token",
    )


def encoder_for_dense_head(plan: FinetunePlan) -> Any:
    """Return ``encoder_from_plan`` for a head outside the encoder; with ``frozen`` all of the encoder is frozen."""
    encoder = encoder_from_plan(plan)
    return freeze_in_eval_mode(encoder) if plan.cfg.freeze_encoder else encoder


def encoder_from_plan(plan: FinetunePlan) -> Any:
    """Return the plan's encoder or backbone: initialized at random, then loaded from the export if there is one.

    Seeds torch's global generator, so that modules initialized afterwards depend on the plan's seed too.
    """
    torch.manual_seed(derive_key(plan.cfg.seed, "weights"))
    return _build_timm_backbone(plan) if plan.backbone is not None else _build_vit_encoder(plan)


def exported_weight_prefix(cfg: FinetuneConfig) -> str:
    """Return the name prefix of the weights that the export gets: the EMA's if the run has an EMA."""
    return "encoder." if cfg.ema_decay is None else "averaged."


def _build_vit_encoder(plan: FinetunePlan) -> nn.Module:
    cfg = plan.cfg
    encoder = encoder_from_card(plan.encoder, cfg.init or "model", drop_path=cfg.drop_path)
    if plan.init_source is not None:
        path, card = plan.init_source.path, plan.init_source.card
        weights = resize_positions_from_card(
            plan.init_source.load_weights(), encoder, card.encoder, f"{path}/card.json"
        )
        # With average pooling, timm's encoder has ``fc_norm`` after the pooling instead of ``norm`` before it.
        averaged = plan.encoder["pooling"] == "avg"
        new, unused = (("head.", "fc_norm."), ("head.", "norm.")) if averaged else (("head.",), ("head.", "fc_norm."))
        load_weights_strict(encoder, weights, path, new_module_prefixes=new, unused_prefixes=unused)
    if plan.trains_sincos_positions:
        encoder.get_parameter("pos_embed").requires_grad_(True)
    return encoder


def _build_timm_backbone(plan: FinetunePlan) -> nn.Module:
    """Return the timm model; its head is newly initialized unless the export's head has the same classes."""
    cfg, card = plan.cfg, plan.backbone
    assert card is not None
    backbone = backbone_from_card(plan.encoder, cfg.init or "backbone", drop_path=cfg.drop_path)
    if plan.init_source is not None:
        source = plan.init_source
        same_classes = source.card.classes == plan.classes and source.card.encoder["classes"] == card.classes
        head = () if same_classes else head_parameter_names(*card.build_args)
        load_weights_strict(
            backbone, source.load_weights(), source.path, new_module_prefixes=head, unused_prefixes=head
        )
    return backbone


def model_from_export(
    export_dir: Path, head_kind: str, build_model: Callable[[Any, dict[str, Any], dict[str, Any], str], Any]
) -> Any:
    """Return the exported model with a head of this kind, in evaluation mode on the CPU.

    ``build_model`` takes the encoder, the encoder's card, the head's card and the path of the card file.
    Raises: ExportError.
    """
    head_weights, head = read_head(export_dir, head_kind)
    encoder, card = build_exported_encoder(export_dir), read_card(export_dir)
    model = build_model(encoder, card.encoder, head, f"{export_dir}/card.json")
    load_weights_strict(model.head, head_weights, export_dir / "head.safetensors")
    return model.eval()


def _head_prefixes(plan: FinetunePlan) -> tuple[str, ...]:
    """Return the name prefixes of the head's parameters, the trainable ones of a frozen model."""
    return ("head.", "fc_norm.") if plan.backbone is None else head_parameter_names(*plan.backbone.build_args)


def param_groups_from_plan(plan: FinetunePlan, model: Any) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups, with layer-wise learning-rate decay if configured."""
    optim, encoder = plan.cfg.optim, model.encoder
    if plan.backbone is None:
        depth = plan.encoder["depth"]
        return parameter_groups(model, optim, _vit_layer_index(depth), depth + 1)
    undecayed = {f"encoder.{name}" for name in get_no_weight_decay_names(encoder)}
    if optim.layer_decay == 1:
        return parameter_groups(model, optim, no_weight_decay=undecayed)
    layers = {f"encoder.{name}": layer for name, layer in get_layer_ids(encoder).items()}
    head = max(layers.values())
    return parameter_groups(model, optim, lambda name: layers.get(name, head), head, undecayed)


def _vit_layer_index(depth: int) -> Callable[[str], int]:
    """Map parameter names to layers: 0 embedding, 1 to ``depth`` blocks, depth + 1 head (BEiT, 2021)."""

    def layer(name: str) -> int:
        part = name.removeprefix("encoder.").split(".")
        if part[0] in {"cls_token", "reg_token", "pos_embed", "patch_embed", "rope"}:
            return 0
        return int(part[1]) + 1 if part[0] == "blocks" else depth + 1

    return layer
