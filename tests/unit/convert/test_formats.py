"""Every kind of model in every format: the other library gives foveal's outputs, or a sentence says why it cannot."""

from pathlib import Path

import pytest
from tiny_exports import CLASSES, KINDS, written

from foveal.convert import to_onnx
from foveal.convert.formats import FORMATS, Conversion, convert
from foveal.convert.request import Options
from foveal.errors import ExportError

for library in ("transformers", "onnxruntime"):
    pytest.importorskip(library, reason="needs the extra foveal[export]")

# Of fp32 outputs: largest value about 1 to 10, sums of at most 100 products. A weight that is missing moves them by 0.1.
TIGHT = 1e-5
DENSE = ("segmenter", "CNN segmenter", "detector")
REFUSALS = {
    **{(kind, "timm"): r"timm cannot hold .*: timm has no head for (segmentation|detection)" for kind in DENSE},
    **{(kind, "hf"): r"transformers cannot hold .*: it has no head of foveal's for task \w+" for kind in DENSE},
}
# The class of transformers that opens a kind of model.
CLASSES_OF_TRANSFORMERS = {
    "plain": "ViTModel",
    "patches of 8, 16 x 24 pixels": "ViTModel",
    "classifier": "ViTForImageClassification",
    "classifier of the mean": "TimmWrapperForImageClassification",
    "CNN classifier": "TimmWrapperForImageClassification",
}


def converted(kind: str, to: str, place: Path, options: Options | None = None) -> Conversion:
    return convert(written(place / "export", *KINDS[kind]()), to, options=options)


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_other_library_gives_the_same(kind: str, to: str, tmp_path: Path) -> None:
    if (kind, to) in REFUSALS:
        with pytest.raises(ExportError, match=REFUSALS[kind, to]):
            converted(kind, to, tmp_path)
        assert [each.name for each in tmp_path.iterdir()] == ["export"]
        return
    conversion = converted(kind, to, tmp_path)
    assert conversion.folder == tmp_path / f"export-{to}"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["export", f"export-{to}"]
    assert all(difference.relative < TIGHT for difference in conversion.differences), conversion.differences
    has_classes = "classifier" in kind or kind in DENSE
    assert conversion.reopened.classes == (CLASSES if has_classes else ())
    names = {difference.output for difference in conversion.differences}
    expected = {"logits"} if has_classes else {"features"}
    if kind == "detector":
        expected = {"class_logits", "box_distances_in_strides", "centerness_logits", "locations"}
    assert names == expected
    if to == "hf":
        library = conversion.reopened.library
        assert library.endswith(f" as {CLASSES_OF_TRANSFORMERS.get(kind, 'TimmWrapperModel')}")


@pytest.mark.parametrize("to", ["onnx", "pt2"])
@pytest.mark.parametrize("kind", ["registers", "CNN"])
def test_patches_and_preprocessing_are_part_of_the_graph(kind: str, to: str, tmp_path: Path) -> None:
    conversion = converted(kind, to, tmp_path, Options(patches=True, preprocess=True))
    assert [difference.output for difference in conversion.differences] == ["features", "patches"]
    assert all(difference.relative < TIGHT for difference in conversion.differences)


def test_weights_too_large_for_a_file_of_onnx_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_onnx, "_LARGEST_FILE", 0)
    conversion = converted("plain", "onnx", tmp_path)
    assert sorted(file.name for file in conversion.folder.iterdir()) == ["model.onnx", "model.onnx.data"]


@pytest.mark.parametrize(("dtype", "rounding"), [("bf16", 2**-8), ("fp16", 2**-11)])
def test_weights_of_half_precision_are_compared_without_a_limit(dtype: str, rounding: float, tmp_path: Path) -> None:
    conversion = converted("classifier", "safetensors", tmp_path, Options(dtype=dtype))
    assert conversion.reopened.tolerance is None
    # Some tens of rounded products: their errors are of the size of one, in either direction.
    assert rounding / 100 < conversion.differences[0].relative < 20 * rounding
    assert (conversion.folder / "model.safetensors").stat().st_size < 0.7 * (
        tmp_path / "export" / "model.safetensors"
    ).stat().st_size
