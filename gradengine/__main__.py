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
    ahead = commands.add_parser(
        "compile", help="compile the kernels now rather than when they are first used"
    )
    ahead.add_argument(
        "--cuda",
        metavar="ARCHITECTURE",
        help="those for GPUs of an architecture, such as sm_90a, rather than the CPU's; needs no GPU",
    )
    given = parser.parse_args(arguments)
    if given.command == "doctor":
        print(report())
        return 0
    from gradengine import precompile  # imports Numba

    if not given.cuda:
        precompile.compile_cpu_kernels()
        return 0
    try:
        precompile.compile_cuda_kernels(given.cuda)
    except (RuntimeError, ValueError) as error:
        parser.exit(2, f"{error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
