"""`foveal embed` and `foveal neighbours`: the features of probes, in shards that any ranks may write and continue."""

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from exports import SIDE, STD, export_backbone, export_classifier, export_encoder, export_segmenter, write_photos
from PIL import Image
from processes import ended
from typer.testing import CliRunner

import foveal
from finetune.config import FinetuneConfig
from finetune.probe.features import build_feature_extractor
from finetune.probe.plan import ProbePlan, plan_probe_or_training
from foveal.cli import app
from foveal.data.image.transforms import normalise
from foveal.data.loader import eval_batches
from foveal.errors import ConfigError, DataError, ExportError, FovealError
from foveal.inference import embed
from foveal.inference.embedding_files import EmbeddingShard, iter_shards, read_manifest
from foveal.models.backbone import forward_pooled
from foveal.weights.export import Card, write_export


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_encoder(tmp_path_factory.mktemp("encoder") / "export")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder, 7)
    return folder


def run(command: str, *arguments: Any, code: int = 0) -> str:
    result = CliRunner().invoke(app, [command, *map(str, arguments)])
    if isinstance(result.exception, FovealError):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def read_all(folder: Path) -> tuple[list[str], np.ndarray]:
    shards: list[EmbeddingShard] = list(iter_shards(folder, read_manifest(folder)))
    return [name for shard in shards for name in shard.images], np.concatenate([shard.features for shard in shards])


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


# --- features ---


@pytest.mark.parametrize("feature", ["token", "mean", "patches"])
@pytest.mark.parametrize("pooling", ["token", "avg"])
@pytest.mark.parametrize("layer", [1, 2])
def test_features_are_those_of_a_probe(feature: str, pooling: Any, layer: int, digits: Path, tmp_path: Path) -> None:
    """Of a packed data set, bit for bit, behind each block, of encoders with their norm before and after the pooling."""
    export, out = export_encoder(tmp_path / "export", pooling=pooling), tmp_path / "out"
    run("embed", export, digits / "val-*.tar", "--out", out, "--feature", feature, "--layer", layer, "--batch-size", 32)
    names, features = read_all(out)
    tree = {
        "data": {"path": str(digits), "image_size": SIDE, "channels": 3, "lanes": 4, "eval_crop_ratio": 1.0},
        "init": str(export),
        "engine": {"kind": "plain", "precision": "fp32"},
        "optim": {},
        "epochs": 1,
        "batch": {"global_size": 32, "max_micro_size": 32},
        "run": {"dir": str(tmp_path / "run")},
        "probe": {
            "kinds": ["attentive" if feature == "patches" else "knn"],
            "layers": [layer],
            "features": {"token": "token", "mean": "avg"}.get(feature),
        },
    }
    cfg = FinetuneConfig.from_dict(tree, "here")
    plan = plan_probe_or_training(cfg, 1)
    assert isinstance(plan, ProbePlan)
    _, extract = build_feature_extractor(plan, torch.device("cpu"))
    expected = []
    data = {"split": "val", "subset": "all", "training_seed": 0, "rank": 0, "world_size": 1, "microbatch_size": 32}
    for batch in eval_batches(plan.dataset, cfg.data, **data):  # type: ignore[arg-type]
        with torch.no_grad():
            pooled, patches = extract(normalise(batch.images, plan.mean, plan.std))
        assert patches is not None
        expected.append((patches.half() if feature == "patches" else pooled)[0][batch.valid])
    assert len(names) == len(features) == plan.dataset.num_samples("val")
    np.testing.assert_array_equal(features, torch.cat(expected).numpy())
    assert features.dtype == (np.float16 if feature == "patches" else np.float32)


