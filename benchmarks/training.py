"""A training epoch and an evaluation of SASRec against version 0.1, and against the floor: same weights,
same windows, one thread, in turn. UniRec's stage 1 in its default form against version 0.1's form, on a
made-up catalogue of the same size. And a training step beside a busy neighbour.

Without `--prepared FOLDER` (a folder of the prepare stage) the histories are made up, in the shape of Amazon
Beauty 2014: 22,363 users, 12,101 items, half of the histories shorter than seven events.
`--recbole` measures RecBole's SASRec too (benchmarks/peer.py; it needs the network).
"""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.peer import measure
from benchmarks.side_by_side import Table, arguments, folder, in_turn, say, spread
from unirec.baselines.sequential import (
    ItemTable,
    SASRec,
    SequenceScorer,
    next_item_cross_entropy,
    window_batches,
)
from unirec.core.device import keep_memory, measured_tflops
from unirec.core.params import read_yaml
from unirec.data.histories import Histories
from unirec.encoders.catalogue import Catalogue, toy_catalogue
from unirec.evaluation.metrics import full_ranks
from unirec.model.events import Events, packed_batches, training_batches
from unirec.model.hierarchy import EncoderConfig, Reconstruction
from unirec.model.recommender import UniRec
from unirec.training.objective import LossConfig, Objective

LENGTH, BATCH, WIDTH = 50, 128, 64
NEIGHBOUR = "while True: sum(range(10**6))"  # keeps one core busy


def made_up(users: int, items: int, seed: int = 0) -> tuple[Histories, np.ndarray]:
    "Histories of 3 events and more, popular items more often, and a validation item for each user."
    rng = np.random.default_rng(seed)
    lengths = 2 + rng.geometric(1 / 5, users).clip(max=200)
    drawn = (items * rng.random(lengths.sum() + users) ** 2.5).astype(np.int64)
    count = int(lengths.sum())
    events = np.zeros(count, np.int64), np.full(count, np.nan, np.float32), np.full(count, -1)
    offsets = np.concatenate([[0], lengths.cumsum()])
    return Histories(offsets, drawn[:count], *events, items), drawn[count:]


def prepared(path: Path) -> tuple[Histories, np.ndarray]:
    "Train histories and validation items of a folder of the prepare stage."
    train, valid = (pd.read_parquet(path / f"{part}.parquet") for part in ("train", "valid"))
    items = len(pd.read_parquet(path / "items.parquet", columns=[]))
    return Histories.from_frame(train, len(valid), items), valid.item.to_numpy(np.int64)


# --- version 0.1: a matrix of scores, a dense mask of seen items, one window a row


def loss_of_0_1(model: SASRec, batch: dict[str, Tensor]) -> Tensor:
    "The cross-entropy over all items as version 0.1 computed it."
    real, inputs = batch["targets"] >= 0, batch["inputs"]
    temperature = model.log_temperature.exp().clamp(0.01, 1.0)
    scores = F.normalize(model(inputs)[real], dim=-1) @ F.normalize(model.items(), dim=-1).T / temperature
    targets, steps = batch["targets"][real], torch.arange(inputs.shape[1])
    first = torch.full((len(inputs), scores.shape[1]), inputs.shape[1])
    first.scatter_reduce_(1, inputs, steps.expand_as(inputs), "amin")
    seen = (first[:, None] <= steps[:, None])[real].scatter_(1, targets[:, None], False)
    return F.cross_entropy(scores.masked_fill(seen, -torch.inf), targets)


class Scorer01:
    "Scores as version 0.1 computed them: padded histories, and the table of items once a batch."

    def __init__(self, model: SASRec):
        self.model = model

    @torch.no_grad()
    def __call__(self, histories: Histories, users: np.ndarray) -> Tensor:
        events = histories.last(LENGTH, users)
        counts = (events >= 0).sum(1)
        items = torch.as_tensor(histories.items[np.maximum(events, 0)])
        last = self.model(items[:, : counts.max()])[torch.arange(len(items)), torch.as_tensor(counts - 1)]
        temperature = self.model.log_temperature.exp().clamp(0.01, 1.0)
        return F.normalize(last, dim=-1) @ F.normalize(self.model.items(), dim=-1).T / temperature


# --- both sides


def trainer(model: nn.Module, loss: Callable, batches: list[dict], fused: bool) -> Callable[[], float]:
    "A function that takes the next batches of an epoch, one step each."
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)

    def run() -> float:
        total = 0.0
        for batch in batches:
            optimiser.zero_grad()
            value = loss(model, batch)
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            total += value.item()
        return total

    return run


def new_model(items: int) -> SASRec:
    "The same weights every time."
    torch.manual_seed(0)
    return SASRec(ItemTable(items, WIDTH), WIDTH, dropout=0.3, length=LENGTH)


