"""A training step of our Q-Former against transformers' Blip2QFormerModel: same weights, same data, same
shapes, in turn."""

import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from benchmarks.side_by_side import Table, arguments, folder, in_turn, memory, say, spread
from unirec.core.device import keep_memory
from unirec.model.qformer import QFormer, QFormerConfig, load_blip2

SHAPE = {"width": 1024, "layers": 12, "heads": 16, "cross_every": 2}  # the released code's
ATTRIBUTES, QUERIES, MISSING = 14, 4, 0.3
OPPONENTS = ("eager", "sdpa")  # transformers' attention implementations that run on a CPU


def ours_and_theirs(dropout: float, shape: dict = SHAPE) -> tuple[QFormer, Blip2QFormerModel]:
    "Both, with the same weights, in training mode."
    torch.manual_seed(0)
    ours, theirs = our_model(dropout, shape), their_model(dropout, shape)
    load_blip2(ours, theirs.state_dict())
    return ours, theirs


def our_model(dropout: float, shape: dict = SHAPE) -> QFormer:
    "Ours, in training mode."
    return QFormer(
        QFormerConfig(
            shape["width"],
            shape["width"],
            shape["layers"],
            shape["heads"],
            QUERIES,
            shape["cross_every"],
            dropout=dropout,
        )
    ).train()


