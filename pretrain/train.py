"""Pretraining: build the model, train it, export the encoder."""

import torch

from foveal.models.vit import build_encoder, encoder_card, resolve_sizes
from foveal.optim.optimizers import parameter_groups
from foveal.seeding import derive_key
from foveal.training.checkpointing import resume
from foveal.training.loop import TrainingSetup, build_stage_engine, is_due
from foveal.training.run import Run
from foveal.training.stage import StageFunctions
from foveal.training.steps import finish_step, training_steps
from foveal.training.validation import evaluate_encoders, evaluate_if_due
from pretrain.init import load_init_weights
from pretrain.init_decoder import load_init_decoder
from pretrain.model import autoencoder_from_config
from pretrain.objective import MaskedModelingLoss
from pretrain.plan import PretrainPlan, plan_pretraining
from pretrain.reconstructions import save_reconstructions


def train(plan: PretrainPlan, run: Run) -> None:
    """Train from the first step or the newest checkpoint, then export the encoder."""
    cfg = plan.cfg
    setup = build(plan, run.world.device)
    engine = build_stage_engine(setup, plan, run.world)
    start = resume(run, engine)

    def evaluate(step: int) -> None:
        evaluate_if_due(run, step, lambda: evaluate_encoders(engine, run, setup.objective, step))

    evaluate(start)  # a preempted attempt may have saved this step without evaluating it
    with training_steps(run, engine, setup.objective, start) as steps:
        for step in steps:
            if cfg.uses_ema and step.result is not None:
                engine.update_ema("averaged.", "encoder.", 1 - plan.ema_decay_at(step.index))
            if finish_step(run, engine, step):
                return
            evaluate(step.index)
            has_image = cfg.target == "pixels" and is_due(step.index, cfg.log.images_every, plan.stop_step)
            if has_image and run.read_updates():
                save_reconstructions(step.index, engine, setup.objective, run)
    if plan.stop_step == plan.total_steps:
        metrics = run.evaluations.get(plan.total_steps, {})
        card = encoder_card(cfg.model, cfg.data.image_size, cfg.data.channels)
        run.export_weights(engine, card, prefix="encoder.", metrics=metrics)
        run.mark_finished(metrics)


def build(plan: PretrainPlan, _device: torch.device) -> TrainingSetup[MaskedModelingLoss]:
    """Return the masked autoencoder, initialised from the seed and ``init``, and its loss."""
    cfg = plan.cfg
    sizes = resolve_sizes(cfg.model)
    torch.manual_seed(derive_key(cfg.seed, "weights"))
    encoder = build_encoder(cfg.model, image_size=cfg.data.image_size, channels=cfg.data.channels)
    source = plan.init_source
    weights = None if source is None else load_init_weights(encoder, source, sizes)
    model = autoencoder_from_config(encoder, cfg)
    if cfg.init_decoder and source is not None and weights is not None:
        load_init_decoder(model.decoder, weights, sizes, cfg.data.channels, source.patch_grid, source.path)
    objective = MaskedModelingLoss(
        seed=cfg.seed,
        mask_strategy=cfg.mask_strategy,
        mask_ratio=cfg.mask_ratio,
        mask_block_size=plan.mask_block_size,
        norm_pix=cfg.norm_pix,
        target=cfg.target,
        image_loss_weight=cfg.image_loss_weight,
        patch_size=sizes.patch,
        patch_grid=sizes.patch_grid(cfg.data.image_size),
        mean=plan.mean,
        std=plan.std,
    )
    return TrainingSetup(model, parameter_groups(model, cfg.optim), objective)


FUNCTIONS = StageFunctions(plan_pretraining, train, build)
