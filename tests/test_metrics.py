"""Ranks, splits, statistics and breakdowns against slow or independent ways.

They also check that choosing a model never sees the test split.
"""

import ast
import dataclasses
import inspect
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from benchmarks import evaluation, side_by_side
from unirec.baselines.classic import markov
from unirec.data.histories import Histories
from unirec.data.schema import SetSpec
from unirec.data.splits import in_order, last_k, leave_one_out
from unirec.encoders import catalogue
from unirec.evaluation import significance
from unirec.evaluation.breakdowns import (
    by_group,
    diversity,
    gini,
    list_figures,
    retrieval,
    target_groups,
    top_lists,
)
from unirec.evaluation.metrics import (
    candidate_ranks,
    full_ranks,
    history_mask,
    last_ranks,
    random_mrr,
    ranks,
    shuffled_ranks,
    summarise,
    target_kinds,
    validation_figures,
)
from unirec.evaluation.significance import bootstrap, compare_models, holm, paired, seeds_and_users
from unirec.pipeline import evaluate
from unirec.pipeline import stages as steps
from unirec.training import objective as task
from unirec.training import resume


def histories(sequences: list[list[int]], n_items: int) -> Histories:
    "Histories out of lists of items."
    frame = pd.DataFrame(
        [(u, i, t) for u, s in enumerate(sequences) for t, i in enumerate(s)],
        columns=["user", "item", "timestamp"],
    ).astype(np.int64)
    return Histories.from_frame(frame.assign(rating=1.0), len(sequences), n_items)


def world(
    seed: int, users: int = 40, n_items: int = 30, most: int = 15
) -> tuple[Histories, np.ndarray, np.ndarray]:
    "Histories with repeats, targets of which some are in them, and scores with many ties."
    rng = np.random.default_rng(seed)
    h = histories([rng.integers(n_items, size=rng.integers(most)).tolist() for _ in range(users)], n_items)
    return h, rng.integers(n_items, size=users), rng.normal(size=(users, n_items)).round(1).astype(np.float32)


# ranks


@given(st.integers(0, 10_000))
def test_ranks_are_those_of_a_plain_loop(seed):
    h, targets, scores = world(seed)
    slow = []
    for u, target in enumerate(targets.tolist()):
        had = set(h.items[h.offsets[u] : h.offsets[u + 1]].tolist())
        left_out = set() if target in had else had
        rivals = set(range(h.n_items)) - left_out - {target}
        slow.append(
            1
            + sum(scores[u, i] > scores[u, target] for i in rivals)
            + sum(scores[u, i] == scores[u, target] for i in rivals) / 2
        )
    found = full_ranks(lambda h, users: torch.from_numpy(scores[users]), h, targets, batch=1 + seed % 50)
    assert found.tolist() == slow


def kinds_by_loop(train: Histories, h: Histories, targets: np.ndarray) -> list[str]:
    "The kind of every target, from plain sets."
    known, out = set(train.items.tolist()), []
    for u, target in enumerate(targets.tolist()):
        had = h.items[h.offsets[u] : h.offsets[u + 1]].tolist()
        out.append("repeated" if target in had else "new" if target in known else "cold")
    return out


@given(st.integers(0, 10_000))
def test_kinds_of_targets_are_those_of_a_plain_loop(seed):
    h, targets, _ = world(seed, most=6)
    train = h.first(3)
    in_train = np.bincount(train.items, minlength=h.n_items) > 0
    assert target_kinds(h, targets, in_train).tolist() == kinds_by_loop(train, h, targets)
    assert target_kinds(h, targets).tolist() == kinds_by_loop(h, h, targets)
    assert (
        target_kinds(h, targets[5:9], in_train, np.arange(5, 9)).tolist()
        == kinds_by_loop(train, h, targets)[5:9]
    )


