"""The command line. Exit codes: 0 done, 1 refused (it says why), 2 misused, 130 interrupted."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import lora2fx
from lora2fx.commands import demo, export, fold, inspect, report, train
from lora2fx.errors import DataError, Lora2fxError, RunError
from lora2fx.sources import SourceError

Command = Callable[[argparse.Namespace], None]


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; every subcommand sets `run`."""
    parser = argparse.ArgumentParser(prog="lora2fx", description="An adapter compiler for PyTorch.")
    parser.add_argument("--version", action="version", version=f"lora2fx {lora2fx.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (demo, inspect, train, report, fold, export):
        command.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (argparse itself exits with 2 on misuse)."""
    options = build_parser().parse_args(arguments)
    command: Command = options.run
    try:
        command(options)
    except (SourceError, DataError, RunError) as error:
        print(f"lora2fx: {error}", file=sys.stderr)
        return 2
    except Lora2fxError as error:
        print(f"lora2fx: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        if stop.args:
            print(f"lora2fx: {stop}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
