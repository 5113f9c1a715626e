"""AWQ (arXiv 2306.00978): channels that carry large activations are scaled up before rounding, and down before them.

Per site s = importance^ratio is searched over a line of ratios, importance being the root mean square of the channel,
with the rounding of the actual grid and the output error as the measure. A scale that does not help is not applied.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from anyquant.core.dtypes import Float32
from anyquant.core.errors import UsageError
from anyquant.models.architecture import Architecture
from anyquant.transforms.base import Scene, Transform
from anyquant.transforms.operations import Scale
from anyquant.transforms.rewrites import Rewrites, chain
from anyquant.transforms.search import LEAST_GAIN, Reader, site_error, site_readers
from anyquant.transforms.sites import Site, block_sites, choose_kinds
from anyquant.transforms.structure import refuses_norms

Float64 = npt.NDArray[np.float64]

DEFAULTS = {"ratios": 20, "duo": True, "rows": 512, "bound": 256.0, "sites": "all"}
FLOOR = 1e-4  # of the largest: channels below it count as dead


def block(scene: Scene, options: Mapping[str, Any]) -> Rewrites:
    """Options: `ratios` tried between 0 and 1; `duo`: also divided by the size of the weights to the power 1 - ratio;
    `rows` of each matrix that the search looks at (0: all); `bound`: scales lie in [1 / bound, bound]; `sites`.
    """
    kinds = choose_kinds("awq", options["sites"])
    return chain([_scale(scene, site, options) for site in block_sites(scene.architecture, scene.block, kinds)])


def _scale(scene: Scene, site: Site, options: Mapping[str, Any]) -> Rewrites:
    readers = site_readers(scene, site, options["rows"])
    if not readers:
        return Rewrites(notes=(f"{site.name}: not scaled, nothing behind it is quantized with known activations",))
    unscaled = site_error(readers, site, None)
    best, chosen, name = unscaled * (1 - LEAST_GAIN), None, ""
    for label, scales in candidates(readers, site, options):
        operation = Scale((1 / scales).astype(np.float32))
        error = site_error(readers, site, operation)
        if error < best:
            best, chosen, name = error, operation, label
    if chosen is None:
        return Rewrites(notes=(f"{site.name}: not scaled, no scale lowers the error of rounding",))
    return site.rewrite(chosen, f"{site.name}: scaled by {name}, error {best / unscaled:.3f} of the unscaled")


def candidates(readers: list[Reader], site: Site, options: Mapping[str, Any]) -> Iterator[tuple[str, Float32]]:
    """(what it is, scales (channels,) float32, their geometric mean 1) in the order in which they are tried."""
    activations = np.sqrt(_per_channel(site, np.mean([r.moments.second_moment for r in readers], axis=0)))
    sizes = _per_channel(site, np.concatenate([np.abs(r.weights) for r in readers]).mean(axis=0))
    count, bound = options["ratios"], options["bound"]
    for step in range(1, count + 1):
        ratio = step / count
        yield f"activation^{ratio:g}", _normalised(_floored(activations) ** ratio, bound)
    for step in range(count if options["duo"] else 0):
        ratio = step / count
        scales = _floored(activations) ** ratio / _floored(sizes) ** (1 - ratio)
        yield f"activation^{ratio:g} / weight^{1 - ratio:g}", _normalised(scales, bound)


def _per_channel(site: Site, values: Float32) -> Float64:
    """Means over the heads of the readers that one head of the makers serves."""
    means = values.astype(np.float64)
    return means if site.repeats == 1 else means.reshape(-1, site.repeats, site.head_dim).mean(axis=1).reshape(-1)


def _floored(values: Float64) -> Float64:
    largest = float(values.max(initial=0.0)) or 1.0
    floored: Float64 = np.maximum(values, FLOOR * largest)
    return floored


def _normalised(scales: Float64, bound: float) -> Float32:
    centred: Float32 = (scales / np.exp(np.log(scales).mean())).clip(1 / bound, bound).astype(np.float32)
    return centred


def refuses(architecture: Architecture, options: Mapping[str, Any]) -> str | None:
    for name, least in {"ratios": 1, "bound": 1, "rows": 0}.items():
        if not least <= options[name] < np.inf:
            raise UsageError(f"transform awq: option {name} is {options[name]}, expected at least {least}")
    reason = refuses_norms(architecture)
    behind_norm = {"attn_input", "ffn_input"} & set(choose_kinds("awq", options["sites"]))
    return f"scales cannot be folded into the norms: {reason}" if reason and behind_norm else None


TRANSFORM = Transform(
    "awq",
    refuses,
    DEFAULTS,
    needs=frozenset({"second_moment"}),
    uses=frozenset({"hessian"}),
    block=block,
)
