"""Says what the compiled engine lacks of the flags that build_ffi.py asks for: `python tools/dev/hardening.py FILE.so`.

Reads the ELF file itself, 64 bit and little-endian. Exit status 1 and one line for each thing that is missing.
"""

from __future__ import annotations

import struct
import sys
from dataclasses import dataclass
from pathlib import Path

EM_X86_64 = 62
PT_LOAD, PT_DYNAMIC, PT_GNU_STACK, PT_GNU_RELRO = 1, 2, 0x6474E551, 0x6474E552
DT_STRTAB, DT_SYMTAB, DT_STRSZ, DT_FLAGS, DT_TEXTREL, DT_FLAGS_1 = 5, 6, 10, 30, 22, 0x6FFFFFFB
DF_TEXTREL, DF_BIND_NOW, DF_1_NOW = 4, 8, 1
PF_EXECUTE, PF_WRITE = 1, 2
ENDBR64 = b"\xf3\x0f\x1e\xfa"


@dataclass(frozen=True)
class Segment:
    kind: int
    flags: int
    offset: int
    address: int
    size: int


class Elf:
    """A shared object; ValueError for a file that is none."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        if self.data[:6] != b"\x7fELF\x02\x01":
            raise ValueError(f"{path}: no 64-bit little-endian ELF file")
        (self.machine,) = struct.unpack_from("<H", self.data, 18)
        start, size, count = *struct.unpack_from("<Q", self.data, 32), *struct.unpack_from("<HH", self.data, 54)
        self.segments = []
        for at in range(start, start + size * count, size):
            kind, flags, offset, address, _, in_file = struct.unpack_from("<IIQQQQ", self.data, at)
            self.segments.append(Segment(kind, flags, offset, address, in_file))
        self.dynamic: dict[int, int] = {}
        for part in self.of_kind(PT_DYNAMIC):
            self.dynamic.update(struct.iter_unpack("<QQ", self.data[part.offset : part.offset + part.size]))

    def of_kind(self, kind: int) -> list[Segment]:
        return [part for part in self.segments if part.kind == kind]

    def at(self, address: int) -> int:
        """Where an address stands in the file."""
        for part in self.of_kind(PT_LOAD):
            if part.address <= address < part.address + part.size:
                return address - part.address + part.offset
        raise ValueError(f"address {address:#x} is not in the file")

    def symbols(self) -> dict[str, int]:
        """Names that the dynamic linker sees, with their addresses; 0 for those it has to find elsewhere."""
        names = self.at(self.dynamic[DT_STRTAB])
        table = self.at(self.dynamic[DT_SYMTAB])
        out = {}
        # The names follow the table, as linkers lay it out.
        for at in range(table + 24, names, 24):
            name, _, _, _, value, _ = struct.unpack_from("<IBBHQQ", self.data, at)
            if name >= self.dynamic[DT_STRSZ]:
                break
            out[self.data[names + name : self.data.index(b"\0", names + name)].decode()] = value
        return out


def weaknesses(path: Path) -> list[str]:
    """What is missing, in words; nothing if all is there."""
    elf = Elf(path)
    symbols = elf.symbols()
    stacks = elf.of_kind(PT_GNU_STACK)
    now = elf.dynamic.get(DT_FLAGS, 0) & DF_BIND_NOW or elf.dynamic.get(DT_FLAGS_1, 0) & DF_1_NOW
    writable_code = [part for part in elf.of_kind(PT_LOAD) if part.flags & PF_EXECUTE and part.flags & PF_WRITE]
    text_relocations = DT_TEXTREL in elf.dynamic or elf.dynamic.get(DT_FLAGS, 0) & DF_TEXTREL
    lacks = {
        "RELRO (-z relro)": not elf.of_kind(PT_GNU_RELRO),
        "full RELRO (-z now)": not now,
        "a stack that is not executable (-z noexecstack)": not stacks or bool(stacks[0].flags & PF_EXECUTE),
        "code that is not writable": bool(writable_code or text_relocations),
        "the stack protector (-fstack-protector-strong)": "__stack_chk_fail" not in symbols,
        "checked copies (_FORTIFY_SOURCE)": not any(name.endswith("_chk") for name in symbols),
    }
    if elf.machine == EM_X86_64:
        entries = [value for name, value in symbols.items() if name.startswith("PyInit_") and value]
        marked = [elf.data[elf.at(value) :][:4] == ENDBR64 for value in entries]
        lacks["marked jump targets (-fcf-protection)"] = not (marked and all(marked))
    return [what for what, is_missing in lacks.items() if is_missing]


def main() -> int:
    lacking = [f"{name}: lacks {what}" for name in sys.argv[1:] for what in weaknesses(Path(name))]
    print("\n".join(lacking), end="\n" if lacking else "")
    return 1 if lacking or len(sys.argv) == 1 else 0


if __name__ == "__main__":
    sys.exit(main())
