"""Reading a command's arguments with tyro, with errors that name the option as a person typed it."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from typing import Any

import tyro

from cutlayer.errors import ConfigError, nearest, unknown


def parse_recipe(
    defaults: Mapping[str, Any], about: Mapping[str, str], prog: str, arguments: Sequence[str], description: str = ""
) -> Any:
    """A recipe's values with whatever the arguments change in them.

    Args:
        defaults: by recipe.
        about: what each recipe is.
        prog: how the command is called.

    Raises:
        ConfigError: values that a group of options, such as `--client.*`, does not take.
        SystemExit: help was asked for, or an argument cannot be read; what is to be said has been printed.
    """
    # What version 0.1 called it.
    arguments = ["--strategy" + given[6:] if given.split("=")[0] == "--mode" else given for given in arguments]
    recipe = _recipe(arguments, [*defaults], prog)
    if recipe is not None:  # what is wrong with an option is then said for this recipe alone
        defaults, arguments = {recipe: defaults[recipe]}, arguments[1:]
        prog, description = f"{prog} {recipe}", about[recipe]
    kind: Any = tyro.extras.subcommand_type_from_defaults(dict(defaults), dict(about))
    said = _Said()
    try:
        with redirect_stderr(said):
            return tyro.cli(
                kind if recipe is None else type(defaults[recipe]),
                default=tyro.MISSING_NONPROP if recipe is None else defaults[recipe],
                prog=prog,
                description=description or None,
                args=arguments,
                config=(tyro.conf.OmitSubcommandPrefixes,),
            )
    except SystemExit as end:
        # tyro takes the error of a nested value for its own, and calls the value by an internal name.
        outer, inner = end.__context__, getattr(end.__context__, "__context__", None)
        if isinstance(inner, ConfigError) and outer is not None:
            group = str(outer.args[-1]).rsplit(".", 1)[-1].replace("_", "-")
            given = [name for argument in arguments if (name := argument.split("=")[0]).startswith(f"--{group}.")]
            raise ConfigError(f"{', '.join(given) or f'--{group}'}: {inner}") from None
        sys.stderr.write(said.getvalue())
        raise


def _recipe(arguments: Sequence[str], known: Sequence[str], prog: str) -> str | None:
    """The recipe, which comes first; None if help is asked for. Raises ConfigError, in a line, without one."""
    first = arguments[0] if arguments else ""
    if first in known:
        return first
    if {"-h", "--help"} & {*arguments} or first.startswith("--tyro"):
        return None
    if not first or first.startswith("-"):
        some = next((each for each in arguments if each in known), known[0])
        raise ConfigError(f"expected a recipe first, such as {prog} {some} ...; known: {', '.join(known)}")
    meant = nearest(first, known)
    raise ConfigError(
        f"unknown recipe {first!r}; did you mean {' or '.join(meant)}?" if meant else unknown("recipe", first, known)
    )


class _Said(io.StringIO):
    """Standard error for later, which is as wide and as coloured as now."""

    def isatty(self) -> bool:
        return sys.__stderr__ is not None and sys.__stderr__.isatty()
