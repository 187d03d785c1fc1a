"""Images by files, folders, globs, shards, data sets and URLs; threads that decode them keep their order."""

import io
import tarfile
import threading
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exports import write_photos
from pictures import encoded
from PIL import Image

from foveal.data.indexing.index import index_folder
from foveal.errors import DataError
from foveal.inference.decoding import iter_decoded_batches
from foveal.inference.file_names import make_file_names
from foveal.inference.image_inputs import ImageInput, ImageList, LocalImages
from foveal.inference.image_sources import resolve_images
from foveal.inference.image_transform import ImageTransform

TRANSFORM = ImageTransform((8, 8), 3, (0.5,) * 3, (0.5,) * 3, 1.0, "bicubic", jpeg_scaling=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, files that are none, shards without an index, and a packed data set with masks."""
    root = tmp_path_factory.mktemp("inputs")
    write_photos(root / "photos", 3)
    write_photos(root / "photos/deep/er", 2)
    (root / "photos/notes.txt").write_text("no image")
    (root / "photos/.hidden.png").write_bytes(b"")
    for name in ("shards", "packed"):
        (root / name).mkdir()
        for split, numbers in (("train", range(3)), ("val", range(3, 5))):
            with tarfile.open(root / name / f"{split}-000000.tar", "w") as tar:
                for number in numbers:
                    grey = encoded(Image.new("L", (8, 8), 40 * number), "PNG")
                    mask = encoded(Image.new("L", (8, 8), 1), "PNG")
                    for member, data in ((f"a/{number}.png", grey), (f"a/{number}.mask.png", mask)):
                        header = tarfile.TarInfo(member)
                        header.size = len(data)
                        tar.addfile(header, io.BytesIO(data))
    index_folder(str(root / "packed"), bit_depth=12, on_warning=lambda _: None)
    return root


def names_of(images: ImageList, root: Path | str) -> list[str]:
    return [images[position].name.removeprefix(f"{root}/") for position in range(len(images))]


def greys_of(images: ImageList) -> list[int]:
    return [int(np.asarray(Image.open(io.BytesIO(images[n].read())))[0, 0]) for n in range(len(images))]


def test_a_folder_is_all_images_below_it(folder: Path) -> None:
    assert names_of(resolve_images([str(folder / "photos")]), folder) == [
        *(f"photos/{name}" for name in ("0.png", "1.jpg", "2.png")),
        *(f"photos/deep/er/{name}" for name in ("0.png", "1.jpg")),
    ]


def test_globs_and_files_come_in_the_order_they_are_named(folder: Path) -> None:
    images = resolve_images([str(folder / "photos/2.png"), str(folder / "photos/**/*.jpg")])
    assert names_of(images, folder) == ["photos/2.png", "photos/1.jpg", "photos/deep/er/1.jpg"]


@pytest.mark.parametrize("name", ["shards", "packed"])
def test_shards_and_data_sets(name: str, folder: Path) -> None:
    """The image of a sample, not its mask; a data set states its bit depth."""
    images = resolve_images([str(folder / name)])
    assert names_of(images, folder) == [
        *(f"{name}/train-000000.tar#a/{n}" for n in range(3)),
        *(f"{name}/val-000000.tar#a/{n}" for n in range(3, 5)),
    ]
    assert greys_of(images) == [0, 40, 80, 120, 160]
    bit_depth = 12 if name == "packed" else None
    assert images[0].bit_depth == bit_depth
    val = resolve_images([str(folder / name / "val-*.tar")])
    assert (greys_of(val), val[0].bit_depth) == ([120, 160], bit_depth)
    assert greys_of(resolve_images([images[4].name, images[1].name])) == [160, 40], "a name is an argument"


def test_urls_are_read_as_paths_are(folder: Path) -> None:
    url = f"file://{folder}"
    for path in ("photos", "photos/1.jpg", "photos/*.png", "packed", "packed/val-*.tar", "shards/val-000000.tar"):
        local, remote = resolve_images([str(folder / path)]), resolve_images([f"{url}/{path}"])
        assert sorted(names_of(remote, url)) == sorted(names_of(local, folder)), path
        data = {images[n].read() for images in (local, remote) for n in range(len(images))}
        assert len(data) == len(local), "the same bytes"
    key = resolve_images([f"{url}/shards/val-000000.tar#a/4"])
    assert greys_of(key) == [160]


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name it has there
        pass


@pytest.fixture
def server(folder: Path) -> Iterator[str]:
    """The address of a web server of the folder."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_images_of_a_web_server(server: str, folder: Path) -> None:
    """An address that is not there is an unreadable image; what a signed address says is no part of the name."""
    images = resolve_images(
        [f"{server}/photos/0.png", f"{server}/photos/1.jpg?Signature=planted", f"{server}/none.png"]
    )
    assert [images[n].name for n in range(3)] == [
        f"{server}/photos/0.png",
        f"{server}/photos/1.jpg",
        f"{server}/none.png",
    ]
    assert images[1].read() == (folder / "photos/1.jpg").read_bytes()
    with closing(iter_decoded_batches(images, range(3), TRANSFORM, 3)) as batches:
        (batch,) = batches
    assert (len(batch.names), [image.name for image in batch.unreadable]) == (2, [f"{server}/none.png"])


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("none.jpg", "no such file or folder: .*none.jpg"),
        ("photos/*.gif", "no file matches .*photos/"),
        ("empty", "no image in .*empty: give files, folders or shards"),
        ("packed/val-000000.tar#a/9", "has no sample 'a/9': give a key of one of its 2 samples"),
    ],
)
def test_what_is_not_there_is_said(source: str, sentence: str, folder: Path) -> None:
    (folder / "empty").mkdir(exist_ok=True)
    with pytest.raises(DataError, match=sentence):
        resolve_images([f"{folder}/{source}"])


