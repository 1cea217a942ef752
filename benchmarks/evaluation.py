"""The evaluation: exact ranks over the whole catalogue for all users in batches, against one user at a
time, from given query vectors and with the model on both sides; its peak memory; and the share of a
real evaluation that ranking takes."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.growth import catalogue, histories
from benchmarks.side_by_side import ROOT, Table, arguments, folder, in_turn, memory, say, spread
from unirec.core.params import read_params
from unirec.data.histories import Histories
from unirec.data.schema import SetSpec
from unirec.encoders.catalogue import load
from unirec.evaluation.metrics import candidate_ranks, expected_ranks, full_ranks, ranks
from unirec.model.events import Events, last_batches
from unirec.model.hierarchy import EncoderConfig
from unirec.model.llm import LLMConfig
from unirec.model.recommender import UniRec, pack

SIZE = {"users": 20_000, "items": 20_000, "width": 64, "history": 50, "candidates": 100}
SLOW = 500  # users of the loop over the whole catalogue: its rate does not depend on their number
# users of an evaluation with the language model, so that what is done once, the catalogue's encoding, is
# shared by many
WITH_LLM = 512
PADDED = 512  # tokens of every prompt of the released code
LOOP = 100  # users of the loop with the model in it


def data(users: int, items: int, width: int, history: int, candidates: int, seed: int = 0) -> dict:
    "Made up: query and item vectors, histories, a target and a list of candidates for each user."
    g, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    # column 0 is the target
    drawn = np.stack([rng.choice(items, candidates, replace=False) for _ in range(users)])
    return {
        "queries": torch.randn(users, width, generator=g),
        "vectors": torch.randn(items, width, generator=g),
        "histories": histories(users, history, items, seed),
        "candidates": drawn,
        "targets": drawn[:, 0].copy(),
    }


def scorer(d: dict) -> Callable:
    "The scores of a batch of users: one matrix product."
    return lambda h, users: d["queries"][users] @ d["vectors"].T


@torch.no_grad()
def one_at_a_time(queries: torch.Tensor, vectors: torch.Tensor, candidates: torch.Tensor) -> list[int]:
    """The released way: a Python loop over users, each with the vectors of its candidates.

    Sort, and look where the first one went.
    """
    found = []
    for u in range(len(queries)):
        scores = vectors[candidates[u]] @ queries[u]
        order = torch.argsort(scores, descending=True)
        found.append((order == 0).nonzero().item() + 1)
    return found


@torch.no_grad()
def one_at_a_time_full(
    queries: torch.Tensor, vectors: torch.Tensor, h: Histories, targets: torch.Tensor
) -> list[int]:
    "The same loop over the whole catalogue without the history: what we compute, the released way."
    found, had = [], torch.as_tensor(h.items)
    for u in range(len(queries)):
        scores = vectors @ queries[u]
        mine = had[h.offsets[u] : h.offsets[u + 1]]
        if targets[u] not in mine:  # where the user takes an item again, nothing is left out
            scores[mine] = -torch.inf
        order = torch.argsort(scores, descending=True)
        found.append((order == targets[u]).nonzero().item() + 1)
    return found


def lists_in_batches(
    queries: torch.Tensor, vectors: torch.Tensor, candidates: torch.Tensor, batch: int = 256
) -> np.ndarray:
    "The loop's question, lists of candidates and nothing else, for a batch of users at a time."
    parts = zip(queries.split(batch), candidates.split(batch))
    return np.concatenate(
        [
            expected_ranks(torch.bmm(vectors[c], q[:, :, None])[..., 0], np.zeros(len(q), np.int64))
            for q, c in parts
        ]
    )


def sides(d: dict, slow: int) -> dict[str, Callable]:
    "What is timed: name -> one run."
    first, h, candidates, targets = (
        d["queries"][:slow],
        d["histories"],
        torch.as_tensor(d["candidates"]),
        torch.as_tensor(d["targets"]),
    )
    return {
        "full": lambda: full_ranks(scorer(d), h, d["targets"]),
        "full_and_sampled": lambda: ranks(scorer(d), h, d["targets"], d["candidates"]),
        "sampled": lambda: lists_in_batches(d["queries"], d["vectors"], candidates),
        "loop_sampled": lambda: one_at_a_time(d["queries"], d["vectors"], candidates),
        "loop_full": lambda: one_at_a_time_full(first, d["vectors"], h, targets),
    }


def agreement(d: dict, slow: int) -> dict[str, float]:
    """Share of users with the same rank on both sides.

    A matrix product and a single one differ in the last bit, so two scores may change places.
    """
    run, first, protocol = sides(d, slow), slice(slow), f"sampled{d['candidates'].shape[1]}"
    ours = run["full_and_sampled"]()
    same = {
        "sampled": float((ours[protocol] == run["loop_sampled"]()).mean()),
        "full": float((ours["full"][first] == run["loop_full"]()).mean()),
    }
    same["sampled"] = min(same["sampled"], float((run["sampled"]() == run["loop_sampled"]()).mean()))
    if min(same.values()) < 0.95:
        raise RuntimeError(f"not the same computation: the shares of equal ranks are {same}")
    return same


def build(size: dict) -> Callable[[], object]:
    "Data and one run of all exact ranks, for the child that measures memory."
    d = data(**size)
    return lambda: full_ranks(scorer(d), d["histories"], d["targets"])


def some(h: Histories, users: int) -> Histories:
    "The first users."
    events = int(h.offsets[: users + 1][-1])
    return Histories(
        h.offsets[: users + 1],
        *(x[:events] for x in (h.items, h.times, h.ratings, h.reviews)),
        n_items=h.n_items,
    )


def share(net: UniRec, h: Histories, targets: np.ndarray, with_llm: bool) -> dict[str, float]:
    "Seconds of an evaluation in the scorer and outside of it."
    inner, spent = net.scorer(with_llm=with_llm), []

    def timed(histories, users):
        start = time.perf_counter()
        out = inner(histories, users)
        spent.append(time.perf_counter() - start)
        return out

    start = time.perf_counter()
    full_ranks(timed, h, targets)
    total = time.perf_counter() - start
    return {
        "users": len(h),
        "items": h.n_items,
        "seconds": total,
        "scorer_seconds": sum(spent),
        "share": 1 - sum(spent) / total,
    }


def padded_query(
    net: UniRec, tokens: torch.Tensor, batch: dict, vectors: torch.Tensor, length: int
) -> torch.Tensor:  # (out,)
    """What `net.query` computes for one user, from a prompt that is padded to `length` tokens, as the
    released code pads every prompt."""
    history = tokens[batch["items"]]
    users = net.users(net.catalogue, history, batch)
    x = pack(net.llm.prompt, *net.llm.pieces(history, users))
    n = x.shape[1]
    there = (torch.arange(length) < n)[None]
    spoken = net.llm.read(
        net.llm.states(F.pad(x, (0, 0, 0, length - n)), there.long(), torch.arange(length)[None])[:, n - 1]
    )
    pooled = net.users.pool(users, vectors[batch["items"]] if net.config.recent else None, batch)[0, 0]
    return F.normalize(pooled + net.gate * spoken[0], dim=-1)


@torch.no_grad()
def loop_with_model(
    net: UniRec, h: Histories, candidates: np.ndarray, with_llm: bool, length: int = 0
) -> list[int]:
    """The released way with the model in it: for each user its history's items and its candidates are
    encoded, one prompt (padded to `length`) is read, the candidates are sorted; column 0 is the target."""
    net.eval()
    events, found = Events.of(h), []
    for u in range(len(h)):
        (batch,) = last_batches(h, events, net.config.history, np.array([u]))
        listed, place = torch.cat([torch.as_tensor(candidates[u]), batch["items"].flatten()]).unique(
            return_inverse=True
        )
        tokens = net.items(net.catalogue, listed)
        vectors, n = net.items.embed(tokens), candidates.shape[1]
        batch = batch | {"items": place[n:].view_as(batch["items"])}
        query = (
            padded_query(net, tokens, batch, vectors, length)
            if length
            else net.query(tokens, batch, with_llm, vectors)[0, 0]
        )
        order = torch.argsort(vectors[place[:n]] @ query, descending=True)
        found.append((order == 0).nonzero().item() + 1)
    return found


def end_to_end(
    net: UniRec, h: Histories, targets: np.ndarray, with_llm: bool, pairs: int, slow: int
) -> list[dict]:
    """Users a second with the model on both sides: all ranks over the whole catalogue, items encoded once
    and users in batches, against one user at a time over 100 candidates."""
    users, rng = len(h), np.random.default_rng(0)
    others = np.stack(
        [rng.choice(h.n_items - 1, SIZE["candidates"] - 1, replace=False) for _ in range(users)]
    )
    # any items but the target
    drawn = np.concatenate([targets[:, None], others + (others >= targets[:, None])], 1)
    few = some(h, min(slow, users))
    sides = {
        "full": lambda: full_ranks(net.scorer(with_llm=with_llm), h, targets),
        "loop": lambda: loop_with_model(net, few, drawn, with_llm),
    }
    if with_llm:
        sides["padded loop"] = lambda: loop_with_model(net, few, drawn, with_llm, PADDED)
    ours = candidate_ranks(net.scorer(with_llm=with_llm), few, drawn[: len(few)])
    # a batch and a single prompt differ in the last bits: neighbours may change places
    same = min(
        float((abs(np.array(run()) - ours) <= 1).mean()) for side, run in sides.items() if side != "full"
    )
    if same < 0.95:
        raise RuntimeError(
            f"not the same computation: the share of equal ranks, give or take one, is {same:.2f}"
        )
    return [
        {
            "measure": "end to end",
            "side": f"{side}, {'with' if with_llm else 'without'} LLM",
            "pair": pair,
            "users": (n := users if side == "full" else len(few)),
            "items": h.n_items if side == "full" else SIZE["candidates"],
            "seconds": s,
            "users_per_s": n / s,
            "same_sampled": same,
        }
        for pair, both in enumerate(in_turn(sides, pairs))
        for side, s in both.items()
    ]


def models(params: dict, quick: bool):
    "(name, model, histories, targets) of real evaluations; weights are fresh, time does not depend on them."
    # a closed gate: the LLM would not be asked
    encoder, llm = EncoderConfig(**params["model"]), LLMConfig(**params["llm"] | {"gate": 0.1})
    at, n_users, n_items = (
        ("prepared", "embeddings"),
        *((64, 500) if quick else (SIZE["users"], SIZE["items"])),
    )
    if all((ROOT / a / "movielens").exists() for a in at):
        d = load(
            *(ROOT / a / "movielens" for a in at),
            SetSpec.from_params("movielens", params["sets"]["movielens"]),
        )
        yield "movielens", UniRec(d.catalogue, encoder, llm), d.train, d.valid_targets
    else:
        say(
            "prepared/movielens or embeddings/movielens is missing: `dvc repro embed@movielens` makes them;"
            " measured without"
        )
    c = catalogue(n_items, 14)
    yield (
        "made-up vectors",
        UniRec(c, encoder, llm),
        histories(n_users, 50, n_items),
        np.random.default_rng(1).integers(n_items, size=n_users),
    )


def measure(table: Table, size: dict, slow: int, pairs: int, real, repeats: int) -> pd.DataFrame:
    "Rows of speed, memory and share."
    d = data(**size)
    same = agreement(d, slow)
    for pair, seconds in enumerate(in_turn(sides(d, slow), pairs)):
        for side, s in seconds.items():
            users, ranked = (
                slow if side == "loop_full" else size["users"],
                size["candidates"] if side in ("sampled", "loop_sampled") else size["items"],
            )
            table.add(
                {
                    "measure": "time",
                    "side": side,
                    "pair": pair,
                    "users": users,
                    "items": ranked,
                    "seconds": s,
                    "users_per_s": users / s,
                    "scores_per_s": users * ranked / s,
                    "same_sampled": same["sampled"],
                    "same_full": same["full"],
                }
            )
    table.add(
        {
            "measure": "memory",
            "side": "full",
            "users": size["users"],
            "items": size["items"],
            **memory(build, size, runs=1),
        }
    )
    for name, net, h, targets in real:
        for with_llm in (True, False):
            short = (some(h, WITH_LLM), targets[:WITH_LLM]) if with_llm else (h, targets)
            for row in end_to_end(net, *short, with_llm, repeats, WITH_LLM // 16 if with_llm else LOOP):
                table.add(row | {"model": name})
            for repeat in range(1 if with_llm else repeats):
                table.add(
                    {
                        "measure": "share",
                        "side": f"{name}, {'with' if with_llm else 'without'} LLM",
                        "pair": repeat,
                        **share(net, *short, with_llm),
                    }
                )
    return pd.DataFrame(table.rows)


def main() -> None:
    "Command line."
    args = arguments(__doc__).parse_args()
    params = read_params(ROOT)
    size, slow = (SIZE | {"users": 500, "items": 1_000}, 50) if args.quick else (SIZE, SLOW)
    table = Table(
        "evaluation",
        folder(args),
        quick=args.quick,
        size=size,
        model=params["model"],
        llm=params["llm"],
        data=(
            "made up: random vectors and histories; share: real MovieLens-100k histories and triplets, and"
            " made-up ones"
        ),
        what=(
            "full: exact ranks over the whole catalogue in batches; full_and_sampled: those and the lists of"
            " 100; sampled: the lists of 100 alone, in batches; loop_sampled: one user at a time over 100"
            " candidates; loop_full: one user at a time over the whole catalogue; scores by a product of"
            " query and item vectors; end to end: the model on both sides, the loop encodes each user's"
            " history and candidates and reads one prompt at a time, the padded loop one of 512 tokens, as"
            " the released code does; share: of an evaluation's time that is spent outside the model's"
            " scorer; memory in a fresh process, above the imports"
        ),
    )
    rows = measure(
        table,
        size,
        slow,
        args.pairs or (2 if args.quick else 7),
        models(params, args.quick),
        1 if args.quick else 3,
    )
    rate = rows[rows.measure == "time"].pivot(index="pair", columns="side", values="users_per_s")
    for side in rate:
        say(
            f"{side:18s} {spread(rate[side])} users/s; {spread(rate[side] / rate.loop_sampled)} times the"
            " loop over 100 candidates"
        )
    for name, part in rows[rows.measure == "end to end"].groupby("model", sort=False):
        rate = part.pivot(index="pair", columns="side", values="users_per_s")
        for loop in rate.columns[rate.columns.str.contains("loop")]:
            full = f"full, {loop.partition(', ')[2]}"
            say(
                f"{name}, {full}: {spread(rate[full])} users/s over the whole catalogue,"
                f" {spread(rate[full] / rate[loop])} times {loop}, over 100 candidates"
            )
    say(rows[rows.measure == "memory"][["memory_mb", "step_mb"]].to_string(index=False))
    say(rows[rows.measure == "share"][["side", "users", "items", "seconds", "share"]].to_string(index=False))


if __name__ == "__main__":
    main()
