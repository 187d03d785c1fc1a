"""Sources of pretrained models: a foveal export, or foreign weights of a timm model."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from foveal.data.config import DataConfig
from foveal.errors import ExportError
from foveal.models.backbone import BackboneCard, parse_encoder_card
from foveal.models.resizable import check_resizable
from foveal.timeouts import DEFAULT_STALL_TIMEOUT, read_with_timeout
from foveal.weights.export import Card, read_card, read_export
from foveal.weights.foreign import find_weights_file, is_weights_file
from foveal.weights.foreign_card import FOREIGN_STAGE, build_foreign_card, read_foreign_model


@dataclass(frozen=True)
class SourceModel:
    """A model that a run starts or learns from. ``card``: None for weights that are read name by name."""

    path: Path
    sha256: str
    card: Card | None


@dataclass(frozen=True)
class PretrainedSource:
    """An inspected model; ``card`` rebuilds it and holds its file's digest.

    ``notes`` say in words how foreign weights were read: what was renamed or left out, and whose pixel statistics apply.
    """

    path: Path
    card: Card
    stall_timeout: float = DEFAULT_STALL_TIMEOUT
    notes: tuple[str, ...] = ()

    def load_weights(self) -> dict[str, Tensor]:
        """Return the weights (fp32, CPU) with the names and shapes of the card's module.

        Raises: ExportError if the file has changed since the inspection.
        """
        if self.card.stage == FOREIGN_STAGE:
            file = find_weights_file(self.path, self.stall_timeout)
            encoder = self.card.encoder
            foreign = read_foreign_model(file, encoder.get("timm") or encoder["name"], self.stall_timeout)
            weights, digest = foreign.tensors, foreign.sha256
        else:
            weights, card = read_export(self.path, self.stall_timeout)
            digest = card.sha256
        if digest != self.card.sha256:
            raise ExportError(f"{self.path} has changed since the run was planned; start it again")
        return weights


def inspect_pretrained(path: Path, timm_name: str | None, data: DataConfig) -> PretrainedSource:
    """Inspect a model: a foveal export, or with ``timm_name`` weights of others (``foveal.weights.foreign``).

    Nothing is downloaded, and no memory is allocated for the model. Foreign weights get a new card: an encoder card if
    foveal can train the named model and the weights have its sizes, so that its layers can be distillation targets,
    else a backbone card.
    Raises: ExportError for weights that do not fit; ConfigError for a name unknown to timm, and for an image size that
    is no multiple of the patch size.
    """
    stall_timeout, notes = data.stall_timeout_seconds, ()
    if timm_name is None and read_with_timeout(path, stall_timeout, lambda: _is_foreign_weights(path)):
        raise ExportError(
            f"{path} has no card.json, so it is no export of foveal's; for weights of others say which model of timm's "
            f"they are (init_name, or teacher_name in distillation)"
        )
    if timm_name is None:
        card = read_card(path, stall_timeout)
    else:
        card, notes = build_foreign_card(path, timm_name, data)
    encoder_spec = parse_encoder_card(card.encoder, f"{path}/card.json")
    if isinstance(encoder_spec, BackboneCard):
        check_resizable(encoder_spec, data.image_size, str(path))
    else:
        encoder_spec.trained_size_if_different(data.image_size)
    return PretrainedSource(path, card, stall_timeout, notes)


def _is_foreign_weights(path: Path) -> bool:
    return not (path / "card.json").exists() and (
        path.is_file() or any(is_weights_file(file) for file in path.glob("*.*"))
    )
