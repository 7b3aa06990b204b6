"""`pyvolume completion bash|zsh|fish`: completion for the command, made from the tables of flags.

Top layer, beside cli. Flags of `volume` may stand without the subcommand, so they are offered there, too. Values are
offered where they come from a short list, files and directories by the shell.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pyvolume import config
from pyvolume.config import Flag
from pyvolume.offline import common

SHELLS = ("bash", "zsh", "fish")
_VALUES: Mapping[str, tuple[str, ...]] = {
    "index": config.INDEX_KINDS,
    "readMode": config.READ_MODES,
    "disk": ("hdd", "ssd"),
    "offsetBytes": ("4", "5"),
    "stderrthreshold": ("INFO", "WARNING", "ERROR", "FATAL"),
    "v": ("0", "1", "2", "3", "4"),
}
_DIRECTORIES = frozenset(("dir", "dir.idx", "logdir", "config_dir", "idx-dir"))
_FILES = frozenset(("options", "securityFile", "cpuprofile", "memprofile", "state", "o"))
_COMMANDS: Mapping[str, str] = {
    "volume": "start a volume server",
    "check": "look for damage in volumes that no server has",
    "fix": "rebuild their indexes from their data",
    "export": "list or extract their needles",
    "compact": "vacuum them",
    "completion": "print completion for a shell",
    "version": "print the version",
    "help": "tell more of a command",
}


@dataclass(frozen=True)
class Word:
    """One flag as it is typed, with its dashes."""

    text: str
    help: str
    takes_value: bool
    values: tuple[str, ...] = ()
    is_directory: bool = False
    is_file: bool = False


def _of_flag(flag: Flag) -> Word:
    values = ("true", "false") if flag.kind.is_bool else _VALUES.get(flag.name, ())
    return Word(
        f"-{flag.name}", flag.help, not flag.kind.is_bool, values, flag.name in _DIRECTORIES, flag.name in _FILES
    )


def words() -> dict[str, list[Word]]:
    """All flags by subcommand; "" is the command itself: global flags and those of `volume`."""
    own = {flag.name: flag for flag in (*config.GLOBAL_FLAGS, *config.VOLUME_FLAGS)}
    out = {
        "": [_of_flag(own[name]) for name in sorted(own)],
        "volume": [_of_flag(flag) for flag in sorted(config.VOLUME_FLAGS, key=lambda flag: flag.name)],
    }
    for command in config.OFFLINE_COMMANDS:
        out[command] = [
            Word(
                option,
                action.help or "",
                action.nargs != 0,
                (),
                option.strip("-") in _DIRECTORIES,
                option.strip("-") in _FILES,
            )
            for action in common.parser_of(command)._actions
            for option in action.option_strings
        ]
    return out


def script(shell: str) -> str:
    """The completion of one shell, to be sourced or put where it looks. KeyError for another shell."""
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell]()


def _bash() -> str:
    cases = []
    for command, flags in words().items():
        if not command:
            continue
        cases.append(f"        {command}) flags='{' '.join(word.text for word in flags)}';;")
    top = " ".join(word.text for word in words()[""])
    values: dict[str, list[str]] = {}
    for flags in words().values():
        for word in flags:
            if word.takes_value or word.values:
                if word.is_directory:
                    kind = "__directory"
                elif word.is_file:
                    kind = "__file"
                elif word.values:
                    kind = " ".join(word.values)
                else:
                    kind = "__none"
                names = values.setdefault(kind, [])
                if word.text not in names:
                    names.append(word.text)
    looked_up = "\n".join(
        f"        {'|'.join(sorted(names))}) kind='{kind}';;" for kind, names in sorted(values.items())
    )
    booleans = "|".join(sorted({w.text for flags in words().values() for w in flags if w.values and not w.takes_value}))
    return f"""# bash completion for {config.PROGRAM}