@given(st.integers(0, 10_000))
def test_a_large_constant_on_seen_items_gains_nothing(seed):
    """New targets keep their ranks to the last bit; a repeated one is ranked among all that its user has had.

    The mask of seen items would otherwise tell which of them is the target.
    """
    h, targets, scores = world(seed)
    kinds, mask = target_kinds(h, targets), history_mask(h, np.arange(len(h)))

    def boosted(h, users):
        return scores[users] + 1000 * history_mask(h, users)

    plain, found = full_ranks(lambda h, u: scores[u], h, targets), full_ranks(boosted, h, targets)
    assert np.array_equal(found[kinds != "repeated"], plain[kinds != "repeated"])
    for u in np.flatnonzero(kinds == "repeated"):
        among = scores[u, mask[u]] - scores[u, targets[u]]  # all that the user has had, the target too
        assert found[u] == 1 + (among > 0).sum() + ((among == 0).sum() - 1) / 2


def marketplace_with_cold_items() -> tuple[Histories, Histories, np.ndarray]:
    "Train, histories and test targets of users who walk along a circle; train lacks the last four items."
    rng, users, known = np.random.default_rng(0), 400, 60
    starts = rng.integers(known, size=users)
    walks = [(start + np.arange(8)) % known for start in starts]
    train = histories([w[:6].tolist() for w in walks], known + 4)
    h = histories([w[:7].tolist() for w in walks], known + 4)
    targets = np.array([w[7] if rng.random() < 0.1 else rng.integers(known) for w in walks])
    cold = rng.random(users) < 0.4
    targets[cold] = known + rng.integers(4, size=cold.sum())
    return train, h, targets


def test_never_seen_in_train_first_does_not_beat_markov_on_the_figure():
    "The k-core over all events makes an item that train lacks a sure target; the figure pays nothing for it."
    train, h, targets = marketplace_with_cold_items()
    in_train = np.bincount(train.items, minlength=train.n_items) > 0
    kinds, chain = target_kinds(h, targets, in_train), markov(train)

    def cold_first(h, users):
        return np.asarray(chain(h, users)) + 1000 * ~in_train

    plain, trick = full_ranks(chain, h, targets), full_ranks(cold_first, h, targets)
    assert (1 / trick).mean() > (1 / plain).mean()  # over all targets it wins without knowing anything
    assert (1 / trick[kinds == "new"]).mean() < (1 / plain[kinds == "new"]).mean()
    assert (trick[kinds == "new"] >= plain[kinds == "new"]).all()


def test_validation_counts_new_and_warm_targets_alone():
    h, targets, scores = world(12)
    in_train = np.arange(h.n_items) % 3 > 0
    new = target_kinds(h, targets, in_train) == "new"
    found = validation_figures(lambda h, u: scores[u], h, targets, in_train)
    expected = summarise(full_ranks(lambda h, u: scores[u], h, targets)[new])
    assert 0 < new.sum() < len(h) and found == expected


