"""SmoothQuant (arXiv 2211.10438, equation 4): part of the range of activations moves into the weights.

s_j = max|X_j|^alpha / max|W_j|^(1 - alpha); the activation is divided by s, the matrices behind it multiplied.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from anyquant.core.dtypes import Float32
from anyquant.core.errors import UsageError
from anyquant.models.architecture import Architecture
from anyquant.transforms.base import Scene, Transform
from anyquant.transforms.operations import Scale
from anyquant.transforms.rewrites import Rewrites, chain
from anyquant.transforms.sites import Site, block_sites, choose_kinds
from anyquant.transforms.structure import refuses_norms

DEFAULTS = {"alpha": 0.5, "sites": "all"}
BOUND = 1e4  # scales leave [1 / BOUND, BOUND] only where a channel is all but dead; fp16 gains must hold them


def block(scene: Scene, options: Mapping[str, Any]) -> Rewrites:
    """Options: `alpha` from 0 (nothing moves out of the weights) to 1; `sites`, see `sites.KINDS`."""
    kinds = choose_kinds("smoothquant", options["sites"])
    return chain(
        [_smooth(scene, site, options["alpha"]) for site in block_sites(scene.architecture, scene.block, kinds)]
    )


def _smooth(scene: Scene, site: Site, alpha: float) -> Rewrites:
    readers = [reader for reader in site.readers if scene.grid(reader.name) is not None]
    found = [scene.moments(reader.input_group) for reader in readers]
    largest = [moments.absolute_maximum for moments in found if moments and moments.absolute_maximum is not None]
    if not readers or not largest:
        return Rewrites(notes=(f"{site.name}: not smoothed, nothing behind it is quantized with known activations",))
    weights = np.max([np.abs(scene.weights(reader.name)).max(axis=0) for reader in readers], axis=0)
    scales = smoothing_scales(np.max(largest, axis=0), weights, alpha)
    if site.repeats > 1:
        scales = scales.reshape(-1, site.repeats, site.head_dim).mean(axis=1).reshape(-1)
    return site.rewrite(Scale((1 / scales).astype(np.float32)), f"{site.name}: smoothed, alpha {alpha:g}")


def smoothing_scales(activations: Float32, weights: Float32, alpha: float) -> Float32:
    """Scales (in,) from the largest |x| and |W| of each channel; 1 where one of them is 0: nothing flows there."""
    alive = (activations > 0) & (weights > 0)
    safe_activations, safe_weights = (np.where(alive, array, 1).astype(np.float64) for array in (activations, weights))
    scales: Float32 = (safe_activations**alpha / safe_weights ** (1 - alpha)).clip(1 / BOUND, BOUND).astype(np.float32)
    return np.where(alive, scales, np.float32(1))


def refuses(architecture: Architecture, options: Mapping[str, Any]) -> str | None:
    if not 0 <= options["alpha"] <= 1:
        raise UsageError(f"transform smoothquant: option alpha is {options['alpha']}, expected 0 to 1")
    reason = refuses_norms(architecture)
    behind_norm = {"attn_input", "ffn_input"} & set(choose_kinds("smoothquant", options["sites"]))
    return f"scales cannot be folded into the norms: {reason}" if reason and behind_norm else None


TRANSFORM = Transform("smoothquant", refuses, DEFAULTS, needs=frozenset({"absolute_maximum"}), block=block)
