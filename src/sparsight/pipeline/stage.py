"""The frame that every stage script shares: arguments, lock, threads, errors."""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

import sparsight
from sparsight.common.allocator import keep_freed_memory
from sparsight.common.digests import digest, file_digest
from sparsight.common.errors import SparsightError, reason
from sparsight.common.files import write_json
from sparsight.common.member import Member
from sparsight.common.progress import log
from sparsight.common.work import Work
from sparsight.config import Activations, Compute, schema
from sparsight.pipeline import code_digest, records
from sparsight.pipeline.gpu_slots import take_cards
from sparsight.pipeline.processes import report, run_all, this_member

if TYPE_CHECKING:
    import torch


@dataclass
class Stage:
    """One execution of a stage, as its script's ``main`` sees it."""

    config: Any
    """The stage's own section of the configuration."""
    inputs: dict[str, Any]
    """Input paths, or lists of paths, by the names that the script declares."""
    name: str
    """Name of the result, e.g. ``topk-s0``; empty if there is only one."""
    seed: int
    """The run's seed."""
    work: Work
    out: Path
    """The folder of the results. Only results that are finished piece by piece are written there directly."""
    compute: Compute = field(default_factory=Compute)
    cores: int = 1
    """Number of CPU cores that the stage may use at the same time. No result depends on it."""
    member: Member = field(default_factory=Member)
    """This process, if the stage runs in several."""

    @cached_property
    def device(self) -> "torch.device":
        """The torch device, after setting torch to deterministic algorithms and the configured number of threads.

        With ``compute.device: cuda`` the stage gets a GPU of its own, and may have to wait for one.
        """
        if self.compute.device == "cuda" and self.member.size == 1:
            take_cards()
        return prepare_torch(self.compute)

    def runs_in(self, n: int) -> bool:
        """Run the stage's script in ``n`` processes, unless this is one of them or the only one; whether it has run.

        On GPUs every process gets one of its own. See :func:`sparsight.pipeline.processes.run_all` for errors.
        """
        if n == 1 or self.member.size > 1:
            return False
        run_all(n, self.work, take_cards(n) if self.compute.device == "cuda" else [])
        return True

    def record(self) -> dict[str, Any]:
        """Origin of a result, which is saved with it: digests of the configuration and of the inputs, and the seed."""
        return {
            "config": digest(self.config) if self.config is not None else None,
            "seed": self.seed,
            "inputs": {name: _input_digests(value) for name, value in self.inputs.items()},
        }


def run(main: Callable[[Stage], None], description: str, config: type | None = None, **inputs: str | list[str]) -> None:
    """Run a stage script: parse arguments, lock the working folder, call ``main``, put its files into place.

    Args:
        main: writes every result into ``stage.work.out``.
        description: the script's docstring.
        config: dataclass of the stage's section, or None.
        inputs: help text of each input file, by name. A list means that the input takes several files.
    """
    parser = argparse.ArgumentParser(description=description)
    for name, text in inputs.items():
        several = isinstance(text, list)
        parser.add_argument(
            f"--from-{name}",
            dest=f"from_{name}",
            type=Path,
            required=not several,
            default=[] if several else None,
            nargs="*" if several else None,
            help="".join(text),
        )
    parser.add_argument("--out", type=Path, required=True, help="folder that receives the results")
    parser.add_argument("--work", type=Path, required=True, help="folder for working state, removed at the end")
    parser.add_argument("--record", type=Path, help="JSON file, in a folder of the run's, that receives all digests")
    parser.add_argument("--name", default="", help="what the result is called")
    parser.add_argument("--seed", type=int, default=0, help="seed of the run")
    parser.add_argument("--code", default="", help="digest of the code that decides the result (all of it)")
    n_cpus = os.cpu_count() or 1
    parser.add_argument("--cores", type=int, default=n_cpus, help="to use at most; they change no result (all)")
    for section in filter(None, (Compute, config)):
        schema.add_arguments(parser, section)
    arguments = parser.parse_args()
    member = this_member()
    try:
        _run(main, config, {name: getattr(arguments, f"from_{name}") for name in inputs}, arguments, member)
        if member.size == 1:
            log(f"processor time: {sum(os.times()[:4]):.1f} s")  # Snakemake's benchmarks only sample it
    except Exception as error:
        message = _message(error, arguments)
        if member.size > 1:
            report(member, message)
            sys.exit(1)
        if message is None:
            raise
        sys.exit(f"error: {message}")


