"""A linear classifier on an export's frozen features: scikit-learn's logistic regression."""

from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from foveal.checkpoint.export import load_strictly, read_export
from foveal.data import DataConfig, Dataset, eval_batches, normalise
from foveal.models.encode import features
from foveal.models.vit import encoder_from_card

_PENALTIES = (0.01, 0.1, 1.0)
_HELD_OUT = 5  # every so many images of train choose the penalty


def linear_probe(export: Path, data: str = "data/digits") -> tuple[float, float]:
    """Top-1 on the validation images, from the class token and from the mean of the patches; train has all its labels."""
    weights, card = read_export(export)
    encoder = encoder_from_card(card.encoder, str(export)).eval()
    load_strictly(encoder, weights, export)
    told = card.encoder
    cfg = DataConfig(path=data, image_size=told["image_size"], channels=told["channels"], lanes=1, crop_ratio=1.0)
    dataset, parts = Dataset.open(cfg), {}
    for split in (cfg.train, cfg.val):
        rows = []
        for batch in eval_batches(dataset, cfg, split=split, part="all", seed=0, rank=0, size=1, at_once=256):
            with torch.no_grad():
                token, patches = features(encoder, normalise(batch.images, card.mean, card.std))
            rows.append([each[batch.valid].numpy() for each in (token, patches.mean(dim=1), batch.labels)])
        parts[split] = [np.concatenate(column) for column in zip(*rows, strict=True)]
    (*train, labels), (*val, truth) = parts[cfg.train], parts[cfg.val]
    token, patches = (_top1(ours, labels, hers, truth) for ours, hers in zip(train, val, strict=True))
    return token, patches


def _top1(train: np.ndarray, labels: np.ndarray, val: np.ndarray, truth: np.ndarray) -> float:
    mean, scale = train.mean(axis=0), train.std(axis=0) + 1e-6
    train, val = (train - mean) / scale, (val - mean) / scale
    held = np.arange(len(train)) % _HELD_OUT == 0

    def fitted(penalty: float, rows: np.ndarray) -> LogisticRegression:
        return LogisticRegression(C=penalty, max_iter=2000).fit(train[rows], labels[rows])

    best = max(_PENALTIES, key=lambda penalty: fitted(penalty, ~held).score(train[held], labels[held]))
    return float(fitted(best, np.ones_like(held)).score(val, truth))