_{config.PROGRAM}() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}"
    local commands='{" ".join(_COMMANDS)}' command='' flags kind='' name='' word
    COMPREPLY=()
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case "$word" in {"|".join(_COMMANDS)}) command="$word"; break;; esac
    done
    case "$command" in
{chr(10).join(cases)}
        completion) COMPREPLY=($(compgen -W '{" ".join(SHELLS)}' -- "$current")); return;;
        help) COMPREPLY=($(compgen -W "$commands" -- "$current")); return;;
        version) return;;
        *) flags='{top}';;
    esac
    if [[ "$current" == = ]]; then name="$before"; current=''
    elif [[ "$before" == = ]]; then name="${{COMP_WORDS[COMP_CWORD-2]}}"
    elif [[ "$current" == -*=* ]]; then name="${{current%%=*}}"; current="${{current#*=}}"
    elif [[ "$before" == -* ]]; then
        case "$before" in {booleans}) ;; *) name="$before";; esac
    fi
    case "${{name/#--/-}}" in
{looked_up.replace("--", "-")}
    esac
    case "$kind" in
        __directory) compopt -o filenames 2>/dev/null; COMPREPLY=($(compgen -d -- "${{current##*,}}"));;
        __file) compopt -o filenames 2>/dev/null; COMPREPLY=($(compgen -f -- "$current"));;
        __none) ;;
        '')
            if [[ -z "$command" && "$current" != -* ]]; then COMPREPLY=($(compgen -W "$commands" -- "$current"))
            elif [[ -n "$command" && "$command" != volume && "$current" != -* ]]; then
                compopt -o filenames 2>/dev/null; COMPREPLY=($(compgen -d -- "$current"))
            else COMPREPLY=($(compgen -W "$flags" -- "$current"))
            fi;;
        *) COMPREPLY=($(compgen -W "$kind" -- "$current"));;
    esac
}}
complete -F _{config.PROGRAM} {config.PROGRAM}
"""


def _zsh_word(word: Word) -> str:
    text = word.help.replace("'", "'\\''").replace("[", "(").replace("]", ")").replace(":", "\\:")
    if word.takes_value:
        kind = f"({' '.join(word.values)})" if word.values else ""
        kind = "_directories" if word.is_directory else "_files" if word.is_file else kind
        return f"'{word.text}=[{text}]:value:{kind}'"
    if word.values:
        return f"'{word.text}=-[{text}]::value:({' '.join(word.values)})'"
    return f"'{word.text}[{text}]'"


def _zsh() -> str:
    every = words()
    lines = [f"#compdef {config.PROGRAM}", f"_{config.PROGRAM}() {{", "  local -a commands", "  commands=("]
    lines += [f"    '{name}:{text}'" for name, text in _COMMANDS.items()]
    lines += ["  )", "  local command=${words[(r)(" + "|".join(_COMMANDS) + ")]}", '  case "$command" in']
    for command, flags in every.items():
        if command:
            rest = "'*:directory:_directories'" if command != "volume" else ""
            specs = " \\\n      ".join([*map(_zsh_word, flags), *([rest] if rest else [])])
            lines += [f"    {command})", f"      _arguments \\\n      {specs}", "      ;;"]
    lines += [f"    completion) _values shell {' '.join(SHELLS)} ;;", "    version) ;;"]
    lines += ["    help) _describe command commands ;;", "    *)"]
    specs = " \\\n      ".join(map(_zsh_word, every[""]))
    lines += [
        f"      _arguments '1:command:{{_describe command commands}}' \\\n      {specs}",
        "      ;;",
        "  esac",
        "}",
    ]
    name = f"_{config.PROGRAM}"
    lines.append(f'if [ "$funcstack[1]" = "{name}" ]; then {name} "$@"; else compdef {name} {config.PROGRAM}; fi')
    return "\n".join(lines) + "\n"


def _fish_quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _fish() -> str:
    program = config.PROGRAM
    names = " ".join(_COMMANDS)
    lines = [f"# fish completion for {program}", f"complete -c {program} -f"]
    none = f"not __fish_seen_subcommand_from {names}"
    for name, text in _COMMANDS.items():
        lines.append(f"complete -c {program} -n {_fish_quote(none)} -a {name} -d {_fish_quote(text)}")
    lines.append(
        f"complete -c {program} -n '__fish_seen_subcommand_from completion' -a {_fish_quote(' '.join(SHELLS))}"
    )
    lines.append(f"complete -c {program} -n '__fish_seen_subcommand_from help' -a {_fish_quote(names)}")
    for command, flags in words().items():
        condition = f"__fish_seen_subcommand_from {command}" if command else none
        if command in config.OFFLINE_COMMANDS:
            lines.append(f"complete -c {program} -n {_fish_quote(condition)} -a '(__fish_complete_directories)'")
        for word in flags:
            dashes = "-l" if word.text.startswith("--") else "-s" if len(word.text) == 2 else "-o"
            line = f"complete -c {program} -n {_fish_quote(condition)} {dashes} {word.text.lstrip('-')}"
            if word.takes_value:
                line += " -r" if word.is_file else " -x"
                if word.is_directory:
                    line += " -a '(__fish_complete_directories)'"
                elif word.is_file:
                    line += " -F"
                elif word.values:
                    line += f" -a {_fish_quote(' '.join(word.values))}"
            lines.append(f"{line} -d {_fish_quote(word.help)}")
    return "\n".join(lines) + "\n"
