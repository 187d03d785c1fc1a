"""What each objective and each kind of distillation is worth, on images that a few minutes of CPU suffice for.

    python benchmarks/objectives.py digits --seeds 0 1 2 --out benchmarks/results/objectives.md
    python benchmarks/objectives.py cifar10 --seeds 0 --out benchmarks/results/objectives-cifar10.md

For every seed: each way of pretraining, each student of its masked autoencoder, then one fine-tuning for all of them, in
which every arm gets the same labels, steps and augmentation and the same learning rates, of which each keeps the best by
the mean over seeds on a held-out part of train (two-label arms hold out ten images a class, as the demo does). Runs
continue where they were stopped: the same command again. ``--jobs`` seeds at a time, one thread each; minutes are of
processor time, so that what else the machine did does not count.
"""

import argparse
import concurrent.futures
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from machine import described

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Arm:
    """A way to make an encoder: a stage's config, further settings, and the arm whose export it needs."""

    stage: str
    config: str
    settings: tuple[str, ...] = ()
    teacher: str | None = None


@dataclass(frozen=True)
class Labels:
    """A fine-tuning of several arms: the settings of its labels, its learning rates, and the encoder from scratch.

    ``CLASSIFIER`` in a setting is the export of the study's classifier of the same seed.
    """

    title: str
    config: str
    arms: tuple[str, ...]
    rates: tuple[float, ...]
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """What is compared. ``classifiers`` are runs with labels that teach classes; ``probed`` are probed, frozen.

    ``features`` are those of the class token, or the mean of the patches; ``fresh`` are the settings of an encoder that learned nothing, which is ``scratch`` among the probed.
    """

    data: str
    arms: dict[str, Arm]
    comparisons: tuple[Labels, ...]
    classifiers: dict[str, Arm] = field(default_factory=dict)
    probed: tuple[str, ...] = ()
    features: tuple[str, ...] = ("token", "avg")
    fresh: tuple[str, ...] = ()


SMALL = "model={name: vit_tiny_patch16_224, patch: 4, width: 64, depth: 4, heads: 4}"
_SMALL_CIFAR = SMALL.replace("patch: 4", "patch: 8")
_CIFAR_VIT = "model={name: vit_tiny_patch16_224, patch: 8, width: 96, depth: 6, heads: 4}"
_THOUSAND = ("data.samples_per_class=1000", "epochs=4", "optim.warmup_epochs=1")
_CONVOLUTIONS = ("resnet18", "densenet121", "efficientnet_b0")
_RATES = (1e-2, 3e-2, 1e-1)
_PRETRAINED = ("mae", "image", "latents")
_READERS = ("linear", "logistic", "attentive", "knn")
_STUDENTS = ("mae_small", "features", "layers", "relations", "logits", "token")
DIGITS = Study(
    data="digits",
    arms={
        "mae": Arm("pretrain", "digits"),
        "image": Arm("pretrain", "digits_image"),
        "latents": Arm("pretrain", "digits_latents"),
        "mae_small": Arm("pretrain", "digits", (SMALL, "epochs=80")),
        "features": Arm("distill", "digits", teacher="mae"),
        "layers": Arm("distill", "digits_layers", teacher="mae"),
        "relations": Arm("distill", "digits_relations", teacher="mae"),
        "logits": Arm("distill", "digits_logits", teacher="classifier"),
        "token": Arm("distill", "digits_token", teacher="classifier"),
    },
    classifiers={"classifier": Arm("finetune", "digits", ("model=null",), teacher="mae")},
    comparisons=(
        Labels("2 labels a class", "digits", ("scratch", *_PRETRAINED), _RATES),
        Labels("2 labels a class, small", "digits", ("scratch", *_STUDENTS), _RATES, (SMALL,)),
        Labels("14 labels a class", "digits", ("scratch", "mae"), _RATES, ("data.samples_per_class=14",)),
        Labels("all labels", "digits", ("scratch", "mae"), _RATES, ("data.samples_per_class=null", "epochs=12")),
    ),
    probed=_PRETRAINED,
)
CIFAR10 = Study(
    data="cifar10",
    arms={
        "mae": Arm("pretrain", "cifar10_small"),
        "features": Arm("distill", "cifar10_small", teacher="mae"),
    },
    comparisons=(
        Labels("100 labels a class", "cifar10_small", ("scratch", "mae"), (1e-3, 3e-3)),
        Labels("100 labels a class, small", "cifar10_small", ("scratch", "features"), (1e-3, 3e-3), (_SMALL_CIFAR,)),
        Labels("1000 labels a class", "cifar10_small", ("scratch", "mae"), (1e-3, 3e-3, 1e-2), _THOUSAND),
        *(
            Labels(
                f"1000 labels a class, {name}",
                "cifar10_small",
                ("scratch",),
                (1e-3, 3e-3, 1e-2),
                (*_THOUSAND, "model=null", f"backbone={name}", "optim.layer_decay=1"),
            )
            for name in _CONVOLUTIONS
        ),
    ),
    probed=("scratch", "mae"),
    features=("token",),
    fresh=(_CIFAR_VIT, "data.mean=[0.4914, 0.4822, 0.4465]", "data.std=[0.2470, 0.2435, 0.2616]"),
)
STUDIES = {"digits": DIGITS, "cifar10": CIFAR10}