def same_gradients(train: Histories) -> float:
    "Largest difference of the gradients of both ways over the largest gradient, without dropout."
    gradients = []
    for loss, packed in ((loss_of_0_1, False), (lambda m, b: next_item_cross_entropy(m, b, False), True)):
        model = new_model(train.n_items).eval()
        loss(model, window_batches(train, LENGTH, BATCH, 1, 0, packed)(0)[0]).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    difference = float((gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max())
    if difference > 1e-2:
        raise RuntimeError(f"not the same computation: the gradients differ by {difference:.1e}")
    return difference


# --- UniRec's stage 1: what params.yaml says, and the form that version 0.1 had

OLD_FORM = {"width": 64, "out": 64, "layers": 1, "dropout": 0.3, "id_dropout": 0.1}
OLD_LOSS = {"recon": 0.1, "contrast": 0.1}
OLD_BATCH = {"positions": 16, "size": 64}


def made_up_catalogue(items: int) -> Catalogue:
    "Five attributes an item, vectors of the default encoders' widths."
    catalogue, generator = toy_catalogue(items), torch.Generator().manual_seed(0)
    widths = {"text": 384, "image": 1280, "number": 42}
    tables = {
        name: torch.randn(len(table), widths[name], generator=generator)
        for name, table in catalogue.tables.items()
    }
    text = {name: torch.randn(6, 384, generator=generator) for name in ("names", "types")}
    return replace(catalogue, tables=tables, reviews=torch.zeros(0, 384), **text)


def stage_1(train: Histories, old: bool, steps: int) -> tuple[Callable[[], float], int]:
    "A function that takes some steps of stage 1, and how many positions they train."
    params = read_yaml(Path(__file__).resolve().parent.parent / "params.yaml")
    form, settings = params["model"], params["pretrain"]
    encoder = EncoderConfig(**OLD_FORM) if old else EncoderConfig(**form)
    loss = LossConfig(**OLD_LOSS) if old else LossConfig(**settings["loss"])
    catalogue, events = made_up_catalogue(train.n_items), Events.of(train)
    torch.manual_seed(0)
    model = UniRec(catalogue, encoder)
    objective = Objective(model, loss, Reconstruction(catalogue, encoder) if loss.recon else None)
    if old:
        batches = training_batches(train, events, encoder.history, **OLD_BATCH, seed=0, epoch=0)
    else:
        batches = packed_batches(train, events, encoder.history, settings["batch"]["size"], 0, 0)
    objective.keep(len(batches), 1)
    batches = batches[: math.ceil(steps / objective.kept.every) * objective.kept.every]  # whole turns
    run = trainer(objective, lambda model, batch: model(batch)["loss"], batches, fused=True)

    def step() -> float:
        with sdpa_kernel([SDPBackend.MATH]):  # as training does on a CPU
            return run()

    return step, sum(int(batch["events"]) for batch in batches)


def floor_seconds(train: Histories) -> float:
    "Seconds of an epoch's matrix products at the rate that this machine's products reach now, one thread."
    positions = int((train.lengths - 1).clip(min=0).sum())
    softmax = 3 * 2 * positions * train.n_items * WIDTH  # forward, and the gradients of both sides
    trunk = 3 * 2 * positions * 2 * (4 * WIDTH**2 + 2 * 2 * WIDTH**2)  # two layers
    return (softmax + trunk) / (1e12 * measured_tflops(1.0))


def neighbour_step(threads: int, seconds: float) -> None:
    "Print the seconds of a training step on a small made-up set: run in a process of its own."
    torch.set_num_threads(threads)
    keep_memory()
    train, _ = made_up(2000, 1500)
    batches = window_batches(train, LENGTH, 64, 1, 0)(0)[:10]
    run = trainer(new_model(1500), lambda m, b: next_item_cross_entropy(m, b, False), batches, True)
    run()
    steps, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        run()
        steps += len(batches)
    print((time.perf_counter() - start) / steps)


def beside_a_neighbour(table: Table, seconds: float) -> dict[str, float]:
    "Slowdown of a step by one busy process: with threads that spin, threads that sleep, and one thread."
    cores, slowdown = os.cpu_count() or 1, {}
    for name, threads, policy in (
        ("spinning", cores, "ACTIVE"),
        ("sleeping", cores, "PASSIVE"),
        ("one thread", 1, "PASSIVE"),
    ):
        taken = {}
        for busy in (False, True):
            env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "MKL_", "GOMP_"))}
            if policy == "PASSIVE":
                env["OMP_WAIT_POLICY"] = policy
            other = subprocess.Popen([sys.executable, "-c", NEIGHBOUR]) if busy else None
            try:
                command = [sys.executable, __file__, "--neighbour-step", str(threads), str(seconds)]
                taken[busy] = float(
                    subprocess.run(command, env=env, text=True, capture_output=True, check=True).stdout
                )
            finally:
                if other:
                    other.kill()
                    other.wait()
        slowdown[name] = taken[True] / taken[False]
        row = {"alone_s": taken[False], "beside_s": taken[True]}
        table.add({"measure": "neighbour", "side": name, "threads": threads, **row})
        say(
            f"neighbour, {name}: a step takes {1e3 * taken[False]:.1f} ms alone,"
            f" {1e3 * taken[True]:.1f} ms beside a busy process"
        )
    return slowdown


