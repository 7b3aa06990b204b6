"""Builds pyvolume._pv, the cffi module (API mode, stable ABI) over the C engine in csrc/.

`python build_ffi.py` compiles in place; packaging takes `ffibuilder` from here through setuptools' cffi_modules. The
declarations cffi sees are csrc/pv.h itself, so there is no second list to keep in step.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
MODULE = "pyvolume._pv"

_NUMERIC_DEFINE = re.compile(r"#\s*define\s+(\w+)\s+\(?(-?\s*(?:0[xX][0-9a-fA-F]+|\d+))\)?[uUlL]*\s*(?:/\*.*)?$")
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_MARKS = re.compile(r"\b(?:PV_API|PV_WUR)\b")


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


def make_ffi() -> FFI:
    """The builder with declarations and sources set; paths are relative to the project, as setuptools wants them."""
    ffi = FFI()
    ffi.cdef(declarations((CSRC / "pv.h").read_text(encoding="utf-8")))
    ffi.set_source(
        MODULE,
        '#include "pv.h"\n',
        sources=sorted(f"csrc/{path.name}" for path in CSRC.glob("pv_*.c")),
        depends=sorted(f"csrc/{path.name}" for path in CSRC.glob("pv*.h")),
        include_dirs=["csrc"],
        libraries=["isal", "pthread"],
        extra_compile_args=["-std=c11", "-O2", "-g", "-fvisibility=hidden", "-Wall", "-Wextra"],
        py_limited_api=True,
    )
    return ffi


ffibuilder = make_ffi()


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
    print(target)


if __name__ == "__main__":
    main()
