"""The compiled engine has what build_ffi.py's HARDENING asks of the compiler."""

from __future__ import annotations

import platform
import runpy
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvolume import _pv

ROOT = Path(__file__).parents[2]
weaknesses: Callable[[Path], list[str]] = runpy.run_path(str(ROOT / "tools" / "dev" / "hardening.py"))["weaknesses"]
BUILD = runpy.run_path(str(ROOT / "build_ffi.py"))

CODE = """
#include <string.h>
void use(char *);
int PyInit_x(const char *p, unsigned n) { char buf[64]; memcpy(buf, p, n); use(buf); return buf[0]; }
"""


def test_the_engine_is_hardened() -> None:
    assert weaknesses(Path(_pv.__file__)) == []


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
def test_a_build_without_the_flags_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "x.c").write_text(CODE)

    def build(name: str, *flags: str) -> list[str]:
        out = tmp_path / name
        subprocess.run(["gcc", "-O2", "-shared", "-fPIC", *flags, "-o", out, tmp_path / "x.c"], check=True)
        return weaknesses(out)

    is_x86 = platform.machine() == "x86_64"
    off = ["-fno-stack-protector", "-U_FORTIFY_SOURCE", *["-fcf-protection=none"] * is_x86]
    found = " ".join(build("soft.so", *off, "-Wl,-z,norelro,-z,lazy,-z,execstack"))
    for word in ["RELRO (-z relro)", "-z now", "executable", "protector", "FORTIFY", *["jump targets"] * is_x86]:
        assert word in found
    assert build("hard.so", *BUILD["HARDENING"], *BUILD["HARDENED_LINK"]) == []


def test_what_is_no_shared_object_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.so"
    path.write_text("no such thing")
    with pytest.raises(ValueError, match="no 64-bit little-endian ELF file"):
        weaknesses(path)
