"""What distillation and fine-tuning share of a teacher: a model from an export that nothing can train, and its softened logits.

B images, K classes.
"""

from functools import partial
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from foveal.models.backbone import backbone_from_card
from foveal.models.resize import resize_weights_from_card
from foveal.models.vit import encoder_from_card
from foveal.weights.export import Card, load_weights_strict


def build_teacher(
    weights: dict[str, Tensor], card: Card, image_size: int | tuple[int, int] | None, path: Path
) -> nn.Module:
    """The model that a card describes, with its weights, for images of this size. Raises: ExportError."""
    told = card.encoder | ({} if image_size is None else {"image_size": image_size})
    file = f"{path}/card.json"
    if "timm" in told:
        model = backbone_from_card(told, file)
        load_weights_strict(model, weights, path)
        return model
    encoder = encoder_from_card(told, file)
    load_weights_strict(encoder, resize_weights_from_card(weights, encoder, card.encoder, file), path)
    return encoder


def freeze_in_eval_mode(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, which cannot be undone: ``train`` of every part leaves it as it is."""
    model.eval().requires_grad_(False)
    for module in model.modules():
        setattr(module, "train", partial(_ignore_train_mode, module))  # noqa: B010 - a method, of this one alone
    return model


def soft_target_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Hinton et al., 2015: T^2 times the divergence [B] of logits [B, K] at a temperature T, summed over classes.

    It is that of an image. A mean over the B * K numbers, as in DeiT's code, would be K times too small.
    """
    hers, his = ((each / temperature).log_softmax(dim=-1) for each in (teacher_logits, student_logits))
    return temperature**2 * F.kl_div(his, hers, reduction="none", log_target=True).sum(dim=-1)


def _ignore_train_mode(module: nn.Module, mode: bool = True) -> nn.Module:  # noqa: ARG001 - as nn.Module.train
    return module