def test_ranks_do_not_depend_on_the_order_of_items():
    h, targets, scores = world(1)
    order = np.random.default_rng(2).permutation(h.n_items)
    place = np.argsort(order)
    moved = dataclasses.replace(h, items=place[h.items])
    assert np.array_equal(
        full_ranks(lambda h, u: scores[u], h, targets),
        full_ranks(lambda h, u: scores[u][:, order], moved, place[targets]),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_scores_of_any_kind(dtype):
    h, targets, scores = world(3)
    typed = torch.from_numpy(scores * 10).to(dtype)
    assert np.array_equal(
        full_ranks(lambda h, u: typed[u], h, targets), full_ranks(lambda h, u: typed[u].double(), h, targets)
    )


def test_an_infinite_score_is_a_score_and_nan_is_an_error():
    h = histories([[3]], 4)
    assert full_ranks(lambda h, u: np.array([[-np.inf, 0.0, np.inf, 9.0]]), h, np.array([1])).tolist() == [2]
    assert full_ranks(
        lambda h, u: np.array([[-np.inf, -np.inf, np.inf, 9.0]]), h, np.array([0])
    ).tolist() == [2.5]
    with pytest.raises(ValueError, match="NaN"):
        full_ranks(lambda h, u: np.array([[0.0, 1.0, np.nan, 2.0]]), h, np.array([0]))


def test_equal_scores_are_chance():
    "By expectation the middle of the list, exactly; shuffled the MRR of a random order, on average."
    n, users = 51, 20_000
    h, targets = (
        Histories(
            np.zeros(users + 1, np.int64),
            *(np.zeros(0, t) for t in (np.int64, np.int64, np.float32, np.int64)),
            n_items=n,
        ),
        np.zeros(users, np.int64),
    )

    def equal(h, u):
        return np.zeros((len(u), n))

    assert (full_ranks(equal, h, targets) == (n + 1) / 2).all()
    assert summarise(full_ranks(equal, h, targets))["mrr"] == pytest.approx(2 / (n + 1), abs=1e-12)
    drawn = shuffled_ranks(equal, h, targets, seed=3)
    mrr, error = (1 / drawn).mean(), (1 / drawn).std() / users**0.5
    assert abs(mrr - random_mrr(n)) < 4 * error and abs(mrr - 2 / (n + 1)) > 20 * error
    # every place as likely
    assert stats.chisquare(np.bincount(drawn.astype(int), minlength=n + 1)[1:]).pvalue > 1e-3
    assert np.array_equal(drawn, shuffled_ranks(equal, h, targets, seed=3, batch=999))


def test_both_protocols_and_the_shuffled_row_are_one_pass():
    h, targets, scores = world(5, n_items=40)
    candidates = np.stack(
        [
            np.r_[t, np.random.default_rng(u).choice(np.setdiff1d(np.arange(40), [t]), 9, replace=False)]
            for u, t in enumerate(targets)
        ]
    )
    calls = []

    def scorer(h, u):
        calls.append(len(u))
        return scores[u]

    found = ranks(scorer, h, targets, candidates, batch=16, shuffle=7)
    assert calls == [16, 16, 8] and list(found) == ["full", "full_shuffled", "sampled10"]
    assert np.array_equal(found["full"], full_ranks(scorer, h, targets)) and np.array_equal(
        found["sampled10"], candidate_ranks(scorer, h, candidates)
    )
    assert np.array_equal(found["full_shuffled"], shuffled_ranks(scorer, h, targets, seed=7)) and list(
        ranks(scorer, h, targets, candidates)
    ) == ["full", "sampled10"]


def test_twenty_thousand_users_and_items_fit_in_two_gigabytes():
    used = side_by_side.memory(evaluation.build, evaluation.SIZE, runs=1)
    assert used["memory_mb"] < 2_000, used


# the evaluation's benchmark


def test_evaluation_rows(tmp_path):
    size = {"users": 60, "items": 80, "width": 8, "history": 5, "candidates": 12}
    d = evaluation.data(**size)
    same = evaluation.agreement(d, 20)
    assert (
        min(same.values()) >= 0.95
        and all(len(set(r)) == 12 for r in d["candidates"])
        and np.array_equal(d["candidates"][:, 0], d["targets"])
    )
    table = side_by_side.Table("evaluation", tmp_path)
    rows = evaluation.measure(table, size, 20, 2, [], 1)
    time = rows[rows.measure == "time"]
    assert (
        set(time.side) == {"full", "full_and_sampled", "sampled", "loop_sampled", "loop_full"}
        and len(time) == 10
    )
    assert (
        np.allclose(time.users_per_s, time.users / time.seconds)
        and (time[time.side == "loop_full"].users == 20).all()
        and (rows[rows.measure == "memory"].memory_mb > 0).all()
    )


def test_evaluation_that_computes_something_else_is_found_out(monkeypatch):
    d = evaluation.data(60, 80, 8, 5, 12)
    monkeypatch.setattr(evaluation, "one_at_a_time", lambda queries, vectors, candidates: [1] * len(queries))
    with pytest.raises(RuntimeError, match="not the same computation"):
        evaluation.agreement(d, 20)


def test_share_counts_what_is_outside_of_the_scorer():
    h, targets, scores = world(6)

    class Net:
        def scorer(self, with_llm):
            return lambda h, u: scores[u]

    row = evaluation.share(Net(), h, targets, True)
    assert (
        row["users"] == 40
        and row["items"] == 30
        and 0 < row["share"] < 1
        and row["scorer_seconds"] < row["seconds"]
    )


# last five


@given(st.integers(0, 10_000))
def test_last_k_is_that_of_a_plain_loop(seed):
    rng = np.random.default_rng(seed)
    lengths, k = rng.integers(4, 15, 6), int(rng.integers(1, 8))
    events = in_order(
        pd.DataFrame(
            [
                (u, int(rng.integers(9)), int(rng.integers(5)))
                for u, n in enumerate(lengths)
                for _ in range(n)
            ],
            columns=["user", "item", "timestamp"],
        ).astype(np.int64)
    )
    parts = last_k(events, k)
    for u, n in enumerate(lengths):
        items, m = events[events.user == u].item.tolist(), min(k, n - 3)
        mine = {p: f[f.user == u].item.tolist() for p, f in parts.items()}
        assert (
            mine == {"train": items[: n - m - 1], "valid": items[n - m - 1 : n - m], "test": items[n - m :]}
            and len(mine["train"]) >= 2
        )
    assert all(last_k(events, 1)[p].equals(leave_one_out(events)[p]) for p in parts)


def test_last_ranks_sees_what_came_before_and_nothing_else():
    rng = np.random.default_rng(0)
    events = in_order(
        pd.DataFrame(
            [(u, int(rng.integers(50)), t) for u, n in enumerate(rng.integers(4, 14, 30)) for t in range(n)],
            columns=["user", "item", "timestamp"],
        )
        .astype(np.int64)
        .assign(rating=1.0)
    )
    parts = {p: Histories.from_frame(f, 30, 50) for p, f in last_k(events).items()}
    before, scores = {}, rng.normal(size=(30, 50)).round(1)

    def scorer(h, users):
        for u in users:
            before.setdefault(int(u), []).append(h.items[h.offsets[u] : h.offsets[u + 1]].tolist())
        return scores[users]

    found = last_ranks(scorer, parts["train"].append(parts["valid"]), parts["test"], batch=7)
    assert (
        len(found) == len(parts["test"].items)
        and (found.groupby("user").position.max().to_numpy() == parts["test"].lengths).all()
    )
    for u in range(30):
        items, m = events[events.user == u].item.tolist(), int(parts["test"].lengths[u])
        assert before[u] == [items[: len(items) - m + p] for p in range(m)]
        for p in range(m):
            target, seen = items[len(items) - m + p], set(before[u][p])
            rivals = set(range(50)) - (set() if target in seen else seen) - {target}
            slow = (
                1
                + sum(scores[u, i] > scores[u, target] for i in rivals)
                + sum(scores[u, i] == scores[u, target] for i in rivals) / 2
            )
            assert found[(found.user == u) & (found.position == p + 1)]["rank"].item() == slow
    spread = bootstrap((1 / found["rank"]).to_numpy(), found.user.to_numpy())
    assert spread["mean"] == pytest.approx((1 / found["rank"]).mean())


# statistics


def former_paired(ours, theirs, draws=2000, seed=0):
    "As it stood in `unirec.experiments.runs` when the committed summaries were made."
    d = ours.mean(0) - theirs.mean(0)
    picks = np.random.default_rng(seed).integers(0, len(d), (draws, len(d)))
    low, high = np.quantile(d[picks].mean(1), [0.025, 0.975])
    p = stats.wilcoxon(d).pvalue if (d != 0).any() else 1.0
    return {
        "difference": d.mean(),
        "low": low,
        "high": high,
        "p": float(p),
        "detectable": float((stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) * d.std(ddof=1) / len(d) ** 0.5),
    }


@pytest.mark.parametrize("users", [7, 943, 6_000])
def test_paired_gives_what_it_gave(users):
    rng = np.random.default_rng(users)
    ours, theirs = (1 / rng.integers(1, 50, (3, users)) for _ in range(2))
    draws = 2000 if users < 5000 else 1000  # the largest is drawn in parts
    new, old = paired(ours, theirs, draws), former_paired(ours, theirs, draws)
    assert {k: new[k] for k in ("difference", "low", "high", "p")} == {
        k: old[k] for k in ("difference", "low", "high", "p")
    } and new["detectable"] == pytest.approx(old["detectable"], rel=1e-12)
    assert significance.paired_error is significance.paired_error


def null(rng: np.random.Generator, seeds: int, users: int, seed_sd: float) -> tuple[np.ndarray, np.ndarray]:
    """Reciprocal ranks of two models that are equally good: users in common, tastes, seeds and noise of
    their own."""
    ability = rng.normal(0, 1.5, users)

    def draw():
        return 1 / np.ceil(
            np.exp(
                np.maximum(
                    0,
                    2.5
                    - ability
                    - rng.normal(0, 0.5, users)
                    - rng.normal(0, seed_sd, (seeds, 1))
                    - rng.normal(0, 0.7, (seeds, users)),
                )
            )
        )

    return draw(), draw()


@pytest.mark.parametrize("seed_sd", [0.0, 0.1, 0.3])
def test_false_alarms_of_the_test_over_seeds_and_users(seed_sd):
    """Near 5% of equal pairs, whatever the seeds' spread.

    A test over users alone calls far more as soon as seeds matter.
    """
    rng, repeats = np.random.default_rng(int(100 * seed_sd)), 1_000
    p = np.array(
        [
            (seeds_and_users(a, b)["p"], stats.ttest_rel(a.mean(0), b.mean(0)).pvalue)
            for a, b in (null(rng, 3, 150, seed_sd) for _ in range(repeats))
        ]
    )
    both, users_only = (p < 0.05).mean(0)
    assert 0.015 < both < 0.05 + 3 * (0.05 * 0.95 / repeats) ** 0.5
    if seed_sd:
        assert users_only > 2 * both


def test_seeds_and_users_finds_a_true_difference():
    rng = np.random.default_rng(1)
    found = [
        seeds_and_users(a + 0.05, b)["p"] < 0.05 for a, b in (null(rng, 3, 400, 0.05) for _ in range(100))
    ]
    assert np.mean(found) > 0.8


def test_seeds_and_users_is_symmetric_and_scales():
    a, b = null(np.random.default_rng(2), 3, 200, 0.1)
    one, other, scaled = seeds_and_users(a, b), seeds_and_users(b, a[:2]), seeds_and_users(5 * a, 5 * b)
    assert seeds_and_users(b, a)["p"] == pytest.approx(one["p"]) and seeds_and_users(b, a)[
        "low"
    ] == pytest.approx(-one["high"])
    assert (
        scaled["p"] == pytest.approx(one["p"])
        and scaled["se"] == pytest.approx(5 * one["se"])
        and other["df"] > 1
    )
    nothing = seeds_and_users(a * 0, a[:1] * 0)
    assert nothing["p"] == 1.0 and nothing["difference"] == 0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_holm_is_the_step_down_procedure(p):
    """Rejecting adjusted p-values below alpha is walking through the sorted ones and stopping at the first
    that is too large."""
    adjusted = holm(p)
    for alpha in (0.01, 0.05, 0.2):
        walked, left = set(), len(p)
        for i in np.argsort(p, kind="stable"):
            if p[i] * left >= alpha:
                break
            walked.add(int(i))
            left -= 1
        assert set(np.flatnonzero(adjusted < alpha).tolist()) == walked
    assert (adjusted >= np.array(p)).all() and (adjusted <= 1).all()


def test_holm_keeps_false_alarms_of_a_whole_table_rare():
    p = np.random.default_rng(0).random((2_000, 12))
    assert (p.min(1) < 0.05).mean() > 0.4 and abs(
        np.mean([(holm(row) < 0.05).any() for row in p]) - 0.05
    ) < 0.02


def test_compare_models_is_repeatable_and_needs_the_same_users():
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        [
            (m, s, u, r)
            for m, n in (("a", 3), ("b", 3), ("counts", 1))
            for s in range(n)
            for u, r in enumerate(rng.integers(1, 40, 60))
        ],
        columns=["model", "seed", "user", "full"],
    )
    found = compare_models(table, "a")
    pd.testing.assert_frame_equal(found, compare_models(table, "a"))
    assert (
        found.seeds.tolist() == [3, 3, 1]
        and found.verdict[0] == "reference"
        and np.isnan(found.p_both[0])
        and (found.holm_both[1:] >= found.p_both[1:]).all()
    )
    grid = {
        m: 1 / g.pivot(index="seed", columns="user", values="full").to_numpy()
        for m, g in table.groupby("model")
    }
    assert found.difference[2] == pytest.approx(grid["counts"].mean() - grid["a"].mean()) and found.p_both[
        2
    ] == pytest.approx(seeds_and_users(grid["counts"], grid["a"])["p"])
    with pytest.raises(ValueError, match="1 of 60"):
        compare_models(table.drop(index=0), "a")


