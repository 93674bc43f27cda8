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
# The options for measuring single ops, by attribute.
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
OF_MODELS = {
    "layers": "--layers",
    "experts": "--experts",
    "batch": "--batch",
    "prefill": "--prefill",
    "mode": "--mode",
    "compile_time": "--compile-time",
}


def refuse(arguments: argparse.Namespace) -> None:
    """Refuse options of the other kind of benchmark.

    Raises:
        ValueError: one is given, and would have no effect.
    """
    other, why = (OF_MODELS, "without a TARGET") if arguments.target is None else (OF_OPS, "with a TARGET")
    for attribute, option in other.items():
        if getattr(arguments, attribute) not in (None, False):
            raise ValueError(f"{option} has no effect {why}: leave it out")
    if arguments.compile_time:
        for attribute, option in (("prefill", "--prefill"), ("rounds", "--rounds")):
            if getattr(arguments, attribute) is not None:
                raise ValueError(f"{option} has no effect with --compile-time: leave it out")
        if arguments.batch is not None and len(arguments.batch) > 1:
            raise ValueError(f"--batch {','.join(map(str, arguments.batch))}: --compile-time takes one size")
        if arguments.mode == ["eager"]:
            raise ValueError("--mode eager compiles nothing without fusionpass: name default or reduce-overhead")


def bench_model_command(arguments: argparse.Namespace) -> int:
    """Returns 0: the table is for the user to judge.

    Raises:
        ValueError: bad input or no CUDA GPU, told in one sentence.
    """
    if arguments.json is not None:
        ensure_writable(arguments.json, "--json")
    ensure_gpu(f"bench {arguments.target!r} measures a model's steps")
    from fusionpass.bench.steps import randomise
    from fusionpass.targets import resolve

    with Progress() as progress, quiet():
        progress.stage(f"building {arguments.target}")
        named = {"layers": arguments.layers, "experts": arguments.experts, "dtype": arguments.dtype}
        target = resolve(arguments.target, **named, device="cuda")
        if not hasattr(target.model, "get_input_embeddings"):
            raise ValueError(
                f"bench {arguments.target!r} decodes tokens: name a Hugging Face model type, folder or hub id"
            )
        randomise(target.model)
        measure = _compile_times if arguments.compile_time else _steps
        text, data = measure(target.model, arguments, progress)
    print_out(text)
    if arguments.json is not None:
        write(arguments.json, json.dumps(data, indent=2) + "\n", "--json")
    return 0


def _steps(model, arguments: argparse.Namespace, progress: Progress) -> tuple[str, dict]:
    import torch

    from fusionpass.bench.steps import ModelRun, measure

    rounds = arguments.rounds or DEFAULT_ROUNDS
    cells = measure(
        model,
        batches=arguments.batch or (() if arguments.prefill else DEFAULT_BATCHES),
        prefills=arguments.prefill or (),
        rounds=rounds,
        modes=arguments.mode or MODES,
        stage=progress.stage,
    )
    name = torch.cuda.get_device_name()
    run = ModelRun(arguments.target, arguments.layers, name, torch.__version__, rounds, cells, arguments.experts)
    return run.text(arguments.format), run.to_dict()


def _compile_times(model, arguments: argparse.Namespace, progress: Progress) -> tuple[str, dict]:
    import torch

    from fusionpass.bench.compiling import CompileRun, compile_times

    (batch,) = arguments.batch or (1,)
    times = compile_times(model, batch=batch, modes=arguments.mode or MODES, stage=progress.stage)
    name = torch.cuda.get_device_name()
    run = CompileRun(arguments.target, arguments.layers, name, torch.__version__, times, arguments.experts)
    return run.text(arguments.format), run.to_dict()