def their_model(dropout: float, shape: dict = SHAPE) -> Blip2QFormerModel:
    "Transformers' model, in training mode; it drops attention weights too."
    return Blip2QFormerModel(
        Blip2QFormerConfig(
            hidden_size=shape["width"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            intermediate_size=4 * shape["width"],
            cross_attention_frequency=shape["cross_every"],
            encoder_hidden_size=shape["width"],
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    ).train()


def data(batch: int, missing: float, learned: bool, width: int) -> tuple[Tensor, Tensor | None, Tensor]:
    "Triplets (B, A, D), which of them are there (B, A; None: all), and the weights of the loss (B, K, D)."
    g = torch.Generator().manual_seed(batch)
    memory, weights = (
        torch.randn(batch, ATTRIBUTES, width, generator=g),
        torch.randn(batch, QUERIES, width, generator=g),
    )
    mask = torch.rand(batch, ATTRIBUTES, generator=g) >= missing
    mask[:, 0] = True  # a product has a title
    return memory.requires_grad_(learned), mask if missing else None, weights / batch


def step_ours(net: QFormer, memory: Tensor, mask: Tensor | None, weights: Tensor) -> Callable[[], Tensor]:
    "Forward and backward of ours."

    def run() -> Tensor:
        net.zero_grad(set_to_none=True)
        memory.grad = None
        out = net(memory, mask)[:, 0]
        (out * weights).sum().backward()
        return out

    return run


def step_theirs(
    net: Blip2QFormerModel,
    queries: Tensor,
    memory: Tensor,
    mask: Tensor | None,
    weights: Tensor,
    attention: str,
) -> Callable[[], Tensor]:
    "Forward and backward of transformers' model; the queries (1, K, D) are a parameter, as in Blip2Model."

    def run() -> Tensor:
        net.zero_grad(set_to_none=True)
        queries.grad = memory.grad = None
        net.config._attn_implementation = attention
        out = net(
            query_embeds=queries.expand(len(memory), -1, -1),
            encoder_hidden_states=memory,
            encoder_attention_mask=mask,
        ).last_hidden_state
        (out * weights).sum().backward()
        return out

    return run


def difference(a: Tensor, b: Tensor) -> float:
    "Largest difference over the largest value."
    return ((a - b).abs().max() / b.abs().max()).item()


def agreement(
    ours: QFormer, theirs: Blip2QFormerModel, queries: Tensor, inputs: tuple, attention: str
) -> dict[str, float]:
    """Do both compute the same, dropout off? Outputs, and the gradients of queries, one weight and the
    triplets."""
    got = []
    for net, step in (
        (ours, step_ours(ours, *inputs)),
        (theirs, step_theirs(theirs, queries, *inputs, attention)),
    ):
        net.eval()
        out = step().detach()
        net.train()
        weight = (
            ours.layers[0].up.weight
            if net is ours
            else theirs.encoder.layer[0].intermediate_query.dense.weight
        )
        got.append(
            [out, ours.queries.grad if net is ours else queries.grad[0], weight.grad]
            + ([inputs[0].grad] if inputs[0].requires_grad else [])
        )
    out, *gradients = [difference(a, b) for a, b in zip(*got)]
    if max(out, *gradients) > 1e-3:
        raise RuntimeError(
            f"not the same computation: outputs differ by {out:.1e}, gradients by {max(gradients):.1e}"
        )
    return {"output_difference": out, "gradient_difference": max(gradients)}


def build(side: str, batch: int, missing: float, dropout: float, shape: dict = SHAPE) -> Callable[[], Tensor]:
    "One side alone, for the measurement of memory."
    keep_memory()
    torch.manual_seed(0)
    inputs = data(batch, missing, True, shape["width"])
    if side == "ours":
        return step_ours(our_model(dropout, shape), *inputs)
    return step_theirs(
        their_model(dropout, shape),
        torch.nn.Parameter(torch.randn(1, QUERIES, shape["width"])),
        *inputs,
        side,
    )


def measure(
    table: Table,
    shape: dict,
    cases: list[tuple[int, float, float, bool]],  # (batch, missing, dropout, learned)
    pairs: dict[int, int],
    memory_at: tuple[int, ...] = (),
) -> pd.DataFrame:
    "All cases; every pair is a row of the table."
    for batch in memory_at:  # first: this process is still small
        for side in ("ours", *OPPONENTS):
            table.add(
                {
                    "measure": "memory",
                    "batch": batch,
                    "missing": MISSING,
                    "dropout": 0.1,
                    "memory": "learned",
                    "side": side,
                    **memory(build, side, batch, MISSING, 0.1, shape, runs=1),
                }
            )
            say(f"memory, batch {batch}, {side}: {table.rows[-1]['memory_mb']:.0f} MB")
    keep_memory()
    for dropout in sorted({c[2] for c in cases}):
        ours, theirs = ours_and_theirs(dropout, shape)
        queries = torch.nn.Parameter(ours.queries.detach()[None].clone())
        for batch, missing, _, learned in [c for c in cases if c[2] == dropout]:
            inputs = data(batch, missing, learned, shape["width"])
            sides = {
                "ours": step_ours(ours, *inputs),
                **{a: step_theirs(theirs, queries, *inputs, a) for a in OPPONENTS},
            }
            same = agreement(ours, theirs, queries, inputs, OPPONENTS[0])
            rows = in_turn(sides, pairs[batch], warmup=2 if batch <= 4 else 1)
            # transformers' faster attention is the opponent
            best = min(OPPONENTS, key=lambda a: pd.Series([r[a] for r in rows]).median())
            case = {
                "measure": "time",
                "batch": batch,
                "missing": missing,
                "dropout": dropout,
                "memory": "learned" if learned else "frozen",
                "opponent": best,
            }
            table.add(
                *(
                    {
                        **case,
                        "pair": i,
                        **{f"{k}_s": v for k, v in r.items()},
                        "ratio": r[best] / r["ours"],
                        "ours_items_per_s": batch / r["ours"],
                        "theirs_items_per_s": batch / r[best],
                        **same,
                    }
                    for i, r in enumerate(rows)
                )
            )
            say(
                f"batch {batch:3d}  missing {missing}  dropout {dropout}  {case['memory']}  ours /"
                f" transformers {best}: x{spread([r[best] / r['ours'] for r in rows])}"
            )
    return summary(pd.DataFrame(table.rows))


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    "Medians and ranges per case."
    by = rows[rows.measure == "time"].groupby(
        ["batch", "missing", "dropout", "memory", "opponent"], sort=False
    )
    return by.agg(
        pairs=("ratio", "size"),
        ours_items_per_s=("ours_items_per_s", "median"),
        theirs_items_per_s=("theirs_items_per_s", "median"),
        ratio=("ratio", "median"),
        lowest=("ratio", "min"),
        highest=("ratio", "max"),
        output_difference=("output_difference", "max"),
        gradient_difference=("gradient_difference", "max"),
    ).reset_index()


def main() -> None:
    "Command line."
    parser = arguments(__doc__)
    parser.add_argument(
        "--batches", type=int, nargs="+", default=None, help="items a step (default 1 4 16 64 256)"
    )
    args = parser.parse_args()
    shape = {"width": 128, "layers": 2, "heads": 4, "cross_every": 2} if args.quick else SHAPE
    batches = args.batches or ([1, 4, 16] if args.quick else [1, 4, 16, 64, 256])
    pairs = {b: args.pairs or (3 if args.quick or b > 16 else 5 if b > 4 else 7) for b in batches}
    cases = [
        (b, missing, dropout, True)
        for b in batches
        for dropout in (0.0, 0.1)
        for missing in (0.0, MISSING)
        if b <= 64 or missing and not dropout
    ]
    cases += [(b, MISSING, 0.0, False) for b in batches if b == 16]  # what a frozen memory changes
    table = Table(
        "qformer",
        folder(args),
        shape={**shape, "attributes": ATTRIBUTES, "queries": QUERIES, "missing": MISSING, "dtype": "float32"},
        quick=args.quick,
        what=(
            "forward + backward of one training step; `memory` learned: the triplets get a gradient, frozen:"
            " they get none; pairs are taken in turn in one process, the opponent is transformers' faster"
            " attention; memory of each side in a fresh process, above the imports"
        ),
    )
    say(
        measure(
            table, shape, cases, pairs, tuple(b for b in batches if b == (16 if args.quick else 64))
        ).to_string(index=False, float_format="%.4g")
    )


if __name__ == "__main__":
    main()
