"""The recipe of pretraining: a masked autoencoder."""

from foveal.commands.init.data_facts import DataFacts
from foveal.commands.init.draft import Draft
from foveal.commands.init.recipe import (
    Request,
    choose_image_size,
    choose_model,
    choose_patch,
    choose_pretraining_batch,
    lr_per_256,
    set_augmentation,
    set_data,
    set_engine,
)

_SMALL_DECODER = {"width": 96, "depth": 1, "heads": 4}
_MIDDLE_DECODER = {"width": 256, "depth": 4, "heads": 8}
_SHORT_PEAK_LR = 1.0e-3  # of small models in thousands of steps; 1.5e-4 per 256 images is for a hundred thousand


def draft_pretraining(facts: DataFacts, request: Request) -> Draft:
    """Return the settings of a pretraining but for its length."""
    image_size = choose_image_size(facts, request)
    patch, patch_reason = choose_patch(facts, request, image_size)
    model = choose_model(facts, request)
    batch_size, batch_reason = choose_pretraining_batch(facts, request)
    draft = Draft()
    draft.set("seed", 0)
    draft.set("epochs", 1)
    set_data(draft, facts, image_size, facts.channels, own_stats=True)
    set_augmentation(draft, facts, facts.channels, [0.2, 1.0])
    draft.set("batch", {"global_size": batch_size}, batch_reason)
    draft.set("model", {"name": model.pop("name"), "patch": patch} | model, patch_reason)
    is_micro = "width" in model
    if is_micro:
        draft.set("decoder", dict(_SMALL_DECODER), "it is thrown away after pretraining")
    elif "base" not in draft.settings["model"]["name"] and "large" not in draft.settings["model"]["name"]:
        draft.set("decoder", dict(_MIDDLE_DECODER), "it is thrown away after pretraining")
    if is_micro or not request.on_gpu:
        rate, reason = lr_per_256(_SHORT_PEAK_LR, batch_size), "high, for a small model and few steps"
    else:
        rate, reason = 1.5e-4, "MAE's"
    draft.set("optim.lr_per_256", rate, reason)
    draft.set("optim.warmup_epochs", 1.0)
    set_engine(draft, request, "deepspeed")
    return draft
