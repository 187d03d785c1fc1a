"""Lineage from recorded inputs, and from what older versions left: links that are whole, gone, and another's by now."""

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lineage_cards import DIGITS, use_export, write_card, write_run

from foveal.atomic import read_json, sha256, write_json
from foveal.data.format.manifest import read_manifest
from foveal.errors import CheckpointError, ExportError
from foveal.runs.descendants import Ancestor, find_descendants
from foveal.runs.inputs import ModelInput, RunInputs
from foveal.runs.lineage import build_lineage, lineage_of_record
from foveal.runs.lineage_check import check_lineage
from foveal.runs.lineage_node import LineageNode

OLD = Path(__file__).parents[2] / "fixtures" / "v0_1_0"


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    return write_card(tmp_path / "encoder" / "export", RunInputs(str(tmp_path / "encoder"), "pretrain", (DIGITS,)))


def classifier_of(folder: Path, *models: ModelInput) -> Path:
    inputs = RunInputs(str(folder.parent), "finetune", (DIGITS,), models)
    return write_card(folder, inputs, stage="finetune", metrics={"loss": 1.0, "val_top1": 0.5, "val_pixels": 0.25})


def test_recorded_inputs_need_no_other_file(encoder: Path, tmp_path: Path) -> None:
    export = classifier_of(tmp_path / "classifier" / "export", use_export(encoder, "init"))
    shutil.rmtree(encoder.parent)
    root = build_lineage(export)
    assert (root.stage, root.name, root.step, root.path) == ("finetune", "classifier", 7, str(export))
    assert root.results == {"val_top1": 0.5, "val_pixel_accuracy": 0.25}  # under the names of today
    (source,) = root.models
    assert (source.role, source.stage, source.name, source.datasets) == ("init", "pretrain", "encoder", (DIGITS,))
    assert not root.list_gaps()
    assert build_lineage(export / "model.safetensors") == root


def test_a_shared_ancestor_has_its_sources_once(encoder: Path, tmp_path: Path) -> None:
    student = RunInputs("/runs/student", "distill", (DIGITS,), (use_export(encoder, "teacher"),))
    folder = write_card(tmp_path / "student" / "export", student, stage="distill")
    root = lineage_of_record(
        RunInputs("/runs/a", "finetune", (), (use_export(folder, "init"), use_export(encoder, "teacher")))
    )
    first, second = root.models
    assert (first.models[0].is_repeated, second.is_repeated) == (False, True)
    assert (first.models[0].datasets, second.datasets, second.sha256) == ((DIGITS,), (), first.models[0].sha256)
    assert root.to_dict()["models"][1]["is_repeated"] is True


