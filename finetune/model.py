"""The classifier that a plan builds, and how fast each of its layers learns."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.config import FinetuneConfig
from finetune.plan import FinetunePlan
from foveal.models.backbone import backbone_from_card, get_layer_ids, get_no_weight_decay_names, head_parameter_names
from foveal.models.classify import Classifier
from foveal.models.resize import resize_weights_from_card
from foveal.models.vit import encoder_from_card
from foveal.optim.optimizers import parameter_groups
from foveal.seeding import derive_key
from foveal.weights.export import load_weights_strict, read_export, read_head
from foveal.weights.teacher import freeze_in_eval_mode


def classifier_from_plan(plan: FinetunePlan) -> Classifier:
    """The plan's encoder or backbone, with a head of its own."""
    cfg = plan.cfg
    return Classifier(
        encoder_from_plan(plan),
        dropout=cfg.dropout,
        trainable_prefixes=_head_prefixes(plan) if cfg.frozen else None,
        with_ema=cfg.average is not None,
        with_auxiliary_batch_norms=cfg.adversarial is not None and cfg.adversarial.split_norms,
        with_distillation_token=cfg.teacher is not None and cfg.teacher.kind == "token",
    )


def encoder_for_dense_head(plan: FinetunePlan) -> Any:
    """As ``encoder_of``, for a head that is no part of it: where only the head learns, all of it is frozen."""
    encoder = encoder_from_plan(plan)
    return freeze_in_eval_mode(encoder) if plan.cfg.frozen else encoder


def encoder_from_plan(plan: FinetunePlan) -> Any:
    """The plan's encoder or backbone, freshly drawn, and its weights from the export where there is one.

    It seeds torch's global generator: what is drawn after it is a function of the seed too.
    """
    torch.manual_seed(derive_key(plan.cfg.seed, "weights"))
    return _build_timm_backbone(plan) if plan.backbone is not None else _build_vit_encoder(plan)


def export_prefix(cfg: FinetuneConfig) -> str:
    """The beginning of the names of the weights that an export takes."""
    return "encoder." if cfg.average is None else "averaged."


def _build_vit_encoder(plan: FinetunePlan) -> nn.Module:
    cfg = plan.cfg
    encoder = encoder_from_card(plan.encoder, cfg.init or "model", drop_path=cfg.drop_path)
    if plan.init_source is not None:
        place, card = plan.init_source.path, plan.init_source.card
        weights = resize_weights_from_card(plan.init_source.load_weights(), encoder, card.encoder, f"{place}/card.json")
        # The mean of the patches has a norm of its own behind it, and does without the norm before it.
        averaged = plan.encoder["pooling"] == "avg"
        new, unused = (("head.", "fc_norm."), ("head.", "norm.")) if averaged else (("head.",), ("head.", "fc_norm."))
        load_weights_strict(encoder, weights, place, new_prefixes=new, unused_prefixes=unused)
    return encoder


def _build_timm_backbone(plan: FinetunePlan) -> nn.Module:
    """The head is a fresh one too, unless the export's is of the same classes."""
    cfg, told = plan.cfg, plan.backbone
    assert told is not None
    backbone = backbone_from_card(plan.encoder, cfg.init or "backbone", drop_path=cfg.drop_path)
    if plan.init_source is not None:
        card = plan.init_source.card
        same = card.classes == plan.classes and card.encoder["classes"] == told.classes
        head = () if same else head_parameter_names(*told.build_args)
        load_weights_strict(
            backbone, plan.init_source.load_weights(), plan.init_source.path, new_prefixes=head, unused_prefixes=head
        )
    return backbone


def model_from_export(
    export_dir: Path, head_kind: str, build_model: Callable[[Any, dict[str, Any], dict[str, Any], str], Any]
) -> Any:
    """The model that a run left with a head of this kind, in evaluation mode on the CPU.

    ``build`` makes it of an encoder, the encoder's card, the head's, and where they were read. Raises: ExportError.
    """
    weights, card = read_export(export_dir)
    head_weights, head = read_head(export_dir, head_kind)
    where = f"{export_dir}/card.json"
    encoder = (backbone_from_card if "timm" in card.encoder else encoder_from_card)(card.encoder, where)
    load_weights_strict(encoder, weights, export_dir)
    model = build_model(encoder, card.encoder, head, where)
    load_weights_strict(model.head, head_weights, export_dir / "head.safetensors")
    return model.eval()


def _head_prefixes(plan: FinetunePlan) -> tuple[str, ...]:
    """The beginnings of the names of what is fresh, and learns where the rest is frozen."""
    return ("head.", "fc_norm.") if plan.backbone is None else head_parameter_names(*plan.backbone.build_args)


def param_groups_from_plan(plan: FinetunePlan, model: Any) -> list[dict[str, Any]]:
    """The groups of the optimizer, with layer-wise decay where it is asked for."""
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
    """A parameter's layer, for layer-wise decay: 0 the embedding, 1.. the blocks, depth + 1 what follows (BEiT, 2021)."""

    def layer(name: str) -> int:
        part = name.removeprefix("encoder.").split(".")
        if part[0] in {"cls_token", "reg_token", "pos_embed", "patch_embed", "rope"}:
            return 0
        return int(part[1]) + 1 if part[0] == "blocks" else depth + 1

    return layer
