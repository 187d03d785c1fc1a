"""A document is as executable as code: every command that it shows could be typed, every link leads somewhere."""

import re
from pathlib import Path

import pytest
from commands import commands, complaints, documents
from house import ROOT, STAGES


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("document", documents(), ids=name_of)
def test_commands_exist(document: Path) -> None:
    text = document.read_text()
    made = {f"no file {file}" for file in re.findall(r"--out (\S+\.yaml)", text)}  # by `foveal init`
    wrong = {command: found for command in commands(text) if (found := set(complaints(command)) - made)}
    assert not wrong


@pytest.mark.parametrize("document", [*documents(), ROOT / "benchmarks" / "README.md"], ids=name_of)
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text())
    local = [target for target in targets if not target.startswith(("http://", "https://", "mailto:"))]
    assert not [target for target in local if not (document.parent / target).exists()]


def test_the_readme_shows_the_ways_in() -> None:
    shown = "\n".join(commands((ROOT / "README.md").read_text()))
    for door in ("make demo", "make test", "sbatch slurm/pretrain_mae.sh", "accelerate launch finetune/run.py"):
        assert door in shown


@pytest.mark.parametrize(
    "file", sorted(f for stage in STAGES for f in (ROOT / "configs" / stage).glob("*.yaml")), ids=name_of
)
def test_a_config_runs_by_the_command_in_its_header(file: Path) -> None:
    header = re.findall(r"^# Command: +(.*?)(?: {2,}.*)?$", file.read_text(), re.MULTILINE)
    assert header
    assert not [problem for command in header for problem in complaints(command)]


@pytest.mark.parametrize(
    "command",
    [
        "make dinner",
        "python -m pretrain.walk digits",
        "python -m pretrain.run no_such_config",
        "python -m pretrain.run digits optim.lr_per_265=1e-3",
        "accelerate launch finetune/walk.py",
        "accelerate launch finetune/run.py digits data.per_glass=2",
        "sbatch --nodes=2 slurm/pretrain_mea.sh",
        "torchrun --nproc-per-node=2 -m distill.run configs/distill/none.yaml",
        "foveal data pock digits",
        "foveal train pretrian digits",
        "foveal train finetune digits mask_ratio=0.5",
        "torchrun --nproc-per-node=2 -m foveal.cli train pretrain no_such_config",
        "foveal data pack digits --into data/digits",
        "foveal --verzion",
        "cd somewhere && make dinner",
        "OMP_NUM_THREADS=1 make dinner",
        "slurm-magic go",
    ],
)
def test_a_command_that_cannot_be_typed_is_seen(command: str) -> None:
    assert complaints(command)


@pytest.mark.parametrize(
    "command",
    [
        "make demo PYTHON=python3.12",
        "python -m pretrain.run digits",
        "python -m pretrain.run digits optim.lr_per_256=1e-3 engine.deepspeed.fp16=x --check",
        "python -m pretrain.run CONFIG [key=value ...]",
        "torchrun --nproc-per-node=2 -m pretrain.run configs/pretrain/digits.yaml",
        "sbatch --nodes=1 slurm/finetune.sh",
        "foveal data pack digits --out data/digits",
        "foveal --version",
        "foveal train pretrain|distill|finetune CONFIG [key=value ...]",
        "torchrun --nproc-per-node=2 -m foveal.cli train pretrain digits epochs=1",
        "foveal config show pretrain/digits",
    ],
)
def test_a_command_that_can_be_typed_passes(command: str) -> None:
    assert not complaints(command)


def test_commands_are_found_in_blocks_and_prose() -> None:
    text = "Say `make demo` or `x = 1`.\n```bash\n# first\n$ make test \\\n  PYTEST=-x\n```\n```python\nmake = 1\n```\n"
    assert [" ".join(command.split()) for command in commands(text)] == ["make test PYTEST=-x", "make demo"]
