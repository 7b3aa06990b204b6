"""Builds pyvolume._pv, the cffi module (API mode, stable ABI) over the C engine in csrc/.

`python build_ffi.py` compiles in place; packaging takes `ffibuilder` from here through setuptools' cffi_modules. The
declarations cffi sees are csrc/pv.h itself, so there is no second list to keep in step.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from cffi import FFI

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
MODULE = "pyvolume._pv"
STUB = ROOT / "pyvolume" / "_pv.pyi"
LINE_LENGTH = 120

# What stands in the way of whoever finds a mistake in csrc. Python's own flags may hold some of it, or a lower level:
# these come later and win. tools/dev/hardening.py looks for them in what was built.
HARDENING = [
    "-fstack-protector-strong",
    "-fstack-clash-protection",
    "-U_FORTIFY_SOURCE",
    "-D_FORTIFY_SOURCE=3",
    "-Wformat",
    "-Werror=format-security",
    *{"x86_64": ["-fcf-protection=full"], "aarch64": ["-mbranch-protection=standard"]}.get(platform.machine(), []),
]
HARDENED_LINK = ["-Wl,-z,relro", "-Wl,-z,now", "-Wl,-z,noexecstack"]

_NUMERIC_DEFINE = re.compile(r"#\s*define\s+(\w+)\s+\(?(-?\s*(?:0[xX][0-9a-fA-F]+|\d+))\)?[uUlL]*\s*(?:/\*.*)?$")
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_MARKS = re.compile(r"\b(?:PV_API|PV_WUR|PV_QUICK)\b")
_QUICK = re.compile(r"\bPV_API\s+PV_QUICK\b[^(;]*?\b(\w+)\(")


def declarations(header: str) -> str:
    """What cffi reads: the header without preprocessor lines (numeric constants stay), comments and attributes.

    cffi checks the value of each constant against the compiler's, so a constant cannot be misread here.
    """
    lines: list[str] = []
    continued = False
    for line in _COMMENT.sub(" ", header).splitlines():
        is_directive = continued or line.lstrip().startswith("#")
        continued = is_directive and line.endswith("\\")
        if not is_directive:
            lines.append(_MARKS.sub("", line).rstrip())
            continue
        constant = _NUMERIC_DEFINE.match(line.strip())
        if constant is not None:
            lines.append(f"#define {constant[1]} {constant[2]}")
    return "\n".join(line for line in lines if line)


def quick_functions(header: str) -> list[str]:
    """The functions that the header marks PV_QUICK."""
    return _QUICK.findall(_COMMENT.sub(" ", header))


def preamble(header: str) -> str:
    """What stands before cffi's wrappers. Each of those lets go of the interpreter's lock around its call, by these two
    macros; with other threads waiting that costs more than a small function does, so the quick ones keep it. The
    compiler knows each wrapper's name, so nothing is compared while the program runs."""
    same = " || ".join(f'!__builtin_strcmp(name, "_cffi_f_{name}")' for name in quick_functions(header))
    return f"""#include "pv.h"
static inline __attribute__((always_inline)) int pv_is_quick(const char *name) {{
    return {same};
}}
#undef Py_BEGIN_ALLOW_THREADS
#undef Py_END_ALLOW_THREADS
#define Py_BEGIN_ALLOW_THREADS {{ PyThreadState *unlocked = pv_is_quick(__func__) ? NULL : PyEval_SaveThread();
#define Py_END_ALLOW_THREADS if (unlocked != NULL) PyEval_RestoreThread(unlocked); }}
"""


def make_ffi() -> FFI:
    """The builder with declarations and sources set; paths are relative to the project, as setuptools wants them."""
    ffi = FFI()
    header = (CSRC / "pv.h").read_text(encoding="utf-8")
    ffi.cdef(declarations(header))
    ffi.set_source(
        MODULE,
        preamble(header),
        sources=sorted(f"csrc/{path.name}" for path in CSRC.glob("pv_*.c")),
        depends=sorted(f"csrc/{path.name}" for path in CSRC.glob("pv*.h")),
        include_dirs=["csrc"],
        libraries=["isal", "pthread"],
        extra_compile_args=["-std=c11", "-O2", "-g", "-fvisibility=hidden", "-Wall", "-Wextra", *HARDENING],
        extra_link_args=HARDENED_LINK,
        py_limited_api=True,
    )
    return ffi


ffibuilder = make_ffi()

