"""Experiments, one module each with `add_arguments(parser)` and `run(args)`: `spectral-kernels paper NAME`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module

EXPERIMENTS = {
    "fig1": "stable rank and alignment of a layer's gradient against the batch size",
    "fig2": "changes of features and weights against width: muP, NTP, SP, and other optimizers",
    "fig3": "stable rank of the features and gradients that a layer's update is made of",
    "fig4": "weights and their changes do not cancel (Assumption 1)",
    "fig5": "the activation keeps the size of features (Assumption 2)",
    "fig6": "an input's own part of the update (Assumption 3)",
    "table1": "spectral, Frobenius and entry sizes of weights and updates; Eqs. 19 and 20",
    "appb": "Lemma 1 and the propositions of Appendix B, for SGD, Adam and sign",
    "uniqueness": "one layer's initial size or rate scaled by a power of the width: what blows up, what freezes",
    "ntp-mup": "NTP becomes muP by scaling its output and its rate (section 5.3), step by step",
    "transfer": "loss against the rate at 8x different widths: SGD and Adam, Condition 1 and SP",
    "stacking": "time of trials as one stacked model against a loop over them",
    "page": "the page on all of the above, from result files",
    "dial": "singular values clipped at the s-th, from Eq. 17 (s = 1) to Muon (full rank)",
}


def module_of(name: str) -> str:
    """The module of a command: `ntp-mup` -> `ntp_mup`."""
    return name.replace("-", "_")


def add_parsers(parser: argparse.ArgumentParser, argv: Sequence[str] = ()) -> None:
    """A subcommand per experiment; only the one that argv asks for is imported, for its options and to run it."""
    names = parser.add_subparsers(metavar="experiment", required=True)
    asked = next((word for word in argv if not word.startswith("-")), None)
    for name, text in EXPERIMENTS.items():
        one = names.add_parser(name, help=text)
        if name != asked:
            continue
        module = import_module(f".{module_of(name)}", __name__)
        one.description, one.formatter_class = module.__doc__, argparse.RawDescriptionHelpFormatter
        module.add_arguments(one)
        one.set_defaults(command=module.run)
