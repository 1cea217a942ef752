"""A small real model in processes of its own that are killed or share a batch: for test_training.py.

`python tests/train_toy.py '{"name": [{...}, {...}]}'` runs each name's attempts one after the other, each in
a forked process (imports are paid once); under `accelerate launch` all run in the launched processes.
The keys of an attempt are `train`'s arguments. Printed as JSON: how each attempt ended, 0 or minus the
signal.
"""

import json
import os
import signal
import sys
from pathlib import Path

import accelerate  # noqa: F401  before the fork, as all that takes long
import numpy as np
import pandas as pd
import torch
import torch._dynamo  # noqa: F401  the optimiser imports it
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from unirec.data.histories import Histories
from unirec.encoders.catalogue import toy_catalogue
from unirec.evaluation.metrics import validation_figures
from unirec.model.events import Events, training_batches
from unirec.model.hierarchy import EncoderConfig, Reconstruction
from unirec.model.losses import info_nce
from unirec.model.recommender import UniRec
from unirec.training import loop as training
from unirec.training import resume
from unirec.training.step import shard

HISTORY = 6
CONFIG = {"epochs": 3, "lr": 3e-3, "patience": 3, "seed": 5}


def histories(users: int = 9, n_items: int = 12) -> tuple[Histories, np.ndarray]:
    "Made-up histories of 3 to 12 events, and a valid item for each user."
    rng = np.random.default_rng(0)
    rows = [
        (u, int(i), (20_000 + t) * 86_400_000, 4.0)
        for u in range(users)
        for t, i in enumerate(rng.integers(0, n_items, rng.integers(3, 13)))
    ]
    return Histories.from_frame(
        pd.DataFrame(rows, columns=["user", "item", "timestamp", "rating"]), users, n_items
    ), rng.integers(0, n_items, users)


def epoch_batches(epoch: int, size: int = 5) -> list[dict]:
    """Six batches of five rows, an odd number, and the last of one, fewer than two processes have.

    `ids` are 100 times the batch's number, plus the row.
    """
    h, _ = histories()
    batches = [
        b
        for b in training_batches(h, Events.of(h), HISTORY, 3, size, CONFIG["seed"], epoch, steps=20)
        if len(b["items"]) == size
    ][:6]
    batches[-1] = shard(batches[-1], 0, size)
    return [
        b | {"ids": 100 * n + torch.arange(len(b["items"])), "tokens": b["present"].sum()}
        for n, b in enumerate(batches)
    ]


def build(dropout: float) -> torch.nn.ModuleDict:
    "Stage 1: a UniRec without LLM, and the reconstruction head."
    torch.manual_seed(3)
    catalogue = toy_catalogue(12)
    encoder = EncoderConfig(
        width=16,
        out=16,
        layers=1,
        heads=2,
        item_tokens=2,
        user_tokens=2,
        dropout=dropout,
        history=HISTORY,
        attribute_dropout=dropout,
        again=False,
    )
    return torch.nn.ModuleDict(
        {"model": UniRec(catalogue, encoder), "recon": Reconstruction(catalogue, encoder)}
    )


def loss(whole: torch.nn.ModuleDict, batch: dict) -> dict:
    "Next item, exactly, and the reconstruction of all items, which does not depend on the batch."
    model, wanted = whole["model"], batch["positions"] >= 0
    tokens = model.items(model.catalogue)
    following = info_nce(
        model.query(tokens, batch)[wanted],
        model.items.embed(tokens),
        batch["targets"][wanted],
        model.temperature(),
    )
    recon = whole["recon"](model.catalogue, tokens, torch.arange(len(tokens)))
    return {"loss": following + recon, "next_item": following, "recon": recon, "shared": recon}


def die(*_) -> None:
    "What kill -9 does."
    os.kill(os.getpid(), signal.SIGKILL)


def train(
    out: str,  # weights (of this process) and log go here
    dropout: float = 0.0,
    state: str | None = None,
    key: str = "toy",
    kill_batch: int = 0,  # killed when it computes the loss of its n-th batch
    kill_write: int = 0,  # killed when its n-th state is written and not yet in place
    torn: bool = False,  # ... of which half is on the disk
    stop_batch: int = 0,  # as kill_batch, by an exception: all processes stop there and live on
    bad: int | None = None,  # the row whose loss is NaN
    count_start: bool = False,
    batches=epoch_batches,
    **config,
) -> tuple[torch.nn.ModuleDict, list[dict]]:
    "One run of the loop."
    torch.set_num_threads(1)
    h, targets = histories()
    calls = {"loss": 0, "write": 0}

    def counted(whole, batch):
        calls["loss"] += 1
        if calls["loss"] == kill_batch:
            die()
        if calls["loss"] == stop_batch:
            raise KeyboardInterrupt
        parts = loss(whole, batch)
        return (
            parts
            if bad is None
            else parts | {"loss": torch.where((batch["ids"] == bad).any(), torch.nan, parts["loss"])}
        )

    def replace(source, target):
        calls["write"] += 1
        if calls["write"] == kill_write:
            if torn:
                os.truncate(source, os.path.getsize(source) // 2)
            die()
        os.rename(source, target)

    if kill_write:
        resume.os.replace = replace
    whole = build(dropout)

    def validate(m):
        return validation_figures(m["model"].scorer(), h, targets)

    log = training.fit(
        whole,
        batches,
        counted,
        validate,
        training.FitConfig(**CONFIG | config),
        desc="toy",
        count_start=count_start,
        state=Path(state) if state else None,
        key=key,
    )
    if out:
        rank = os.environ.get("RANK", "0")
        save_file({n: t.contiguous() for n, t in whole.state_dict().items()}, f"{out}.{rank}.safetensors")
        Path(f"{out}.{rank}.json").write_text(json.dumps(log))
    return whole, log


def forked(attempt: dict) -> int:
    "Run in a process of its own, stderr in a file; returns 0 or minus the signal that ended it."
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with open(f"{attempt['out']}.err", "a") as err:
                os.dup2(err.fileno(), 2)
            train(**attempt)
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status)


def launched(attempt: dict) -> int:
    "Run in this process; a loss that is not finite is written down, an interruption ends the attempt only."
    try:
        train(**attempt)
    except KeyboardInterrupt:
        return 2
    except FloatingPointError as e:
        Path(f"{attempt['out']}.{os.environ['RANK']}.error").write_text(str(e))
    return 0


if __name__ == "__main__":
    run = launched if "RANK" in os.environ else forked
    codes = {name: [run(a) for a in attempts] for name, attempts in json.loads(sys.argv[1]).items()}
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(codes))
