"""Properties of the split rules, on generated events."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from unirec.data.splits import (
    by_time,
    cut_times,
    in_order,
    k_core,
    keep_repeats,
    last_k,
    leave_one_out,
    moment,
    sample_candidates,
    split,
    split_counts,
)

PARTS = ("train", "valid", "test")
RULES = [
    ("leave_one_out", {}),
    ("last_k", {"k": 2}),
    ("last5", {}),
    ("by_time", {}),
    ("by_time", {"shares": (0.2, 0.3)}),
]


@st.composite
def events(draw, least=4):
    """Events of up to six users in file order, at least so many each, times from a small range so that
    they tie."""
    rows = [
        (user, draw(st.integers(0, 7)), draw(st.integers(0, 30)))
        for user in range(draw(st.integers(1, 6)))
        for _ in range(draw(st.integers(least, 9)))
    ]
    rows = draw(st.permutations(rows))
    frame = pd.DataFrame(rows, columns=["user", "item", "timestamp"]).astype("int64")
    return frame.assign(row=range(len(frame)))


@pytest.mark.parametrize("name, options", RULES)
@given(table=events(), ties=st.sampled_from(["file", "shuffled"]), seed=st.integers(0, 3))
def test_each_event_lands_in_one_part_and_in_order(name, options, table, ties, seed):
    ordered = in_order(table, ties, seed)
    try:
        parts = split(ordered, name, **options)
    except ValueError:
        assert name == "by_time", "only a split by time can leave a part empty here"
        assume(False)
    assert sorted(pd.concat(parts.values()).row) == list(range(len(table)))
    for part in parts.values():
        again = ordered[ordered.row.isin(part.row)].reset_index(drop=True)
        pd.testing.assert_frame_equal(part, again)  # every part keeps the order of its events
    whole = pd.concat([parts[p].assign(part=k) for k, p in enumerate(PARTS)])
    # nobody is asked about their past
    for _, mine in whole.groupby("user"):
        assert (mine.sort_values("timestamp", kind="stable").part.diff().dropna() >= 0).all()


@given(table=events(least=1), shares=st.sampled_from([(0.1, 0.1), (0.3, 0.2), (0.05, 0.4)]))
def test_by_time_has_no_event_after_the_cut_in_train(table, shares):
    try:
        parts = by_time(in_order(table), shares)
    except ValueError:
        assume(False)
    first, second = cut_times(table.timestamp.to_numpy(), shares)
    assert parts["train"].timestamp.max() < first <= parts["valid"].timestamp.min()
    assert parts["valid"].timestamp.max() < second <= parts["test"].timestamp.min()
    assert (table.timestamp < first).sum() == len(parts["train"]), "all that is before the cut is train"
    known = set(parts["train"].user)
    assert (
        set(parts["valid"].user) | set(parts["test"].user) <= known
        and not set(parts["left_out"].user) & known
    )
    counts = split_counts(parts)
    assert counts["cold_users"] == table.user.nunique() - len(known) and counts[
        "events_of_cold_users"
    ] == len(parts["left_out"])
    assert counts["cold_test_targets"] == sum(i not in set(parts["train"].item) for i in parts["test"].item)


def ratio_split(rows: int, ratios: list[float]) -> list[int]:
    """Sizes of a peer toolkit's ratio split, as its documentation has them: each part but the first is
    rounded down, the first takes the rest."""
    sizes = [int(r * rows) for r in ratios]
    return [rows - sum(sizes[1:]), *sizes[1:]]


@given(
    n=st.integers(10, 200),
    seed=st.integers(0, 9),
    shares=st.sampled_from([(0.1, 0.1), (0.2, 0.1), (0.15, 0.35)]),
)
def test_without_ties_by_time_is_the_ratio_split(n, seed, shares):
    table = pd.DataFrame(
        {"user": 0, "item": range(n), "timestamp": np.random.default_rng(seed).permutation(n).astype("int64")}
    )
    parts = by_time(in_order(table), shares)
    assert [len(parts[p]) for p in PARTS] == ratio_split(n, [1 - sum(shares), *shares]) and parts[
        "left_out"
    ].empty


@given(table=events())
def test_item_aggregates_of_a_time_split_end_at_the_cut(table):
    from unirec.data.splits import train_aggregate

    try:
        parts = by_time(in_order(table.assign(rating=4.0)))
    except ValueError:
        assume(False)
    first, _ = cut_times(table.timestamp.to_numpy(), (0.1, 0.1))
    before = table[table.timestamp < first].item.value_counts().reindex(range(8), fill_value=0)
    assert train_aggregate(parts["train"], 8, "count").tolist() == before.tolist()


@given(table=events(), seed=st.integers(0, 9))
def test_shuffled_ties_move_nothing_but_ties(table, seed):
    plain, mixed = in_order(table), in_order(table, "shuffled", seed)
    assert plain.user.equals(mixed.user) and plain.timestamp.equals(mixed.timestamp)

    def same(frame):
        return frame.groupby(["user", "timestamp"]).row.agg(frozenset)

    assert same(plain).equals(same(mixed))
    assert plain.groupby(["user", "timestamp"]).row.apply(lambda r: r.is_monotonic_increasing).all(), (
        "ties keep the order of the file"
    )
    pd.testing.assert_frame_equal(mixed, in_order(table, "shuffled", seed))


def test_shuffled_ties_are_shuffled():
    table = pd.DataFrame({"user": 0, "item": range(50), "timestamp": np.int64(7)})
    orders = {tuple(in_order(table, "shuffled", seed).item) for seed in range(5)}
    assert len(orders) == 5 and tuple(range(50)) not in orders


@given(table=events(least=1), rule=st.sampled_from(["keep", "first", "last"]))
def test_repeated_pairs_leave_one_event_of_each(table, rule):
    kept = table.iloc[
        keep_repeats(*(pd.factorize(table[c])[0] for c in ("user", "item")), table.timestamp.to_numpy(), rule)
    ].rename(columns={"user": "user_id", "item": "item_id"})
    table = table.rename(columns={"user": "user_id", "item": "item_id"})
    assert kept.row.is_monotonic_increasing
    if rule == "keep":
        return
    assert (
        not kept.duplicated(["user_id", "item_id"]).any()
        and kept.groupby(["user_id", "item_id"]).ngroups == table.groupby(["user_id", "item_id"]).ngroups
    )
    extreme = table.groupby(["user_id", "item_id"]).timestamp.agg("min" if rule == "first" else "max")
    assert kept.set_index(["user_id", "item_id"]).timestamp.sort_index().equals(extreme.sort_index())


@given(table=events(least=1), users=st.integers(1, 4), items=st.integers(1, 4))
def test_k_core_is_the_largest_that_holds(table, users, items):
    table = table.rename(columns={"user": "user_id", "item": "item_id"})
    codes = [pd.factorize(table[column])[0] for column in ("user_id", "item_id")]
    kept = table.iloc[k_core(*codes, users, items)[0]]
    assert kept.groupby("user_id").size().ge(users).all() and kept.groupby("item_id").size().ge(items).all()
    assert kept.row.is_monotonic_increasing
    rest = table
    while True:  # one row at a time, another way to the same core
        bad = [
            r
            for r in rest.index
            if (rest.user_id == rest.user_id[r]).sum() < users
            or (rest.item_id == rest.item_id[r]).sum() < items
        ]
        if not bad:
            break
        rest = rest.drop(bad[0])
    assert rest.row.tolist() == kept.row.tolist()


@pytest.mark.parametrize("name", ["leave_one_out", "last5"])
@given(table=events())
def test_held_out_sizes(name, table):
    parts = split(in_order(table), name)
    sizes = table.groupby("user").size()
    tests = parts["test"].groupby("user").size()
    assert (parts["valid"].groupby("user").size() == 1).all() and set(parts["valid"].user) == set(sizes.index)
    assert tests.tolist() == (
        [1] * len(sizes) if name == "leave_one_out" else np.minimum(5, sizes - 3).tolist()
    )


def test_rules_by_name_are_the_functions():
    table = in_order(
        pd.DataFrame({"user": np.repeat([0, 1], 9), "item": range(18), "timestamp": np.arange(18)})
    )
    for named, direct in (
        (split(table), leave_one_out(table)),
        (split(table, "last3"), last_k(table, 3)),
        (split(table, "by_time", cuts=(3, 7)), by_time(table, cuts=(3, 7))),
    ):
        for part in direct:
            pd.testing.assert_frame_equal(named[part], direct[part])


@pytest.mark.parametrize(
    "name, options, told",
    [
        ("random", {}, "use one of leave_one_out, last_k, by_time"),
        ("leave_one_out", {"k": 3}, "it takes none"),
        ("by_time", {"cuts": ("2020-02-30", 5)}, "is no moment"),
        ("by_time", {"cuts": (True, 5)}, "is no moment"),
        ("by_time", {"cuts": (1.6e12, 5)}, "is no moment"),
        ("by_time", {"cuts": (4, 4)}, "the first before the second"),
        ("by_time", {"shares": (0.1,)}, "expected two above 0"),
        ("last0", {}, "at least 1"),
    ],
)
def test_wrong_rules_are_named(name, options, told):
    table = in_order(pd.DataFrame({"user": 0, "item": range(9), "timestamp": np.arange(9)}))
    with pytest.raises(ValueError, match=told):
        split(table, name, **options)


def test_moments():
    assert (
        moment("2020-07-01")
        == moment("2020-07-01T02:00+02:00")
        == moment(pd.Timestamp("2020-07-01").to_pydatetime())
        == 1_593_561_600_000
        == moment(np.int64(1_593_561_600_000))
    )


def test_candidates_of_several_targets_leave_out_all_that_the_user_touched():
    table = in_order(
        pd.DataFrame(
            {"user": np.repeat([0, 1], 8), "item": [*range(8), *range(4, 12)], "timestamp": np.arange(16)}
        )
    )
    test = split(table, "last5")["test"]
    touched = table.groupby("user").item.agg(np.array)
    events, asked = table[["user", "item"]].to_numpy().T, test[["user", "item"]].to_numpy().T
    drawn = np.concatenate(list(sample_candidates(*events, *asked, 40, 20, seed=1)))
    assert drawn.shape == (len(test), 21)
    for user, row in zip(test.user, drawn):
        assert not set(row[1:]) & set(touched[user]) and len(set(row)) == 21
