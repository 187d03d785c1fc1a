"""``foveal lineage MODEL``: what a model was made from, and what was made from it."""

import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.text import Text
from rich.tree import Tree

from foveal.errors import ConfigError, ExportError
from foveal.redact import printable, redact
from foveal.runs.descendants import Ancestor, Descendant, find_descendants
from foveal.runs.inputs import DatasetInput, describe_roles
from foveal.runs.lineage import FOREIGN_STAGE, build_lineage
from foveal.runs.lineage_check import DigestCheck, check_lineage
from foveal.runs.lineage_node import LineageNode
from foveal.runs.record import is_run

_SHORT = 12  # characters of a digest
_INDENT = "  "


def lineage(
    model: Annotated[Path, typer.Argument(help="An export, or the directory of a run.")],
    descendants: Annotated[
        Path | None, typer.Option(help="List instead what in this folder was made from the model.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Compute the digests of the files that are there, and compare.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a model was made from, back to the data sets: the model on top, its sources below it."""
    if descendants is not None and check:
        raise ConfigError(
            "--check looks at the sources of a model, --descendants at what was made from it: leave out one"
        )
    root = build_lineage(model)
    if descendants is not None:
        _show_descendants(model, root, descendants, as_json=as_json)
        return
    checks = check_lineage(root) if check else []
    if as_json:
        _print_json(root.to_dict() | ({"checks": list(map(asdict, checks))} if check else {}))
    else:
        _show_tree(root, checks if check else None)
    differing = sum(found.verdict == "differs" for found in checks)
    if differing:
        raise ExportError(f"digests that differ from what is recorded: {differing} of {len(checks)}, as said above")


def _show_tree(root: LineageNode, checks: list[DigestCheck] | None) -> None:
    console = Console(highlight=False)
    console.print(_build_tree(root))
    gaps = root.list_gaps()
    if gaps:
        console.print()
        console.print(f"{len(gaps)} {'link is' if len(gaps) == 1 else 'links are'} not whole: see ! above.")
    if checks is None:
        return
    console.print()
    for found in checks:
        reason = f" ({found.reason})" if found.reason else ""
        place = found.path or "no path"
        console.print(Text(printable(f"{found.verdict:<12}{found.digest[:_SHORT]}  {place}{reason}")), soft_wrap=True)


def _build_tree(node: LineageNode) -> Tree:
    """Return a node with its sources; data sets first, because they are short."""
    tree = Tree(_describe_node(node), guide_style="dim")
    if node.is_repeated:
        return tree
    for export in node.exports:
        tree.add(_describe_node(export, "export"))
    for dataset in node.datasets:
        tree.add(_describe_dataset(dataset))
    for source in node.models:
        tree.children.append(_build_tree(source))
    return tree


def _describe_node(node: LineageNode, use: str = "") -> Group:
    """Return the lines of a node: what it is, results, place, what is missing."""
    role = use or node.role
    stage = "weights of others" if node.stage == FOREIGN_STAGE else node.stage or ("run" if node.run else "model")
    facts = [
        f"{stage} {node.name}".rstrip(),
        "" if node.step is None else f"step {node.step}",
        f"{'checkpoint ' * (node.role == 'fork')}{node.sha256[:_SHORT]}",
        "as above" if node.is_repeated else "",
    ]
    words = {"fork": "fork of", "": ""}.get(role, f"{role}:")
    head = Text.assemble((f"{printable(words)} " if words else "", "bold"), printable(", ".join(filter(None, facts))))
    lines = [head]
    if node.is_repeated:
        return Group(*lines)
    if node.results:
        lines.append(Text(printable(_format_results(node.results))))
    if place := node.path or node.run:
        lines.append(Text(printable(place), style="dim", overflow="fold"))
    if node.evidence == "settings":
        lines.append(Text("its version recorded no inputs: from its settings", style="dim"))
    lines += [Text(printable(f"! {gap}"), style="yellow", overflow="fold") for gap in node.gaps]
    return Group(*lines)


def _describe_dataset(dataset: DatasetInput) -> Group:
    use = {"training": "trained on", "evaluation": "evaluated on"}[dataset.role]
    used = f" ({dataset.num_used:,} used)" if dataset.num_used not in (0, dataset.num_images) else ""
    images = f"{dataset.num_images:,} images{used}" if dataset.num_images else ""
    facts = [dataset.name or "name not recorded", dataset.split, images, dataset.digest[:_SHORT]]
    lines = [Text.assemble((f"{use}: ", "bold"), printable(", ".join(filter(None, facts))))]
    if dataset.path:
        lines.append(Text(printable(dataset.path), style="dim", overflow="fold"))
    return Group(*lines)


def _show_descendants(path: Path, root: LineageNode, folder: Path, *, as_json: bool) -> None:
    if not folder.is_dir():
        raise ConfigError(f"--descendants {folder} is no folder; give one that holds runs")
    digests = frozenset(node.sha256 for node in (root, *root.exports) if node.sha256)
    is_whole_run = is_run(path)
    ancestor = Ancestor(digests, *((str(path.resolve()), None) if is_whole_run else (root.run, root.step)))
    found = find_descendants(ancestor, folder)
    if as_json:
        _print_json({"digests": sorted(digests), "descendants": list(map(asdict, found))})
        return
    console = Console(highlight=False)
    for item in found:
        for line in _describe_descendant(item, folder, console.width):
            console.print(line, soft_wrap=True)
    if not found:
        console.print(Text(printable(f"nothing in {folder} was made from it")), soft_wrap=True)


def _describe_descendant(item: Descendant, folder: Path, width: int) -> Iterator[Text]:
    path, root = Path(item.path), folder.resolve()
    yield Text(printable(str(path.relative_to(root)) if path.is_relative_to(root) else item.path), style="bold")
    facts = [item.stage or "run", "" if item.step is None else f"step {item.step}", item.sha256[:_SHORT]]
    for line in (
        f"{', '.join(filter(None, facts))}; the model is its {describe_roles(item.roles)}",
        _format_results(item.results),
    ):
        for part in textwrap.wrap(printable(line), width - len(_INDENT)):
            yield Text(f"{_INDENT}{part}")


def _format_results(results: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in results.items())


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(_redact_all(value), indent=1, ensure_ascii=False))


def _redact_all(value: Any) -> Any:
    if isinstance(value, dict):
        return {_redact_all(name): _redact_all(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_redact_all(inner) for inner in value]
    return redact(value) if isinstance(value, str) else value
