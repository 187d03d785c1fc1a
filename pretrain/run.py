"""Pretraining: ``python -m pretrain.run CONFIG [key=value ...]``, alone, under torchrun, or under srun."""

import torch

from foveal.engines.base import Engine
from foveal.engines.build import build_engine
from foveal.inspect.reconstruction import reconstruction_sheet
from foveal.models.mae import MaskedAutoencoder
from foveal.models.vit import build_encoder, encoder_card
from foveal.optim.optimizers import parameter_groups
from foveal.seeding import key
from foveal.training.cli import Stage, main
from foveal.training.loop import Parts, Step, due
from foveal.training.run import Run
from pretrain.config import PretrainConfig, PretrainPlan, plan
from pretrain.init import load_start
from pretrain.objective import Reconstruct

_SHOWN = 8  # images on a reconstruction sheet


def train(plan: PretrainPlan, run: Run) -> None:
    """From the first step, or the newest checkpoint, to the export of the encoder."""
    cfg = plan.cfg
    made, sizes = parts(plan, run.world.device), {"at_once": plan.at_once, "accumulate": plan.micros}
    engine = build_engine(made.model, made.groups, cfg.optim, cfg.engine, run.world, **sizes)
    start = run.resume(engine)
    with run.steps(engine, made.objective, start) as steps:
        for step in steps:
            if cfg.averages and step.applied:
                engine.average("averaged.", "encoder.", 1 - plan.keeps(step.index))
            if due(step.index, cfg.log.every, plan.stop):
                run.report()
            leaving = run.asked_to_leave()
            if leaving or due(step.index, cfg.checkpoint.every, plan.stop):
                run.save(engine, step.index)
            if leaving:
                return run.leave(step.index)
            if cfg.target == "pixels" and due(step.index, cfg.log.pictures_every, plan.stop):
                show(step, engine, made.objective, run)
    if plan.stop == plan.steps:
        run.export(engine, encoder_card(cfg.model, cfg.data.image_size, cfg.data.channels), prefix="encoder.")
        run.finish()
    return None


def parts(plan: PretrainPlan, _device: torch.device) -> Parts[Reconstruct]:
    """The masked autoencoder, freshly drawn but for what ``init`` brings, and what it learns."""
    cfg = plan.cfg
    sizes = cfg.model.resolved()
    torch.manual_seed(key(cfg.seed, "weights"))
    encoder = build_encoder(cfg.model, image_size=cfg.data.image_size, channels=cfg.data.channels)
    if plan.start is not None:
        load_start(encoder, plan.start, sizes)
    wants = {"latents": cfg.target == "latents", "image": cfg.image_weight > 0, "averaged": cfg.averages}
    model = MaskedAutoencoder(encoder, cfg.decoder, **wants)
    objective = Reconstruct(
        seed=cfg.seed,
        masking=cfg.masking,
        mask_ratio=cfg.mask_ratio,
        mask_side=plan.mask_side,
        norm_pix=cfg.norm_pix,
        target=cfg.target,
        image_weight=cfg.image_weight,
        patch=sizes.patch,
        grid=sizes.grid(cfg.data.image_size),
        mean=plan.mean,
        std=plan.std,
    )
    return Parts(model, parameter_groups(model, cfg.optim), objective)


def show(step: Step, engine: Engine, objective: Reconstruct, run: Run) -> None:
    """A sheet of originals, what was shown of them, and what was made of it; every rank takes part in the forward."""
    with run.pace.paused(), engine.looking():
        pred, masked, *_ = objective.predict(engine.model, step.batch)[1]
        some = slice(_SHOWN)
        run.picture(
            "reconstruction",
            step.index,
            lambda: reconstruction_sheet(
                step.batch.images[some],
                pred[some],
                masked[some],
                mean=objective.mean,
                std=objective.std,
                normalise=objective.norm_pix,
            ),
        )


STAGE = Stage("pretrain", PretrainConfig, plan, train, parts)

if __name__ == "__main__":
    main(STAGE)
