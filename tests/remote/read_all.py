"""Read every shard of a split once, in pieces of 100 kB, and print a digest of it all. Run by tests as a process of its own."""

import hashlib
import json
import sys

from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.storage import remote


def main() -> None:
    remote.CHUNK_BYTES = 100_000
    dataset = Dataset.open(DataConfig.from_dict(json.loads(sys.argv[1]), "the test"))
    print("open", flush=True)  # noqa: T201 - the test waits for it
    sys.stdin.readline()
    digest = hashlib.sha256()
    for number, shard in enumerate(dataset.manifest.splits["train"].shards):
        digest.update(dataset.read_bytes(shard.file, 0, shard.bytes))
        digest.update(dataset.shard_index("train", number).labels.tobytes())
    print(digest.hexdigest(), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
