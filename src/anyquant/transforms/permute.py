"""Channel permutation: hidden channels of the feed-forward part, and those within heads, sorted so that the groups that
share a scale hold channels of one size.

Several orders are tried with the rounding of the actual grid; one that does not lower the output error is not applied.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from anyquant.core.dtypes import Float32
from anyquant.core.errors import UsageError
from anyquant.models.architecture import Architecture
from anyquant.transforms.base import Scene, Transform
from anyquant.transforms.operations import Index, Permute
from anyquant.transforms.rewrites import Rewrites, chain
from anyquant.transforms.search import LEAST_GAIN, Reader, site_error, site_readers
from anyquant.transforms.sites import Site, block_sites

DEFAULTS = {"ffn": True, "heads": True, "rows": 512}


def block(scene: Scene, options: Mapping[str, Any]) -> Rewrites:
    """Options: `ffn`, `heads`: which channels; `rows` of each matrix that the search looks at (0: all)."""
    kinds = [kind for kind, name in (("attn_output_input", "heads"), ("ffn_down_input", "ffn")) if options[name]]
    sites = block_sites(scene.architecture, scene.block, kinds)
    return chain([_sort(scene, site, options["rows"]) for site in sites])


def _sort(scene: Scene, site: Site, rows: int) -> Rewrites:
    readers = site_readers(scene, site, rows)
    if not readers:
        return Rewrites(notes=(f"{site.name}: not permuted, nothing behind it is quantized with known activations",))
    unsorted = site_error(readers, site, None)
    best, chosen, name = unsorted * (1 - LEAST_GAIN), None, ""
    for label, key in _keys(readers):
        operation = Permute(sorting_index(site, key))
        error = site_error(readers, site, operation)
        if error < best:
            best, chosen, name = error, operation, label
    if chosen is None:
        return Rewrites(notes=(f"{site.name}: not permuted, no order lowers the error of rounding",))
    return site.rewrite(chosen, f"{site.name}: sorted by {name}, error {best / unsorted:.3f} of the unsorted")


def _keys(readers: list[Reader]) -> list[tuple[str, Float32]]:
    """Sizes of the readers' input channels by which they may be sorted."""
    weights = np.concatenate([reader.weights for reader in readers])
    activations = np.sqrt(np.mean([reader.moments.second_moment for reader in readers], axis=0))
    size, largest = np.sqrt(np.square(weights).mean(axis=0)), np.abs(weights).max(axis=0)
    return [
        ("weight", size),
        ("largest weight", largest),
        ("activation", activations),
        ("weight times activation", size * activations),
    ]


def sorting_index(site: Site, key: Float32) -> Index:
    """The order of the makers' channels by `key` of the readers', largest first; within heads where there are any."""
    if not site.head_dim:
        return np.argsort(-key, kind="stable").astype(np.int64)
    heads = key.reshape(-1, site.repeats, site.head_dim).mean(axis=1)
    within = np.argsort(-heads, axis=1, kind="stable")
    return (within + site.head_dim * np.arange(len(heads))[:, None]).reshape(-1).astype(np.int64)


def refuses(architecture: Architecture, options: Mapping[str, Any]) -> str | None:
    if options["rows"] < 0:
        raise UsageError(f"transform permute: option rows is {options['rows']}, expected at least 0")
    return None if options["ffn"] or options["heads"] else "neither ffn nor heads is asked for"


TRANSFORM = Transform(
    "permute",
    refuses,
    DEFAULTS,
    needs=frozenset({"second_moment"}),
    uses=frozenset({"hessian"}),
    block=block,
)
