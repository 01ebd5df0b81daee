"""What went wrong while capturing, in the user's terms: where in their code, why, and what to change."""

from __future__ import annotations

import inspect
import os
import re
import sysconfig
import traceback
from collections.abc import Iterator

from torch import nn

_STDLIB = sysconfig.get_paths()["stdlib"]
_HERE = os.path.dirname(os.path.abspath(__file__))

#: (pattern over exception type and message, reason, remedy); the first that matches is used.
_REASONS: tuple[tuple[str, str, str], ...] = (
    (
        r"DynamicOutputShape|aten\.nonzero|masked_select|unique|memo disaster",
        "the shape of a result depends on the values of a tensor (boolean-mask index, nonzero, unique, masked_select)",
        "keep the full shape and select with torch.where or a multiplication by the mask",
    ),
    (
        r"GuardOnDataDependent|Could not guard|data-dependent|DataDependentOutput|_local_scalar_dense|"
        r"UserError.*(?:cond|control flow)|unbacked",
        "the code branches on the value of a tensor, or reads it as a Python number (if tensor, bool(), .item(), "
        ".tolist(), int())",
        "use torch.where to choose by element, or decide from shapes and arguments",
    ),
    (
        r"autocast for cuda is on",
        "autocast for CUDA is on, and its casts, which depend on the device an op runs on, cannot be captured",
        "cast the model (model.to(torch.bfloat16)), or compile with precision='bf16', and leave autocast('cuda') out",
    ),
    (
        r"two different devices|at least two devices, (cpu and cuda|cuda)",
        "a tensor on the GPU is neither a parameter, a buffer nor an attribute of a module, and a program is captured "
        "on the CPU",
        "register it with register_buffer in __init__, or pass it to forward",
    ),
    (
        r"non-Fake Tensor|convert all Tensors to FakeTensors|Mixing fake",
        "the model uses a tensor that is neither a parameter nor a buffer",
        "register it with register_buffer in __init__",
    ),
    (
        r"fake mode|FakeTensorMode|tracing mode",
        "the model or its arguments were made under a FakeTensorMode that is still active",
        "leave the FakeTensorMode before capturing",
    ),
    (
        r"_cdata|numpy\(\)|\.numpy|Tensor-likes",
        "the code leaves torch (numpy) in the middle of the forward",
        "compute it with torch ops",
    ),
    (r"mutat|in-place|inplace", "an argument or parameter is changed in place", "work on a copy: x = x.clone()"),
)


def explain(error: BaseException, model: nn.Module) -> str:
    """The message of a CaptureError for an exception raised while tracing `model`."""
    place = user_line(error, model)
    text = f"{type(error).__name__}: {error}"
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    first = re.sub(r"\s+", " ", first)[:200]
    if any("_higher_order_ops" in path for path, _, _ in _frames(error)):
        return (
            f"cannot capture {type(model).__name__} at {place}: the code holds graphs of its own (torch.cond, "
            f"while_loop, scan and the like), which cannot be split. Change: use torch.where for a choice, a Python "
            f"loop for a repetition. ({first})"
        )
    for pattern, reason, remedy in _REASONS:
        if re.search(pattern, text):
            return f"cannot capture {type(model).__name__} at {place}: {reason}. Change: {remedy}. ({first})"
    return (
        f"cannot capture {type(model).__name__} at {place}: {type(error).__name__}: {first}. Change that line to "
        f"something that can be traced; a plain call of the model tells whether it runs at all"
    )


def user_line(error: BaseException, model: nn.Module) -> str:
    """`file:line (text)` of the innermost line of the model's own code in the traceback, else of code near it."""
    frames = list(_frames(error))
    own = {inspect.getsourcefile(type(m)) for m in model.modules() if not _is_torch(type(m).__module__)}
    choices = (
        lambda path: path in own,
        lambda path: not path.startswith(("<", _STDLIB, _HERE)) and "site-packages" not in path,
        lambda path: "site-packages" in path and "/torch/" not in path,
        lambda path: "/torch/nn/modules/" in path and not path.endswith("/module.py"),
    )
    for wanted in choices:
        found = [f for f in frames if wanted(f[0])]
        if found:
            path, line, text = found[-1]
            return f"{path}:{line}" + (f" ({text})" if text else "")
    return "a line that torch did not tell"


def _is_torch(module: str) -> bool:
    return module == "torch" or module.startswith("torch.")


def _frames(error: BaseException) -> Iterator[tuple[str, int, str]]:
    """(file, line, text), outermost first: of what it was caused by, of the exception, of tracebacks in its text."""
    cause = error.__cause__ or error.__context__
    if cause is not None:
        yield from _frames(cause)
    for frame in traceback.extract_tb(error.__traceback__):
        yield frame.filename, frame.lineno or 0, frame.line or ""
    for path, line, text in re.findall(r'File "([^"]+)", line (\d+)[^\n]*(?:\n\s+([^\n]+))?', str(error)):
        yield path, int(line), text.strip()
