"""Sites: activations inside a block that may be changed, because both what makes them and what reads them are weights.

attn_input           norm -> q, k, v
attn_output_input    v -> attention output (softmax mixes tokens, never channels)
ffn_input            norm -> gate, up, router, of all experts
ffn_down_input       up (times the activated gate) -> down, of one expert
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from anyquant.core.errors import AnyQuantError, UsageError
from anyquant.core.linear import Carried, Linear, Role
from anyquant.core.registry import suggest
from anyquant.models.architecture import Architecture
from anyquant.transforms.operations import Operation, Permute, repeat_heads
from anyquant.transforms.rewrites import Place, Rewrites, gather, on_input, on_output, on_vector
from anyquant.transforms.structure import NORM_READERS, biases, block_linears, norm_readers, refuses_norms

KINDS = ("attn_input", "attn_output_input", "ffn_input", "ffn_down_input")
SCALING = frozenset({"scale"})
MOVING = frozenset({"scale", "permute"})
ANY = frozenset({"scale", "permute", "hadamard", "rotate"})


@dataclass(frozen=True)
class Site:
    """`readers` are the Linears behind the activation, `makers` those before it, `vectors` their biases or the gain.

    The makers have `channels` outputs; with `repeats` > 1 each head of `head_dim` of them serves that many heads of the
    readers. `companions` (and their biases) must follow a permutation but nothing else: the gate, whose channels are
    multiplied with those of up. `takes` are the kinds of operation that may be applied.
    """

    kind: str
    block: int
    channels: int
    takes: frozenset[str]
    readers: tuple[Linear, ...]
    makers: tuple[Linear, ...] = ()
    vectors: tuple[Carried, ...] = ()
    companions: tuple[Linear, ...] = ()
    companion_vectors: tuple[Carried, ...] = ()
    head_dim: int = 0
    repeats: int = 1

    @property
    def name(self) -> str:
        """Of the input group of its readers; of the dense or shared one where experts have their own."""
        return next((r.input_group for r in self.readers if r.expert is None), self.readers[0].input_group)

    @property
    def groups(self) -> tuple[str, ...]:
        """The input groups of the readers."""
        return tuple(dict.fromkeys(reader.input_group for reader in self.readers))

    def widen(self, operation: Operation) -> Operation:
        """The operation on the readers' input that belongs to one on the makers' output."""
        return repeat_heads(operation, self.head_dim, self.repeats)

    def rewrite(self, operation: Operation, note: str = "") -> Rewrites:
        """Let the activation x become `operation` x. Raises AnyQuantError for a kind that the site does not take."""
        if operation.kind not in self.takes or operation.size != self.channels:
            raise AnyQuantError(f"{self.name}: cannot take {operation.kind} of {operation.size} channels")
        wide = self.widen(operation)
        dual = wide.dual
        places: list[Place] = [on_input(reader, dual) for reader in self.readers]
        places += [on_output(maker, operation) for maker in self.makers]
        places += [on_vector(vector, operation) for vector in self.vectors]
        if isinstance(operation, Permute):
            places += [on_output(companion, operation) for companion in self.companions]
            places += [on_vector(vector, operation) for vector in self.companion_vectors]
        inputs = dict.fromkeys(self.groups, (wide,))
        return Rewrites(gather(places), inputs=inputs, notes=(note,) if note else ())


def choose_kinds(transform: str, sites: str) -> tuple[str, ...]:
    """The kinds of site named in an option: "all", or names of KINDS with commas. Raises UsageError for another."""
    names = KINDS if sites == "all" else tuple(name.strip() for name in sites.split(","))
    for name in names:
        if name not in KINDS:
            raise UsageError(f"transform {transform}: option sites names {name!r}; {suggest(name, [*KINDS, 'all'])}")
    return names


def block_sites(architecture: Architecture, block: int, kinds: Sequence[str] = KINDS) -> Iterator[Site]:
    """The sites of a block, in order of the forward pass; those behind a norm only where the norm is understood."""
    linears = block_linears(architecture, block)
    norms = [c for c in architecture.carried if c.block == block and c.role in NORM_READERS]
    if refuses_norms(architecture) is not None:
        norms = []
    for norm in norms:
        kind = "attn_input" if norm.role == "attn_norm" else "ffn_input"
        if kind in kinds:
            readers = tuple(norm_readers(architecture, norm))
            yield Site(kind, block, norm.length, SCALING, readers, vectors=(norm,))
        if norm.role == "attn_norm" and "attn_output_input" in kinds:
            yield from _value_sites(architecture, linears)
    if not norms and "attn_output_input" in kinds:
        yield from _value_sites(architecture, linears)
    if "ffn_down_input" in kinds:
        yield from _down_sites(architecture, linears)


def value_site(architecture: Architecture, block: int) -> Site:
    """The site between values and attention output."""
    return next(_value_sites(architecture, block_linears(architecture, block)))


def _value_sites(architecture: Architecture, linears: list[Linear]) -> Iterator[Site]:
    values = tuple(linear for linear in linears if linear.role is Role.ATTN_V)
    sizes = architecture.dimensions
    yield Site(
        "attn_output_input",
        values[0].block or 0,
        values[0].shape[0],
        ANY,
        readers=tuple(linear for linear in linears if linear.role is Role.ATTN_OUTPUT),
        makers=values,
        vectors=tuple(biases(architecture, values)),
        head_dim=sizes.head_dim,
        repeats=sizes.heads // sizes.kv_heads,
    )


def _down_sites(architecture: Architecture, linears: list[Linear]) -> Iterator[Site]:
    for down in linears:
        if down.role is not Role.FFN_DOWN:
            continue
        owner = down.name.removesuffix(Role.FFN_DOWN.value)
        up, gate = (architecture.by_name[owner + role.value] for role in (Role.FFN_UP, Role.FFN_GATE))
        yield Site(
            "ffn_down_input",
            down.block or 0,
            down.shape[1],
            MOVING,
            readers=(down,),
            makers=(up,),
            vectors=tuple(biases(architecture, [up])),
            companions=(gate,),
            companion_vectors=tuple(biases(architecture, [gate])),
        )
