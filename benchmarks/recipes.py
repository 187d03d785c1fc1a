"""What every way to fine-tune is worth on the digits, from the same encoders, with the same number of rates to choose from.

    python benchmarks/recipes.py --seeds 0 1 2 --out benchmarks/results/recipes.md

For every seed a masked autoencoder, then each recipe with two labels a class; ten images a class are held out, and each
recipe keeps the rate whose mean over the seeds is best on them. Then the probes, which see all labels. The same command again continues. Minutes are of processor
time, one thread a run.
"""

import argparse
import concurrent.futures
import shlex
import statistics
import sys
from pathlib import Path

from machine import described
from objectives import Arm, Labels, Study, best_of, comparison, make, minutes_of, probed, spread, summaries

_ADAMW = (1e-2, 3e-2, 1e-1)
_ATTACK = "adversarial={{attack: pgd, epsilon: 16, step_size: 4, steps: 5, weight: {weight}}}"
RECIPES: dict[str, tuple[tuple[float, ...], tuple[str, ...]]] = {
    "the config": (_ADAMW, ()),
    "no layer-wise decay": (_ADAMW, ("optim.layer_decay=1",)),
    "no label smoothing": (_ADAMW, ("label_smoothing=0",)),
    "drop path 0.1": (_ADAMW, ("drop_path=0.1",)),
    "dropout 0.2": (_ADAMW, ("dropout=0.2",)),
    "mixup 0.8": (_ADAMW, ("mixup=0.8",)),
    "cutmix 1.0": (_ADAMW, ("cutmix=1.0",)),
    "mixup and cutmix": (_ADAMW, ("mixup=0.8", "cutmix=1.0")),
    "RandAugment 2, 9": (_ADAMW, ("data.augment.rand_augment.ops=2",)),
    "erasing 0.25": (_ADAMW, ("random_erasing=0.25",)),
    "average 0.99": (_ADAMW, ("ema_decay=0.99",)),
    "steps at 40 and 60": (_ADAMW, ("optim.schedule=step", "optim.step_epochs=[40, 60]")),
    "early stopping": (_ADAMW, ("evaluate_every=4", "early_stopping={metric: holdout_loss, patience: 5}")),
    "a teacher of all labels": (_ADAMW, ("teacher={init: CLASSIFIER}",)),
    "SGD, momentum 0.9": ((0.1, 0.3, 1.0), ("optim.name=sgd",)),
    "frozen, a new head": ((3e-2, 1e-1, 3e-1), ("freeze_encoder=true",)),
    "attacks measured": (_ADAMW, (_ATTACK.format(weight=0),)),
    "PGD, half of the loss": (_ADAMW, (_ATTACK.format(weight=0.5),)),
}
STUDY = Study(
    data="digits",
    arms={"mae": Arm("pretrain", "digits")},
    classifiers={
        "classifier": Arm(
            "finetune", "digits", ("model=null", "data.samples_per_class=null", "epochs=12"), teacher="mae"
        ),
    },
    comparisons=tuple(Labels(name, "digits", ("mae",), *told) for name, told in RECIPES.items()),
    probed=("scratch", "mae"),
    fresh=("model={name: vit_tiny_patch16_224, patch: 4, width: 96, depth: 6, heads: 4}",),
)


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for finished in [pool.submit(make, STUDY, options.runs, seed) for seed in options.seeds]:
            finished.result()
    text = "\n".join(_report(options.runs, options.seeds))
    (options.out.write_text if options.out else sys.stdout.write)(text)


def _report(runs: Path, seeds: list[int]) -> list[str]:
    lines = [
        "# Recipes of fine-tuning on the digits",
        "",
        f"`python benchmarks/recipes.py {shlex.join(sys.argv[1:])}`",
        "",
    ]
    lines += [described(["torch", "timm", "accelerate"]), ""]
    lines += [f"Two labels a class, seeds {', '.join(map(str, seeds))}, from the masked autoencoder of the same seed"]
    lines += [
        f"({minutes_of(runs, 'mae', seeds):.1f} processor minutes each). Minutes below are of a seed, all rates.",
        "",
    ]
    lines += ["| recipe | settings | top-1, mean | lowest to highest | under attack | lr per 256 | minutes |"]
    lines += ["|---|---|--:|--:|--:|--:|--:|"]
    for labels in STUDY.comparisons:
        rate, top1 = best_of(labels, "mae", runs, seeds)
        robust = [each.get("val_robust_top1") for each in summaries(labels, "mae", rate, runs, seeds)]
        told = [each for each in robust if each is not None]
        under = f"{statistics.fmean(told):.3f} ({spread(told)})" if told else ""
        settings = f"`{shlex.join(labels.settings)}`" if labels.settings else ""
        row = [labels.title, settings, f"{statistics.fmean(top1):.3f}", spread(top1), under, f"{rate:g}"]
        lines.append(f"| {' | '.join([*row, f'{minutes_of(runs, labels.title, seeds):.1f}'])} |")
    first = STUDY.comparisons[0]
    lines += ["", f"A row's command, with its settings: `{shlex.join(comparison(first, Path('RUNS'), seeds[0]))}`", ""]
    return [*lines, *probed(STUDY, runs, seeds), ""]


if __name__ == "__main__":
    main()
