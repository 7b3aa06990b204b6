"""`python -m tools.compat`: is this server what the Go server is?

Starts a server command beside the development master, opens copies of Go-made volumes and replays recorded Go
exchanges. Exit status: 0 no differences, 1 differences, 2 the test bed failed.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from tools.compat import recordings, volumes
from tools.compat.bed import BedError
from tools.compat.report import Report

DATA = Path(__file__).resolve().parents[2] / "tests" / "data"


def read_gaps(path: Path | None) -> set[str]:
    """Names that a later step brings: `family`, `profile/family`, `volume:name` or `rpc:Name`; `#` begins a comment."""
    if path is None:
        return set()
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return {line for line in lines if line}


def _has_volume(data: Path) -> bool:
    """Whether there is a plain or an erasure coded volume in a directory."""
    return any(any(data.glob(pattern)) for pattern in ("*.dat*", "*.ec00*"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.compat", description=__doc__)
    default = f"{shlex.quote(sys.executable)} -m pyvolume"
    parser.add_argument("--server", default=default, help="command to test; {config} and {base} are replaced")
    parser.add_argument("--data", type=Path, default=DATA, help="directory with go-4.44/ and http-4.44/")
    parser.add_argument("--known-gaps", type=Path, help="file of names to leave out; it may only shrink")
    parser.add_argument("--family", help="only these families, comma separated")
    parser.add_argument("--profile", help="only these recordings, comma separated")
    parser.add_argument("--volume", help="only these volumes, comma separated; with --profile none are opened")
    parser.add_argument("--show", type=int, default=20, help="differences to print in full")
    args = parser.parse_args(argv)

    gaps = read_gaps(args.known_gaps)
    report = Report(show=args.show)
    families = set(args.family.split(",")) if args.family else None
    only_http = bool(args.family or args.profile)
    wanted = set(args.volume.split(",")) if args.volume else None
    try:
        if wanted or not only_http:
            for fixture in sorted((args.data / "go-4.44").iterdir()):
                if not (fixture / "manifest.json").exists() or f"volume:{fixture.name}" in gaps:
                    continue
                if not _has_volume(fixture / "data") or (wanted and fixture.name not in wanted):
                    continue
                volumes.check(fixture, args.server, report, gaps)
        if only_http or not wanted:
            profiles = set(args.profile.split(",")) if args.profile else None
            for path in sorted((args.data / "http-4.44").glob("*.jsonl.xz")):
                if not profiles or path.name.removesuffix(".jsonl.xz") in profiles:
                    recordings.replay(path, args.server, report, families, gaps)
    except BedError as e:
        print(f"compat: {e}", file=sys.stderr)
        return 2
    report.print_summary()
    if gaps:
        print("left out, known gaps: " + ", ".join(sorted(gaps)))
    print(f"compat: {report.checks} checks, {report.differences} differences")
    if report.checks == 0:
        print("compat: nothing was checked", file=sys.stderr)
        return 2
    return 1 if report.differences else 0


if __name__ == "__main__":
    sys.exit(main())
