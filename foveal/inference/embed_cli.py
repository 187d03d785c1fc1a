"""Command lines of `foveal embed` and `foveal neighbours`."""

from pathlib import Path
from typing import Annotated

import typer

from foveal.atomic import write_atomic
from foveal.data.tools.progress_bar import progress_bar
from foveal.errors import ConfigError
from foveal.inference.predict_cli import DeviceOption, ExportArgument, ImagesArgument, report_unreadable


def embed_command(
    export: ExportArgument,
    images: ImagesArgument,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the features; the same command continues in it.")],
    feature: Annotated[
        str | None,
        typer.Option(help="token, mean (of the patches) or patches; default: what the export's own pooling reads."),
    ] = None,
    layer: Annotated[int | None, typer.Option(min=1, help="Block to read, from 1; default: the last.")] = None,
    file_format: Annotated[str, typer.Option("--format", help="parquet or npz.")] = "parquet",
    shard_size: Annotated[
        int | None, typer.Option(min=1, help="Images per file; default: 10,000, or 256 with patches.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward.")] = 64,
    device: DeviceOption = "auto",
) -> None:
    """Compute features of images with the encoder of EXPORT, in shards that several ranks may share.

    Images that cannot be read are listed at the end, and the exit code is then 1.
    """
    from foveal.distributed.launcher import read_launch_env
    from foveal.inference.embed import embed_images, plan_embeddings, wait_for_all_shards  # with torch
    from foveal.inference.embedder import load_embedder
    from foveal.inference.image_sources import resolve_images
    from foveal.inference.predict import choose_device

    env = read_launch_env()
    embedder = load_embedder(export, feature, layer, choose_device(device, env.local_rank))
    image_list = resolve_images(images)
    manifest = plan_embeddings(embedder, image_list, file_format=file_format, shard_size=shard_size)
    with progress_bar("embedding" if env.world_size == 1 else f"embedding, rank {env.rank}") as on_progress:
        unreadable = embed_images(
            embedder,
            image_list,
            manifest,
            out,
            batch_size=batch_size,
            rank=env.rank,
            world_size=env.world_size,
            on_progress=on_progress if env.local_rank == 0 else lambda _finished, _total: None,
        )
    if env.rank == 0:
        shape = " x ".join(map(str, manifest.feature_shape))
        typer.echo(
            f"{out}: {manifest.feature} {shape} of {len(image_list):,} images in {manifest.num_shards:,} shards of {manifest.shard_size:,}"
        )
    if unreadable and env.world_size > 1:
        wait_for_all_shards(out, manifest)
    report_unreadable(unreadable, len(image_list))


def neighbours_command(
    embeddings: Annotated[Path, typer.Argument(help="Folder that `foveal embed` has written.", metavar="EMBEDDINGS")],
    image: Annotated[str, typer.Argument(help="Image file, URL, or SHARD.tar#KEY.", metavar="IMAGE")],
    export: Annotated[str, typer.Option(help="The export that made the embeddings, or the directory of its run.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Also write a sheet of the image and its neighbours.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Neighbours.")] = 8,
    device: DeviceOption = "auto",
) -> None:
    """Print the nearest images of IMAGE among EMBEDDINGS, by cosine similarity, and draw them."""
    from foveal.inference.image_sources import resolve_images
    from foveal.inference.neighbours import draw_neighbours, encode_png, find_neighbours, load_embedder_of
    from foveal.inference.new_outputs import check_new, writing
    from foveal.inference.predict import choose_device

    if out is not None:
        check_new(out)
    embedder, manifest = load_embedder_of(export, embeddings, choose_device(device))
    queries = resolve_images([image])
    if len(queries) != 1:
        raise ConfigError(f"{image} holds {len(queries):,} images, and neighbours are those of one")
    neighbours = find_neighbours(embedder, manifest, embeddings, queries[0], count)
    typer.echo("  similarity  distance  image")
    for neighbour in neighbours:
        typer.echo(f"  {neighbour.similarity:10.4f}  {1 - neighbour.similarity:8.4f}  {neighbour.name}")
    if out is not None:
        with writing(out):
            write_atomic(out, encode_png(draw_neighbours(queries[0], neighbours, embedder.transform)))
        typer.echo(f"{out}: written")
