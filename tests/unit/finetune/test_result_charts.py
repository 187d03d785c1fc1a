"""Charts of probes, trials and folds: what is drawn, on rank 0 alone, and never in the way."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from finetune.result_charts import save_fold_chart, save_probe_chart, save_trial_chart
from foveal.inspect import series
from foveal.training.run import Run


class Pictures:
    """Stands for a run; keeps the words of its pictures by name."""

    def __init__(self, rank: int = 0) -> None:
        self.words: dict[str, str] = {}
        self.run = cast(
            Run,
            SimpleNamespace(
                world=SimpleNamespace(rank=rank), plan=SimpleNamespace(total_steps=7), save_picture=self.save_picture
            ),
        )

    def save_picture(self, name: str, step: int, render: Any) -> None:
        assert step == 7
        self.words[name] = render().description


def test_each_kind_of_run_has_its_chart() -> None:
    pictures = Pictures()
    save_probe_chart(pictures.run, {("knn", 1): 0.5, ("knn", 2): 0.75, ("linear", 2): 0.25}, 1000)
    save_trial_chart(pictures.run, {("a", 0.1): [0.5, 0.7], ("a", 0.3): [0.1, 0.1]}, "holdout_top1")
    save_fold_chart(pictures.run, {3: [0.5, 0.7], 4: [0.5, 0.5]}, "fold_top1")
    probes, trials, folds = (pictures.words[name] for name in ("probes", "trials", "folds"))
    assert probes.startswith("top-1 by block, of 1,000 images: knn from 50.0 % at 1 to 75.0 % at 2")
    assert "linear 25.0 %" in probes
    assert trials.startswith("holdout_top1 by lr_per_256, of 4 runs: a from 60.0 % at 0.1 to 10.0 % at 0.3")
    assert folds == "fold_top1 by fold, of 4 runs: seed 3 60.0 % (50.0 % to 70.0 %); seed 4 50.0 % (50.0 % to 50.0 %)."


def test_one_rank_draws_and_a_failure_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other = Pictures(rank=1)
    save_fold_chart(other.run, {3: [0.5]}, "fold_top1")
    assert not other.words

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no ink")

    monkeypatch.setattr(series, "draw_series", fail)
    save_fold_chart(Pictures().run, {3: [0.5]}, "fold_top1")
    assert "the picture 'folds' is not written: no ink" in caplog.text
