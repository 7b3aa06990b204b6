"""The `pyvolume` command: picks the subcommand, prints usage and version, starts the server.

Top layer: imports anything, nothing imports it. Modules that need long to import (gRPC, HTTP) are imported only once
a server is really started, so that usage errors and `version` answer at once.

    pyvolume [global flags] volume [flags]      as `weed volume`
    pyvolume [global flags and flags]           without a subcommand, as the Rust port takes them
    pyvolume check | fix | export | compact     on the files of volumes that no server has
    pyvolume completion bash | zsh | fish       for the command line
    pyvolume version | help [command]
"""

from __future__ import annotations

import logging
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pyvolume import config, log
from pyvolume.config import USAGE_STATUS, ParsedFlags, UsageError, go_quote
from pyvolume.version import PYVOLUME_VERSION, full_version

if TYPE_CHECKING:
    import argparse

_log = logging.getLogger(__name__)
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "i686": "386", "armv7l": "arm"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status. A FATAL ends the process from within."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words, os.environ)
    except UsageError as exc:
        sys.stderr.write(exc.text)
        return exc.exit_code


def _dispatch(words: list[str], environ: Mapping[str, str]) -> int:
    if words and words[0] in config.OFFLINE_COMMANDS:
        from pyvolume.offline import common

        return common.main(words)
    if words and words[0] == "completion":
        return _completion(words[1:])
    command = config.classify(words).command
    if command is None:
        return _serve(config.parse_combined(words, environ), environ)
    parsed = config.parse_global(words, environ)
    if command == "help":
        return _help(parsed.rest[1:], environ)
    if command == "version":
        return _version(parsed.rest[1:], environ)
    if command != config.VOLUME:
        raise config.unknown_subcommand(command)
    return _serve(config.parse_volume(parsed, environ), environ)


def _serve(flags: ParsedFlags, environ: Mapping[str, str]) -> int:
    from pyvolume.server import signals

    inbox = signals.Inbox()
    inbox.install()
    log.setup(flags.log)
    log.install_exception_hooks()
    for warning in flags.warnings:
        _log.warning("%s", warning)
    from pyvolume.server import lifecycle

    return lifecycle.run(flags, inbox, environ)


def _version(words: Sequence[str], environ: Mapping[str, str]) -> int:
    usage = (
        f"Example: weed version\nDefault Usage:\n{config.VERSION_SET.usage(environ)}Description:\n  print the version\n"
    )
    try:
        rest = config.VERSION_SET.parse(words, environ).rest
    except config.FlagError as exc:
        raise UsageError(USAGE_STATUS, f"{exc}\n{usage}") from None
    except config.HelpAsked:
        raise UsageError(USAGE_STATUS, usage) from None
    if rest:
        raise UsageError(USAGE_STATUS, usage)
    machine = platform.machine()
    print(f"version {full_version()} {sys.platform} {_ARCHITECTURES.get(machine, machine)}")
    print(f"{config.PROGRAM} {PYVOLUME_VERSION}", file=sys.stderr)
    return 0


def _completion(words: Sequence[str]) -> int:
    from pyvolume import completion

    if len(words) != 1 or words[0] not in completion.SHELLS:
        raise UsageError(USAGE_STATUS, f"usage: {config.PROGRAM} completion {'|'.join(completion.SHELLS)}\n")
    sys.stdout.write(completion.script(words[0]))
    return 0


def _help(words: Sequence[str], environ: Mapping[str, str]) -> int:
    if not words:
        sys.stdout.write(config.program_summary())
        return 0
    if len(words) > 1:
        raise UsageError(USAGE_STATUS, "usage: weed help command\n\nToo many arguments given.\n")
    if words[0] == config.VOLUME:
        print(f"Usage: {config.PROGRAM} volume -port=8080 -dir=/tmp -max=5 -ip=server_name -master=localhost:9333")
        sys.stderr.write(f"Default Parameters:\n{config.VOLUME_SET.usage(environ)}")
        return 0
    if words[0] in config.OFFLINE_COMMANDS:
        from pyvolume.offline import common

        return common.main([words[0], "--help"])
    if words[0] in config.KNOWN_COMMANDS:
        print(f"Usage: {config.PROGRAM} {words[0]}")
        return 0
    topic = f"`{words[0]}`" if "`" not in words[0] else go_quote(words[0])
    raise UsageError(USAGE_STATUS, f"Unknown help topic {topic}.  Run 'weed help'.\n")


def manpage_parser() -> argparse.ArgumentParser:
    """The flags as an argparse parser, from which the manual page is made. Never used to parse: the grammar differs."""
    import argparse

    parser = argparse.ArgumentParser(
        prog=config.PROGRAM,
        add_help=False,
        usage=(
            f"{config.PROGRAM} [global flags] [volume] [flags] | {config.PROGRAM} check|fix|export|compact DIR... | "
            f"{config.PROGRAM} completion bash|zsh|fish | {config.PROGRAM} version|help"
        ),
        description=(
            "A volume server for SeaweedFS clusters. It takes the place of the command `weed volume`: the same flags, "
            "files, ports and protocols. A flag can be written with one dash or two, its value behind `=` or in the "
            "next word; that of a boolean only behind `=`."
        ),
    )
    for title, flags in (("global flags", config.GLOBAL_FLAGS), ("flags of volume", config.VOLUME_FLAGS)):
        group = parser.add_argument_group(title)
        for flag in flags:
            if title == "global flags" and flag.name == "options":
                continue
            text = flag.help
            default = "" if callable(flag.default) else config.shown_default(flag, flag.default)
            text += f" (default {default})" if default else ""
            group.add_argument(f"-{flag.name}", metavar=flag.kind.word or "bool", help=text.replace("%", "%%"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
