"""Completion of commands, options, files, and keys with their values, in bash, zsh and fish.

    eval "$(register-python-argcomplete tutelage)"

in a shell, or in its start file, asks this program at every press of the tab key (argcomplete).
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from typing import Any

VARIABLE = "_ARGCOMPLETE"
"""Set by the shell that asks."""


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell and end the program; nothing without argcomplete (extra `completion`)."""
    if find_spec("argcomplete") is None:
        return
    import argcomplete

    argcomplete.autocomplete(parser)


def overrides(prefix: str, **_: Any) -> list[str]:
    """The overrides that a text may become: keys, or the words that a key takes."""
    from tutelage.config.keys import KEYS
    from tutelage.config.reference import choices

    key, equals, _word = prefix.partition("=")
    if not equals:
        return [f"{name}=" for name in KEYS]
    return [f"{key}={word}" for word in choices(key)] if key in KEYS else []


def keys(prefix: str, **_: Any) -> list[str]:
    """Keys and tables of a configuration."""
    from tutelage.config.keys import KEYS, TABLES

    return [*filter(None, TABLES), *KEYS]