# breakdowns


def test_groups_know_nothing_of_later_events_and_scores():
    h, targets, scores = world(8, users=60)
    train = h.first(4)
    groups = target_groups(train, h, targets)
    counts = np.bincount(train.items, minlength=h.n_items)
    assert ((groups.popularity == "cold") == (counts[targets] == 0)).all()
    assert (groups.popularity[groups.target == "cold"] == "cold").all()
    assert (groups.popularity[groups.target == "new"] != "cold").all()
    repeated = [t in h.items[a:b] for t, a, b in zip(targets, h.offsets, h.offsets[1:])]
    assert (groups.target == "repeated").tolist() == repeated
    found = by_group(full_ranks(lambda h, u: scores[u], h, targets), groups)
    assert (
        (found.groupby("group").users.sum() == 60).all()
        and (found.low <= found.mrr).all()
        and (found.mrr <= found.high).all()
    )
    assert list(inspect.signature(target_groups).parameters) == [
        "train",
        "histories",
        "targets",
        "catalogue",
        "users",
    ]


def test_lists_hold_nothing_that_the_user_has_had():
    h, targets, scores = world(9)
    lists = top_lists(lambda h, u: scores[u], h, 5, batch=7)
    assert all(
        not set(top) & set(h.items[a:b].tolist()) and len(set(top)) == 5
        for top, a, b in zip(lists.tolist(), h.offsets, h.offsets[1:])
    )
    figures = list_figures(lists, h, targets, np.random.default_rng(0).normal(size=(30, 4)))
    assert figures["coverage@5"] == len(set(lists.ravel().tolist())) / 30 and all(
        np.isfinite(v) for v in figures.values()
    )
    assert not np.isinf(scores).any()  # the scorer's own table is left alone