def main() -> None:
    "Measure, print and write."
    parser = arguments(__doc__.split("\n\n")[0])
    parser.add_argument(
        "--prepared", type=Path, default=None, help="folder of a prepare stage, instead of made-up histories"
    )
    parser.add_argument(
        "--recbole", action="store_true", help="RecBole 1.2.1's SASRec as well, in an environment of its own"
    )
    parser.add_argument("--neighbour-step", nargs=2, default=None, help="(internal) threads and seconds")
    args = parser.parse_args()
    if args.neighbour_step:
        return neighbour_step(int(args.neighbour_step[0]), float(args.neighbour_step[1]))
    torch.set_num_threads(1)
    keep_memory()
    pairs, steps = args.pairs or (2 if args.quick else 5), 3 if args.quick else 12
    train, targets = (
        prepared(args.prepared)
        if args.prepared
        else made_up(*((500, 700) if args.quick else (22_363, 12_101)))
    )
    positions = int((train.lengths - 1).clip(min=0).sum())
    table = Table(
        "training", folder(args), what=__doc__, quick=args.quick, users=len(train), items=train.n_items
    )
    table.facts |= {
        "events": len(train.items),
        "made_up": args.prepared is None,
        "gradient_difference": same_gradients(train),
    }
    sides, counts = {}, {}
    for name, loss, packed in (
        ("0.1", loss_of_0_1, False),
        ("this version", lambda m, b: next_item_cross_entropy(m, b, False), True),
    ):
        batches = window_batches(train, LENGTH, BATCH, 1, 0, packed)(0)[:steps]
        counts[name] = sum(b["events"] for b in batches)
        sides[name] = trainer(new_model(train.n_items), loss, batches, packed)
    rows = in_turn(sides, pairs)
    rates = {name: [counts[name] / row[name] for row in rows] for name in sides}
    floor = floor_seconds(train)
    for pair, row in enumerate(rows):
        for name in sides:
            rate = counts[name] / row[name]
            table.add({"measure": "training", "pair": pair, "side": name, "seconds": positions / rate})
    for name, rate in rates.items():
        say(f"SASRec, {name}: {spread(rate)} positions a second")
    ratios = [row["0.1"] / row["this version"] for row in rows]
    best = statistics.median(rates["this version"])
    model = new_model(train.n_items).eval()
    evaluated = in_turn(
        {
            "0.1": lambda: full_ranks(Scorer01(model), train, targets),
            "this version": lambda: full_ranks(SequenceScorer(model, LENGTH), train, targets),
        },
        min(pairs, 3),
    )
    for pair, row in enumerate(evaluated):
        for name in sides:
            table.add({"measure": "evaluation", "pair": pair, "side": name, "seconds": row[name]})
            say(f"evaluation, {name}: {row[name]:.2f} s for {len(train):,} users, {train.n_items:,} items")
    forms = {"0.1's form": stage_1(train, True, steps), "this version": stage_1(train, False, steps)}
    stages = in_turn({name: run for name, (run, _) in forms.items()}, min(pairs, 3))
    for pair, row in enumerate(stages):
        for name, (_, trained) in forms.items():
            seconds = positions * row[name] / trained
            table.add({"measure": "stage 1", "pair": pair, "side": name, "seconds": seconds})
            say(f"UniRec, stage 1, {name}: {trained / row[name]:,.0f} positions a second")
    table.facts |= {
        "sasrec_vs_0.1": statistics.median(ratios),
        "unirec_stage1_vs_0.1": statistics.median(
            (r["0.1's form"] / forms["0.1's form"][1]) / (r["this version"] / forms["this version"][1])
            for r in stages
        ),
        "positions": positions,
        "floor_seconds": floor,
        "share_of_floor": floor / (positions / best),
        "evaluation_vs_0.1": statistics.median(r["0.1"] / r["this version"] for r in evaluated),
        "neighbour": beside_a_neighbour(table, 1.0 if args.quick else 6.0),
    }
    if args.recbole:
        rate = measure(np.repeat(np.arange(len(train)), train.lengths).tolist(), train.items.tolist(), steps)
        table.add({"measure": "training", "pair": 0, "side": "recbole", "seconds": positions / rate})
        table.facts["sasrec_vs_recbole"] = best / rate
        say(f"SASRec, RecBole 1.2.1: {rate:,.0f} positions a second")
    table.add()
    say(json.dumps({k: v for k, v in table.facts.items() if k != "what"}, indent=1))


if __name__ == "__main__":
    main()
