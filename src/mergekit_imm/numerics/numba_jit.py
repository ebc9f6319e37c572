"""Decorators for functions that numba compiles, and their machine code; see `native`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import numba
from numba.extending import overload

from .native import ENTRY, target, target_machine

# numba compiles for the features that `native` names, unless its user has chosen others.
if numba.config.CPU_FEATURES is None:
    numba.config.CPU_FEATURES = target()[1]


def jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compile a function at its first call: without the GIL, reference counts or checks of division."""
    return numba.njit(nogil=True, error_model="numpy", _nrt=False, **options)(function)  # type: ignore[no-any-return]


def inline(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function that loops call per element, always inlined: a call would prevent vectorisation."""
    return jit(function, forceinline=True)


def by_type(choose: Callable[..., Any]) -> Callable[..., Any]:
    """Make an inlined function whose implementation `choose` picks by the types of its arguments."""

    def chosen(*_: Any) -> None:
        """Name the function in compiled code; numba calls what `choose` returns."""

    overload(chosen, jit_options={"forceinline": True})(choose)
    return chosen


def machine_code(function: Any, arguments: tuple[Any, ...]) -> bytes:
    """Compile a function for arguments like these; return an object file with one function, ENTRY.

    ENTRY takes the address of the arguments, each in eight bytes, passes them on as numba does, and returns zero.
    """
    signature = tuple(map(numba.typeof, arguments))
    function.compile(signature)
    name = function.overloads[signature].fndesc.mangled_name
    module = llvm.parse_assembly(function.inspect_llvm(signature))
    module.link_in(llvm.parse_assembly(_entry(module.get_function(name))))
    for each in module.functions:
        if not each.is_declaration and each.name != ENTRY:
            each.linkage = "internal"
    machine = target_machine()
    passes = llvm.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(module, llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options()))
    return bytes(machine.emit_object(module))


def _entry(function: Any) -> str:
    """Return the assembly of ENTRY. numba passes two places first, for a result and an error, which are not used."""
    kinds = [str(each.type) for each in function.arguments]
    opaque = kinds[0] == "ptr"  # since LLVM 17 no pointer names what it points to

    def pointer(kind: str) -> str:
        return "ptr" if opaque else f"{kind}*"

    lines = [f"declare i32 @{function.name}({', '.join(kinds)})", "", f"define i32 @{ENTRY}(i64 %slots) {{"]
    for i, kind in enumerate(kinds[:2]):
        lines.append(f"  %v{i} = alloca {kind if opaque else kind[:-1]}")
    for i, kind in enumerate(kinds[2:], 2):
        stored = "i8" if kind == "i1" else kind
        lines += [
            f"  %a{i} = add i64 %slots, {8 * (i - 2)}",
            f"  %p{i} = inttoptr i64 %a{i} to {pointer(stored)}",
            f"  %{'s' if kind == 'i1' else 'v'}{i} = load {stored}, {pointer(stored)} %p{i}",
        ]
        if kind == "i1":
            lines.append(f"  %v{i} = trunc i8 %s{i} to i1")
    passed = ", ".join(f"{kind} %v{i}" for i, kind in enumerate(kinds))
    lines += [f"  %status = call i32 @{function.name}({passed})", "  ret i32 %status", "}"]
    return "\n".join(lines)
