"""The lineage of an export or run: from recorded inputs; where a version recorded none, from cards and runs still there."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from foveal.atomic import read_json, sha256
from foveal.errors import ExportError, FovealError
from foveal.renames import translate_setting
from foveal.runs.card_record import CARD, CardRecord, read_card_record
from foveal.runs.inputs import DatasetInput, ModelInput, RunInputs, read_inputs
from foveal.runs.lineage_node import Evidence, LineageNode
from foveal.runs.older_sources import OlderSources, find_run_of_export
from foveal.runs.record import RunRecord, is_run, read_run

FOREIGN_STAGE = "foreign"  # of weights of others, whose origin nobody records
_SHORT = 12  # characters of a digest in a sentence
_MOST_DEEP = 100  # models between the root and its farthest ancestor; a tree is built and drawn by recursion


def build_lineage(path: Path) -> LineageNode:
    """Return the lineage of an export, or of a run: of its export, of all its exports, or before any of the run itself.

    Only cards and records are read. Raises: ExportError, CheckpointError for a path that is neither, or a damaged one.
    """
    try:
        return _build_lineage(path)
    except OSError as error:
        raise ExportError(f"{path} cannot be read ({error.strerror})") from None


def _build_lineage(path: Path) -> LineageNode:
    builder = _Builder()
    if path.name == "model.safetensors" and (path.parent / CARD).is_file():
        path = path.parent
    if (path / CARD).is_file():
        return builder.build_export(read_card_record(path))
    if not is_run(path) and path.is_dir() and any(path.glob("*.safetensors")):
        raise ExportError(
            f"{path} holds weights and no {CARD}, which has the lineage; give the export that they were made from"
        )
    record = read_run(path)
    exports = [read_card_record(folder) for folder in record.exports]
    if len(exports) == 1:
        return builder.build_export(exports[0])
    return builder.build_run(record, exports)


def lineage_of_record(inputs: RunInputs) -> LineageNode:
    """Return the lineage of a run by its recorded inputs alone; no file is read."""
    return _Builder(reads_files=False).build_recorded(LineageNode(stage=inputs.stage), inputs)


class _Builder:
    """Builds the nodes of one tree. A model has its sources at its first node only: ancestors may be shared."""

    def __init__(self, *, reads_files: bool = True) -> None:
        self._reads_files = reads_files
        self._built: dict[tuple[str, str], LineageNode] = {}  # by digest; without those whose sources are missing
        self._depth = 0

    def build_export(self, card: CardRecord) -> LineageNode:
        """Return the node of the export whose lineage it is."""
        node = _node_of_card(card, "")
        self._built[_key_of(node)] = node
        recorded = card.read_inputs()
        if recorded is not None:
            return self.build_recorded(node, recorded)
        return self._build_older(node, OlderSources(card.science, find_run_of_export(card.folder)))

    def build_run(self, record: RunRecord, exports: list[CardRecord]) -> LineageNode:
        """Return the node of a run with no export, or several."""
        nodes = tuple(_node_of_card(card, "") for card in exports)
        recorded = record.inputs
        stage = next((node.stage for node in nodes), record.stage if recorded is None else recorded.stage)
        node = LineageNode(stage=stage, run=str(record.path.resolve()), results=_results_of(record), exports=nodes)
        if recorded is not None:
            return self.build_recorded(node, recorded)
        return self._build_older(node, _older_sources_of(record.path))

    def build_recorded(self, node: LineageNode, inputs: RunInputs) -> LineageNode:
        """Return a node with the data sets and models of recorded inputs."""
        return self._attach(node, inputs.run, inputs.datasets, inputs.models, "recorded")

    def _build_older(self, node: LineageNode, sources: OlderSources) -> LineageNode:
        run = node.run or ("" if sources.run is None else str(sources.run))
        return self._attach(node, run, sources.datasets, sources.models, "settings")

    def _attach(
        self,
        node: LineageNode,
        run: str,
        datasets: tuple[DatasetInput, ...],
        models: tuple[ModelInput, ...],
        evidence: Evidence,
    ) -> LineageNode:
        sources = tuple(self._build_source(model) for model in models)
        return replace(node, run=run, datasets=datasets, models=sources, evidence=evidence)

    def _build_source(self, model: ModelInput) -> LineageNode:
        """Return the node of a model that a run names, as far as it is recorded or can be read."""
        is_known = bool(model.stage)
        node = LineageNode(
            role=model.role,
            stage=model.stage,
            step=model.step if (is_known and model.stage != FOREIGN_STAGE) or model.role == "fork" else None,
            sha256=model.sha256,
            path=model.path,
            run=model.path if model.role == "fork" else "",
            results=model.results,
            evidence="recorded" if is_known else "digest",
        )
        if model.stage == FOREIGN_STAGE:
            return node
        key = _key_of(node)
        if (first := self._built.get(key)) is not None:
            return replace(first, role=node.role, datasets=(), models=(), gaps=(), is_repeated=True)
        self._built[key] = node  # for a circle of paths
        self._depth += 1
        built = self._build_sources_of(node, model)
        self._depth -= 1
        self._built[key] = built
        if not built.datasets and not built.models:
            del self._built[key]  # another run may know more of it
        return built

    def _build_sources_of(self, node: LineageNode, model: ModelInput) -> LineageNode:
        if self._depth > _MOST_DEEP:
            return _with_gap(node, f"not shown: more than {_MOST_DEEP} models lie between")
        if model.inputs is not None:
            return self.build_recorded(node, model.inputs)
        if not model.path:
            return _with_gap(node, "known by its digest alone: where it was is not recorded")
        if not self._reads_files:
            return _with_gap(node, "what it was made from is not recorded here")
        return self._read_fork_source(node) if model.role == "fork" else self._read_source(node)

    def _read_source(self, node: LineageNode) -> LineageNode:
        """Return the node of an export that recorded no inputs, or that only its user's settings name."""
        folder = Path(node.path)
        try:
            if not node.stage and folder.exists() and not (folder / CARD).exists():
                return replace(node, stage=FOREIGN_STAGE)  # an older run's digest of weights of others
            card = _read_same_card(folder, node.sha256)
        except OSError as error:  # a folder of somebody else
            card = f"what it was made from is not recorded, and {folder} cannot be read ({error.strerror})"
        if isinstance(card, str):
            return _with_gap(node, f"missing: {card}")
        found = _node_of_card(card, node.role)
        try:
            recorded = card.read_inputs()
        except FovealError as error:
            return _with_gap(found, f"damaged: {error}")
        if recorded is not None:
            return self.build_recorded(found, recorded)
        return self._build_older(found, OlderSources(card.science, find_run_of_export(folder)))

    def _read_fork_source(self, node: LineageNode) -> LineageNode:
        """Return the node of a fork's source run, which recorded no inputs when it was forked."""
        run, step = Path(node.path), node.step or 0
        try:
            if not is_run(run):
                with suppress(FileNotFoundError, NotADirectoryError):
                    (run / "config.yaml").stat()  # raises for a folder of somebody else
                nothing = f"there is no run at {run} any more"
                return _with_gap(node, f"missing: what it was made from is not recorded, and {nothing}")
            if not has_checkpoint(run, step, node.sha256):
                doubt = f"{run} has its checkpoint of step {step} no more, and may be another run by now"
                node = _with_gap(node, f"unproven: {doubt}")
            recorded, sources = read_inputs(run), _older_sources_of(run)
        except (FovealError, OSError) as error:
            return _with_gap(node, f"damaged: {error}")
        return self._build_older(node, sources) if recorded is None else self.build_recorded(node, recorded)


