"""The model of timm that config.json states, against the model that is built: functions that shapes do not show."""

import re

from torch import nn

from foveal.errors import ConfigError, ExportError
from foveal.models.backbone import build_meta_model_as_stated
from foveal.weights.hub_files import HubFiles

# Arguments of timm's models that foveal decides, or that change training alone.
_IGNORED_ARGS = re.compile(r"num_classes|in_chans|img_size|pretrained.*|.*drop.*|cache_dir|scriptable|exportable")
_TRAINING_ONLY = re.compile(r"momentum=[^,]+(, )?")
_FACTS = ("num_heads", "scale", "eps", "temperature", "ref_feat_shape", "pool_type")  # no part of a module's text


def check_stated_architecture(hub: HubFiles, model: nn.Module, name: str) -> list[str]:
    """Check that a model computes what timm's ``architecture`` and ``model_args`` of config.json do.

    Names of one function, such as a DeiT's and a ViT's, are equal. Return sentences for the plan: for a model that this
    timm cannot build. Raises: ExportError with the first difference.
    """
    stated, args = hub.architecture, {k: v for k, v in hub.model_args.items() if not _IGNORED_ARGS.fullmatch(k)}
    if stated is None or (stated == name and not args):
        return []
    channels = getattr(model, "in_chans", None)
    try:
        with_channels = args if channels is None else args | {"in_chans": channels}
        expected = _describe_modules(build_meta_model_as_stated(stated, with_channels))
    except ConfigError:
        return [f"config.json states timm's {stated}, which this timm cannot build; taken for {name}"]
    found = _describe_modules(model)
    for module, description in expected.items():
        if found.get(module, description) != description:
            with_args = f" with model_args {args}" if args else ""
            remedy = "foveal takes no model_args" if args else f"is {stated} the model that is meant?"
            raise ExportError(
                f"{hub.weights} is timm's {stated}{with_args} by config.json, in which {module} is {description}; in "
                f"{name} it is {found[module]}, so the same weights would give other features ({remedy})"
            )
    return []


def _describe_modules(model: nn.Module) -> dict[str, str]:
    """Return what shapes do not show of every module that computes something, by its name."""
    descriptions = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.Identity) or kind.startswith("Drop"):
            continue
        facts = [f"{fact}={value}" for fact in _FACTS if (value := getattr(module, fact, None)) is not None]
        is_leaf = next(module.children(), None) is None
        if is_leaf and not isinstance(module, nn.Linear):  # a linear layer has nothing but its shape
            facts.insert(0, _TRAINING_ONLY.sub("", module.extra_repr()))
        if is_leaf or facts:
            descriptions[name] = f"{kind}({', '.join(fact for fact in facts if fact)})"
    return descriptions
