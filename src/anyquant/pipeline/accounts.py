"""The accounts: one ledger line per Linear and carried tensor, balanced to the byte on both sides."""

from collections import defaultdict
from collections.abc import Mapping

from anyquant.core.errors import AnyQuantError
from anyquant.core.ledger import Ledger, Line
from anyquant.core.linear import Linear
from anyquant.core.plan import EMPTY, Place
from anyquant.pipeline.planner import Job


def _stored(job: Job, linear: Linear) -> int:
    """Source bytes of a Linear; 0 where a transform has made the tensor (a head that is no longer tied)."""
    if linear.view.tensor not in job.source.names():
        return 0
    spec = job.source.spec(linear.view.tensor)
    return linear.weights * spec.nbytes // spec.elements


def make_ledger(job: Job, errors: Mapping[str, float] | None = None, kinds: Mapping[str, str] = EMPTY) -> Ledger:
    """One line per Linear and carried tensor. Raises AnyQuantError unless both sides balance to the byte.

    `kinds`: what transcoding did to a Linear.
    """
    architecture, checkpoint = job.architecture, job.source
    lines = []
    claimed: dict[str, int] = defaultdict(int)
    parts = {name: part for name, (_, part) in job.layout.locate().items()}
    for unit in job.layout.units:
        for name in unit.linears:
            linear, decision = architecture.by_name[name], job.plan.decisions[name]
            owned = [
                place
                for place in job.format.slices(unit, architecture, name, 0, linear.view.rows)
                if not place.shared or name == unit.linears[0]
            ]
            owned += [Place(part, 0, parts[part].nbytes) for part in unit.inputs if name == unit.linears[0]]
            for place in owned:
                claimed[place.part] += place.total
            lines.append(
                Line(
                    name=name,
                    role=linear.role.value,
                    source=linear.view.tensor,
                    source_dtype=checkpoint.spec(linear.view.tensor).dtype if _stored(job, linear) else "(untied)",
                    source_bytes=_stored(job, linear),
                    requested=decision.requested,
                    applied=decision.grid,
                    algorithm=decision.chain,
                    target=owned[0].part,
                    target_bytes=sum(place.total for place in owned),
                    reason=f"{decision.reason}: {kinds[name]}" if name in kinds else decision.reason,
                    error=None if errors is None else errors[name],
                )
            )
        for name in unit.carried:
            carried = architecture.carried_by_name[name]
            spec = checkpoint.spec(carried.tensor)
            nbytes = sum(parts[stored].nbytes for stored in unit.parts)
            for stored in unit.parts:
                claimed[stored] += parts[stored].nbytes
            lines.append(
                Line(
                    name=name,
                    role=carried.role,
                    source=carried.tensor,
                    source_dtype=spec.dtype,
                    source_bytes=carried.length * spec.nbytes // spec.elements,
                    requested=job.plan.carried[name] or "as stored",
                    applied=job.plan.carried[name] or parts[unit.parts[0]].dtype,
                    algorithm="carried",
                    target=unit.parts[0],
                    target_bytes=nbytes,
                    reason="kept in float",
                )
            )
    for name, part in parts.items():
        if claimed[name] != part.nbytes:
            raise AnyQuantError(f"ledger: {claimed[name]} of {part.nbytes} bytes of {name} are accounted for")
    unused = tuple((name, checkpoint.spec(name).nbytes, reason) for name, reason in architecture.unused.items())
    ledger = Ledger(tuple(lines), unused)
    ledger.balance(sum(checkpoint.spec(name).nbytes for name in checkpoint.names()), job.layout.payload)
    return ledger
