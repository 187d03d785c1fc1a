"""Nearest neighbours of an image among embeddings, by cosine similarity, and their sheet. D: feature width."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from foveal.data.image.decode import UndecodableError
from foveal.errors import ConfigError, DataError, ExportError
from foveal.inference.embedder import Embedder, load_embedder
from foveal.inference.embedding_files import EmbeddingManifest, iter_shards, read_manifest
from foveal.inference.exported_model import find_export
from foveal.inference.image_inputs import ImageInput
from foveal.inference.image_sources import resolve_images
from foveal.inference.image_transform import ImageTransform
from foveal.inspect.image_grid import draw_image_grid
from foveal.weights.export import read_card

_MISSING = 128  # grey of an image that is no longer at its path


@dataclass(frozen=True)
class Neighbour:
    """An image among the embeddings, and the cosine of the angle between its feature and the query's."""

    name: str
    similarity: float


def load_embedder_of(export: str | Path, embeddings: Path, device: torch.device) -> tuple[Embedder, EmbeddingManifest]:
    """Return the encoder that made a folder of embeddings, with the same feature, and their manifest.

    Raises: ExportError if the export has other weights or sees images otherwise; ConfigError if the embeddings have no
    vector per image; DataError.
    """
    manifest = read_manifest(embeddings)
    if len(manifest.feature_shape) != 1:
        raise ConfigError(
            f"{embeddings} holds {manifest.feature}; neighbours need one vector per image: --feature mean"
        )
    folder = find_export(export)
    other_model = ExportError(f"{embeddings} is of another model than {folder}: give the export that made it")
    if read_card(folder).sha256 != manifest.export:
        raise other_model
    is_backbone = manifest.layer == 0
    embedder = load_embedder(folder, manifest.feature, None if is_backbone else manifest.layer, device)
    if embedder.transform.to_dict() != manifest.transform:
        raise other_model
    return embedder, manifest


def find_neighbours(
    embedder: Embedder, manifest: EmbeddingManifest, embeddings: Path, query: ImageInput, count: int
) -> list[Neighbour]:
    """Return the images of the ``count`` largest similarities, the largest first; the first image wins a tie.

    Shards are read one at a time. Raises: DataError if the query or a shard cannot be read.
    """
    pixels = read_pixels(query, embedder.transform)
    feature_D = _normalise_rows(embedder(pixels[None]).astype(np.float64))[0]
    best: list[Neighbour] = []
    for shard in iter_shards(embeddings, manifest):
        similarities = _normalise_rows(shard.features.astype(np.float64)) @ feature_D
        order = np.argsort(-similarities, kind="stable")[:count].tolist()
        best += [Neighbour(shard.images[int(row)], float(similarities[row])) for row in order]
        best = sorted(best, key=lambda neighbour: -neighbour.similarity)[:count]
    return best


def draw_neighbours(query: ImageInput, neighbours: Sequence[Neighbour], transform: ImageTransform) -> Image.Image:
    """Draw the query and its neighbours, as the model sees them, with similarities and names.

    An image that is no longer at its path is grey.
    """
    columns = {"query": read_pixels(query, transform)[None]}
    notes = [f"query: {query.name}"]
    for number, neighbour in enumerate(neighbours, start=1):
        pixels, remark = _read_neighbour(neighbour, transform)
        columns[f"{number}: {neighbour.similarity:.3f}"] = pixels[None]
        notes.append(f"{number}: {neighbour.name}{remark}")
    return draw_image_grid(columns, title="Nearest neighbours by cosine similarity", notes=notes)


def encode_png(sheet: Image.Image) -> bytes:
    """Return a sheet as a PNG file."""
    stream = io.BytesIO()
    sheet.save(stream, "PNG")
    return stream.getvalue()


def read_pixels(image: ImageInput, transform: ImageTransform) -> Tensor:
    """Return the pixels uint8 [C, H, W] of an image. Raises: DataError if it cannot be read."""
    try:
        return transform.decode(image.read(), image.bit_depth)[0]
    except UndecodableError as error:
        raise DataError(f"{image.name} is no image that can be read ({error})") from None
    except OSError as error:
        raise DataError(f"{image.name} cannot be read ({error.strerror})") from None


def _read_neighbour(neighbour: Neighbour, transform: ImageTransform) -> tuple[Tensor, str]:
    try:
        return read_pixels(resolve_images([neighbour.name])[0], transform), ""
    except DataError:
        grey = torch.full((transform.channels, *transform.image_hw), _MISSING, dtype=torch.uint8)
        return grey, " (not there any more)"


def _normalise_rows(features: np.ndarray) -> np.ndarray:
    """Return features [n, D] of norm 1; a zero feature stays zero, at similarity 0 to all."""
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(norms > 0, norms, 1.0)
