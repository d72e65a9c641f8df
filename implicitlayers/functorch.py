"""The few things we must ask PyTorch's function transforms that have no public name, in one place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.func import grad, vmap
from torch.utils import _pytree as pytree

__all__ = [
    "all_lanes", "batched", "below", "carries_derivative", "current_level", "forward_ad_enabled", "full_precision",
    "graph_leaves", "is_wrapped", "opaque_to_compile", "over_legacy_lanes", "primal", "pullback", "pushforward",
    "recorded", "stripped", "tape_is_free",
]  # fmt: skip


C = TypeVar("C", bound=Callable[..., Any])


def is_wrapped(t: Tensor) -> bool:
    """Whether `t` lives inside a torch.func transform (vmap, grad, jvp) right now."""
    return _functorch.is_functorch_wrapped_tensor(t)


def _dual(t: Tensor) -> bool:
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None


def recorded(t: Tensor) -> bool:
    """Whether what is computed from `t` now may be differentiated from outside: not inside a Function's forward.

    Dual numbers are carried along under `torch.no_grad` as well.
    """
    duals = forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled()
    return torch.is_grad_enabled() or duals or is_wrapped(t)


def tape_is_free(t: Tensor) -> bool:
    """Whether a tape of one's own may be started at `t`: nothing is recorded, and no transform is running.

    Inside a transform PyTorch refuses `requires_grad_`, also under `torch.no_grad`.
    """
    return not recorded(t) and current_level() == 0


def carries_derivative(t: Tensor) -> bool:
    """Whether a derivative with respect to `t` is asked for at any level: by backward, by torch.func or by a dual."""
    if not (t.is_floating_point() or t.is_complex()):
        return False
    while True:
        # A lane level is never itself a dual, and cannot be asked: what it holds may be one.
        if t.requires_grad or (not _functorch.is_batchedtensor(t) and _dual(t)):
            return True
        if not is_wrapped(t):
            return False
        t = _functorch.get_unwrapped(t)


def graph_leaves(tensors: Sequence[Tensor]) -> set[int]:
    """Identities of the leaves that backward from `tensors` would reach; none for tensors inside transforms."""
    pending = [t.grad_fn for t in tensors if not is_wrapped(t)]
    seen, leaves = set(), {id(t) for t in tensors if not is_wrapped(t) and t.is_leaf and t.requires_grad}
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves.add(id(variable))
        pending.extend(parent for parent, _ in node.next_functions)
    return leaves


def opaque_to_compile(fn: C) -> C:
    """`torch.compiler.disable`, which runs the function as it is inside compiled code, with the type kept."""
    return torch.compiler.disable(fn)  # type: ignore[return-value]


def full_precision(t: Tensor) -> AbstractContextManager[Any]:
    """Context without autocast on the device of `t`: a solve in half precision would stall at three digits."""
    device = t.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def primal(t: Tensor) -> Tensor:
    """Drop the tangent of a dual tensor; other tensors pass."""
    return forward_ad.unpack_dual(t).primal if forward_ad._current_level >= 0 else t


def forward_ad_enabled() -> Any:
    """Context that switches forward-mode AD back on.

    PyTorch turns it off inside `Function.jvp`, and nested forward derivatives of what runs there would silently vanish.
    """
    return forward_ad._set_fwd_grad_enabled(True)


def current_level() -> int:
    """How many torch.func transforms are being run."""
    interpreter = _functorch.peek_interpreter_stack()
    return 0 if interpreter is None else interpreter.level()


def below(t: Tensor, level: int) -> Tensor:
    """What transforms entered after `level` was the current one have wrapped."""
    while is_wrapped(t) and _functorch.maybe_get_level(t) > level:
        t = _functorch.get_unwrapped(t)
    return t


def stripped(t: Tensor) -> Tensor:
    """Strip every transform from `t`, its lanes wherever they are; what is below may be on PyTorch's own tape."""
    while is_wrapped(t):
        t = _functorch.get_unwrapped(t)
    return t


def all_lanes(t: Tensor) -> Tensor:
    """Strip every transform from `t`, with the vmapped axes as leading dimensions, the outermost first.

    A decision that concerns all lanes at once ("is any of them still running?") may look at this; a value may not.
    """
    t = t.detach()
    while is_wrapped(t):
        level_below = _functorch.get_unwrapped(t)
        if _functorch.is_batchedtensor(t):
            level_below = level_below.movedim(_functorch.maybe_get_bdim(t), 0)
        t = level_below
    return t


def batched(fn: Callable[..., Any], lanes: Sequence[Sequence[int | None]], leading: int = 1) -> Callable[..., Any]:
    """Map `fn` over lane levels, the first level innermost.

    Args:
        fn: function of `leading` arguments that carry every lane, then of tensors that carry a lane where the level's
            entry is 0 and are shared by all lanes where it is None.
        lanes: one tuple a level with an entry for every one of those tensors.
        leading: how many leading arguments carry every lane.
    """
    for dims in lanes:
        fn = vmap(fn, in_dims=(*([0] * leading), *dims))
    return fn


def over_legacy_lanes(f: Callable[[Tensor], Sequence[Tensor]], v: Tensor) -> Sequence[Tensor]:
    """Map `f` over the lanes that ``torch.autograd.grad(..., is_grads_batched=True)`` gives a cotangent.

    They belong to an older vmap, of which torch.func knows nothing and which hardly any operation supports. So they are
    taken off, and put back on the results.
    """
    if not torch._C._dispatch_keys(v).has(torch._C._dispatch_key_parse("Batched")):
        return f(v)
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    rows = torch._remove_batch_dim(v, level, 0, 0)  # pyright: ignore[reportPrivateImportUsage]
    pulled = vmap(lambda row: tuple(f(row)))(rows)
    return [torch._add_batch_dim(t, 0, level) for t in pulled]  # pyright: ignore[reportPrivateImportUsage]


def pullback(f: Callable[..., Any], primals: Sequence[Any], cotangent: Any) -> tuple[Any, ...]:
    """Vector-Jacobian products wᵀ ∂f/∂primal, one for every primal; differentiable in everything.

    Written as the gradient of ⟨f, w⟩, not by torch.func.vjp: what vjp returns runs its backward after its own transform
    has ended, and a custom Function inside f (a nested argmin) then meets dead wrappers and fails.
    """
    weights = pytree.tree_leaves(cotangent)

    def paired(*p: Any) -> Tensor:
        return torch.stack([_inner(o, w) for o, w in zip(pytree.tree_leaves(f(*p)), weights, strict=True)]).sum()

    return grad(paired, argnums=tuple(range(len(primals))))(*primals)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Σ ab; for complex numbers Re Σ ab̄, of which PyTorch's gradient is b."""
    return (a * b.conj()).real.sum() if a.is_complex() or b.is_complex() else (a * b).sum()


def pushforward(f: Callable[..., Any], primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> Any:
    """Jacobian-vector product as the transpose of a transpose, J t = d/dw ⟨[wᵀ J]ᵀ, t⟩.

    It takes no forward-mode level of its own: PyTorch's dual numbers do not nest, and torch.func.jvp inside
    `Function.jvp` would be silently wrong.
    """
    out = f(*primals)
    return pullback(lambda w: pullback(f, primals, w), [pytree.tree_map(torch.zeros_like, out)], tuple(tangents))[0]
