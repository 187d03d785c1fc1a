"""Every setting is read, says what it is, and is one of a number that somebody decided; every shipped YAML is valid."""

import ast
from pathlib import Path
from typing import Any

import pytest
from house import PRODUCT, ROOT, STAGES, python_files, syntax
from submit import build_jobs_and_options

from foveal.commands.reference import get_stage_configs
from foveal.config import Config
from foveal.setting_docs import iter_setting_docs

CONFIGS = get_stage_configs()

# Raising one of these is a decision of its own: say in the change who needs the setting that is new.
# The data plane brought twelve: jpeg_scaling, max_bad, ledger, patience_seconds, two of the cache, and five of mix (most
# runs leave all of them alone). Surviving the night brought seven: when to go back and when to give up (recovery, two),
# run.max_attempts_without_progress, how much room checkpoints may take and whether they are written aside, how long the end waits for MLflow,
# and how Accelerate shards. Kinds of masking brought two: the kind, for who compares with figure 6 of the paper, and the
# side of a block, which is small on the digits' 4 x 4 patches and large on 14 x 14. Going on from public weights brought
# init to pretraining. Registers are a size of an encoder. What is predicted, of what, and how an average follows: four.
# Any model of timm brought backbone to fine-tuning: for whose students are networks or hierarchical transformers, and as
# the baseline that an encoder has to beat. Kinds of lesson brought fourteen to distillation: the kind, and what only some
# of them read (layers and relations: the pairs; layers: how much is masked, what pixels weigh and how they are normalised,
# and the four of the decoder; logits: temperature and pooling; logits and token: what labels weigh), a model of timm as it
# is, and that model may be left out for it. Several students at once brought twelve: a name, and for each again what a
# student is, all unseen by whoever has one. Teachers of others brought their name, and answers kept on disk two.
# Labels that are masks, boxes or several classes brought four: the kind, the member, the id that is left out, and how large
# an image is evaluated. RandAugment brought three, classes of other sizes one. Recipes of fine-tuning brought twenty: mixup and
# cutmix, erasing, dropout, weights of classes, an average, a frozen encoder, six of an attack and four of a teacher.
# SGD and LARS brought their kind and momentum, for recipes that were published with them (linear probing, convolutional
# networks); other schedules four, for the same; early stopping three to fine-tuning, for whose labels are few.
# Cross-validation brought six: one fold of the data (three, in every stage), for who pretrains for it too, and how many folds
# and repeats fine-tuning makes of it.
# Probes brought twelve to fine-tuning, all behind one section that most runs leave out: what reads the features, which
# features, how much of them, and what each kind of reader is swept over.
# Segmentation brought three: the head, how wide a pyramid is, and how far apart windows lie.
# Detection brought four: the width, layers and strides of pyramid and head, which are large for COCO's images and small for
# others, and whether every class is told of (of eighty, seldom).
# Weights of others to fine-tune from brought their name.
# Where a step's time goes brought one: which steps the profiler traces.
# A new run from another run's checkpoint brought one.
# Whether an encoder gets better while it trains brought evaluate_every to pretraining and distillation.
# Fine-tuning as it was published brought two: positions that are trained, and erased boxes that lie inside the image.
# Files that were read wrongly brought one: the version of the rules of reading, so that runs begun before keep theirs.
# Distillation as published brought two: the loss of layers that is DMAE's, and the version of the default pair of layers.
# Weights of others that were read wrongly brought one: the version of the rules of reading them, for the same.
# Gradients that were summed in bf16 brought one: the type of the sum, so that runs begun before keep theirs, and half the
# traffic for whose network is slow.
# Published decoders to go on with brought one to pretraining.
# Model cards brought five: the licence (three), who made the model, and what it is for, for whoever hands an export on.
# Attention that suits a processor brought one.
# Pictures at a run's end brought one, for who does without them.
# Reports at the end of a run brought one, for whose run directories are counted in megabytes.
# The use of nodes brought one.
# MLflow's registry brought three: whether weights are uploaded, the registered model, its alias.
MOST_SETTINGS = {"pretrain": 126, "distill": 147, "finetune": 171}


def shipped(folder: str) -> list[Path]:
    return sorted((ROOT / "configs" / folder).glob("*.yaml"))


def name_of(file: Any) -> str | None:
    return str(file.relative_to(ROOT / "configs")) if isinstance(file, Path) else None


@pytest.fixture(scope="module")
def attributes() -> set[str]:
    """Every name that the product's code reads behind a dot; a field's own declaration is not among them."""
    nodes = (node for file in python_files(*PRODUCT) for node in ast.walk(syntax(file)))
    return {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}


@pytest.mark.parametrize("stage", STAGES)
def test_every_setting_is_read(stage: str, attributes: set[str]) -> None:
    unread = [line.name for line in iter_setting_docs(CONFIGS[stage]) if line.name.rpartition(".")[2] not in attributes]
    assert not unread, f"settings that no line reads: {unread}"


@pytest.mark.parametrize("stage", STAGES)
def test_every_setting_says_what_it_is(stage: str) -> None:
    mute = [line.name for line in iter_setting_docs(CONFIGS[stage]) if not line.description]
    assert not mute, f"settings without a description: {mute}"


@pytest.mark.parametrize("stage", STAGES)
def test_settings_are_few(stage: str) -> None:
    names = [line.name for line in iter_setting_docs(CONFIGS[stage])]
    assert len(names) <= MOST_SETTINGS[stage], f"{stage} has {len(names)} settings: {names}"


def test_every_stage_ships_a_config() -> None:
    assert not [stage for stage in STAGES if not shipped(stage)]


@pytest.mark.parametrize(("stage", "file"), [(stage, file) for stage in STAGES for file in shipped(stage)], ids=name_of)
def test_configs_are_valid(stage: str, file: Path) -> None:
    CONFIGS[stage].load(file)


@pytest.mark.parametrize(("stage", "file"), [(stage, file) for stage in STAGES for file in shipped(stage)], ids=name_of)
def test_configs_say_how_to_run_them_and_what_to_expect(stage: str, file: Path) -> None:
    header = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert [line for line in header if line.startswith("# Command:")], (
        f"{file.name} of {stage} has no '# Command:' line"
    )
    assert [line for line in header if line.startswith("# Expected:")], (
        f"{file.name} of {stage} has no '# Expected:' line"
    )


@pytest.mark.parametrize("file", shipped("pipelines"), ids=name_of)
def test_pipelines_chain_valid_stages(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    jobs, _ = build_jobs_and_options(file, ())
    assert jobs


@pytest.mark.parametrize("file", shipped("accelerate"), ids=name_of)
def test_accelerate_takes_its_configs(file: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    load_config_from_file(str(file))


def test_an_unread_setting_would_be_seen(attributes: set[str]) -> None:
    class Idle(Config):
        nobody_reads_this: int = 0

    assert [line.name for line in iter_setting_docs(Idle) if line.name not in attributes] == ["nobody_reads_this"]
