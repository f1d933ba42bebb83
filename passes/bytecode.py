"""Watch the Python code that runs while a forward is traced: is it a straight line that tells what every run does?"""

from __future__ import annotations

import dis
import sysconfig
import types
from typing import Any

_JUMPS = frozenset(dis.hasjrel) | frozenset(dis.hasjabs)
_FORBIDDEN = {
    "STORE_ATTR": "writes an attribute",
    "DELETE_ATTR": "deletes an attribute",
    "STORE_GLOBAL": "writes a global",
    "BEFORE_WITH": "has a with block",
    "LOAD_SPECIAL": "has a with block",
    "PUSH_EXC_INFO": "catches exceptions",
    "YIELD_VALUE": "is a generator",
    "IMPORT_NAME": "imports",
}
_QUERIES = frozenset(
    {
        *("is_grad_enabled", "is_autocast_enabled", "is_inference_mode_enabled", "get_autocast_dtype"),
        *("is_scripting", "is_tracing", "is_compiling", "is_exporting", "is_dynamo_compiling"),
        *("get_default_dtype", "initial_seed", "item", "tolist", "numpy"),
    }
)
_CONTEXTS = frozenset(
    f"torch.{name}"
    for name in (
        *("amp.autocast_mode", "autograd.grad_mode", "autograd.graph", "utils._contextlib", "utils.checkpoint"),
        *("random", "_dynamo.eval_frame", "_dynamo.decorators", "_dynamo.external_utils", "_disable_dynamo"),
    )
)
"""Where torch's Python switches modes that no graph holds."""
_OWN = ("lora2fx.passes.tracing", "lora2fx.passes.spies")
_SAFE_MODULES = ("torch", "math", "_operator", "operator")
_LIBRARY = (sysconfig.get_path("stdlib"), "<frozen")


def _code_reason(code: types.CodeType, names: dict[str, Any]) -> str | None:
    """Why running this code once does not tell what every run does, or None."""
    for step in dis.get_instructions(code):
        if step.opcode in _JUMPS:
            return "branches or loops"
        if step.opname in _FORBIDDEN:
            return _FORBIDDEN[step.opname]
        if step.opname == "LOAD_DEREF" and step.argval != "__class__":
            return f"reads the closure variable {step.argval}"
        if step.argval in _QUERIES and step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL"):
            return f"asks {step.argval}()"
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and not _is_safe_global(names, step.argval):
            return f"reads the global {step.argval}"
    return None


def _is_library(code: types.CodeType) -> bool:
    return code.co_filename.startswith(_LIBRARY) and "site-packages" not in code.co_filename


def _is_safe_global(names: dict[str, Any], name: str) -> bool:
    if name not in names:
        return name == "super"
    value = names[name]
    if isinstance(value, types.ModuleType):
        return value.__name__.partition(".")[0] in _SAFE_MODULES
    if isinstance(value, types.FunctionType) and not _is_library(value.__code__):
        return True  # its own code is looked at when it runs
    return str(getattr(value, "__module__", "")).partition(".")[0] in _SAFE_MODULES and callable(value)


class CodeWatch:
    """A profiler that collects, while tracing, why any Python code of the user's that ran is not a straight line.

    It looks from the call of `forward` on: what leads there is the tracer's own, and differs once torch.compile
    was used in the process.
    """

    def __init__(self, forward: Any) -> None:
        self.reasons: list[str] = []
        self._seen: set[types.CodeType] = set()
        self._start: types.CodeType | None = getattr(forward, "__code__", None)

    def __call__(self, frame: types.FrameType, event: str, arg: Any) -> None:
        """Look at each piece of code the first time that it is called."""
        code = frame.f_code
        if event != "call" or code in self._seen or self._start not in (None, code):
            return
        self._start = None
        self._seen.add(code)
        module = str(frame.f_globals.get("__name__", ""))
        if module in _CONTEXTS:
            self.reasons.append(f"runs under {module}.{code.co_name}, a mode that a graph doesn't hold")
        own = module in _OWN or module.startswith("namedtuple_")
        if own or _is_library(code) or module.partition(".")[0] == "torch":
            return
        if (reason := _code_reason(code, frame.f_globals)) is not None:
            self.reasons.append(f"{code.co_name} {reason}")
