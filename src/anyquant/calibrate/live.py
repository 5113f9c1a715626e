"""One block of the model while it is being quantized: its weights, what enters it, what leaves it."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np

from anyquant.calibrate.replay import Replay, parts_of
from anyquant.calibrate.stats import Moments, Running, assumed, average
from anyquant.calibrate.stream_sum import StreamSum, writers
from anyquant.calibrate.watch import Enough, Routing, first_of_groups, watching
from anyquant.core.arithmetic import fast_products
from anyquant.core.dtypes import Float32
from anyquant.core.errors import AnyQuantError
from anyquant.core.extras import require
from anyquant.core.linear import Carried, Linear
from anyquant.models.batches import Batch
from anyquant.models.streaming import StreamedModel


class LiveBlock:
    """Block `index` with its weights, float at first; `Chain.block` makes it.

    `module` is its torch module, `linears` are its Linears, in order. `inputs` are the states that enter it through the
    quantized blocks, `floats` those of the unquantized model, or None. `unrouted` are the Linears, experts, whose
    statistics had to be assumed. `moved` is called with a number of tokens when they have passed the block. At most
    `room` bytes of what is computed inside the block are kept from one pass to the next.

    The weights that the block began with are kept beside assigned ones where there are `floats`; else they are read
    again when they are asked for.
    """

    def __init__(
        self,
        model: StreamedModel,
        index: int,
        module: Any,
        states: tuple[Sequence[Batch], Sequence[Any] | None],
        moved: Callable[[int], None],
        room: int = 0,
    ) -> None:
        self.index = index
        self.module = module
        self.linears = tuple(linear for linear in model.architecture.linears if linear.block == index)
        self.unrouted: tuple[str, ...] = ()
        self.advanced = False
        self._model = model
        self._torch = require("torch")
        self._inputs, self._floats = states
        self._moved = moved
        self._short = {name: short for short, name in model.parameters(index).items()}
        self._changed: set[str] = set()
        self._settled: set[str] = set()
        self._kept: dict[str, Any] = {}
        self._floats_moved = False
        self._dense = {linear.name for linear in self.linears if linear.expert is None}
        self._replay = Replay(parts_of(module, f"{model.architecture.block_path}.{index}", self.linears), room)

    @property
    def batches(self) -> int:
        return len(self._inputs)

    def weights(self, linear: Linear) -> Float32:
        """The weights (out, in) that the Linear has now; a copy."""
        place = self._model.places[linear.name]
        values: Float32 = np.array(place.of(self._parameter(place.parameter)).numpy(), order="C")
        return values

    def assign(self, linear: Linear, values: Float32) -> None:
        """Give the Linear other weights (out, in). Raises AnyQuantError when the shape is another."""
        place = self._model.places[linear.name]
        self._change(place.parameter, place.of, values, linear.name)

    def settle(self, linear: Linear, values: Float32) -> None:
        """`assign`, for good: what these weights make need be computed only once."""
        self.assign(linear, values)
        self._settled.add(linear.name)

    def assign_carried(self, carried: Carried, values: Float32) -> None:
        """Give a norm or bias other values (length,). Raises AnyQuantError when the length is another."""
        stop = carried.start + carried.length
        parameter = self._model.parameter_of(carried.tensor)
        self._change(parameter, lambda tensor: tensor.view(-1)[carried.start : stop], values, carried.name)

    def accept(self) -> None:
        """The weights of now count as the float ones from here on: after a transform that preserves the function."""
        for name in self._changed:
            self._kept[name] = self._parameter(name).clone()
        self._settled.clear()
        self._replay.clear()

    def observe(
        self, needs: frozenset[str], linears: Sequence[Linear] | None = None, last: bool = False
    ) -> dict[str, Moments]:
        """Statistics of what enters `linears` (all of the block), by input group: one pass with the weights of now.

        "cross" takes a second pass, of the unquantized states through the float weights; experts get there the tokens
        that the quantized states route to them. An expert that no token reached has the average of the others observed
        with it, or, where there are none, inputs of size 1 that are not correlated. `last`: nothing else will be asked
        of this block but to advance, so that this second pass may leave the unquantized states behind the block. Raises
        BadInputError for activations that are not finite.
        """
        return self._observe(needs, linears, keep=False, last=last)

    def advance(self, needs: frozenset[str] | None = None) -> dict[str, Moments]:
        """Push the states through the block with its weights of now, those of the float model through its float ones.

        With `needs` it is `observe` too, in the same pass; "cross" cannot be had here.
        """
        if self.advanced:
            raise AnyQuantError(f"block {self.index} has been advanced")
        if needs is not None and {"cross", "residual"} & needs:
            raise AnyQuantError("cross statistics are observed before the block is advanced")
        moments = {} if needs is None else self._observe(needs, None, keep=True)
        floats = None if self._floats_moved else self._floats
        original = self._originals() if floats is not None else {}
        for number, batch in enumerate(self._inputs):
            if needs is None:
                batch.states.copy_(self._now(number, {}, False))
            if floats is not None:
                floats[number].copy_(self._float(number, original, {}, False))
            if needs is None:
                self._moved(batch.tokens)
        self.advanced = True
        return moments

    def close(self) -> None:
        """Let go of what was kept between passes."""
        self._replay.clear()

    def call(self, batch: int, weights: Mapping[str, Any]) -> Any:
        """Output states (documents, length, hidden) when the Linears named in `weights` have these weights.

        They are torch tensors (out, in), to which gradients flow.
        """
        assembled: dict[str, Any] = {}
        for name, values in weights.items():
            place = self._model.places[name]
            short = self._short[place.parameter]
            parameter = self._parameter(place.parameter)
            if place.expert is None and not place.transposed and values.shape == parameter.shape:
                assembled[short] = values
                continue
            if short not in assembled:
                assembled[short] = parameter.clone()
            place.of(assembled[short]).copy_(values)
        entering = self._inputs[batch]
        with fast_products():
            return self._model.apply(self.index, self.module, entering, entering.states, assembled)

    def target(self, batch: int) -> Any:
        """Output states of the float block: on the states of the unquantized model where there are any, else on those
        that `call` gets.
        """
        states = None if self._floats is None else self._floats[batch]
        return self._run(batch, states, self._originals())

    def _observe(
        self, needs: frozenset[str], linears: Sequence[Linear] | None, keep: bool, last: bool = False
    ) -> dict[str, Moments]:
        groups = first_of_groups(self.linears if linears is None else linears)
        location = f"{self._model.checkpoint.location}: block {self.index}"
        several = len(groups) < len(first_of_groups(self.linears))  # then it pays to know what passes have in common
        into = writers(self.linears) if ("residual" in needs or several) and self._adds_up else {}
        sums = {
            group: Running(linear.shape[1], f"{location}, {linear.module}", needs, linear.shape[0] * (group in into))
            for group, linear in groups.items()
        }
        if {"cross", "residual"} & needs:
            self._observe_both(groups, sums, last)
        else:
            enough = Enough(groups, keep)
            parameters = {name: self._parameter(name) for name in self._short}

            def add(group: str, rows: Any) -> None:
                if group in sums:
                    sums[group].add(rows)
                    enough.arrived(group)

            watched = self._watched(groups)
            with watching(self._model, watched, parameters, add):
                for number, batch in enumerate(self._inputs):
                    output = enough.run(partial(self._now, number, watched, not keep))
                    if keep:
                        batch.states.copy_(output)
                        self._moved(batch.tokens)
        return self._results(groups, sums)

    def _observe_both(self, groups: Mapping[str, Linear], sums: Mapping[str, Running], last: bool) -> None:
        """The quantized states through the weights of now, then the float ones through the float weights."""
        if self._floats is None or self._floats_moved:
            raise AnyQuantError("cross statistics need the states of the unquantized model: Chain(both=True)")
        held: dict[str, Any] = {}
        original, routing = self._originals(), Routing(self._model, list(groups.values()))
        current = {name: self._parameter(name) for name in self._short}
        before = {name: original.get(short, current[name]) for name, short in self._short.items()}
        stream = StreamSum(self._stream_modules())
        enough, enough_float = Enough(groups, False), Enough(groups, last)
        watched = self._watched(groups)

        def hold(group: str, rows: Any) -> None:
            if group in sums:
                held[group] = (rows.clone(), stream.now)
                enough.arrived(group)

        def add(group: str, rows: Any) -> None:
            if group not in sums:
                return
            activations, found = held.pop(group)
            sums[group].add(activations, rows, stream.now - found if sums[group].streams else None)
            enough_float.arrived(group)

        for number, states in enumerate(self._floats):
            entering = stream.following(self._inputs[number].states)
            with watching(self._model, watched, current, hold), routing.recording(), entering:
                enough.run(partial(self._now, number, watched, True))
            with watching(self._model, watched, before, add), routing.repeating(), stream.following(states):
                output = enough_float.run(partial(self._float, number, original, watched, not last))
            if last and not routing:
                states.copy_(output)
        self._floats_moved = last and not routing

    def _watched(self, groups: Mapping[str, Linear]) -> dict[str, Linear]:
        """`groups`, and of experts all of the block: some may be reached by no token, but not all.

        Of matrices that lie one below the other in one parameter, the first is where products find it.
        """
        if all(linear.expert is None for linear in groups.values()):
            return dict(groups)
        return {**groups, **first_of_groups([linear for linear in self.linears if linear.expert is not None])}

    @cached_property
    def _adds_up(self) -> bool:
        """Whether the block's output is its input and what its writers add, seen on the first batch."""
        into = [(one.name, self._model.module.get_submodule(one.module)) for one in writers(self.linears).values()]
        stream = StreamSum([module for _, module in into])
        with stream.following(self._inputs[0].states), self._replay.learning(into):
            return stream.explains(self._run(0), self._model.dtype)

    def _stream_modules(self) -> list[Any]:
        """What puts out what is added to the stream: the parts of the block that are known to, else the writers."""
        found = []
        for linear in writers(self.linears).values():
            sound = [part.module for part in self._replay.parts if part.sound and linear.name in part.linears]
            found += sound or [self._model.module.get_submodule(linear.module)]
        return found

    def _results(self, groups: Mapping[str, Linear], sums: Mapping[str, Running]) -> dict[str, Moments]:
        """Experts without tokens get the average of the others in the same place, else what is assumed of any input."""
        found = {g: running.result() for g, running in sums.items() if running.count or groups[g].expert is None}
        unrouted = []
        for group, linear in groups.items():
            if group in found:
                continue
            alike = [
                found[other]
                for other, one in groups.items()
                if other in found and (one.role, one.module) == (linear.role, linear.module) and one.expert is not None
            ]
            seen = [moments for moments in alike if moments.count]
            found[group] = average(seen) if seen else assumed(linear.shape[1], sums[group].needs)
            unrouted += [one.name for one in self.linears if one.input_group == group]
        self.unrouted = tuple(dict.fromkeys((*self.unrouted, *unrouted)))
        return {group: found[group] for group in groups}

    def _now(self, number: int, watched: Mapping[str, Linear], keep: bool) -> Any:
        """The quantized states through the weights of now; `keep` what a later pass can use."""
        with self._replay.passing(("now", number), self._settled.__contains__, _names(watched), keep):
            return self._run(number)

    def _float(self, number: int, original: Mapping[str, Any], watched: Mapping[str, Linear], keep: bool) -> Any:
        """The states of the unquantized model through its weights. Experts may be made to see other tokens."""
        states = None if self._floats is None else self._floats[number]
        with self._replay.passing(("float", number), self._dense.__contains__, _names(watched), keep):
            return self._run(number, states, original)

    def _run(self, number: int, states: Any = None, weights: Mapping[str, Any] | None = None) -> Any:
        batch = self._inputs[number]
        with self._torch.no_grad(), fast_products():
            entering = batch.states if states is None else states
            return self._model.apply(self.index, self.module, batch, entering, weights)

    def _parameter(self, name: str) -> Any:
        return self.module.get_parameter(self._short[name])

    def _change(self, name: str, part: Callable[[Any], Any], values: Float32, what: str) -> None:
        if name not in self._short:
            raise AnyQuantError(f"{what}: block {self.index} has no parameter {name}")
        target = part(self._parameter(name))
        if tuple(target.shape) != values.shape:
            raise AnyQuantError(f"{what}: shape {values.shape} cannot be assigned, it has {tuple(target.shape)}")
        if self._floats is not None:
            self._keep_all([name])
        self._changed.add(name)
        with self._torch.no_grad():
            target.copy_(self._torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)))

    def _keep_all(self, names: Sequence[str] | set[str]) -> None:
        """Hold the values from before the first change."""
        for name in names:
            if name not in self._kept:
                values = self._torch.from_numpy(self._model.read(name)) if name in self._changed else None
                self._kept[name] = self._parameter(name).clone() if values is None else values

    def _originals(self) -> dict[str, Any]:
        """Values before the changes, by names below the block, of the parameters that have been changed."""
        self._keep_all(self._changed)
        return {self._short[name]: self._kept[name] for name in self._changed}


def _names(linears: Mapping[str, Linear]) -> frozenset[str]:
    return frozenset(linear.name for linear in linears.values())
