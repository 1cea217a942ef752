"""What a language model adds to stage 1, on validation; the test split is not read.

Every arm of stage 2 starts from the same stage 1 and has the same batches, epochs, rates and patience:
`none_continued` is stage 1 trained on without a language model, the others read with one whose weights are
pretrained and frozen, frozen with LoRA adapters, trained whole, or drawn at random (with adapters). Rows that
results/model/validation.csv has are not made again."""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from unirec.core.params import override, read_params
from unirec.data.schema import SetSpec
from unirec.encoders.catalogue import load
from unirec.pipeline.stages import finetune, pretrain
from unirec.training.curves import flat

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "results" / "model" / "validation.csv"
ARMS = {
    "none_continued": {"llm.adapt": "none"},
    "random": {"llm.adapt": "random_init"},
    "frozen": {"llm.adapt": "frozen"},
    "lora": {"llm.adapt": "lora"},
    "whole": {"llm.adapt": "whole"},
}
BUDGET = {"finetune.epochs": 6, "finetune.fit.patience": 3, "finetune.control": False}
KEY = ["dataset", "model", "llm", "layers", "seed"]


def row_of(log: list[dict], started: bool) -> dict:
    "Figures of a run; the start of stage 2 is no epoch that was trained."
    trained = log[1:] if started else log
    best = max(trained, key=lambda row: row["mrr"])
    return {
        "mrr": best["mrr"],
        "start": log[0]["mrr"] if started else float("nan"),
        "epoch": best["epoch"],
        "epochs": len(trained),
        "seconds": sum(row["seconds"] for row in trained),
        "flat": flat(log),
    }


def runs(
    dataset: str,
    model: str,  # a form
    seed: int,
    arms: list[str],  # of ARMS
    layers: int,  # first layers of the language model
    known: set[tuple],  # keys of the rows that are there
) -> Iterator[dict]:  # rows of validation.csv
    "Train stage 1 once, and each arm from it."
    wanted = {arm: (dataset, model, arm, 0 if arm == "none_continued" else layers, seed) for arm in arms}
    wanted = {arm: key for arm, key in wanted.items() if key not in known}
    if not wanted:
        return
    params = override(read_params(ROOT) | {"seed": seed}, BUDGET)
    spec = SetSpec.from_params(dataset, params["sets"][dataset])
    data = load(ROOT / "prepared" / dataset, ROOT / "embeddings" / dataset, spec)
    with tempfile.TemporaryDirectory() as scratch:
        first = Path(scratch) / "pretrain"
        log = pretrain(data, params, first, models=[model])[model]
        key = (dataset, model, "stage_1", 0, seed)
        if key not in known:
            yield dict(zip(KEY, key, strict=True)) | row_of(log, started=False)
        for arm, key in wanted.items():
            changed = override(params, ARMS[arm] | {"llm.layers": layers})
            log = finetune(data, changed, first, Path(scratch) / arm, models=[model])[model]
            yield dict(zip(KEY, key, strict=True)) | row_of(log, started=True)


def write(row: dict) -> None:
    "Add a row to the file, which stays sorted."
    rows = pd.read_csv(OUT) if OUT.exists() else pd.DataFrame()
    rows = pd.concat([rows, pd.DataFrame([row])], ignore_index=True).sort_values(KEY)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    rows.to_csv(OUT, index=False, float_format="%.6f")
    print(json.dumps(row), flush=True)


def main() -> None:
    "Make the rows that are missing."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", nargs="+", default=["movielens", "sample"])
    parser.add_argument("--models", nargs="+", default=["unirec", "unirec_id"], help="forms of params.yaml")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--layers", nargs="+", type=int, default=[2])
    args = parser.parse_args()
    for layers, seed, dataset, model in product(args.layers, args.seeds, args.sets, args.models):
        rows = pd.read_csv(OUT) if OUT.exists() else pd.DataFrame(columns=KEY)
        known = set(rows[KEY].itertuples(index=False, name=None))
        for row in runs(dataset, model, seed, args.arms, layers, known):
            write(row)


if __name__ == "__main__":
    main()
