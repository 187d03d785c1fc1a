"""Names of splits, as folders and as cells of a column."""

import pytest

from foveal.data.pack.split_names import guess_split, normalize_split_names, recognize_split
from foveal.errors import DataError


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("train", "train Train TRAIN training Training_Set trainset train-set train2017 train_2017 train_images"),
        ("val", "val valid validation Validation VAL dev val2017 validation_set valset"),
        ("test", "test testing Test test2015 test_set test-images testdata"),
        (None, "cat trains tests validate testament contest devkit train1 seg_train test1 extra unlabeled 2017"),
    ],
)
def test_usual_names_are_recognized(split: str | None, names: str) -> None:
    assert {recognize_split(name) for name in names.split()} == {split}


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *(("trainA", "train"), ("ISIC_Training_Input", "train"), ("TRAINSET_2", "train"), ("x_eval", "val")),
        *(("holdout", "test"), ("seg_pred", "predict"), ("tests", None), ("trains", None), ("evaluated", None)),
        ("seg_train", "train"),
        ("test1", "test"),
        ("ILSVRC2012_img_val", "val"),
        ("my-dev-part", "val"),
        ("cat", None),
    ],
)
def test_a_word_of_a_name_is_a_guess(name: str, split: str | None) -> None:
    assert guess_split(name) == split


def test_names_of_a_column_get_one_form_and_others_keep_theirs() -> None:
    names = ["Train", "validation", "testing", "extra", "Fold_1"]
    assert normalize_split_names(names) == {
        "Train": "train",
        "validation": "val",
        "testing": "test",
        "extra": "extra",
        "Fold_1": "Fold_1",
    }
    assert normalize_split_names(["test set", "train"]) == {"test set": "test", "train": "train"}


@pytest.mark.parametrize("pair", [("Train", "train"), ("val", "validation"), ("dev", "valid"), ("Extra", "extra")])
def test_two_names_of_one_split_are_refused(pair: tuple[str, str]) -> None:
    """Files of 'Extra' and 'extra' would also be the same on file systems that ignore case."""
    with pytest.raises(DataError, match=f"splits '{pair[0]}' and '{pair[1]}' of the source have one meaning"):
        normalize_split_names(["test", *pair])
