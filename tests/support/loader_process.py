"""A trainer that only reads batches with two workers, run as a process of its own so that it can be killed at any moment."""

import json
import sys
from contextlib import closing

from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.loader import train_batches
from foveal.data.sampling.sources import build_training_set
from foveal.data.workers import WorkerPool


def main() -> None:
    cfg = DataConfig.from_dict(json.loads(sys.argv[1]), "the test")
    training_set = build_training_set(Dataset.open(cfg), cfg, seed=3, batch_size=64)
    with closing(WorkerPool(2, 60.0)) as workers:
        while True:
            with train_batches(
                training_set,
                cfg,
                rank=0,
                world_size=1,
                microbatch_size=16,
                start_step=0,
                stop_step=22,
                workers=workers,
            ) as batches:
                for _ in batches:
                    print("batch", flush=True)  # noqa: T201 - the test waits for it


if __name__ == "__main__":
    main()
