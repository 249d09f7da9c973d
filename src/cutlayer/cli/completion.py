"""The command `cutlayer completion`: a script with which a shell completes commands, recipes and options."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console

from cutlayer.errors import ConfigError, unknown
from cutlayer.runs.recipes import RECIPES

SHELLS = ("bash", "zsh")
OF_RECIPES = ("train", "serve", "plan")
Command = Callable[[Sequence[str], Console], None]

BASH = """# Completion of cutlayer: put this into a file that your shell reads.
_cutlayer() {
    local word="${COMP_WORDS[COMP_CWORD]}" choices=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        choices="COMMANDS"
    else
        case "${COMP_WORDS[1]}" in
CASES
        esac
    fi
    COMPREPLY=($(compgen -W "$choices" -- "$word"))
    [ "${#COMPREPLY[@]}" -gt 0 ] || COMPREPLY=($(compgen -f -- "$word"))
}
complete -o filenames -F _cutlayer cutlayer
"""


def completion(arguments: Sequence[str], console: Console, commands: Mapping[str, Command]) -> None:
    """Print a script that completes commands and options: eval "$(cutlayer completion bash)"."""
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        raise ConfigError(unknown("shell", arguments[0] if arguments else "", SHELLS))
    cases = []
    for name, command in commands.items():
        words = _options(command, ["digits", "--help"] if name in OF_RECIPES else ["--help"])
        words += list(RECIPES) if name in OF_RECIPES else []
        cases.append(f'            {name}) choices="{" ".join(words)}" ;;')
    script = BASH.replace("COMMANDS", " ".join([*commands, "completion"])).replace("CASES", "\n".join(cases))
    zsh = "autoload -U +X bashcompinit && bashcompinit\n" if arguments[0] == "zsh" else ""
    console.print(zsh + script, soft_wrap=True)


def _options(command: Command, arguments: Sequence[str]) -> list[str]:
    """The options that a command's help names."""
    text = io.StringIO()
    with (
        contextlib.redirect_stdout(text),
        contextlib.redirect_stderr(text),
        contextlib.suppress(SystemExit, ConfigError),
    ):
        command(arguments, Console(file=text))
    return sorted(set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", text.getvalue())))