def _message(error: Exception, arguments: argparse.Namespace) -> str | None:
    """What to tell the user about an error; None for one that is a fault of the program."""
    if isinstance(error, SparsightError):
        return str(error)
    if isinstance(error, OSError) and (error.filename is not None or error.errno is not None):
        return f"{error.filename or arguments.out}: {reason(error)}"
    if isinstance(error, SafetensorError) and "os error" in str(error):  # as a full disk arrives
        return f"{arguments.work}: {reason(error)}"
    return None


def _run(
    main: Callable[[Stage], None], config: type | None, inputs: dict[str, Any], arguments: argparse.Namespace,
    member: Member,
) -> None:  # fmt: skip
    compute = schema.from_arguments(Compute, arguments)
    section = schema.from_arguments(config, arguments) if config else None
    set_threads(compute.threads)
    if compute.precision != "fp32" and config is not Activations:
        log(f"compute.precision: {compute.precision} is for the activation store alone; this stage does not use it")
    for path in _paths(inputs):
        if not path.exists():
            raise SparsightError(f"there is no {path}; run the stage that makes it first")
    if member.size > 1:  # the process that started this one holds the folder, and puts the files into place
        work = Work(arguments.work, "")
        main(Stage(section, inputs, arguments.name, arguments.seed, work, arguments.out, compute, 1, member))
        return
    digests = {name: _input_digests(value) for name, value in inputs.items()}
    settings = records.settings(compute, section, arguments.seed, arguments.code or _all_code())
    key = digest([settings, arguments.name, digests])  # state of other code is not resumed
    with Work(arguments.work, key) as work:
        if not work.complete:
            main(Stage(section, inputs, arguments.name, arguments.seed, work, arguments.out, compute, arguments.cores))
            if arguments.record is not None:
                files = (path for path in work.out.rglob("*") if path.is_file())
                made = {arguments.out / path.relative_to(work.out): path for path in files}
                write_json(
                    work.record,
                    records.content(settings, {p: _digest(p) for p in _paths(inputs)}, made, arguments.record),
                )
        work.finish(arguments.out, arguments.record)


def set_threads(threads: int) -> None:
    """Set the thread counts of libraries that read them from the environment. Call before importing torch."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    # OpenMP's threads wait for each other by spinning, for milliseconds. If another program holds a core, a step of
    # many short parallel passes takes 60 times as long. This many spins keep the speed and then release the core.
    os.environ["GOMP_SPINCOUNT"] = "20000"
    # A library that picks its own thread count, or rounds differently by alignment, would change bytes.
    os.environ.update(OMP_DYNAMIC="FALSE", MKL_DYNAMIC="FALSE", MKL_CBWR="AUTO", CUBLAS_WORKSPACE_CONFIG=":4096:8")


def prepare_torch(compute: Compute) -> "torch.device":
    """Set torch to deterministic algorithms, full fp32 and the configured threads, and keep freed memory.

    Returns the device.

    On a GPU, full fp32 means that neither products nor convolutions round their inputs to TF32. Products in bf16 add
    up in fp32.

    Raises:
        SparsightError: the device is not available.
    """
    import torch

    keep_freed_memory()
    torch.set_num_threads(compute.threads)
    torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms, without 3 s of imports
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a pass over every array
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if compute.device == "cuda" and not torch.cuda.is_available():
        raise SparsightError("compute.device: torch finds no CUDA device; set compute.device to cpu or mend the driver")
    return torch.device(compute.device)


def _paths(inputs: dict[str, Any]) -> list[Path]:
    return [path for value in inputs.values() for path in (value if isinstance(value, list) else [value])]


def _input_digests(value: Path | list[Path]) -> Any:
    return [_digest(p) for p in value] if isinstance(value, list) else _digest(value)


@cache
def _digest(path: Path) -> str:
    """Digest of an input, cached: inputs do not change while a stage runs, and weights are large."""
    return file_digest(path)


def _all_code() -> str:
    """Digest of the whole package and the script, for a stage that is run by hand."""
    package = Path(sparsight.__file__).parent
    names = [path.relative_to(package).as_posix() for path in sorted(package.rglob("*.py"))]
    return code_digest.code_digest(package, [*names, str(Path(sys.argv[0]).resolve())])
