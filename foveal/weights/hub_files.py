"""Files that lie beside weights on the Hugging Face hub: config.json, preprocessor_config.json, OpenCLIP's."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foveal.errors import ExportError
from foveal.timeouts import DEFAULT_STALL_TIMEOUT, read_with_timeout

CONFIG, PREPROCESSOR, PROCESSOR = "config.json", "preprocessor_config.json", "processor_config.json"
OPEN_CLIP = "open_clip_config.json"
_RESCALE_TOLERANCE = 1e-6  # relative; files state 1/255 with 6 to 16 digits


@dataclass(frozen=True)
class HubFiles:
    """The content of the files beside ``weights``; an empty dict for a file that is not there."""

    weights: Path
    config: dict[str, Any]
    preprocessor: dict[str, Any]
    preprocessor_name: str = PREPROCESSOR
    open_clip: dict[str, Any] = field(default_factory=dict)

    @property
    def num_heads(self) -> int | None:
        """Number of attention heads, which weights do not show: Hugging Face's, or that of timm's model_args."""
        stated = self.config.get("num_attention_heads", self._section("model_args").get("num_heads"))
        return stated if isinstance(stated, int) else None

    @property
    def activation(self) -> str | None:
        """Hugging Face's name of the activation in the MLPs."""
        stated = self.config.get("hidden_act")
        return stated if isinstance(stated, str) else None

    @property
    def norm_epsilon(self) -> float | None:
        """Hugging Face's epsilon of the norms."""
        stated = self.config.get("layer_norm_eps")
        return float(stated) if isinstance(stated, int | float) else None

    @property
    def rope_temperature(self) -> float | None:
        """Hugging Face's base of the rotary positions' periods."""
        stated = self.config.get("rope_theta")
        return float(stated) if isinstance(stated, int | float) else None

    @property
    def num_decoder_heads(self) -> int | None:
        """Number of attention heads of Hugging Face's ViTMAE decoder."""
        stated = self.config.get("decoder_num_attention_heads")
        return stated if isinstance(stated, int) else None

    @property
    def norm_pix(self) -> bool | None:
        """Whether Hugging Face's ViTMAE was trained on normalised pixels."""
        stated = self.config.get("norm_pix_loss")
        return stated if isinstance(stated, bool) else None

    def image_sizes(self) -> list[tuple[int, int]]:
        """Return the (height, width) that config.json states, by Hugging Face's and by timm's names, then OpenCLIP's.

        Raises: ExportError for a value that is no size in pixels.
        """
        stated = [
            ("image_size", self.config.get("image_size")),
            ("model_args.img_size", self._section("model_args").get("img_size")),
        ]
        input_size = self._timm_section().get("input_size")
        if input_size is not None:  # [channels, height, width]
            stated.append(("pretrained_cfg.input_size", input_size[1:] if isinstance(input_size, list) else input_size))
        sizes = [self._parse_size(CONFIG, name, value) for name, value in stated if value is not None]
        open_clip = _section(_section(self.open_clip, "model_cfg"), "vision_cfg").get("image_size")
        return sizes + ([] if open_clip is None else [self._parse_size(OPEN_CLIP, "image_size", open_clip)])

    @property
    def architecture(self) -> str | None:
        """timm's name of the model, without the tag of its weights."""
        stated = self.config.get("architecture", self._section("pretrained_cfg").get("architecture"))
        return stated.partition(".")[0] if isinstance(stated, str) else None

    @property
    def model_args(self) -> dict[str, Any]:
        """Arguments with which timm builds the model, beside its name."""
        return self._section("model_args")

    def _timm_section(self) -> dict[str, Any]:
        """Return timm's pretrained_cfg, which files of timm before 0.8 have at the top."""
        is_flat = "architecture" in self.config or {"mean", "std"} <= self.config.keys()
        return self.config if is_flat and "pretrained_cfg" not in self.config else self._section("pretrained_cfg")

    def _section(self, name: str) -> dict[str, Any]:
        return _section(self.config, name)

    def _parse_size(self, file: str, name: str, value: Any) -> tuple[int, int]:
        sides: Any = [value, value] if isinstance(value, int) else value
        if isinstance(value, dict):
            sides = [value.get("height"), value.get("width")]
        if not isinstance(sides, list) or len(sides) != 2 or not all(type(s) is int and s > 0 for s in sides):
            raise ExportError(
                f"{self.weights.parent / file} has {name} {value!r}, which is no side and no [height, width] in pixels"
            )
        return sides[0], sides[1]

    def label_names(self, num_classes: int) -> tuple[str, ...]:
        """Return the names of a head's classes in timm's config.json; empty if unknown."""
        names = self.config.get("label_names")
        return tuple(map(str, names)) if isinstance(names, list) and len(names) == num_classes else ()

    def class_names(self, num_classes: int) -> tuple[str, ...]:
        """Return timm's label_names, or the names of Hugging Face's id2label; empty if unknown.

        Hugging Face's placeholders (LABEL_0) are no names, and names that occur twice name no class.
        """
        if "label_names" in self.config:
            return self.label_names(num_classes)
        id2label = self._section("id2label")
        if not id2label or id2label.keys() != {str(number) for number in range(num_classes)}:
            return ()
        names = [str(id2label[str(number)]) for number in range(num_classes)]
        is_placeholder = names == [f"LABEL_{number}" for number in range(num_classes)]
        return () if is_placeholder or len(set(names)) < num_classes else tuple(names)

    def pixel_statistics(self, weights_version: int) -> "PixelStatistics | None":
        """Return the mean and std of pixels in [0, 1]: timm's, OpenCLIP's, or those of Hugging Face's preprocessor.

        Version 1 reads timm's pretrained_cfg alone. Raises: StatisticsError.
        """
        if weights_version == 1:
            return self._statistics_of(CONFIG, self._section("pretrained_cfg"))
        return (
            self._statistics_of(CONFIG, self._timm_section())
            or self._statistics_of(OPEN_CLIP, _section(self.open_clip, "preprocess_cfg"))
            or self._preprocessor_statistics()
        )

    def _statistics_of(self, name: str, cfg: dict[str, Any]) -> "PixelStatistics | None":
        if cfg.get("mean") is None or cfg.get("std") is None:
            return None
        file = self.weights.parent / name
        return PixelStatistics(_numbers(file, "mean", cfg["mean"]), _numbers(file, "std", cfg["std"]), name)

    def _preprocessor_statistics(self) -> "PixelStatistics | None":
        """Return image_mean and image_std of the preprocessor, of pixels in [0, 1]; 0 and 1 if it does not normalise.

        Raises: StatisticsError for values that are none, or that are of other pixels than RGB divided by 255.
        """
        cfg, file = self.preprocessor, self.weights.parent / self.preprocessor_name
        if cfg.get("do_flip_channel_order", False) not in (False, None):
            raise StatisticsError(
                f"{file} says that channels are blue, green, red (do_flip_channel_order), and foveal's are red, green, "
                f"blue; if the weights take them so, reverse the input channels of their first layer (flip(1)) as well"
            )
        mean, std, factor = cfg.get("image_mean"), cfg.get("image_std"), cfg.get("rescale_factor", 1 / 255)
        normalises = cfg.get("do_normalize", True) is not False
        if not cfg or (normalises and (mean is None or std is None)):
            return None
        if cfg.get("do_rescale", True) is False or cfg.get("rescale_offset", False) not in (False, None):
            raise StatisticsError(f"{file} does not say that pixels are divided by 255 (do_rescale, rescale_offset)")
        if type(factor) not in (int, float) or not math.isclose(factor * 255, 1, rel_tol=_RESCALE_TOLERANCE):
            raise StatisticsError(f"{file} has rescale_factor {factor!r}, and foveal divides pixels by 255")
        if not normalises:
            return PixelStatistics((0.0,), (1.0,), self.preprocessor_name)
        means, stds = _numbers(file, "image_mean", mean), _numbers(file, "image_std", std)
        return PixelStatistics(means, stds, self.preprocessor_name)


