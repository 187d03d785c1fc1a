"""Whether a command that a document shows could be typed: its files, modules, settings, targets and subcommands exist."""

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from house import ROOT, STAGES, is_first_party_module

from foveal.cli import app
from foveal.commands.lazy import LazyCommand
from foveal.commands.reference import get_stage_configs
from foveal.setting_docs import iter_setting_docs

# Programs that a document may show without their arguments being looked at.
FOREIGN = {
    "apt-get",
    "cd",
    "cp",
    "export",
    "git",
    "ls",
    "pip",
    "pytest",
    "scancel",
    "scontrol",
    "squeue",
    "ssh",
    "sudo",
    "tar",
}
OURS = ("accelerate", "foveal", "make", "python", "sbatch", "torchrun", ".ci/run", "tests/cluster/install_slurm.sh")
FILE = re.compile(r"[\w./-]+\.(py|sh|yaml|toml|txt|md)")
OVERRIDE = re.compile(r"([a-z_]\w*(?:\.\w+)*)=.*")
# What a command makes, or what stands for the reader's own.
MADE = ("data/", "runs/", "docs/configuration.md", "/")
_SETTINGS = {stage: {line.name for line in iter_setting_docs(model)} for stage, model in get_stage_configs().items()}
_TARGETS = set(" ".join(re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)).split())


def commands(text: str) -> Iterator[str]:
    """The shell lines of a Markdown text's fenced blocks, and its inline code that starts with a program of ours."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if language in {"bash", "sh", "console", "shell"}:
            lines = (line.strip().removeprefix("$ ") for line in block.replace("\\\n", " ").splitlines())
            yield from (line for line in lines if line and not line.startswith("#"))
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from (code for code in re.findall(r"`([^`\n]+)`", prose) if code.split()[0] in OURS and " " in code)


def complaints(command: str) -> list[str]:
    """What in a shell line does not exist, in words; nothing if it could be typed."""
    words = shlex.split(command, comments=True)
    joints = [-1, *(place for place, word in enumerate(words) if word in {"&&", ";", "|"}), len(words)]
    parts = [words[start + 1 : stop] for start, stop in itertools.pairwise(joints)]
    return [problem for part in parts for problem in _of_one(part)]


def _of_one(words: list[str]) -> list[str]:
    """One program and its arguments, after any VARIABLE=value."""
    program, *arguments = itertools.dropwhile(lambda word: re.fullmatch(r"[A-Z_]+=.*", word), words)
    arguments = [word.strip("[]") for word in arguments if not _is_placeholder(word)]
    match program.removeprefix("./").removeprefix(".venv/bin/"):
        case "make":
            return [f"no target {word}" for word in arguments if "=" not in word and word not in _TARGETS]
        case "foveal":
            return _foveal(arguments)
        case "accelerate" | "python" | "torchrun" if "foveal.cli" in arguments:
            place = arguments.index("foveal.cli")
            return _files(arguments[:place]) + _foveal(arguments[place + 1 :])
        case "accelerate" | "python" | "sbatch" | "torchrun":
            return _files(arguments) + _modules(arguments) + _stage(arguments)
        case file if "/" in file:
            return _files([file, *arguments]) if (ROOT / file).is_file() else [f"no file {file}"]
        case other:
            return [] if other in FOREIGN else [f"no program {other} here"]


def _is_placeholder(word: str) -> bool:
    """CONFIG, [CONFIG], N, key=value, ..., <name>: they stand for what the reader gives."""
    return word.strip("[]").isupper() or word.strip("[]") in {"key=value", "dotted.key=value", "..."} or "<" in word


def _files(arguments: list[str]) -> list[str]:
    files = [word for word in arguments if FILE.fullmatch(word) and not word.startswith(MADE)]
    return [f"no file {word}" for word in files if not (ROOT / word).is_file()]


def _modules(arguments: list[str]) -> list[str]:
    named = [after for word, after in itertools.pairwise(arguments) if word == "-m"]
    return [
        f"no module {name}" for name in named if not (is_first_party_module(name) or name in {"pip", "pytest", "venv"})
    ]


def _stage(arguments: list[str]) -> list[str]:
    """The config and the overrides of a stage's command."""
    doors = {f"{stage}.run": stage for stage in STAGES} | {f"{stage}/run.py": stage for stage in STAGES}
    doors |= {"slurm/pretrain_mae.sh": "pretrain", "slurm/distill.sh": "distill", "slurm/finetune.sh": "finetune"}
    place = next((place for place, word in enumerate(arguments) if word in doors), None)
    if place is None:
        return []
    return _settings(doors[arguments[place]], arguments[place + 1 :])


def _settings(stage: str, rest: list[str]) -> list[str]:
    """The config and the overrides of a stage."""
    overrides = [match[1] for word in rest if (match := OVERRIDE.fullmatch(word))]
    unknown = [
        name
        for name in overrides
        if not any(name == known or name.startswith(f"{known}.") for known in _SETTINGS[stage])
    ]
    names = [word for word in rest[:1] if re.fullmatch(r"[a-z]\w*", word)]
    absent = [name for name in names if not (ROOT / "configs" / stage / f"{name}.yaml").is_file()]
    return [f"{stage} has no setting {name}" for name in unknown] + [
        f"no configs/{stage}/{name}.yaml" for name in absent
    ]


def _foveal(arguments: list[str]) -> list[str]:
    """A path of subcommands and their options; other words are the last command's own business."""
    if arguments[:1] == ["train"]:
        return _train(arguments[1:])
    command: Any = typer.main.get_command(app)
    wrong = []
    for word in arguments:
        inner = getattr(command, "commands", None)
        if word.startswith("-"):
            options = {name for parameter in command.params for name in parameter.opts} | {"--help"}
            wrong += [] if word.partition("=")[0] in options else [f"foveal: {command.name} has no option {word}"]
        elif inner is not None:
            if word not in inner:
                return [*wrong, f"foveal: no command {word}"]
            command = inner[word].load() if isinstance(inner[word], LazyCommand) else inner[word]
    return wrong


def _train(arguments: list[str]) -> list[str]:
    """A stage, its config and its overrides."""
    stage, *rest = arguments or ["--help"]
    if stage == "--help" or stage.split("|") == list(STAGES):
        return []
    return _files(rest) + _settings(stage, rest) if stage in STAGES else [f"foveal train: no stage {stage}"]


def documents() -> list[Path]:
    """The Markdown of the repository."""
    places = [
        *ROOT.glob("*.md"),
        *(ROOT / ".github").glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "configs").rglob("*.md"),
    ]
    return sorted(places)