STUB_HEAD = '''"""Types of the compiled engine module, for mypy. Written by build_ffi.py from the module itself."""

from collections.abc import Callable, Iterator
from typing import Any, Final, final

@final
class CData:
    def __getattr__(self, name: str) -> Any: ...
    def __setattr__(self, name: str, value: object) -> None: ...
    def __getitem__(self, index: int | slice) -> Any: ...
    def __setitem__(self, index: int | slice, value: object) -> None: ...
    def __add__(self, other: int) -> CData: ...
    def __sub__(self, other: CData) -> int: ...
    def __len__(self) -> int: ...
    def __bool__(self) -> bool: ...
    def __iter__(self) -> Iterator[Any]: ...

@final
class CType:
    kind: str
    cname: str
    fields: list[tuple[str, CField]]
    args: tuple[CType, ...]
    result: CType
    item: CType

@final
class CField:
    type: CType
    offset: int

@final
class buffer:
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __getitem__(self, index: slice) -> bytes: ...
    def __setitem__(self, index: slice, value: bytes) -> None: ...
    def __len__(self) -> int: ...

class FFI:
    error: type[Exception]
    NULL: CData
    def new(self, cdecl: str | CType, init: object = ..., /) -> CData: ...
    def new_allocator(
        self, alloc: object = ..., free: object = ..., should_clear_after_alloc: bool = ...
    ) -> Callable[..., CData]: ...
    def from_buffer(self, cdecl: str | CType, python_buffer: object, require_writable: bool = ...) -> CData: ...
    def buffer(self, cdata: CData, size: int = ..., /) -> buffer: ...
    def release(self, cdata: CData, /) -> None: ...
    def gc(self, cdata: CData, destructor: Callable[[CData], None] | None, size: int = ...) -> CData: ...
    def cast(self, cdecl: str | CType, source: object, /) -> CData: ...
    def memmove(self, dest: object, src: object, n: int) -> None: ...
    def string(self, cdata: CData, maxlen: int = ...) -> bytes: ...
    def unpack(self, cdata: CData, length: int) -> Any: ...
    def addressof(self, cdata: CData, *fields: str | int) -> CData: ...
    def typeof(self, cdecl: object, /) -> CType: ...
    def sizeof(self, cdecl: object, /) -> int: ...
    def offsetof(self, cdecl: str | CType, *fields: str | int) -> int: ...
    def list_types(self) -> tuple[list[str], list[str], list[str]]: ...

class Lib:
'''

STUB_TAIL = """
ffi: FFI
lib: Lib
"""


def _stub_type(ctype: Any, is_argument: bool) -> str:
    if ctype.kind in ("primitive", "enum"):
        return "int"
    if ctype.kind == "void":
        return "None"
    # cffi takes bytes for pointers to single bytes.
    takes_bytes = is_argument and ctype.kind == "pointer" and ctype.item.cname in ("char", "uint8_t", "void")
    return "CData | bytes" if takes_bytes else "CData"


def _stub_function(name: str, args: list[str], result: str) -> list[str]:
    """Lines of one function, broken as the formatter breaks them."""
    one_line = f"    def {name}({', '.join(args)}) -> {result}: ..."
    if len(one_line) <= LINE_LENGTH:
        return [one_line]
    inner = f"        {', '.join(args)}"
    body = [inner] if len(inner) <= LINE_LENGTH else [f"        {arg}," for arg in args]
    return [f"    def {name}(", *body, f"    ) -> {result}: ..."]


def stub(ffi: Any, lib: Any) -> str:
    """The text of pyvolume/_pv.pyi for a compiled module."""
    lines = []
    for name in sorted(dir(lib)):
        value = getattr(lib, name)
        if isinstance(value, int):
            lines.append(f"    {name}: Final[int]")
            continue
        signature = ffi.typeof(value)
        args = ["self", *(f"a{i}: {_stub_type(arg, True)}" for i, arg in enumerate(signature.args))]
        args += ["/"] * (len(args) > 1)
        lines += _stub_function(name, args, _stub_type(signature.result, False))
    return STUB_HEAD + "\n".join(lines) + "\n" + STUB_TAIL


def write_stub() -> None:
    """Brings pyvolume/_pv.pyi into step with the module just built."""
    sys.path.insert(0, str(ROOT))
    sys.setdlopenflags(os.RTLD_LAZY)  # the declarations are what counts here
    module = importlib.import_module(MODULE)
    text = stub(module.ffi, module.lib)
    if not STUB.exists() or STUB.read_text(encoding="utf-8") != text:
        STUB.write_text(text, encoding="utf-8")


def main() -> None:
    """Compiles into the source tree. Object files go to a scratch directory, so that nothing else is left behind."""
    with tempfile.TemporaryDirectory(prefix="pyvolume-build-") as scratch:
        for name in ("csrc", "pyvolume"):
            (Path(scratch) / name).mkdir()
        for path in [*CSRC.glob("pv*.c"), *CSRC.glob("pv*.h")]:
            shutil.copy2(path, Path(scratch) / "csrc" / path.name)
        built = Path(ffibuilder.compile(tmpdir=scratch))
        target = ROOT / "pyvolume" / built.name
        # A running process may have the old one mapped: never write into it.
        fresh = target.with_name(f"{target.name}.{os.getpid()}")
        shutil.copy2(built, fresh)
        fresh.replace(target)
    write_stub()
    print(target)


if __name__ == "__main__":
    main()
