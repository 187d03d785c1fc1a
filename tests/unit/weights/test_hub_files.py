"""What config.json and preprocessor_config.json beside weights say: pixel statistics, class names, sizes, heads."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
from safetensors.torch import save_file

from foveal.data.config import DataConfig
from foveal.errors import ExportError
from foveal.weights.hub_files import read_hub_files
from foveal.weights.pretrained import PretrainedSource, inspect_pretrained

NAME = "test_resnet"
IMAGENET: dict[str, Any] = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
OTHER = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
TIMMS = ((0.5,) * 3, (0.5,) * 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    save_file(timm.create_model(NAME, num_classes=2).state_dict(), folder / "model.safetensors")
    return folder


def inspect(folder: Path, files: dict[str, Any], **settings: Any) -> PretrainedSource:
    """Inspect the weights with these files beside them."""
    for name in ("config.json", "preprocessor_config.json", "processor_config.json", "open_clip_config.json"):
        (folder / name).unlink(missing_ok=True)
        if name in files:
            content = files[name]
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    data = DataConfig.from_dict({"path": "x", "image_size": 64} | settings, "here")
    return inspect_pretrained(folder, NAME, data)


def preprocessor(**values: Any) -> dict[str, Any]:
    return {"preprocessor_config.json": values}


@pytest.mark.parametrize(
    ("files", "mean", "std", "origin"),
    [
        ({}, *TIMMS, f"timm's of {NAME}"),
        (preprocessor(do_normalize=True), *TIMMS, f"timm's of {NAME}"),
        (preprocessor(**IMAGENET), IMAGENET["image_mean"], IMAGENET["image_std"], "preprocessor_config.json"),
        (
            preprocessor(**IMAGENET, feature_extractor_type="ViTFeatureExtractor", do_normalize=True, resample=2),
            IMAGENET["image_mean"],
            IMAGENET["image_std"],
            "preprocessor_config.json",
        ),
        (
            preprocessor(image_processor=IMAGENET | {"rescale_factor": 0.00392156862745098}),
            IMAGENET["image_mean"],
            IMAGENET["image_std"],
            "preprocessor_config.json",
        ),
        (
            {"processor_config.json": {"image_processor": IMAGENET}},
            IMAGENET["image_mean"],
            IMAGENET["image_std"],
            "processor_config.json",
        ),
        (preprocessor(image_mean=0.25, image_std=[0.75]), [0.25] * 3, [0.75] * 3, "preprocessor_config.json"),
        (preprocessor(**IMAGENET, do_normalize=False), [0.0] * 3, [1.0] * 3, "preprocessor_config.json"),
        (
            preprocessor(**IMAGENET) | {"config.json": {"pretrained_cfg": OTHER}},
            OTHER["mean"],
            OTHER["std"],
            "config.json",
        ),
    ],
)
def test_pixel_statistics_beside_the_weights_are_taken(
    files: dict[str, Any], mean: list[float], std: list[float], origin: str, folder: Path
) -> None:
    source = inspect(folder, files)
    assert (source.card.mean, source.card.std) == (tuple(mean), tuple(std))
    assert source.notes[-1].startswith(f"pixels have mean {mean[0]:g}, ")
    assert source.notes[-1].endswith(f": {origin}")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (IMAGENET | {"rescale_factor": 1 / 127.5}, "has rescale_factor 0.00784313"),
        (IMAGENET | {"rescale_factor": "1/255"}, "has rescale_factor '1/255'"),
        (IMAGENET | {"do_rescale": False}, "does not say that pixels are divided by 255"),
        (IMAGENET | {"do_normalize": False, "do_rescale": False}, "does not say that pixels are divided by 255"),
        (IMAGENET | {"rescale_offset": True}, "does not say that pixels are divided by 255"),
        (IMAGENET | {"image_std": [0.2, 0.2, 0]}, "has the image_std [0.2, 0.2, 0]"),
        (IMAGENET | {"image_mean": ["0.5"] * 3}, "has the image_mean ['0.5', '0.5', '0.5']"),
        (IMAGENET | {"image_mean": [float("nan")] * 3}, "has the image_mean [nan, nan, nan]"),
        (IMAGENET | {"image_mean": []}, "has the image_mean []"),
        (IMAGENET | {"image_mean": [0.5, 0.5]}, "does not say how its images of 3 channels were normalised"),
    ],
)
def test_statistics_that_cannot_be_used_need_settings(values: dict[str, Any], sentence: str, folder: Path) -> None:
    with pytest.raises(ExportError) as caught:
        inspect(folder, preprocessor(**values))
    assert sentence in str(caught.value)
    assert "set data.mean and data.std" in str(caught.value)
    stated = inspect(folder, preprocessor(**values), mean=[0.3] * 3, std=[0.2] * 3).card
    assert (stated.mean, stated.std) == ((0.3,) * 3, (0.2,) * 3)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_file_that_is_no_json_object_is_one_sentence(name: str, content: str, folder: Path) -> None:
    with pytest.raises(ExportError, match=rf"{name}, beside the weights, .+ mend it or take it away"):
        inspect(folder, {name: content})


@pytest.mark.parametrize(
    ("config", "classes"),
    [
        ({"id2label": {"0": "cat", "1": "dog"}}, ("cat", "dog")),
        ({"id2label": {"1": "dog", "0": "cat"}}, ("cat", "dog")),
        ({"label_names": ["a", "b"], "id2label": {"0": "cat", "1": "dog"}}, ("a", "b")),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, ()),
        ({"id2label": {"0": "crane", "1": "crane"}}, ()),
        ({"id2label": {"0": "cat", "1": "dog", "2": "cow"}}, ()),
        ({"id2label": ["cat", "dog"]}, ()),
    ],
)
def test_class_names_beside_the_weights_are_taken(
    config: dict[str, Any], classes: tuple[str, ...], folder: Path
) -> None:
    assert inspect(folder, {"config.json": config}).card.classes == classes


def test_rules_of_before_0_2_are_kept(folder: Path) -> None:
    """A run that began before 0.2 keeps data.weights_version=1: timm's pixel statistics, no names of id2label."""
    files = preprocessor(**IMAGENET) | {"config.json": {"id2label": {"0": "cat", "1": "dog"}}}
    before = inspect(folder, files, weights_version=1)
    assert ((before.card.mean, before.card.std), before.card.classes) == (TIMMS, ())
    saved = DataConfig.from_dict({"path": "x", "image_size": 64}, "here").keep_neutral_values(
        {"data.mean": None}, "data."
    )
    assert saved.weights_version == 1


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        ({"image_size": 384}, [(384, 384)]),
        ({"image_size": [288, 512]}, [(288, 512)]),
        ({"image_size": {"height": 288, "width": 512}}, [(288, 512)]),
        ({"pretrained_cfg": {"input_size": [3, 288, 512]}}, [(288, 512)]),
        (
            {"model_args": {"img_size": [288, 512]}, "pretrained_cfg": {"input_size": [3, 224, 224]}},
            [(288, 512), (224, 224)],
        ),
        ({}, []),
    ],
)
def test_image_sizes_of_config_json(config: dict[str, Any], sizes: list[tuple[int, int]], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_hub_files(tmp_path / "model.safetensors").image_sizes() == sizes


@pytest.mark.parametrize("value", ["224", 0, [224], [224, "224"], {"shortest_edge": 224}, True])
def test_an_image_size_that_is_none_is_one_sentence(value: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"image_size": value}))
    with pytest.raises(ExportError, match=r"config.json has image_size .+, which is no side and no \[height, width\]"):
        read_hub_files(tmp_path / "model.safetensors").image_sizes()


