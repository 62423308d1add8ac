"""Operators of torch that cost little per call.

`torch.library.custom_op` flattens pytrees and compares storages at every call, which takes longer than a small batch.
Here an operator is a schema, one kernel for every device and, where it has a derivative, one kernel for autograd; a
call that nothing watches goes to these directly, without the dispatcher's copies of every list.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

LIBRARY = torch.library.Library("flashpair", "FRAGMENT")


class Operator:
    """The operator `flashpair::name` of a function of tensors, which it does not change.

    The type hints of the function are the schema; its first argument is a tensor, and at most one a list of tensors.
    Results must not share memory with arguments: `torch.library.opcheck` on `overload` finds that out, in the tests
    instead of at every call.
    """

    def __init__(self, name: str, function: Callable) -> None:
        schema = torch.library.infer_schema(function, mutates_args=())
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        self.name, self.overload = name, getattr(torch.ops.flashpair, name).default
        self._function = _untraced(function)
        self._kernel = self._function
        LIBRARY.impl(name, self._function, "CompositeExplicitAutograd")

    def __call__(self, *arguments):
        return self.overload(*arguments) if watched(arguments[0]) else self._kernel(*arguments)

    def fake(self, function: Callable) -> Callable:
        """Decorator: shapes, dtypes and strides of the results, from arguments without data."""
        return torch.library.register_fake(f"flashpair::{self.name}", function, lib=LIBRARY)

    def differentiable(self, backward: Callable, setup: Callable | None = None) -> None:
        """Give the operator its derivative.

        Args:
            backward: `(ctx, needs, *grads)` → a gradient or None for each argument, a list of these for a list of
                tensors. `needs` says for each argument whether its gradient is wanted, a tuple of flags for a list.
            setup: `(ctx, arguments, results)` keeps what `backward` reads.
        """
        arguments, returns = self.overload._schema.arguments, self.overload._schema.returns
        kinds = [str(a.type) for a in arguments]
        if kinds.count("List[Tensor]") > 1:
            raise ValueError(f"{self.name} has {kinds.count('List[Tensor]')} lists of tensors; at most one is allowed")
        gives_list = [str(r.type) for r in returns] == ["List[Tensor]"]
        # Tensors come first, so `cut` is where the list or else the first number stands.
        cut = next((i for i, kind in enumerate(kinds) if kind not in ("Tensor", "Optional[Tensor]")), len(kinds))
        listed = kinds[cut : cut + 1] == ["List[Tensor]"]
        if any("Tensor" in kind for kind in kinds[cut + listed :]):
            raise ValueError(f"{self.name} must take its tensors first, then their list, then numbers; got {kinds}")

        # torch.autograd.Function takes a while for each of its arguments: one for all that are no tensors.
        def flat(values) -> tuple:
            return (*values[:cut], *values[cut]) if listed else tuple(values[:cut])

        def nested(values: tuple, kind: type = tuple) -> tuple:
            return (*values[:cut], kind(values[cut:])) if listed else values

        def below_autograd(*values):
            with torch._C._AutoDispatchBelowAutograd():
                return self.overload(*values)

        class Derivative(torch.autograd.Function):
            @staticmethod
            def forward(ctx, run, numbers, *tensors):
                values = (*nested(tensors, list), *numbers)
                results = run(*values)
                if setup is not None:
                    setup(ctx, values, results)
                return tuple(results) if gives_list else results

            @staticmethod
            def backward(ctx, *grads):
                return None, None, *flat(backward(ctx, nested(ctx.needs_input_grad[2:]), *grads))

        Derivative.__name__ = Derivative.__qualname__ = f"{self.name}_derivative"

        def kernel(apply, run, *values):
            if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*values)):
                return run(*values)
            results = apply(run, values[cut + listed :], *flat(values))
            return list(results) if gives_list else results

        LIBRARY.impl(self.name, functools.partial(kernel, Derivative.apply, below_autograd), "Autograd")
        # What torch.autograd.Function adds to its base looks for transforms, of which `watched` knows already.
        bare_apply = super(torch.autograd.Function, Derivative).apply
        self._kernel = functools.partial(kernel, bare_apply, self._function)


def operator(name: str) -> Callable[[Callable], Operator]:
    """Decorator: the function as an operator."""
    return functools.partial(Operator, name)


def watched(x: Tensor, *others: Tensor) -> bool:
    """Whether a call has to pass the dispatcher: somebody compiles, traces, transforms, profiles or fakes it."""
    return (
        torch.compiler.is_compiling()
        or not _plain(x)
        or not all(map(_plain, others))
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )


def _plain(x: Tensor) -> bool:
    return type(x) in (Tensor, torch.nn.Parameter) and not x.is_meta


def _untraced(function: Callable) -> Callable:
    """The function, which Dynamo must not trace; without importing Dynamo, which takes a second."""
    hidden = None

    @functools.wraps(function)
    def call(*args):
        nonlocal hidden
        if hidden is None:
            disable = getattr(sys.modules.get("torch._dynamo"), "disable", None)
            if disable is None:
                return function(*args)
            hidden = disable(function)
        return hidden(*args)

    return call