def test_a_run_of_several_students_is_one_tree(encoder: Path, tmp_path: Path) -> None:
    inputs = RunInputs(str(tmp_path / "run"), "distill", (DIGITS,), (use_export(encoder, "teacher"),))
    run = write_run(tmp_path / "run", inputs)
    before = build_lineage(run)
    assert (before.stage, before.name, before.exports, before.step) == ("distill", "run", (), None)
    for name in ("small", "large"):
        write_card(run / "export" / name, inputs, stage="distill")
    root = build_lineage(run)
    assert [Path(export.path).name for export in root.exports] == ["large", "small"]
    assert [source.role for source in root.models] == ["teacher"]
    shutil.rmtree(run / "export" / "small")
    assert build_lineage(run).sha256 == root.exports[0].sha256


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A run of 0.1.0 as its user had it: started in a folder with data and exports."""
    root = shutil.copytree(OLD / "finetune_finished", tmp_path / "home")
    shutil.copytree(OLD / "exports", root / "exports")
    shutil.copytree(OLD / "data", root / "data")
    return root / "runs" / "finetune_finished"


def test_an_older_chain_is_followed_by_digests(old: Path) -> None:
    root = build_lineage(old)
    assert [(node.role, node.stage, node.evidence) for node in root.walk()] == [
        ("", "finetune", "settings"),
        ("init", "pretrain", "settings"),
        ("teacher", "finetune", "settings"),
        ("init", "pretrain", "settings"),
    ]
    training = root.datasets[0]
    assert (training.name, training.num_images) == ("digits", 32)
    assert replace(training, name="", path="", num_images=0, num_classes=0) == root.models[0].datasets[0]
    assert [node.is_repeated for node in root.walk()] == [False, False, False, True]


def test_an_older_link_that_is_gone_or_anothers(old: Path, tmp_path: Path) -> None:
    exports = tmp_path / "home" / "exports"
    card = read_json(exports / "classifier" / "card.json")
    write_json(exports / "classifier" / "card.json", card | {"sha256": "f" * 64})
    shutil.rmtree(exports / "encoder")
    init, teacher = build_lineage(old).models
    assert init.gaps == (
        f"missing: what it was made from is not recorded, and {exports}/encoder is not there any more",
    )
    (gap,) = teacher.gaps
    assert gap.startswith(
        f"missing: the export at {exports}/classifier is another one by now (sha256 ffffffffffff there,"
    )
    assert gap.endswith(", 8b2a5e8ec1c3 recorded)")
    shutil.rmtree(tmp_path / "home" / "data")
    assert {data.name for data in build_lineage(old).datasets} == {""}


def test_an_older_export_in_a_chain_of_today(tmp_path: Path) -> None:
    folder = shutil.copytree(OLD / "exports" / "classifier", tmp_path / "old")
    export = classifier_of(tmp_path / "new" / "export", use_export(folder, "teacher"))
    (teacher,) = build_lineage(export).models
    assert (teacher.evidence, teacher.gaps) == ("settings", ())
    assert [(source.role, source.gaps) for source in teacher.models] == [
        ("init", ("known by its digest alone: where it was is not recorded",))
    ]
    shutil.rmtree(folder)
    (teacher,) = build_lineage(export).models
    assert (teacher.stage, teacher.step) == ("finetune", 2)
    assert teacher.gaps == (f"missing: what it was made from is not recorded, and {folder} is not there any more",)


def test_without_files_a_gap_is_said_as_well(tmp_path: Path) -> None:
    teacher = use_export(OLD / "exports" / "classifier", "teacher")
    root = lineage_of_record(RunInputs("/runs/a", "finetune", (), (teacher,)))
    assert root.list_gaps() == ["what it was made from is not recorded here"]
    foreign = ModelInput("init", "/weights.pth", "a" * 64, "foreign", 0)
    node = lineage_of_record(RunInputs("/runs/a", "finetune", (), (foreign,))).models[0]
    assert (node.name, node.step, node.gaps) == ("weights.pth", None, ())


def test_a_place_that_cannot_be_read(tmp_path: Path) -> None:
    place = "/" + "x" * 300  # as a folder of somebody else: the answer of the file system is an error
    models = [ModelInput(role, place, role, stage, 3) for role, stage in (("init", ""), ("fork", "pretrain"))]
    root = build_lineage(write_card(tmp_path / "export", RunInputs("/a", "finetune", (), tuple(models))))
    assert [node.gaps[0].partition(":")[0] for node in root.models] == ["missing", "damaged"]
    assert all("File name too long" in gap for gap in root.list_gaps())
    assert verdicts(root) == ["agrees", "not checked", "not checked"]
    with pytest.raises(ExportError, match="cannot be read"):
        build_lineage(Path(place))


def fork_of(source: Path, digest: str) -> ModelInput:
    return ModelInput("fork", str(source), digest, "pretrain", 3)


def checkpoint(run: Path, content: str = "{}") -> str:
    file = run / "checkpoints" / "step-00000003-attempt-0001" / "checksums.json"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    return sha256(file)


def test_the_source_of_a_fork(tmp_path: Path) -> None:
    source = write_run(tmp_path / "source", science={"inherited.data": "d" * 64, "data.train": "all"})
    digest = checkpoint(source)
    export = write_card(tmp_path / "fork" / "export", RunInputs("/fork", "pretrain", (), (fork_of(source, digest),)))
    (node,) = build_lineage(export).models
    assert (node.name, node.step, node.gaps, node.datasets[0].split) == ("source", 3, (), "all")
    shutil.rmtree(source / "checkpoints")
    (node,) = build_lineage(export).models
    assert node.gaps == (f"unproven: {source} has its checkpoint of step 3 no more, and may be another run by now",)
    assert node.datasets
    shutil.rmtree(source)
    (node,) = build_lineage(export).models
    assert node.gaps == (f"missing: what it was made from is not recorded, and there is no run at {source} any more",)


def test_a_fork_of_an_older_version(tmp_path: Path) -> None:
    fork = write_run(tmp_path / "fork", science={"inherited.data": "d" * 64, "inherited.fork": "e" * 64})
    write_json(fork / "fork.json", {"run": "/runs/gone", "step": 5})
    (node,) = build_lineage(fork).models
    assert (node.role, node.path, node.step) == ("fork", "/runs/gone", 5)
    assert node.gaps[0].endswith("there is no run at /runs/gone any more")


def test_a_circle_of_paths_ends(tmp_path: Path) -> None:
    """Two older exports, each of which its science names as the other's: nobody can make them, and anybody can write them."""
    cards = [tmp_path / name / "export" for name in ("a", "b")]
    digests = [hashlib.sha256(f"weights of pretrain {card}".encode()).hexdigest() for card in cards]
    for card, other, digest in zip(cards, reversed(cards), reversed(digests), strict=True):
        write_run(card.parent, config=f"init: {other}\n")
        write_card(card, science={"inherited.init": digest})
    assert [node.is_repeated for node in build_lineage(cards[0]).walk()] == [False, False, True]


