"""`python -m published export --checkpoint=... --output=...` writes any checkpoint with the release's TF1 names."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import published
from errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (None: that of this process). Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m published", description="Converts published checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write any checkpoint as one with the release's TF1 names")
    export.add_argument("--checkpoint", required=True, help="a model_dir, a checkpoint or a published model")
    export.add_argument("--output", required=True, help="the folder for the TF1-named checkpoint")
    arguments = parser.parse_args(argv)
    try:
        weights = published.open_weights(arguments.checkpoint)
        prefix = published.export(weights, arguments.output)
        flags = published.flags_left_open(weights, prefix)
    except UserError as mistake:
        print(f"published: error: {mistake}", file=sys.stderr)
        return 2
    print(prefix)
    if flags:
        print(f"what the file does not tell: {' '.join(flags)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