@dataclass(frozen=True)
class PixelStatistics:
    """Mean and std of pixels in [0, 1], one value or one per channel, and where they were found."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    origin: str

    def per_channel(self, channels: int) -> "PixelStatistics | None":
        """Return one value per channel; None if there are other numbers of values than 1 and ``channels``."""
        if {len(self.mean), len(self.std)} - {1, channels}:
            return None
        mean, std = (values * channels if len(values) == 1 else values for values in (self.mean, self.std))
        return PixelStatistics(mean, std, self.origin)


class StatisticsError(ExportError):
    """Pixel statistics beside weights that cannot be used; data.mean and data.std decide then."""


def read_hub_files(weights: Path, stall_timeout: float = DEFAULT_STALL_TIMEOUT) -> HubFiles:
    """Return the files beside weights.

    ``preprocessor_config.json`` may nest its values under image_processor, as ``processor_config.json`` does, which is
    read in its absence. stall_timeout: limit for storage without progress.
    Raises: ExportError for a file that is no JSON object, StorageUnreachableError.
    """
    name, preprocessor = PREPROCESSOR, _read_object(weights.parent / PREPROCESSOR, stall_timeout)
    if not preprocessor:
        name = PROCESSOR
        processor = _read_object(weights.parent / PROCESSOR, stall_timeout)
        preprocessor = {"image_processor": processor.get("image_processor")}
    nested = preprocessor.get("image_processor")
    top_level = {name: value for name, value in preprocessor.items() if name != "image_processor"}
    config, open_clip = (_read_object(weights.parent / file, stall_timeout) for file in (CONFIG, OPEN_CLIP))
    return HubFiles(weights, config, nested if isinstance(nested, dict) else top_level, name, open_clip)


def _section(tree: dict[str, Any], name: str) -> dict[str, Any]:
    section = tree.get(name)
    return section if isinstance(section, dict) else {}


def _read_object(file: Path, stall_timeout: float) -> dict[str, Any]:
    try:
        tree: Any = read_with_timeout(file, stall_timeout, lambda: json.loads(file.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{file}, beside the weights, cannot be read ({error}); mend it or take it away") from None
    if not isinstance(tree, dict):
        raise ExportError(f"{file}, beside the weights, holds no JSON object; mend it or take it away")
    return tree


def _numbers(file: Path, name: str, values: Any) -> tuple[float, ...]:
    """Return one number or a list of numbers as a tuple. Raises: StatisticsError."""
    numbers = values if isinstance(values, list) else [values]
    lowest = math.nextafter(0, 1) if name.endswith("std") else 0
    if not numbers or not all(type(v) in (int, float) and math.isfinite(v) and v >= lowest for v in numbers):
        raise StatisticsError(f"{file} has the {name} {values!r}")
    if max(numbers) > 1:
        raise StatisticsError(f"{file} has the {name} {values!r}, which is not of pixels in [0, 1]")
    return tuple(map(float, numbers))