@pytest.mark.parametrize(("pooling", "feature"), [("avg", "mean"), ("token", "token")])
def test_the_default_is_what_the_pooling_reads(pooling: Any, feature: str, photos: Path, tmp_path: Path) -> None:
    """Of a classifier, what its head reads."""
    run("embed", export_classifier(tmp_path / "export", pooling=pooling), photos, "--out", tmp_path / "out")
    assert read_manifest(tmp_path / "out").feature == feature
    names, features = read_all(tmp_path / "out")
    model: Any = foveal.load(tmp_path / "export")
    inputs = torch.stack([model.transform(name) for name in names])
    with torch.no_grad():
        expected = model.module.forward_head(model.module.forward_features(inputs), pre_logits=True)
    # timm's attention and foveal's blocks add in another order.
    np.testing.assert_allclose(features, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_a_model_of_timm_and_a_segmenter_have_features(photos: Path, tmp_path: Path) -> None:
    run("embed", export_backbone(tmp_path / "net"), photos, "--out", tmp_path / "a")
    names, features = read_all(tmp_path / "a")
    model = foveal.load(tmp_path / "net")
    with torch.no_grad():
        (expected,) = forward_pooled(model.module, torch.stack([model.transform(name) for name in names]))
    np.testing.assert_array_equal(features, expected.numpy())
    run("embed", export_segmenter(tmp_path / "seg"), photos, "--out", tmp_path / "b", "--feature", "patches")
    assert read_all(tmp_path / "b")[1].shape == (7, 4 * 4, 32), "images of the encoder's own size"
    for options, sentence in (
        (("--feature", "token"), "has a pooling of its own; leave it out, or give patches"),
        (("--layer", 1), "of a model of timm .* only the last map is read"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            run("embed", tmp_path / "net", photos, "--out", tmp_path / "c", *options)


# --- shards ---


def test_shards_of_both_formats_hold_the_same(encoder: Path, photos: Path, tmp_path: Path) -> None:
    for file_format in ("parquet", "npz"):
        options = ("--format", file_format, "--shard-size", 3)
        run("embed", encoder, photos, "--out", tmp_path / file_format, *options)
    (names, features), (other_names, other_features) = (read_all(tmp_path / name) for name in ("parquet", "npz"))
    assert names == other_names == [str(file) for file in sorted(photos.iterdir())]
    np.testing.assert_array_equal(features, other_features)
    assert sorted(file.name for file in (tmp_path / "npz").iterdir()) == [
        "embeddings.json",
        *(f"features-{number:05d}-of-00003.npz" for number in range(3)),
    ]
    rows = pq.read_table(tmp_path / "parquet/features-00002-of-00003.parquet").to_pylist()
    assert [row["image"] for row in rows] == names[6:]
    np.testing.assert_array_equal(np.array(rows[0]["feature"], np.float32), features[6])


def test_the_same_command_continues(encoder: Path, photos: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Ctrl-C during the second shard: the first is kept, the others are computed as without it."""
    arguments = (encoder, photos, "--shard-size", 3, "--batch-size", 2)
    run("embed", *arguments, "--out", tmp_path / "whole")
    written: list[str] = []

    def interrupted(file: Path, shard: EmbeddingShard) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(file.name)
        original(file, shard)

    original = embed.write_shard
    monkeypatch.setattr(embed, "write_shard", interrupted)
    run("embed", *arguments, "--out", tmp_path / "cut", code=130)
    assert sorted(files_of(tmp_path / "cut")) == ["embeddings.json", "features-00000-of-00003.parquet"]
    monkeypatch.undo()
    kept = (tmp_path / "cut/features-00000-of-00003.parquet").stat()
    run("embed", *arguments, "--out", tmp_path / "cut")
    assert (tmp_path / "cut/features-00000-of-00003.parquet").stat().st_mtime_ns == kept.st_mtime_ns
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def test_other_models_images_and_settings_are_refused(encoder: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("embed", encoder, photos, "--out", out)
    other, fewer = export_encoder(tmp_path / "other", pooling="avg"), photos / "0.png"
    before = files_of(out)
    for arguments, differing in (
        ((other, photos, "--feature", "token"), "export"),
        ((encoder, fewer), "images, images_sha256"),
        ((encoder, photos, "--feature", "mean"), "feature"),
        ((encoder, photos, "--layer", 1), "layer"),
        ((encoder, photos, "--shard-size", 5), "shard_size"),
        ((encoder, photos, "--format", "npz"), "file_format"),
    ):
        with pytest.raises(ConfigError, match=rf"made otherwise \(differing: {differing}\): choose another --out"):
            run("embed", *arguments, "--out", out)
    assert files_of(out) == before
    with pytest.raises(ConfigError, match=r"holds other files and no embeddings\.json"):
        run("embed", encoder, photos, "--out", photos)
    for options, sentence in (
        (("--format", "csv"), "--format csv does not exist; there are parquet, npz"),
        (("--feature", "cls"), "--feature cls does not exist; there are token, mean, patches"),
        (("--layer", 3), "--layer 3 does not exist: the encoder of .* has blocks 1 to 2"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            run("embed", encoder, photos, "--out", tmp_path / "new", *options)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("file_format", ["parquet", "npz"])
def test_unreadable_images_are_left_out_and_listed_every_time(
    file_format: str, encoder: Path, photos: Path, tmp_path: Path
) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos/3.jpg").write_bytes(b"no image")
    for _ in range(2):  # computed, and kept
        arguments = (encoder, tmp_path / "photos", "--out", tmp_path / "out", "--format", file_format)
        said = run("embed", *arguments, "--shard-size", 3, code=1)
        assert "1 of 7 images cannot be read and were left out:" in said
        assert "3.jpg: no image in one of the formats" in said
    names, features = read_all(tmp_path / "out")
    assert [Path(name).stem for name in names] == ["0", "1", "2", "4", "5", "6"]
    assert len(features) == 6


def test_a_full_disk_is_a_sentence_and_finished_shards_stay(encoder: Path, photos: Path, tmp_path: Path) -> None:
    arguments, out = (encoder, photos, "--shard-size", 3, "--format", "npz"), tmp_path / "out"
    run("embed", *arguments, "--out", out)
    whole = files_of(out)
    (out / "features-00001-of-00003.npz").unlink()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, before[1]))
    try:
        with pytest.raises(DataError, match="make room and run the same command again, which keeps finished shards"):
            run("embed", *arguments, "--out", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert set(whole) - set(files_of(out)) == {"features-00001-of-00003.npz"}
    with pytest.raises(DataError, match="lacks 1 of its 3 shards: run the command that began it again"):
        read_all(out)


def test_ranks_divide_the_shards(encoder: Path, photos: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Each rank by itself, in any order, as any launcher states it."""
    arguments = (encoder, photos, "--shard-size", 2, "--batch-size", 2)
    run("embed", *arguments, "--out", tmp_path / "one")
    one = files_of(tmp_path / "one")
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank, shards in ((2, {2}), (0, {0, 2, 3}), (1, {0, 1, 2, 3})):
        monkeypatch.setenv("RANK", str(rank))
        run("embed", *arguments, "--out", tmp_path / "three")
        names = {f"features-{number:05d}-of-00004.parquet" for number in shards}
        assert set(files_of(tmp_path / "three")) == {"embeddings.json"} | names
    assert files_of(tmp_path / "three") == one


@pytest.mark.slow
@pytest.mark.thorough
def test_two_processes_of_torchrun_write_the_shards_of_one(
    encoder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an image that no rank can read: the launcher ends with an error, and yet all shards are there."""
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos/0.png").write_bytes(b"no image")
    arguments = ("embed", encoder, "photos", "--shard-size", "2", "--batch-size", "2", "--device", "cpu")
    launcher = ["torchrun", "--standalone", "--nproc-per-node=2", "-m", "foveal.cli"]
    two = ended([*launcher, *arguments, "--out", "two"], tmp_path)
    assert "1 of 7 images cannot be read" in two.err
    assert two.code == 1
    monkeypatch.chdir(tmp_path)
    run("embed", *arguments[1:], "--out", "one", code=1)
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")


# --- neighbours ---


def test_neighbours_are_the_most_similar(encoder: Path, photos: Path, tmp_path: Path) -> None:
    out, sheet = tmp_path / "out", tmp_path / "sheet.png"
    run("embed", encoder, photos, "--out", out, "--shard-size", 3)
    said = run("neighbours", out, photos / "3.jpg", "--export", encoder, "--count", 4, "--out", sheet)
    names, features = read_all(out)
    units = features.astype(np.float64) / np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    similarities = units @ units[3]
    order = np.argsort(-similarities)[:4]
    assert order[0] == 3
    assert 1 - similarities[order[-1]] > 1e-3, "the images differ"
    lines = [line.split() for line in said.splitlines()[1:5]]
    assert [line[2] for line in lines] == [names[row] for row in order]
    assert [float(line[0]) for line in lines] == pytest.approx(similarities[order].tolist(), abs=1e-4)
    assert [float(line[1]) for line in lines] == pytest.approx((1 - similarities[order]).tolist(), abs=1e-4)
    with Image.open(sheet) as image:
        assert image.width > image.height
    with pytest.raises(ConfigError, match=r"sheet\.png exists"):
        run("neighbours", out, photos / "3.jpg", "--export", encoder, "--out", sheet)


def test_neighbours_that_have_gone_are_grey(encoder: Path, photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    run("embed", encoder, tmp_path / "photos", "--out", tmp_path / "out")
    sheets = []
    for name in ("all", "fewer"):
        run("neighbours", tmp_path / "out", photos / "0.png", "--export", encoder, "--out", tmp_path / f"{name}.png")
        sheets.append((tmp_path / f"{name}.png").read_bytes())
        (tmp_path / "photos/1.jpg").unlink(missing_ok=True)
    assert sheets[0] != sheets[1]


def test_neighbours_are_refused_in_a_sentence(encoder: Path, photos: Path, tmp_path: Path) -> None:
    out, image = tmp_path / "out", photos / "0.png"
    with pytest.raises(DataError, match=r"holds no embeddings: it has no embeddings\.json"):
        run("neighbours", tmp_path, image, "--export", encoder)
    run("embed", encoder, photos, "--out", out)
    other = export_encoder(tmp_path / "other", pooling="avg")
    with pytest.raises(ExportError, match=r"is of another model than .*other: give the export that made it"):
        run("neighbours", out, image, "--export", other)
    with pytest.raises(ConfigError, match="holds 7 images, and neighbours are those of one"):
        run("neighbours", out, photos, "--export", encoder)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"broken\.png is no image that can be read"):
        run("neighbours", out, broken, "--export", encoder)
    manifest = json.loads((out / "embeddings.json").read_text())
    (out / "embeddings.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(DataError, match="has format 2; this foveal reads format 1"):
        run("neighbours", out, image, "--export", encoder)
    run("embed", encoder, photos, "--out", tmp_path / "patches", "--feature", "patches")
    with pytest.raises(ConfigError, match="holds patches; neighbours need one vector per image"):
        run("neighbours", tmp_path / "patches", image, "--export", encoder)


def test_features_that_are_not_finite_are_refused(photos: Path, tmp_path: Path) -> None:
    export = export_encoder(tmp_path / "export")
    model = foveal.load(export)
    weights = {
        name: value * 1e30 if name.endswith("fc2.weight") else value
        for name, value in model.module.state_dict().items()
    }
    write_export(tmp_path / "huge", weights, Card("pretrain", model.card.encoder, (0.5,) * 3, STD))
    with pytest.raises(ExportError, match="features that are not finite"):
        run("embed", tmp_path / "huge", photos, "--out", tmp_path / "out")
