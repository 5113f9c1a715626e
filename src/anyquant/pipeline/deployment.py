"""How the artifact is to be run so that it is what was measured: the runtime's command with its flags."""

from dataclasses import dataclass

from anyquant.models.architecture import Architecture
from anyquant.pipeline.targets import Target
from anyquant.runtimes import RUNTIMES
from anyquant.runtimes.kv_cache import CacheTypes


@dataclass(frozen=True)
class Deployment:
    """`command` is given inside the output folder. `context`: the tokens that the model was made for.

    `kv_cache`: types of the key-value cache with which the artifact was judged, and `kv_bytes_per_token` what a token
    of context costs in them; "" and 0 where the runtime cannot be told.
    """

    command: str
    context: int
    kv_cache: str
    kv_bytes_per_token: int


def deployment_of(
    architecture: Architecture, target: Target, artifact: str, wished: str | None = None
) -> Deployment | None:
    """The advice for `artifact`, a path inside the output. `wished`: types of the key-value cache, where any were asked
    for. None for a target that is no server."""
    if not target.serve:
        return None
    sizes = architecture.dimensions
    context = min(sizes.context, sizes.window or sizes.context)
    default = RUNTIMES.get(target.runtime).default_cache if target.runtime else None
    if default is None:
        return Deployment(target.serve.format(artifact=artifact or ".", context=context, cache=""), context, "", 0)
    types = CacheTypes.parse(wished or default)
    flags = "" if wished is None else f" --cache-type-k {types.keys} --cache-type-v {types.values}"
    if types.flash_attention:
        flags += " --flash-attn on"
    command = target.serve.format(artifact=artifact, context=context, cache=flags)
    return Deployment(command, context, str(types), sizes.blocks * types.nbytes(sizes.kv_heads * sizes.head_dim))