def main() -> None:
    """Run what is missing and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    study, runs = STUDIES[options.study], options.runs / options.study
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for finished in [pool.submit(make, study, runs, seed) for seed in options.seeds]:
            finished.result()
    text = "\n".join(_report(study, runs, options.seeds))
    (options.out.write_text if options.out else sys.stdout.write)(text)


def make(study: Study, runs: Path, seed: int) -> None:
    arms = study.arms | study.classifiers
    for name in sorted(arms, key=lambda name: _depth(arms, name)):
        _run(_command(arms[name], runs, name, seed), place_of(runs, name, seed))
    for labels in study.comparisons:
        _run(comparison(labels, runs, seed), place_of(runs, labels.title, seed))
    for name in (f"{arm}-{features}" for arm in study.probed for features in study.features):
        _run(_probe(study, runs, name, seed), place_of(runs, name, seed))


def _depth(arms: dict[str, Arm], name: str) -> int:
    teacher = arms[name].teacher
    return 0 if teacher is None else 1 + _depth(arms, teacher)


def place_of(runs: Path, name: str, seed: int) -> Path:
    return runs / f"{name.replace(', ', '-').replace(' ', '-')}-seed{seed}"


def _command(arm: Arm, runs: Path, name: str, seed: int) -> list[str]:
    told = [f"seed={seed}", f"run.dir={place_of(runs, name, seed)}", "tracking.uri=null", *arm.settings]
    if arm.teacher is not None:
        told.append(f"{'init' if arm.stage == 'finetune' else 'teacher'}={place_of(runs, arm.teacher, seed)}/export")
    return [*_door(arm.stage), arm.config, *told]


def comparison(labels: Labels, runs: Path, seed: int) -> list[str]:
    arms = [f"trials.arms.{arm}={_export(arm, runs, seed)}" for arm in labels.arms]
    told = [f"seed={seed}", f"run.dir={place_of(runs, labels.title, seed)}", "tracking.uri=null", "engine.kind=plain"]
    told += ["trials.repeats=1", f"trials.lr_per_256={list(labels.rates)}", "init=null", *arms]
    told += [each.replace("CLASSIFIER", f"{place_of(runs, 'classifier', seed)}/export") for each in labels.settings]
    return [*_door("finetune"), labels.config, *told]


def _probe(study: Study, runs: Path, name: str, seed: int) -> list[str]:
    """The probes of an arm's features; ``name`` is the arm's and theirs."""
    arm, features = name.rsplit("-", 1)
    told = [f"seed={seed}", f"run.dir={place_of(runs, name, seed)}", "tracking.uri=null", "engine.kind=plain"]
    told += [f"init={_export(arm, runs, seed)}", f"probe.features={features}", *(study.fresh * (arm == "scratch"))]
    return [*_door("finetune"), f"{study.data}_probe", *told]


def _export(arm: str, runs: Path, seed: int) -> str:
    return "null" if arm == "scratch" else f"{place_of(runs, arm, seed)}/export"


def _door(stage: str) -> list[str]:
    return ["finetune/run.py"] if stage == "finetune" else ["-m", f"{stage}.run"]


def _run(command: list[str], place: Path) -> None:
    """Run a stage unless it is finished; its processor time is added up beside it."""
    if (place / "finished.json").exists():
        return
    place.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (place / "output.log").open("a") as log:
        process = subprocess.Popen([sys.executable, *command], env=environment, stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        sys.exit(f"{shlex.join(command)} ended badly; see {place}/output.log")
    with (place / "processor_seconds").open("a") as stream:
        stream.write(f"{used.ru_utime + used.ru_stime:.1f}\n")


def minutes_of(runs: Path, name: str, seeds: list[int]) -> float:
    """Processor minutes that a run took, the mean over seeds, all attempts together."""
    files = [place_of(runs, name, seed) / "processor_seconds" for seed in seeds]
    return statistics.fmean(sum(map(float, file.read_text().split())) for file in files) / 60


def _report(study: Study, runs: Path, seeds: list[int]) -> list[str]:
    given = shlex.join(sys.argv[1:])
    lines = [f"# Objectives and students on {study.data}", "", f"`python benchmarks/objectives.py {given}`", ""]
    lines += [described(["torch", "timm", "deepspeed", "accelerate", "scikit-learn"]), ""]
    lines += [
        f"Seeds {', '.join(map(str, seeds))}; each is another order, other weights, other labels and another head."
    ]
    lines += ["", "| arm | command | processor minutes, one thread |", "|---|---|--:|"]
    for name, arm in (study.arms | study.classifiers).items():
        command = shlex.join(_command(arm, Path("RUNS"), name, seeds[0]))
        lines.append(f"| {name} | `{command}` | {minutes_of(runs, name, seeds):.1f} |")
    for labels in study.comparisons:
        lines += ["", *_compared(labels, runs, seeds)]
    return lines + (["", *probed(study, runs, seeds)] if study.probed else []) + [""]


def _compared(labels: Labels, runs: Path, seeds: list[int]) -> list[str]:
    """A table of one fine-tuning: each arm at its best rate, and what it gains over scratch, seed by seed."""
    lines = [f"## Fine-tuned, {labels.title}", "", f"`{shlex.join(comparison(labels, Path('RUNS'), seeds[0]))}`", ""]
    lines += [f"{minutes_of(runs, labels.title, seeds):.1f} processor minutes a seed for all arms and rates.", ""]
    lines += ["| start | top-1, mean | lowest to highest | gain over scratch, mean | lowest to highest | lr per 256 |"]
    lines += ["|---|--:|--:|--:|--:|--:|"]
    scratch: list[float] = []
    for arm in labels.arms:
        rate, top1 = best_of(labels, arm, runs, seeds)
        scratch = scratch or top1
        gains = [each - other for each, other in zip(top1, scratch, strict=True)]
        mean, gain = statistics.fmean(top1), statistics.fmean(gains)
        row = [arm, f"{mean:.3f}", spread(top1), f"{gain:+.3f}", spread(gains, "+"), f"{rate:g}"]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def best_of(labels: Labels, arm: str, runs: Path, seeds: list[int]) -> tuple[float, list[float]]:
    """The rate whose mean over seeds is best on the held-out images, and its top-1 on the validation images by seed."""
    found = {rate: summaries(labels, arm, rate, runs, seeds) for rate in labels.rates}
    best = max(found, key=lambda rate: statistics.fmean(each["holdout_top1"] for each in found[rate]))
    return best, [each["val_top1"] for each in found[best]]


def summaries(labels: Labels, arm: str, rate: float, runs: Path, seeds: list[int]) -> list[dict[str, float]]:
    """What came of a trial, by seed."""
    trials = {seed: place_of(runs, labels.title, seed) / "trials" for seed in seeds}
    files = [folder / f"{arm}-seed{seed}-lr{rate:g}" / "finished.json" for seed, folder in trials.items()]
    return [json.loads(file.read_text())["summary"] for file in files]


def probed(study: Study, runs: Path, seeds: list[int]) -> list[str]:
    """What each kind of probe reads from the frozen class token, and from the mean of the patches, with all labels."""
    lines = ["## Probes of frozen features, all labels but those held out to choose by", ""]
    lines += [f"`{shlex.join(_probe(study, Path('RUNS'), f'{study.probed[-1]}-{study.features[0]}', seeds[0]))}`", ""]
    lines += [
        f"| pretraining | features | {' | '.join(f'{kind} | lowest to highest' for kind in _READERS)} | minutes |"
    ]
    lines += [f"|---|---|{'--:|--:|' * len(_READERS)}--:|"]
    for arm in study.probed:
        for features in study.features:
            files = [place_of(runs, f"{arm}-{features}", seed) / "finished.json" for seed in seeds]
            summaries = [json.loads(file.read_text())["summary"] for file in files]
            columns = [[each[f"{kind}_top1"] for each in summaries] for kind in _READERS]
            cells = [f"{statistics.fmean(values):.3f} | {spread(values)}" for values in columns]
            took = minutes_of(runs, f"{arm}-{features}", seeds)
            lines.append(f"| {arm} | {features} | {' | '.join(cells)} | {took:.1f} |")
    return lines


def spread(values: Sequence[float], sign: str = "") -> str:
    return f"{min(values):{sign}.3f} to {max(values):{sign}.3f}"


if __name__ == "__main__":
    main()