def damage_inputs(folder: Path) -> None:
    write_json(folder / "card.json", read_json(folder / "card.json") | {"inputs": {"run": 1}})


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: path.with_name("other").mkdir(), "no such folder"),
        (lambda path: path.write_text(""), "is a file"),
        (lambda path: path.mkdir(), "is no run that was ever started"),
        (lambda path: write_run(path / "one"), "is no run, it holds 1"),
        (lambda path: (path.mkdir(), (path / "model.safetensors").touch()), r"holds weights and no card\.json"),
        (lambda path: (path.mkdir(), (path / "card.json").write_text("{")), r"card\.json cannot be read"),
        (lambda path: (path.mkdir(), (path / "card.json").write_text("[]")), "has export format None"),
        (lambda path: write_card(path, step="7"), r"card\.json is not as foveal wrote it \('step'\)"),
        (lambda path: damage_inputs(write_card(path)), "its inputs are not as foveal wrote them"),
    ],
)
def test_what_has_no_lineage_is_a_sentence(make: Any, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "path"
    make(path)
    with pytest.raises((ExportError, CheckpointError), match=sentence):
        build_lineage(path)


def verdicts(root: LineageNode) -> list[str]:
    return [found.verdict for found in check_lineage(root)]


def test_digests_are_computed_again(encoder: Path, tmp_path: Path) -> None:
    data = shutil.copytree(OLD / "data" / "digits", tmp_path / "digits")
    manifest = read_manifest(data)
    digits = replace(DIGITS, path=str(data), digest=manifest.splits["train"].samples_digest)
    foreign = tmp_path / "weights.pth"
    foreign.write_bytes(b"weights")
    models = (use_export(encoder, "init"), ModelInput("teacher", str(foreign), sha256(foreign), "foreign", 0))
    inputs = RunInputs("/runs/a", "finetune", (digits, replace(digits, path="s3://bucket/digits")), models)
    root = build_lineage(write_card(tmp_path / "export", inputs, stage="finetune"))
    assert verdicts(root) == ["agrees", "agrees", "not checked", "agrees", "not checked", "agrees"]
    index = next(data.glob("*.index"))
    index.write_bytes(index.read_bytes().replace(b'"digest', b'"digset'))
    (encoder / "model.safetensors").write_bytes(b"others")
    foreign.unlink()
    assert verdicts(root) == ["agrees", "differs", "not checked", "differs", "not checked", "gone"]
    (data / "manifest.json").unlink()
    (encoder / "model.safetensors").unlink()
    assert verdicts(root) == ["agrees", "not checked", "not checked", "gone", "not checked", "gone"]


def test_what_was_made_from_a_model(encoder: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    student_inputs = RunInputs("/student", "distill", (), (use_export(encoder, "teacher"),))
    student = write_card(write_run(runs / "student", student_inputs) / "export", student_inputs, stage="distill")
    write_run(runs / "begun", RunInputs("/begun", "finetune", (), (use_export(student, "init"),)))
    write_card(runs / "older" / "export", science={"inherited.init": use_export(student, "init").sha256})
    write_card(runs / "other" / "export", RunInputs("/other", "pretrain"))
    write_run(runs / "fork", RunInputs("/fork", "pretrain", (), (fork_of(encoder.parent, "x"),)))
    damage_inputs(write_card(runs / "damaged"))
    (runs / "begun" / "checkpoints" / "step").mkdir(parents=True)
    write_card(runs / "begun" / "checkpoints" / "step" / "export", student_inputs)  # nobody looks there
    digests = frozenset({use_export(encoder, "").sha256})
    assert [
        (Path(item.path).relative_to(runs).parts[0], item.roles) for item in find_descendants(Ancestor(digests), runs)
    ] == [
        ("student", ("teacher",)),
        ("begun", ("init", "teacher")),
        ("older", ("init", "teacher")),
    ]
    for step, names in ((None, ["fork"]), (3, ["fork"]), (4, [])):
        forks = find_descendants(Ancestor(frozenset(), str(encoder.parent), step), runs)
        assert [Path(item.path).name for item in forks] == names


def test_a_very_long_chain_ends_in_a_sentence() -> None:
    inputs = RunInputs("/runs/0", "pretrain", (DIGITS,))
    for number in range(1, 500):
        model = ModelInput("fork", f"/runs/{number}", f"digest {number}", "pretrain", number, inputs)
        inputs = RunInputs(f"/runs/{number}", "pretrain", (DIGITS,), (model,))
    root = lineage_of_record(inputs)
    assert root.list_gaps() == ["not shown: more than 100 models lie between"]
    assert len(list(root.walk())) == len(json.dumps(root.to_dict()).split('"role": "fork"')) == 102


def test_neither_torch_nor_timm_is_imported() -> None:
    code = (
        "import sys; from foveal.commands.lineage import lineage; from pathlib import Path; "
        f"lineage(Path({str(OLD / 'exports' / 'classifier')!r}), check=True, as_json=True, descendants=None); "
        "assert not {'torch', 'timm', 'mlflow'} & sys.modules.keys()"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert json.loads(found.stdout)["checks"][0]["verdict"] == "agrees"
