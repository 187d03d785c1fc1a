"""The README from "Two commands" to "Your cluster", line by line in its order, in a folder where nothing was run yet.

A line is run as it stands. What a test cannot wait for is written down in two tables: shorter durations, and lines that
other tests hold.
"""

import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import commands
from processes import ROOT, Ended, Started, ended

from foveal.training.report import format_value

pytestmark = [pytest.mark.thorough, pytest.mark.slow, pytest.mark.timeout(900)]

_PATIENCE = 500  # seconds of a line: the demo's is five starts
_SHORT = " ".join(
    f"{stage}.{setting}"
    for stage in ("pretrain", "distill", "finetune")
    for setting in ("epochs=2", "optim.warmup_epochs=0")
)
_DEMO = (
    "foveal data pack digits --out data/digits && python slurm/submit.py configs/pipelines/demo.yaml --cluster local "
    f"{_SHORT} finetune.trials.repeats=1 finetune.trials.lr_per_256=[3.0e-2]"
)
# What a line says in this test.
_SHORTER = (
    (r"^make demo$", _DEMO),
    (r"--minutes \d+", "--minutes 0.5"),
    (r"^tar xzf imagenette2-160\.tgz$", "ln -s {photographs} imagenette2-160"),
    (r"/data/photos\b", "{photographs}/train/tench"),
    (r"^(foveal train \w+ \w+\.yaml.*)$", r"\1 epochs=1 optim.warmup_epochs=0"),
    (r"^(foveal train pretrain digits|torchrun .* digits .*)$", r"\1 epochs=1 optim.warmup_epochs=0"),
    (r"^(accelerate launch .*finetune/run\.py.*)$", r"\1 epochs=2 optim.warmup_epochs=0"),
)
# Lines that are run elsewhere, and where.
_ELSEWHERE = {
    "make test": "this is one of its tests",
    "pip install": "tests/unit/test_wheel.py, .ci/run",
    "sbatch ": "tests/cluster",
    "python slurm/submit.py configs/pipelines/imagenet.yaml": "tests/unit/slurm/test_submit.py",
}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs in train/CLASS and val/CLASS, as the archive of Imagenette has them; a part of them."""
    place = os.environ.get("FOVEAL_TEST_DATA")
    if not place:
        pytest.skip("FOVEAL_TEST_DATA is not set: there are no photographs here")
    folder = tmp_path_factory.mktemp("archive")
    names = ("tench", "springer", "cassette", "saw", "church", "horn", "truck", "pump", "golf", "parachute")
    for split, wanted in (("train", 300), ("val", 60)):
        with tarfile.open(Path(place, "imagenette224", f"{split}-000000.tar")) as shard:
            members = {member.name: member for member in shard.getmembers()}
            for name in list(members)[: 2 * wanted : 2]:
                image, label = (shard.extractfile(members[f"{Path(name).stem}.{kind}"]) for kind in ("jpg", "cls"))
                assert image is not None and label is not None
                file = folder / split / names[int(label.read())] / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(image.read())
    return folder


def readme_lines(photographs: Path) -> Iterator[tuple[str, str]]:
    """Every line of the README's blocks of commands that is run here: as it stands, and as it is run."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```bash\n.*?^```\n", text, re.MULTILINE | re.DOTALL)
    for line in (line.split("  #")[0].strip() for block in blocks for line in commands(block)):
        if line.startswith(tuple(_ELSEWHERE)):
            continue
        run = line
        for pattern, shorter in _SHORTER:
            run = re.sub(pattern, shorter.replace("{photographs}", str(photographs)), run)
        yield line, run


def test_every_line_works_in_its_order(photographs: Path, tmp_path: Path) -> None:
    for name in ("configs", "finetune", "slurm"):
        (tmp_path / name).symlink_to(ROOT / name)
    lines: dict[str, Ended] = {}
    for line, run in readme_lines(photographs):
        lines[line] = Started(["bash", "-c", run], tmp_path).ended(_PATIENCE)
        assert lines[line].code == 0, f"{line}\n{run}\n{lines[line].out}{lines[line].err}"
        assert "Traceback" not in lines[line].out + lines[line].err, line
    assert len(lines) > 15
    runs = {file.parent.name: json.loads(file.read_text())["summary"] for file in tmp_path.glob("runs/*/finished.json")}
    assert {"photos", "unlabelled", "ten_labels", "digits", "two", "digits-finetune", "two-finetune"} <= runs.keys()
    assert (tmp_path / "runs" / "demo" / "finetune" / "finished.json").exists()
    assert "fine-tuning the digits from runs/demo/pretrain/export" in lines["accelerate launch finetune/run.py"].err
    said = " ".join(lines["foveal train finetune ten_labels.yaml"].err.split())
    assert f"results val_top1 {format_value(runs['ten_labels']['val_top1'])} " in said


def test_the_smallest_config_is_one(tmp_path: Path, photographs: Path) -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "mine.yaml").write_text(text)
    pack = f"foveal data pack folder {photographs}/train --labels none --out data/photos"
    done = ended(["bash", "-c", f"{pack} && foveal train pretrain mine.yaml --check"], tmp_path)
    assert done.code == 0, done.out + done.err
    assert "start     new run in runs/mine" in done.out