@pytest.mark.parametrize(
    "config",
    [
        {"pretrained_cfg": OTHER},
        {"architecture": NAME, "num_classes": 2} | OTHER,
        {"num_classes": 2} | OTHER,
        {"architecture": NAME, "pretrained_cfg": OTHER},
    ],
)
def test_statistics_of_timms_older_files_are_at_the_top(config: dict[str, Any], folder: Path) -> None:
    card = inspect(folder, {"config.json": config}).card
    assert (list(card.mean), list(card.std)) == (OTHER["mean"], OTHER["std"])
    before = inspect(folder, {"config.json": config}, weights_version=1).card
    assert list(before.mean) == (OTHER["mean"] if "pretrained_cfg" in config else [0.5] * 3)


def test_open_clips_file_states_statistics_and_size(folder: Path) -> None:
    """timm's pretrained_cfg is of these weights; a preprocessor is of Hugging Face's names."""
    files: dict[str, Any] = {"open_clip_config.json": {"model_cfg": {}, "preprocess_cfg": OTHER}}
    found = inspect(folder, files | preprocessor(**IMAGENET))
    assert (list(found.card.mean), list(found.card.std)) == (OTHER["mean"], OTHER["std"])
    assert any("open_clip_config.json" in note for note in found.notes)
    timms = {"config.json": {"pretrained_cfg": {"mean": [0.2] * 3, "std": [0.2] * 3}}}
    assert inspect(folder, files | timms).card.mean == (0.2,) * 3
    assert inspect(folder, files, weights_version=1).card.mean == TIMMS[0]
    assert inspect(folder, {"open_clip_config.json": {"preprocess_cfg": None}}).card.mean == TIMMS[0]
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"vision_cfg": {"image_size": 384}}}))
    assert read_hub_files(folder / "model.safetensors").image_sizes() == [(384, 384)]


@pytest.mark.parametrize("normalises", [True, False])
def test_channels_in_the_order_blue_green_red_are_refused(normalises: bool, folder: Path) -> None:
    files = preprocessor(**IMAGENET, do_flip_channel_order=True, do_normalize=normalises)
    with pytest.raises(ExportError, match=r"channels are blue, green, red \(do_flip_channel_order\).+: set data.mean"):
        inspect(folder, files)
    found = inspect(folder, files, mean=[0.3] * 3, std=[0.2] * 3)
    assert found.card.mean == (0.3,) * 3
    assert any("do_flip_channel_order" in note for note in found.notes), "the plan says so"
    assert list(inspect(folder, preprocessor(**IMAGENET, do_flip_channel_order=False)).card.mean) == [
        0.485,
        0.456,
        0.406,
    ]


@pytest.mark.parametrize(
    "statistics",
    [
        {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]},
        {"mean": [0.5, 0.5, 0.5], "std": [127.5, 127.5, 127.5]},
        {"mean": [1.5], "std": [0.5]},
    ],
)
def test_statistics_of_pixels_to_255_are_refused(statistics: dict[str, Any], folder: Path) -> None:
    preprocessors = preprocessor(image_mean=statistics["mean"], image_std=statistics["std"])
    for files in ({"config.json": {"pretrained_cfg": statistics}}, preprocessors):
        with pytest.raises(ExportError, match=r"which is not of pixels in \[0, 1\]: set data.mean and data.std"):
            inspect(folder, files)
        assert inspect(folder, files, mean=[0.5] * 3, std=[0.25] * 3).card.mean == (0.5,) * 3
