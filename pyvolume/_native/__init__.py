"""The binding to the C engine: the only package that imports `pyvolume._pv`.

`engine` wraps formats, volume handles, scans and the registry; `http` the HTTP semantics that both lanes share. Must
not import anything of pyvolume but `_pv` and the leaves. Importing this package completes all lazily built types of
cffi on the importing thread, before there are others.
"""

from __future__ import annotations

from pyvolume import _pv

__all__: list[str] = []


def _complete_types() -> int:
    """Looks every function, constant and struct field up once; returns how many things were touched."""
    touched = 0
    for name in dir(_pv.lib):
        getattr(_pv.lib, name)
        touched += 1
    typedefs, structs, unions = _pv.ffi.list_types()
    for name in (*typedefs, *(f"struct {s}" for s in structs), *(f"union {u}" for u in unions)):
        ctype = _pv.ffi.typeof(name)
        _pv.ffi.typeof(f"{name} *")
        if ctype.kind not in ("struct", "union"):
            continue
        try:
            _pv.ffi.sizeof(ctype)  # completes the type; its fields must not be asked for before
        except _pv.ffi.error:
            continue  # opaque: pv_vol and its like
        touched += sum(field.offset >= 0 for _, field in ctype.fields)
    return touched


_complete_types()
