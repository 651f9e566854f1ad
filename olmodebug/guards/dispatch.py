"""The dispatch mode that stays on for the whole run: it looks at an op before and after it, and hands on what is wrong.

Nothing here changes a value, draws a random number or waits for a device, but for index ops, whose indices must be known
before the kernel starts. Ops inside a `torch.compile` region are fused and are not seen.
"""

from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode  # the documented extension point, though its module is private

from . import index
from .index import READS, SAMPLERS


def _composites() -> frozenset[Any]:
    """Ops made of others that hide what guards look at; only inference mode hands them over whole."""
    names = ("cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss2d", "dropout", "lstm", "gru", "rnn_tanh", "rnn_relu", "embedding_bag", "one_hot",
             "take_along_dim", "scaled_dot_product_attention")  # fmt: skip
    packets = [getattr(torch.ops.aten, name) for name in names if hasattr(torch.ops.aten, name)]
    return frozenset(getattr(packet, overload) for packet in packets for overload in packet.overloads())


COMPOSITES = _composites()
Check = Callable[[Any, Any, Any], None]


class Guarded(TorchDispatchMode):
    """Every op passes through; `watch` is asked what to look for and told what was seen."""

    supports_higher_order_operators = True

    def __init__(self, watch: Any) -> None:
        super().__init__()
        self.watch = watch
        self.indices = "index" in watch.guards
        self.known: dict[int, tuple[Any, bool, Check | None]] = {}  # by the id of an op, whose own hash is slow
        self.after = watch.observers
        self.before = watch.preparers
        self.ops = 0
        self.quiet = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compilation and fused regions are not looked into: without this, torch.compile would run eagerly under a mode."""
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No wrapper around every op (it would import the compiler): `skip_compiler` names our functions to it instead.

        Private to torch; where it is ignored, the wrapper is back and costs time, nothing else.
        """
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.quiet:
            return func(*args, **kwargs)
        known = self.known.get(id(func))
        if known is None:
            known = self.known[id(func)] = self._known(func)
        _, composite, check = known
        if composite:
            with self:
                inside = func.decompose(*args, **kwargs)
            if inside is not NotImplemented:
                return inside
        self.ops += 1
        self.watch.refused = None
        if check is not None:
            check(func, args, kwargs)
        for prepare in self.before:
            prepare(func, args, kwargs)
        try:
            output = func(*args, **kwargs)
        except Exception as error:
            self.quiet = True
            try:
                self.watch.op_raised(func, args, kwargs, error)
            except Exception:
                self.watch.fault(None)
            finally:
                self.quiet = False
            raise
        if self.after:
            self.quiet = True
            try:
                for observe in self.after:
                    observe(func, args, kwargs, output)
            except Exception:  # a fault of ours must not stop the script: it is told, and this observer is off from here on
                self.watch.fault(observe)
            finally:
                self.quiet = False
        return output

    def _known(self, func: Any) -> tuple[Any, bool, Check | None]:
        """An op, held so that its id stays its own; whether it hides others; and what is asked of its arguments."""
        check: Check | None = None
        if self.indices:
            check = self.check_index if func in READS else self.check_probabilities if func in SAMPLERS else None
        return func, func in COMPOSITES, check

    def check_index(self, func: Any, args: Any, kwargs: Any) -> None:
        """Raise before a kernel would; on the CPU the op raises its own error a moment later."""
        self.quiet = True
        try:
            bad = index.bad_index(func, args, kwargs)
            if bad is None:
                wrapped = index.wraps(func, args)
                if wrapped is not None:
                    self.watch.index_wraps(wrapped)
                return
            message = self.watch.index_is_bad(bad)
        except Exception:
            self.watch.fault(None)
            return
        finally:
            self.quiet = False
        if bad.index.device.type != "cpu":
            raise self._stopped(IndexError, message)

    def check_probabilities(self, func: Any, args: Any, kwargs: Any) -> None:
        """multinomial on a device asserts on improper probabilities, after the launch."""
        probabilities = args[0]
        self.quiet = True
        try:
            wrong = index.improper_probabilities(probabilities)
            message = self.watch.improper(probabilities, wrong) if wrong else ""
        finally:
            self.quiet = False
        if wrong and probabilities.device.type != "cpu":
            raise self._stopped(RuntimeError, message)

    def _stopped(self, kind: type[Exception], message: str) -> Exception:
        """The error in the place of a kernel that would have asserted."""
        error = kind(f"{message} (stopped by olmodebug before the kernel was launched)")
        self.watch.op_raised(None, (), {}, error)
        return error


def skip_compiler(functions: list[Any]) -> None:
    """Tell dynamo to leave these functions, and those defined in them, to Python.

    `skip_code` has no public name; without it dynamo may try to compile a guard's frame, which costs time and changes nothing.
    """
    skip = getattr(getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None), "skip_code", None)
    if skip is None:
        return
    codes: list[CodeType] = [f.__code__ for f in functions if hasattr(f, "__code__")]
    while codes:
        code = codes.pop()
        skip(code)
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
