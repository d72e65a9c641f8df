"""Checkpoints: of a recorded run only the states between stretches of steps are kept.

A stretch of steps is one map z⁺ = S(z, θ) of the solver's state z and the problem's tensors θ, and one autograd
Function. Its forward takes the steps without recording them and saves z and θ. Its derivatives take them again,
recorded,

    vᵀ ∂S/∂(z, θ)   by `pullback` in `backward`,      ∂S/∂(z, θ) t   by `pushforward` in `jvp`,

and are made of differentiable operations on what was saved, so that derivatives of every order follow. With T steps in
√T stretches the memory is that of √T states and of √T recorded steps, for one more run of the steps (Chen et al. 2016;
Griewank & Walther 2008, chapter 12). `torch.utils.checkpoint` does this with hooks on saved tensors, which torch.func
does not support.

A run that looks has decided in the forward how many steps each lane takes. The recorded one repeats their number and
decides nothing: its values may differ in the last bit, and a lane must not stop elsewhere for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd import Function
from torch.utils import _pytree as pytree

from implicitlayers.functorch import forward_ad_enabled, primal, pullback, pushforward
from implicitlayers.loop import Algorithm, Finished, begin, go_on, iterate, repeat, run
from implicitlayers.problem import Bound, Lanes, Posed
from implicitlayers.solver import Solver

__all__ = ["iterate_in_stretches", "run_in_stretches"]

_Fill = Callable[[Iterator[Tensor]], Any]
"""Puts tensors back into the tree that they were taken out of."""


def run_in_stretches(solver: Solver[Any], bound: Bound, state: Any, steps: int) -> Any:
    """As `loop.run`."""
    stretches = _Stretches(solver, steps, look=False)
    return run(stretches, bound, _Between(state, 0), stretches.number).at


def iterate_in_stretches(solver: Solver[Any], bound: Bound, x: Tensor) -> Finished:
    """As `loop.iterate` with a solver that looks."""
    stretches = _Stretches(solver, solver.max_steps, look=True)
    end = iterate(stretches, bound, x, stretches.number, look=True)
    at: Finished = end.state.at
    return Finished(at.state, end.status, at.steps)


class _Between(NamedTuple):
    """The state between two stretches, inside a `Finished` where the run looks, and how many were run."""

    at: Any
    done: int


@dataclass(frozen=True)
class _Stretches(Algorithm[Bound, _Between]):
    """A solver whose step is a stretch of another's steps."""

    solver: Solver[Any]
    steps: int
    look: bool

    @property
    def number(self) -> int:
        """How many there are at most."""
        if self.look:
            return math.ceil((math.sqrt(8 * self.steps + 1) - 1) / 2)
        return math.ceil(self.steps / self._length) if self.steps else 0

    @property
    def _length(self) -> int:
        return math.isqrt(self.steps - 1) + 1

    def init(self, problem: Bound, x: Tensor) -> _Between:
        return _Between(begin(self.solver, problem, self.solver.init(problem, x)), 0)

    def step(self, problem: Bound, state: _Between) -> _Between:
        k = state.done
        # Where the number of steps is not known, the stretches grow by one: T steps make √(2T) of them, none longer.
        before, length = (k * (k + 1) // 2, k + 1) if self.look else (k * self._length, self._length)
        tensors, fill = _split(state.at)
        steps = min(length, self.steps - before)
        stretch = _Stretch(self.solver, problem.posed, problem.lanes, steps, self.look, len(tensors), fill)
        end = _Recomputed.apply(stretch, *tensors, *problem.tensors)
        return _Between(stretch.refill[0](iter(end)), k + 1)

    def terminate(self, problem: Bound, state: _Between) -> Tensor:
        return state.at.status


@dataclass(frozen=True)
class _Stretch:
    """What a stretch is, without its tensors.

    Attributes:
        solver: takes the steps.
        posed: the problem.
        lanes: of its tensors.
        steps: how many, or at most how many.
        look: whether the steps taken are decided on the way.
        count: tensors of the state, which come before the problem's.
        fill: makes the state of them.
        refill: one entry, written by `run`, that makes the state at the end.
    """

    solver: Solver[Any]
    posed: Posed
    lanes: Lanes
    steps: int
    look: bool
    count: int
    fill: _Fill
    refill: list[_Fill] = field(default_factory=list)

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of the state at the end."""
        bound, at = self._open(inputs)
        go = go_on if self.look else run
        tensors, refill = _split(go(self.solver, bound, at, self.steps))
        self.refill[:] = [refill]
        return tensors

    def again(self, inputs: Sequence[Tensor], reached: Tensor | None) -> list[Tensor]:
        """The floating tensors of the same, with as many steps in every lane as on the way to the count `reached`."""
        bound, at = self._open(inputs)
        if reached is None:
            end = run(self.solver, bound, at, self.steps)
        else:
            end = repeat(self.solver, bound, at.state, reached - at.steps)
        return [t for t in _split(end)[0] if t.is_floating_point()]

    def _open(self, inputs: Sequence[Tensor]) -> tuple[Bound, Any]:
        return self.posed.bind(inputs[self.count :], self.lanes), self.fill(iter(inputs))


class _Recomputed(Function):
    """``apply(stretch, *state, *tensors) -> state``."""

    @staticmethod
    def forward(stretch: _Stretch, *inputs: Tensor) -> tuple[Tensor, ...]:
        # PyTorch refuses an output that is an input, or that comes twice.
        seen, out = {id(t) for t in inputs}, []
        for t in stretch.run(inputs):
            out.append(t.clone() if id(t) in seen else t)
            seen.add(id(t))
        return tuple(out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.stretch, ctx.outputs = inputs[0], [t.is_floating_point() for t in output]
        ctx.mark_non_differentiable(*(t for t in output if not t.is_floating_point()))
        # The count of steps is the last entry of a `Finished`.
        saved = (*inputs[1:], output[-1]) if ctx.stretch.look else inputs[1:]
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs, reached = _unpack(ctx.stretch, ctx.saved_tensors)
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        weights = [v for v, floating in zip(cotangents, ctx.outputs, strict=True) if floating]
        again = _function_of(wanted, ctx.stretch, inputs, reached)
        pulled = pullback(again, [inputs[i] for i in wanted], weights)
        grads = dict(zip(wanted, pulled, strict=True))
        return None, *(grads.get(i) for i in range(len(inputs)))

    @staticmethod
    def jvp(ctx: Any, _stretch: Any, *tangents: Tensor | None) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs, reached = _unpack(ctx.stretch, [primal(t) for t in ctx.saved_tensors])
        given = [i for i, t in enumerate(tangents) if t is not None]
        again = _function_of(given, ctx.stretch, inputs, reached)
        with forward_ad_enabled():
            pushed = iter(pushforward(again, [inputs[i] for i in given], [tangents[i] for i in given]))  # type: ignore[misc]
        return tuple(next(pushed) if floating else None for floating in ctx.outputs)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], stretch: _Stretch, *inputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        def front(t: Tensor, dim: int | None) -> Tensor:
            return t if dim is None else t.movedim(dim, 0)

        def wide(t: Tensor, dim: int | None) -> Tensor:
            return t.expand(info.batch_size, *t.shape) if dim is None else front(t, dim)

        n, dims = stretch.count, in_dims[1:]
        level = tuple(None if dim is None else 0 for dim in dims[n:])
        lifted = replace(stretch, lanes=(*stretch.lanes, level))
        out = _Recomputed.apply(lifted, *map(wide, inputs[:n], dims[:n]), *map(front, inputs[n:], dims[n:]))
        return out, (0,) * len(out)


def _unpack(stretch: _Stretch, saved: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tensor | None]:
    return (saved[:-1], saved[-1]) if stretch.look else (saved, None)


def _function_of(
    which: Sequence[int], stretch: _Stretch, inputs: Sequence[Tensor], reached: Tensor | None
) -> Callable[..., tuple[Tensor, ...]]:
    """The stretch as a function of the inputs at the positions `which` alone."""

    def f(*chosen: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip(which, chosen, strict=True))
        return tuple(stretch.again([values.get(i, t) for i, t in enumerate(inputs)], reached))

    return f


def _split(tree: Any) -> tuple[list[Tensor], _Fill]:
    """The tensors of a solver's state, also of dataclasses, which a pytree does not open; and what puts them back."""
    leaves, spec = pytree.tree_flatten(tree)
    parts = [_split_leaf(leaf) for leaf in leaves]
    # Apart, because what puts the tensors back must not hold them.
    puts = [put for _, put in parts]
    found = [t for tensors, _ in parts for t in tensors]
    return found, lambda supply: pytree.tree_unflatten([put(supply) for put in puts], spec)


def _split_leaf(leaf: Any) -> tuple[list[Tensor], _Fill]:
    if isinstance(leaf, Tensor):
        return [leaf], next
    if is_dataclass(leaf) and not isinstance(leaf, type):
        kind, (found, fill) = type(leaf), _split({f.name: getattr(leaf, f.name) for f in fields(leaf)})
        return found, lambda supply: kind(**fill(supply))
    return [], lambda _: leaf
