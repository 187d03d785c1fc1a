"""The comparison of an exported model, as another library opened it, with foveal's own. N images."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.errors import ExportError

# Outputs by name, of pixels uint8 [N, C, H, W].
OutputsFn = Callable[[Tensor], dict[str, Tensor]]
# Of an output's largest value: ten times the largest difference in benchmarks/results/exports.md, which comes from sums
# in another order. Another approximation of GELU, the smallest fault of a converter, moves outputs by 1e-4 and more.
TOLERANCE = 2e-5
BATCH_SIZES = (1, 3, 4)


@dataclass(frozen=True)
class Reopened:
    """A converted export, opened again from its files.

    library: name and version of the library that opened it. ``expected`` computes foveal's outputs, ``actual`` those of
    the library. classes: the class names that the library read. loading: lines of Python that open the folder, with
    ``{folder}`` in place of its path. tolerance: limit of the relative difference; None: no limit, because the weights
    were rounded. notes: sentences about what the folder holds.
    """

    library: str
    expected: OutputsFn
    actual: OutputsFn
    classes: tuple[str, ...]
    loading: str
    tolerance: float | None = TOLERANCE
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Difference:
    """The largest difference of an output: absolute, and relative to the output's largest value."""

    output: str
    absolute: float
    relative: float


def check_reopened(reopened: Reopened, pixels: Tensor, classes: tuple[str, ...]) -> list[Difference]:
    """Return the differences on images [N, C, H, W] in batches of several sizes.

    Raises: ExportError if one exceeds the tolerance, or if outputs or class names are not those of foveal's model.
    """
    if reopened.classes != classes:
        raise ExportError(
            f"{reopened.library} reads other class names than the export has: {list(reopened.classes)[:3]} for "
            f"{list(classes)[:3]}"
        )
    differences = [
        difference
        for size in BATCH_SIZES
        for difference in measure_differences(reopened.expected(pixels[:size]), reopened.actual(pixels[:size]))
    ]
    largest = [_find_largest(differences, name) for name in dict.fromkeys(each.output for each in differences)]
    for difference in largest:
        if reopened.tolerance is not None and not difference.relative <= reopened.tolerance:
            raise ExportError(
                f"{reopened.library} gives other {difference.output} than foveal: they differ by "
                f"{difference.absolute:.1e}, {difference.relative:.1e} of the largest value, and at most "
                f"{reopened.tolerance:.0e} is allowed; nothing was written"
            )
    return largest


@torch.no_grad()
def measure_differences(expected: dict[str, Tensor], actual: dict[str, Tensor]) -> list[Difference]:
    """Return the difference of every output. Raises: ExportError for other names or shapes."""
    shapes, other = ({name: tuple(value.shape) for name, value in outputs.items()} for outputs in (expected, actual))
    if shapes != other:
        raise ExportError(f"the exported model has outputs {other}, and foveal's has {shapes}; nothing was written")
    differences = []
    for name, value in expected.items():
        absolute = (
            (actual[name].double() - value.double()).abs().max().nan_to_num(nan=torch.inf, posinf=torch.inf).item()
        )
        scale = value.double().abs().max().item()
        differences.append(Difference(name, absolute, absolute / scale if scale else (torch.inf if absolute else 0.0)))
    return differences


def _find_largest(differences: list[Difference], name: str) -> Difference:
    own = [difference for difference in differences if difference.output == name]
    return Difference(name, max(each.absolute for each in own), max(each.relative for each in own))
