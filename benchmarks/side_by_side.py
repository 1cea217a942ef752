"""Two or more ways of one computation, measured side by side: in turn in one process for time, each in a
fresh process for peak memory."""

import argparse
import gc
import json
import multiprocessing
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "benchmarks"


def in_turn(
    sides: Mapping[str, Callable[[], object]],  # name -> one run of that side
    pairs: int,  # how many times each side is measured
    warmup: int = 1,  # runs of each side before the clock is used
) -> list[dict[str, float]]:  # one row a pair: name -> seconds
    "Run the sides in turn, the order turned round every second pair: A B, B A, A B, ..."
    names, rows = list(sides), []
    for _ in range(warmup):
        for name in names:
            sides[name]()
    for pair in range(pairs):
        gc.collect()
        seconds = {}
        for name in names if pair % 2 == 0 else names[::-1]:
            start = time.perf_counter()
            sides[name]()
            seconds[name] = time.perf_counter() - start
        rows.append({name: seconds[name] for name in names})
    return rows


def peak_mb() -> float:
    "The largest resident memory of this process so far, in MB."
    status = Path("/proc/self/status")
    if status.exists():  # of this program alone: ru_maxrss of a child begins, on Linux, at its parent's size
        return (
            int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1])
            / 1024
        )
    scale = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def now_mb() -> float:
    "The resident memory of this process now, in MB; the peak so far where the system does not tell."
    statm = Path("/proc/self/statm")
    return (
        int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        if statm.exists()
        else peak_mb()
    )


def _measure(connection, build: Callable, arguments: tuple, runs: int) -> None:
    "In the child: what building and running take above what the imports took."
    try:
        imported = peak_mb()
        step = build(*arguments)
        built = now_mb()
        for _ in range(runs):
            step()
        connection.send({"memory_mb": round(peak_mb() - imported, 1), "step_mb": round(peak_mb() - built, 1)})
    except BaseException as error:
        connection.send({"error": f"{type(error).__name__}: {error}"})
        raise


def memory(
    build: Callable[..., Callable[[], object]],  # a function at the top of a module: arguments -> one run
    *arguments: object,
    runs: int = 2,
) -> dict[str, float]:
    """Peak memory in a fresh process: `memory_mb` above the imports (weights, data and step), `step_mb`
    above what was there before the first run."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_measure, args=(theirs, build, arguments, runs))
    child.start()
    theirs.close()
    try:
        answer = mine.recv()
    except EOFError:
        answer = {"error": "the process ended without an answer (out of memory?)"}
    child.join()
    if "error" in answer:
        raise RuntimeError(f"{build.__name__}{arguments}: {answer['error']}")
    return answer


def machine() -> dict:
    "Facts of the machine that decide about speed; no names, no paths."
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next(
        (line.split(":", 1)[1].strip() for line in flags.splitlines() if line.startswith("model name")),
        platform.machine(),
    )
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft", "numpy")},
    }


class Table:
    """Rows that are written to `<name>.csv` as they come, and facts to `<name>.json`.

    Folder None: kept in memory only.
    """

    def __init__(self, name: str, folder: Path | None, **facts):
        self.rows, self.path, self.facts, self.start = (
            [],
            Path(folder) / f"{name}.csv" if folder else None,
            facts,
            time.perf_counter(),
        )
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, *rows: dict) -> None:
        "Add rows and write everything."
        self.rows += rows
        if self.path is None:
            return
        pd.DataFrame(self.rows).to_csv(self.path, index=False, float_format="%.6g")
        facts = {"machine": machine(), **self.facts, "seconds": round(time.perf_counter() - self.start, 1)}
        self.path.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")


def arguments(description: str) -> argparse.ArgumentParser:
    "What all benchmarks accept."
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small sizes and few pairs, to see that it runs; written only where --out says",
    )
    parser.add_argument("--pairs", type=int, default=None, help="measurements of each side")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder of the csv and the json, default results/benchmarks"
    )
    return parser


def folder(args: argparse.Namespace) -> Path | None:
    "Where the results go: a quick run does not replace what was measured."
    return args.out or (None if args.quick else RESULTS)


def say(*words: object) -> None:
    "Print at once."
    print(*words, flush=True)


def spread(values: Sequence[float]) -> str:
    "Median and range, for the eye."
    s = pd.Series(values)
    return f"{s.median():.2f} ({s.min():.2f}-{s.max():.2f})"