def _key_of(node: LineageNode) -> tuple[str, str]:
    return node.sha256, node.path if node.role == "fork" else ""


def _read_same_card(folder: Path, digest: str) -> CardRecord | str:
    """Return the card of an export that has the recorded digest still, else why there is none."""
    if not folder.exists():
        return f"what it was made from is not recorded, and {folder} is not there any more"
    try:
        card = read_card_record(folder)
    except ExportError as error:
        return f"what it was made from is not recorded, and {error}"
    if card.sha256 != digest:
        here, was = card.sha256[:_SHORT], digest[:_SHORT]
        return f"the export at {folder} is another one by now (sha256 {here} there, {was} recorded)"
    return card


def has_checkpoint(run: Path, step: int, digest: str) -> bool:
    """Return whether a run has the checkpoint whose checksums have a digest."""
    files = run.glob(f"checkpoints/step-{step:08d}-*/checksums.json")
    return any(_or_none(lambda file=file: sha256(file)) == digest for file in files)


def _or_none(read: Callable[[], str]) -> str | None:
    try:
        return read()
    except OSError:
        return None


def _older_sources_of(run: Path) -> OlderSources:
    """Return what the science of a run names. Raises: CheckpointError for a damaged file, OSError."""
    science = read_json(run / "science.json") | _fork_facts(run)
    return OlderSources(dict(translate_setting(name, value) for name, value in science.items()), run.resolve())


def _fork_facts(run: Path) -> dict[str, object]:
    file = run / "fork.json"
    fork = read_json(file) if file.exists() else {}
    names = {"inherited.fork.run": "run", "inherited.fork.step": "step"}
    return {fact: fork[name] for fact, name in names.items() if name in fork}


def _results_of(record: RunRecord) -> dict[str, float]:
    try:
        return dict(list(record.results.items())[:4])
    except FovealError:  # a damaged row; the lineage is whole without it
        return {}


def _node_of_card(card: CardRecord, role: str) -> LineageNode:
    return LineageNode(role, card.stage, card.step, card.sha256, str(card.folder.resolve()), "", card.results)


def _with_gap(node: LineageNode, gap: str) -> LineageNode:
    return replace(node, gaps=(*node.gaps, gap))
