"""The command line: ``python -m gradengine doctor`` and ``python -m gradengine compile``."""

from __future__ import annotations

import argparse

from gradengine.doctor import report


def main(arguments: list[str] | None = None) -> int:
    """Run the subcommand that the command line names and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m gradengine")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "doctor", help="say what gradengine finds on this machine and what is missing"
    )
    commands.add_parser(
        "compile", help="compile the CPU kernels now rather than when they are first used"
    )
    if parser.parse_args(arguments).command == "doctor":
        print(report())
    else:
        from gradengine.precompile import compile_kernels  # imports Numba

        compile_kernels()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
