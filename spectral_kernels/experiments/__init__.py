"""Experiments, one module each with `add_arguments(parser)` and `run(args)`: `spectral-kernels paper NAME`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module

EXPERIMENTS = {"dial": "singular values clipped at the s-th, from Eq. 17 (s = 1) to Muon (full rank)"}


def add_parsers(parser: argparse.ArgumentParser, argv: Sequence[str] = ()) -> None:
    """A subcommand per experiment; only the one that argv asks for is imported, for its options and to run it."""
    names = parser.add_subparsers(metavar="experiment", required=True)
    for name, text in EXPERIMENTS.items():
        one = names.add_parser(name, help=text)
        if name not in argv:
            continue
        module = import_module(f".{name}", __name__)
        one.description, one.formatter_class = module.__doc__, argparse.RawDescriptionHelpFormatter
        module.add_arguments(one)
        one.set_defaults(command=module.run)