@given(st.lists(st.integers(0, 100), min_size=1, max_size=30).filter(any))
def test_gini_is_half_the_relative_mean_difference(x):
    x = np.array(x, float)
    assert gini(x) == pytest.approx(np.abs(x[:, None] - x).mean() / (2 * x.mean()), abs=1e-9)


def test_diversity_and_retrieval_at_their_ends():
    v = np.eye(6)
    assert diversity(np.array([[0, 1, 2]]), v) == pytest.approx([1.0]) and diversity(
        np.array([[0, 1]]), -np.ones((6, 2))
    ) == pytest.approx([0.0], abs=1e-9)
    assert (
        retrieval(v, v)["r@1"] == 1
        and retrieval(v, v)["random r@10"] == 1
        and retrieval(v, np.roll(v, 1, 0), ks=(1,))["r@1"] == 0
    )


# choosing a model never sees the test split


@pytest.fixture(scope="module")
def without_test(toy_project, tmp_path_factory):
    "The toy's prepared folder without what only the evaluation may read."
    folder = tmp_path_factory.mktemp("without") / "prepared"
    shutil.copytree(toy_project[0] / "prepared" / "toy", folder)
    for name in ("test.parquet", "candidates.npy"):
        (folder / name).unlink()
    return folder


def spec_of(params: dict) -> SetSpec:
    return SetSpec.from_params("toy", params["sets"]["toy"])


