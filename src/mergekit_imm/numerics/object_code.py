"""Machine code of a function that numba compiled: as an object file that needs nothing of numba, and loaded again."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from typing import Any

from ..errors import ArgumentError

ENTRY = "mergekit_imm_loop"  # the function of an object file: it takes the address of the arguments, 8 bytes for each
Function = Callable[[Any], int]
_engines: list[Any] = []  # their memory holds the code


@cache
def target() -> tuple[str, str]:
    """Return the name of this CPU and its features, as LLVM has them.

    Commands let LLVM use 512-bit vectors, which it avoids by default on CPUs where they were once slow. What the user
    has chosen for numba comes first.
    """
    import llvmlite.binding as llvm

    cpu, chosen = os.environ.get("NUMBA_CPU_NAME"), os.environ.get("NUMBA_CPU_FEATURES")
    if cpu or chosen:
        return cpu or llvm.get_host_cpu_name(), chosen or ""
    found = llvm.get_host_cpu_features()
    features = found.flatten()
    if os.environ.get("MERGEKIT_IMM_WIDE_VECTORS") == "1" and found.get("avx512f"):
        features += ",-prefer-256-bit"
    return llvm.get_host_cpu_name(), features


def target_machine() -> Any:
    """Return LLVM's compiler for this CPU."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    name, features = target()
    triple = llvm.Target.from_triple(llvm.get_process_triple())
    return triple.create_target_machine(
        cpu=name, features=features, opt=3, reloc="pic", codemodel="jitdefault", jit=True
    )


def machine_code(function: Any, arguments: tuple[Any, ...]) -> bytes:
    """Compile a function for arguments like these; return an object file with one function, ENTRY.

    ENTRY takes the address of the arguments, each in eight bytes, passes them on as numba does, and returns zero.
    """
    import llvmlite.binding as llvm
    import numba

    if numba.config.DISABLE_JIT:
        raise ArgumentError("NUMBA_DISABLE_JIT is set, and a merge needs compiled loops; unset it")
    signature = tuple(map(numba.typeof, arguments))
    function.compile(signature)
    name = function.overloads[signature].fndesc.mangled_name
    module = llvm.parse_assembly(function.inspect_llvm(signature))
    module.link_in(llvm.parse_assembly(_entry(module.get_function(name))))
    for each in module.functions:
        if not each.is_declaration and each.name != ENTRY:
            each.linkage = "internal"
    machine = target_machine()
    if hasattr(llvm, "create_module_pass_manager"):  # llvmlite before 0.45
        legacy = llvm.create_module_pass_manager()
        legacy.add_global_dce_pass()
        legacy.run(module)
    else:
        passes = llvm.create_new_module_pass_manager()
        passes.add_global_dead_code_eliminate_pass()
        passes.run(module, llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options()))
    code = bytes(machine.emit_object(module))
    process: Any = ctypes.CDLL(None if os.name == "posix" else "msvcrt")  # with the mathematical functions of C
    called = {each.name for each in module.functions if each.is_declaration and not each.name.startswith("llvm.")}
    lacking = sorted(each for each in called if not hasattr(process, each))
    if lacking:  # a later run, without numba, would crash
        raise RuntimeError(f"{function.__name__} calls {', '.join(lacking)}; compiled loops must do without")
    return code


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


def function_of(code: bytes) -> Function:
    """Load an object file; return its function. Raises RuntimeError if it does not load."""
    import llvmlite.binding as llvm

    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    address = engine.get_function_address(ENTRY)
    if not address:
        raise RuntimeError(f"an object file lacks {ENTRY}")
    _engines.append(engine)
    return ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p)(address)
