"""What a format's writer gets: the model, where it comes from, and the options of ``foveal export``."""

from dataclasses import dataclass

from foveal.convert.images import ComparisonImages
from foveal.convert.source import Source
from foveal.inference.exported_model import ExportedModel


@dataclass(frozen=True)
class Options:
    """Choices beside the format.

    patches: an encoder's patch features are outputs too. preprocess: the graph's input are pixels, uint8. dtype: the
    weights' type in the file, "fp32", "bf16" or "fp16".
    """

    patches: bool = False
    preprocess: bool = False
    dtype: str = "fp32"


DEFAULTS = Options()


@dataclass(frozen=True)
class Request:
    """A conversion to be done: the export, its model, the options, and images for comparisons of a format's own."""

    source: Source
    model: ExportedModel
    options: Options
    images: ComparisonImages