def test_load_needs_no_test_file_and_holds_no_test_event(toy_project, without_test):
    project, params = toy_project
    prepared, store = project / "prepared" / "toy", project / "embeddings" / "toy"
    whole, trimmed = (
        catalogue.load(prepared, store, spec_of(params)),
        catalogue.load(without_test, store, spec_of(params)),
    )
    assert (
        resume.data_hash(whole) == resume.data_hash(trimmed)
        and whole.items.equals(trimmed.items)
        and np.array_equal(whole.valid_targets, trimmed.valid_targets)
    )
    parts = {p: pd.read_parquet(prepared / f"{p}.parquet") for p in ("train", "valid", "test")}

    def pairs(h):
        return list(zip(h.users.tolist(), h.items.tolist(), h.times.tolist()))

    held = pairs(trimmed.train) + pairs(trimmed.valid)
    assert held == [
        (int(r.user), int(r.item), int(r.timestamp))
        for p in ("train", "valid")
        for r in parts[p].itertuples()
    ]
    assert {f.name for f in dataclasses.fields(trimmed)} == {
        "spec",
        "items",
        "catalogue",
        "train",
        "valid",
    }, "a new field of Data: can it hold test events?"
    again = {(u, i) for u, i, _ in held}
    fresh = [(r.user, r.item) for r in parts["test"].itertuples() if (r.user, r.item) not in again]
    # the toy's test targets are mostly new to their users, so their absence says something
    assert len(fresh) > 0.5 * len(parts["test"])
    with pytest.raises(FileNotFoundError):
        catalogue.load_test(without_test, trimmed)


