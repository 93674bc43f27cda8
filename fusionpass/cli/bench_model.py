"""`fusionpass bench TARGET`: a whole model's steps, in each mode without fusionpass and with it."""

from __future__ import annotations

import argparse
import json

from fusionpass.bench import MODES
from fusionpass.cli.files import ensure_writable, print_out, write
from fusionpass.cli.gpu import ensure_gpu
from fusionpass.cli.progress import Progress
from fusionpass.cli.quiet import quiet

DEFAULT_BATCHES = (1, 8, 32, 128)
DEFAULT_ROUNDS = 7
# What measures single ops, by attribute.
OF_OPS = {
    "op": "--op",
    "tokens": "--tokens",
    "hidden": "--hidden",
    "sets": "--sets",
    "no_tuned": "--no-tuned",
    "saved": "--from",
    "plot": "--plot",
    "check": "--check",
    "tolerance": "--tolerance",
}
OF_MODELS = {"layers": "--layers", "batch": "--batch", "prefill": "--prefill", "mode": "--mode"}


def refuse(arguments: argparse.Namespace) -> None:
    """Options of the other kind of benchmark.

    Raises:
        ValueError: one is given, and would have no effect.
    """
    other, why = (OF_MODELS, "without a TARGET") if arguments.target is None else (OF_OPS, "with a TARGET")
    for attribute, option in other.items():
        if getattr(arguments, attribute) not in (None, False):
            raise ValueError(f"{option} has no effect {why}: leave it out")


def bench_model_command(arguments: argparse.Namespace) -> int:
    """0; the table is what a user decides by.

    Raises:
        ValueError: bad input or no CUDA GPU, told in one sentence.
    """
    import torch

    if arguments.json is not None:
        ensure_writable(arguments.json, "--json")
    ensure_gpu(f"bench {arguments.target!r} measures a model's steps")
    from fusionpass.bench.steps import ModelRun, measure, randomise
    from fusionpass.targets import resolve

    with Progress() as progress, quiet():
        progress.stage(f"building {arguments.target}")
        target = resolve(arguments.target, layers=arguments.layers, dtype=arguments.dtype, device="cuda")
        if not hasattr(target.model, "get_input_embeddings"):
            raise ValueError(
                f"bench {arguments.target!r} decodes tokens: name a Hugging Face model type, folder or hub id"
            )
        randomise(target.model)
        batches = arguments.batch or (() if arguments.prefill else DEFAULT_BATCHES)
        rounds = arguments.rounds or DEFAULT_ROUNDS
        cells = measure(
            target.model,
            batches=batches,
            prefills=arguments.prefill or (),
            rounds=rounds,
            modes=arguments.mode or MODES,
            stage=progress.stage,
        )
    name = torch.cuda.get_device_name()
    run = ModelRun(arguments.target, arguments.layers, name, torch.__version__, rounds, cells)
    print_out(run.text(arguments.format))
    if arguments.json is not None:
        write(arguments.json, json.dumps(run.to_dict(), indent=2) + "\n", "--json")
    return 0
