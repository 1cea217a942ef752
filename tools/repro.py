"""`make repro`: raw data to the page of results, the data sets side by side.

DVC runs one stage at a time, and a stage of a small set keeps one core busy. So once the tables are there, a
`dvc repro` for each data set goes through its stages, with an equal share of the cores; DVC holds its lock
only between stages. The last `dvc repro` finds all of that done and makes the page. The sets take turns where
there is one core or an NVIDIA GPU, and where words are given, which all go to a single `dvc repro`.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

STAGES = ("embed", "pretrain", "finetune", "evaluate")  # of one data set, in this order


def usable_cores() -> int:
    "Cores that this process may use."
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def train_set(
    dataset: str,
    threads: int,  # of each process, unless OMP_NUM_THREADS says otherwise
) -> int:  # exit code
    "Bring the stages of one data set up to date, beside others."
    targets = [f"{stage}@{dataset}" for stage in STAGES]
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    return subprocess.call(["dvc", "--wait-for-lock", "repro", "--single-item", *targets], env=environment)


def repro(words: list[str]) -> int:  # exit code
    "What `make repro` runs; the words are for `dvc repro`."
    datasets = yaml.safe_load(Path("params.yaml").read_text(encoding="utf8"))["datasets"]
    cores = usable_cores()
    abreast = min(cores, len(datasets))
    if not words and abreast > 1 and not shutil.which("nvidia-smi"):
        code = subprocess.call(["dvc", "repro", "prepare"])
        if code:
            return code
        with ThreadPoolExecutor(abreast) as pool:
            codes = pool.map(lambda dataset: train_set(dataset, cores // abreast), datasets)
            code = next((code for code in codes if code), 0)
        if code:
            return code
    return subprocess.call(["dvc", "repro", *words])


if __name__ == "__main__":
    sys.exit(repro(sys.argv[1:]))