def test_nothing_in_the_catalogue_was_counted_over_test_events(toy_project):
    project, _ = toy_project
    items, train = (
        pd.read_parquet(project / "prepared" / "toy" / f"{n}.parquet") for n in ("items", "train")
    )
    assert np.array_equal(items.rating_number.fillna(0), np.bincount(train["item"], minlength=len(items)))


def test_fine_tuning_without_the_test_file_gives_the_same_weights(toy_project, without_test, tmp_path):
    project, params = toy_project
    data = catalogue.load(without_test, project / "embeddings" / "toy", spec_of(params))
    steps.finetune(data, params, project / "models" / "toy" / "pretrain", tmp_path, models=("unirec",))
    assert (tmp_path / "unirec.safetensors").read_bytes() == (
        project / "models" / "toy" / "finetune" / "unirec.safetensors"
    ).read_bytes()


def test_no_stage_that_chooses_depends_on_the_test_split(root):
    "Only `prepare` makes it and only `evaluate` reads it; a folder that holds it counts as it."
    secret = ("test.parquet", "candidates.npy")
    reads = {
        name: [
            d
            for d in stage.get("deps", [])
            if d.rstrip("/").endswith(secret) or d.rstrip("/") in ("prepared", "prepared/${item.dataset}")
        ]
        for name, stage in yaml.safe_load((root / "dvc.yaml").read_text())["stages"].items()
    }
    assert {name for name, found in reads.items() if found} == {"evaluate"}
    assert {"pretrain", "finetune"} <= reads.keys()


def calls(function) -> set[str]:
    "Names and strings that a function's source has."
    nodes = list(ast.walk(ast.parse(inspect.getsource(function))))
    return {n.id for n in nodes if isinstance(n, ast.Name)} | {
        n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)
    }


@pytest.mark.parametrize(
    "function", [catalogue.load, steps.pretrain, steps.finetune, evaluate.baseline_scorers, task.train]
)
def test_what_trains_or_chooses_names_no_test_file(function):
    assert not {
        n for n in calls(function) if n == "load_test" or "test.parquet" in n or "candidates.npy" in n
    }
    assert "load_test" in calls(evaluate.evaluate)  # the one that may