def test_a_digest_identifies_images_and_their_order(folder: Path) -> None:
    sources = ["photos", "packed", "photos/0.png", "shards/val-000000.tar"]
    digests = {resolve_images([f"{folder}/{source}"]).digest() for source in sources}
    both = [f"{folder}/photos/{number}.png" for number in (0, 2)]
    digests |= {resolve_images(both).digest(), resolve_images(both[::-1]).digest()}
    assert len(digests) == 6
    assert resolve_images(both).digest() == resolve_images([*both]).digest()


def test_names_of_any_bytes_are_text(tmp_path: Path) -> None:
    strange = Path(str(tmp_path).encode().decode() + "/" + b"caf\xe9.png".decode(errors="surrogateescape"))
    strange.write_bytes(encoded(Image.new("L", (8, 8), 7), "PNG"))
    (image,) = (LocalImages([strange])[0],)
    image.name.encode()
    assert image.name.endswith("caf\\xe9.png")
    assert image.read() == strange.read_bytes()


def test_files_of_images_have_names_of_their_own() -> None:
    names = [
        "a/x.jpg",
        "b/X.png",
        "c/y.tar.jpg",
        "s/t-0.tar#k/0012",
        "/d/tüv:*?.gif",
        "x-000000.png",
        "a/.jpg",
        "é" * 90,
    ]
    images = ImageList([_Named(names)])
    made = make_file_names(images)
    assert made[:6] == ["x-000000_.png", "X-000001.png", "y.tar.png", "0012.png", "tüv_.png", "x-000000.png"]
    assert len({name.casefold() for name in made}) == len(names)
    assert max(len(name.encode()) for name in made) < 255


class _Named:
    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, position: int) -> ImageInput:
        return ImageInput(self.names[position], lambda: b"")

    def digest(self) -> str:
        return ""


def test_batches_keep_the_order_and_read_no_further_than_two_ahead(folder: Path) -> None:
    """Images that cannot be read leave no gap and move no other image into another batch."""
    read: list[int] = []

    class Counted(_Named):
        def __getitem__(self, position: int) -> ImageInput:
            def load() -> bytes:
                read.append(position)
                return b"" if position % 5 == 3 else encoded(Image.new("L", (8, 8), position), "PNG")

            return ImageInput(str(position), load)

    images = ImageList([Counted([""] * 40)])
    with closing(iter_decoded_batches(images, range(2, 40), TRANSFORM, 4)) as batches:
        first = next(batches)
        assert (first.names, first.num_images) == (("2", "4", "5"), 4)
        assert [image.name for image in first.unreadable] == ["3"]
        assert first.pixels[:, 0, 0, 0].tolist() == [2, 4, 5]
        assert max(read) <= 2 + 3 * 4
        rest = list(batches)
    assert [position for batch in rest for position in batch.positions] == [n for n in range(6, 40) if n % 5 != 3]
    assert [batch.num_images for batch in rest] == [4] * 8 + [2]


def test_a_glob_names_every_image_once_and_no_other_file(folder: Path) -> None:
    everything = names_of(resolve_images([str(folder / "photos/**")]), folder)
    assert (
        sorted(everything)
        == sorted(set(everything))
        == sorted(names_of(resolve_images([str(folder / "photos")]), folder))
    )
    assert names_of(resolve_images([str(folder / "photos/d*")]), folder) == [
        "photos/deep/er/0.png",
        "photos/deep/er/1.jpg",
    ]
    assert len(resolve_images([str(folder / "packed/*")])) == 5, "not its manifest and its indices"


def test_the_label_of_a_segmenter_is_no_image(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "val-000000.tar", "w") as tar:
        for member, grey, kind in (("a.png", 90, "PNG"), ("a.tif", 1, "TIFF")):
            data = encoded(Image.new("L", (8, 8), grey), kind)
            header = tarfile.TarInfo(member)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    for field, grey in (("tif", 90), ("png", 1)):
        assert greys_of(resolve_images([str(tmp_path / "val-000000.tar")], field)) == [grey]
