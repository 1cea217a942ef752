"""How a stage-1 training step grows: history, attributes, item tokens, user tokens and candidates in the
loss, on made-up vectors, with the count of operations beside the time."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.side_by_side import ROOT, Table, arguments, folder, memory, say
from unirec.core.device import keep_memory
from unirec.core.params import read_params
from unirec.data.histories import Histories
from unirec.encoders.catalogue import Catalogue
from unirec.model.events import Events, training_batches
from unirec.model.hierarchy import EncoderConfig
from unirec.model.recommender import UniRec
from unirec.training.objective import LossConfig, step_loss

TEXT, NUMBER = 384, 42  # widths of the mini profile's text vectors and of the Fourier features
DEFAULTS = {
    "history": 50,
    "attributes": 14,
    "item_tokens": 4,
    "user_tokens": 4,
    "candidates": 1000,
    "softmax": "exact",
}
AXES = {
    "history": (10, 50, 200),
    "attributes": (4, 14, 50),
    "item_tokens": (1, 4, 16),
    "user_tokens": (1, 4, 16),
    "candidates": (1_000, 10_000, 100_000),
}
BUDGET = 30  # seconds of one case, above which it is not repeated more than three times


def catalogue(items: int, attributes: int, seed: int = 0) -> Catalogue:
    """Synthetic: half of the attributes text, the others numbers, random vectors.

    At most 5,000 distinct texts, so that 100,000 items fit.
    """
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g)

    texts, numbers, half = min(5_000, 2 * items), 256, (attributes + 1) // 2

    def pick(n, count):
        return torch.randint(n, (items, count), generator=g)

    ids = texts + numbers + torch.arange(items)[:, None]
    value = torch.cat([pick(texts, half), texts + pick(numbers, attributes - half), ids], 1)
    mask = torch.rand(items, attributes + 1, generator=g) >= 0.3
    mask[:, 0] = True
    encoder = torch.tensor([0] * half + [2] * (attributes - half) + [3])
    tables = {"text": draw(texts, TEXT), "image": torch.zeros(0, 1), "number": draw(numbers, NUMBER)}
    return Catalogue(
        tables,
        torch.arange(attributes + 1).expand(items, -1).clone(),
        value,
        mask,
        draw(attributes + 1, TEXT),
        draw(attributes + 1, TEXT),
        encoder,
        torch.ones(items, dtype=torch.bool),
        torch.zeros(0, TEXT),
        [*(f"attribute {i}" for i in range(attributes)), "item_id"],
    )


def histories(users: int, length: int, items: int, seed: int = 0) -> Histories:
    "Synthetic: every user has the same number of events, items drawn uniformly, a day apart."
    rng, events = np.random.default_rng(seed), users * length
    times = np.tile(np.arange(length, dtype=np.int64), users) * 86_400_000
    return Histories(
        np.arange(users + 1, dtype=np.int64) * length,
        rng.integers(items, size=events),
        times,
        rng.integers(1, 6, events).astype(np.float32),
        np.full(events, -1, np.int64),
        items,
    )


def build(case: dict, model: dict, size: int, positions: int, negatives: int) -> Callable[[], None]:
    "Forward, backward and AdamW of one stage-1 batch (next-item InfoNCE, no LLM)."
    keep_memory()
    torch.manual_seed(0)
    c = catalogue(case["candidates"], case["attributes"])
    net = UniRec(c, EncoderConfig(**model | {k: case[k] for k in ("history", "item_tokens", "user_tokens")}))
    h = histories(size, case["history"] + 1, len(c))
    batch = training_batches(h, Events.of(h), case["history"], positions, size, 0, 0)[0]
    loss = LossConfig(softmax="full" if case["softmax"] == "exact" else "sampled", negatives=negatives)
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3)
    net.train()

    def run() -> None:
        optimiser.zero_grad(set_to_none=True)
        # as unirec.training.objective.train on a CPU
        with sdpa_kernel([SDPBackend.MATH]):
            step_loss(net, batch, loss)["loss"].backward()
        optimiser.step()

    return run


def operations(run: Callable[[], None]) -> int:
    "Floating point operations of the matrix products of one run, forward and backward."
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def cases(axes: dict[str, tuple]) -> list[tuple[str, int, dict]]:
    "(axis, value, all settings): one setting away from the defaults; candidates with both kinds of softmax."
    out = [
        (axis, value, DEFAULTS | {axis: value})
        for axis, values in axes.items()
        if axis != "candidates"
        for value in values
    ]
    return out + [
        ("candidates", n, DEFAULTS | {"candidates": n, "softmax": kind})
        for n in axes["candidates"]
        for kind in ("exact", "sampled")
    ]


def measure(
    table: Table, model: dict, size: int, positions: int, negatives: int, axes: dict[str, tuple], repeats: int
) -> pd.DataFrame:
    "One row a case, and one a repeat."
    keep_memory()
    for axis, value, case in cases(axes):
        used = memory(build, case, model, size, positions, negatives, runs=1)
        run = build(case, model, size, positions, negatives)
        count, seconds = operations(run), []
        while len(seconds) < repeats and (len(seconds) < 3 or sum(seconds) < BUDGET):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        median = float(np.median(seconds))
        what = (
            f"{case['softmax']} softmax over {case['candidates']} items"
            if axis == "candidates"
            else axis.replace("_", " ")
        )
        table.add(
            {
                "axis": axis,
                "value": value,
                "what": what,
                "softmax": case["softmax"],
                "repeats": len(seconds),
                "seconds": median,
                "fastest": min(seconds),
                "slowest": max(seconds),
                **used,
                "operations": count,
                "gflop_per_s": count / median / 1e9,
                "all_seconds": " ".join(f"{s:.4f}" for s in seconds),
            }
        )
        say(
            f"{axis:12s} {value:7d} {case['softmax']:8s} {median:7.3f} s  {used['memory_mb']:6.0f} MB "
            f" {count / 1e9:8.1f} Gflop  {count / median / 1e9:5.1f} Gflop/s"
        )
        del run
    return pd.DataFrame(table.rows)


def main() -> None:
    "Command line."
    args = arguments(__doc__).parse_args()
    params = read_params(ROOT)
    p, axes = (
        params["pretrain"],
        (
            {
                "history": (5, 10),
                "attributes": (2, 4),
                "item_tokens": (1, 2),
                "user_tokens": (1, 2),
                "candidates": (100, 1_000),
            }
            if args.quick
            else AXES
        ),
    )
    size, positions = (4, 2) if args.quick else (p["batch"]["size"], p["batch"]["positions"])
    table = Table(
        "growth",
        folder(args),
        quick=args.quick,
        data="synthetic: random vectors, random histories",
        defaults=DEFAULTS,
        model=params["model"],
        size=size,
        positions=positions,
        negatives=p["loss"]["negatives"],
        what=(
            "forward + backward + AdamW of one stage-1 step (next-item InfoNCE, float32, no LLM); one setting"
            " changed at a time; operations: of matrix products, counted by torch.utils.flop_counter; memory"
            " in a fresh process, above the imports"
        ),
    )
    columns = ["axis", "value", "what", "seconds", "memory_mb", "operations", "gflop_per_s"]
    say(
        measure(
            table,
            params["model"],
            size,
            positions,
            p["loss"]["negatives"],
            axes,
            args.pairs or (2 if args.quick else 9),
        )[columns].to_string(index=False, float_format="%.4g")
    )


if __name__ == "__main__":
    main()
