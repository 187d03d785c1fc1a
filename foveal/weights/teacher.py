"""Teachers for distillation and fine-tuning: a frozen model from an export, and the soft-target loss."""

from functools import partial
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from foveal.models.backbone import backbone_from_card
from foveal.models.resize import resize_positions_from_card
from foveal.models.vit import encoder_from_card
from foveal.weights.export import Card, load_weights_strict


def build_unfrozen_teacher(
    weights: dict[str, Tensor], card: Card, image_size: int | tuple[int, int] | None, path: Path
) -> nn.Module:
    """Build the model of a card with its weights; ``image_size`` None: the card's size. Raises: ExportError."""
    encoder_card = card.encoder | ({} if image_size is None else {"image_size": image_size})
    file = f"{path}/card.json"
    if "timm" in encoder_card:
        model = backbone_from_card(encoder_card, file)
        load_weights_strict(model, weights, path)
        return model
    encoder = encoder_from_card(encoder_card, file)
    load_weights_strict(encoder, resize_positions_from_card(weights, encoder, card.encoder, file), path)
    return encoder


def freeze_in_eval_mode(model: nn.Module) -> nn.Module:
    """Freeze a model in evaluation mode for good: ``train()`` of every submodule has no effect. Returns the model."""
    model.eval().requires_grad_(False)
    for module in model.modules():
        setattr(module, "train", partial(_ignore_train_mode, module))  # noqa: B010 - a method of this instance
    return model


def distillation_loss_per_image(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return T^2 times the KL divergence [B] of logits [B, K] at temperature T, summed over K (Hinton et al., 2015).

    A value per image. A mean over the B * K numbers, as in DeiT's code, would be K times too small.
    """
    teacher_log_probs = (teacher_logits / temperature).log_softmax(dim=-1)
    student_log_probs = (student_logits / temperature).log_softmax(dim=-1)
    divergence = F.kl_div(student_log_probs, teacher_log_probs, reduction="none", log_target=True)
    return temperature**2 * divergence.sum(dim=-1)


def _ignore_train_mode(module: nn.Module, mode: bool = True) -> nn.Module:  # noqa: ARG001 - as nn.Module.train
    return module
