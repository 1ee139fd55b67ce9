"""`tutelage config`: print the keys of a configuration, as text, as a page, or as a schema."""

from __future__ import annotations

import argparse
import json

from tutelage.config.reference import as_markdown, as_text, find, json_schema, kinds


def run(arguments: argparse.Namespace) -> int:
    """Print what was asked for."""
    if arguments.markdown:
        print(as_markdown(), end="")
    elif arguments.schema:
        print(json.dumps(json_schema(), indent=2))
    else:
        found = find(arguments.key) if arguments.key else list(kinds())
        print("\n".join(as_text(found)).strip())
    return 0
