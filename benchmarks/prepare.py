"""Raw files to prepared tables: streams and columns against a Python loop over `json.loads` with pandas, in
turn, each run in a fresh process.

Rows a second, peak memory, and how both grow from a tenth of the set to the whole. What Arrow's own reader,
and DuckDB's where it is installed, take for the same fields of the same files is measured as the limit: they
check less, and make neither the items table nor the events."""

import importlib.util
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.json as pj

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from unirec.data.prepare import prepare
from unirec.data.readers import READERS
from unirec.data.schema import SetSpec
from unirec.data.splits import in_order, k_core, leave_one_out, train_aggregate

# the children import this file: what imports torch is imported where it is used, so that torch's memory is
# not measured
SIZES = {"tenth": (500_000, 50_000), "whole": (5_000_000, 500_000)}  # reviews, items
SMALL = {"tenth": (2_000, 200), "whole": (20_000, 2_000)}
PAIRS = {"tenth": 3, "whole": 1}
WORDS = 4_000  # of a made-up vocabulary
PIECES = 20_000  # made-up review texts that the reviews draw from
SCHEMA = {
    "title": {"type": "text"},
    "description": {"type": "text"},
    "brand": {"type": "category", "source": "details.Brand"},
    "color": {"type": "category", "source": "details.Color"},
    "price": {"type": "number", "scale": "log"},
    "average_rating": {"type": "number", "source": "train:mean_rating"},
    "rating_number": {"type": "number", "source": "train:count", "scale": "log"},
}


def spec() -> SetSpec:
    "The generated set as a block of params.yaml would name it."
    return SetSpec.from_params(
        "generated",
        {"format": "amazon2023", "source": "generated", "files": "Made", "schema": SCHEMA, "synthetic": True},
    )


def texts(count: int, low: int, high: int, rng: np.random.Generator) -> list[str]:
    "Made-up texts of `low` to `high` words, as JSON strings; one in ten has letters outside ASCII."
    words = np.array(
        ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), rng.integers(2, 9))) for _ in range(WORDS)]
    )
    return [
        json.dumps(
            " ".join(rng.choice(words, rng.integers(low, high)))
            + (" für Größe \N{GRINNING FACE}" if k % 10 == 0 else "."),
            ensure_ascii=False,
        )
        for k in range(count)
    ]


def generate(folder: Path, reviews: int, items: int, seed: int = 0, block: int = 100_000) -> dict[str, int]:
    """Write a set in the layout of Amazon Reviews 2023: as many users as items, popular items and busy
    users, times in order of the file; returns the bytes of each file."""
    rng = np.random.default_rng(seed)
    titles, long, few = texts(PIECES, 3, 12, rng), texts(PIECES, 15, 60, rng), texts(PIECES, 1, 6, rng)
    with open(folder / "meta_Made.jsonl", "w", encoding="utf-8") as f:
        for i in range(items):
            price = "null" if i % 3 == 0 else f"{rng.integers(100, 9999) / 100}"
            f.write(
                f'{{"main_category": "Made", "title": {titles[rng.integers(PIECES)]}, "average_rating": 4.1,'
                f' "rating_number": 17, "features": [{few[i % PIECES]}, {titles[i % PIECES]}], "description":'
                f' [{long[rng.integers(PIECES)]}, {long[i % PIECES]}], "price": {price}, "images":'
                f' [{{"thumb": "t{i}.jpg", "large": "images/l{i}.jpg", "variant": "MAIN", "hi_res": null}}],'
                f' "videos": [], "store": "S{i % 997}", "categories": ["Made", "C{i % 37}"], "details":'
                f' {{"Brand": "B{i % 991}", "Color": "{["Red", "Teal", "Sand"][i % 3]}", "Weight": "3'
                f' ounces"}}, "parent_asin": "P{i:09d}", "bought_together": null}}\n'
            )
    with open(folder / "Made.jsonl", "w", encoding="utf-8") as f:
        for first in range(0, reviews, block):
            n = min(block, reviews - first)
            user, item = (items * rng.random((2, n)) ** np.array([[1.3], [1.6]])).astype(int).tolist()
            rating, title, text = (
                rng.integers(1, 6, n).tolist(),
                rng.integers(PIECES, size=n).tolist(),
                rng.integers(PIECES, size=n).tolist(),
            )
            f.writelines(
                f'{{"rating": {r}.0, "title": {few[t]}, "text": {long[x]}, "images": [], "asin": "V{i:09d}",'
                f' "parent_asin": "P{i:09d}", "user_id": "AE{u:026d}", "timestamp":'
                f' {1_300_000_000_000 + 61_000 * (first + k)}, "helpful_vote": {k % 7}, "verified_purchase":'
                " true}\n"
                for k, (r, t, x, i, u) in enumerate(zip(rating, title, text, item, user))
            )
    return {p.name: p.stat().st_size for p in sorted(folder.iterdir())}


def ours_read(folder: Path, out: Path) -> int:
    "Items and events by the reader; how many reviews were read."
    return READERS["amazon2023"](folder, spec())[2]["rows_read"]


def ours(folder: Path, out: Path) -> int:
    "Everything: leak checks and candidates too."
    return prepare(folder, spec(), out)["rows_read"]


def plain_items(folder: Path) -> pd.DataFrame:
    "The items by a loop."
    rows = []
    with open(folder / "meta_Made.jsonl", encoding="utf-8") as f:
        for line in f:
            r = json.loads(line)
            details = r.get("details") or {}
            rows.append(
                (
                    r["parent_asin"],
                    r.get("title"),
                    " ".join(r.get("description") or []) or None,
                    [v for v in [details.get("Brand")] if v],
                    [v for v in [details.get("Color")] if v],
                    math.nan if r.get("price") is None else float(r["price"]),
                )
            )
    return pd.DataFrame(rows, columns=["item_id", "title", "description", "brand", "color", "price"])


def plain_events(folder: Path) -> pd.DataFrame:
    "The reviews by a loop."
    rows = []
    with open(folder / "Made.jsonl", encoding="utf-8") as f:
        for line in f:
            r = json.loads(line)
            text = " ".join(t.strip() for t in (r.get("title"), r.get("text")) if t and t.strip()) or None
            rows.append((r["user_id"], r["parent_asin"], r["rating"], r["timestamp"], text))
    return pd.DataFrame(rows, columns=["user_id", "item_id", "rating", "timestamp", "review"]).astype(
        {"rating": "float32"}
    )


def plain_read(folder: Path, out: Path) -> int:
    "Items and events by loops; how many reviews were read."
    items, events = plain_items(folder), plain_events(folder)
    return len(events[events.item_id.isin(set(items.item_id))]) and len(events)


def plain(folder: Path, out: Path) -> int:
    "The same tables by loops and pandas, without leak checks, quality report and candidates."
    items, events = plain_items(folder), plain_events(folder)
    read = len(events)
    events = events[events.item_id.isin(set(items.item_id))]
    codes = [pd.factorize(events[column])[0] for column in ("user_id", "item_id")]
    events = events.iloc[k_core(*codes, 5, 5)[0]]
    items = items[items.item_id.isin(set(events.item_id))].reset_index(drop=True)
    users = pd.DataFrame({"user_id": pd.unique(events.user_id)})

    def number(values, ids):
        return values.map(pd.Series(range(len(ids)), ids)).to_numpy(np.int64)

    table = pd.DataFrame(
        {
            "user": number(events.user_id, users.user_id),
            "item": number(events.item_id, items.item_id),
            **{c: events[c].to_numpy() for c in ("rating", "timestamp", "review")},
        }
    )
    parts = leave_one_out(in_order(table))
    items["average_rating"], items["rating_number"] = (
        train_aggregate(parts["train"], len(items), "mean_rating"),
        train_aggregate(parts["train"], len(items), "count"),
    )
    out.mkdir(parents=True)
    items.to_parquet(out / "items.parquet")
    users.to_parquet(out / "users.parquet")
    for name, part in parts.items():
        part.to_parquet(out / f"{name}.parquet")
    return read


# the raw fields that both sides take, as Arrow and DuckDB call their types
RAW_FIELDS = {
    "meta_Made.jsonl": {
        "parent_asin": ("string", "VARCHAR"),
        "title": ("string", "VARCHAR"),
        "description": (pa.list_(pa.string()), "VARCHAR[]"),
        "details": (
            pa.struct([("Brand", pa.string()), ("Color", pa.string())]),
            "STRUCT(Brand VARCHAR, Color VARCHAR)",
        ),
        "price": ("float64", "DOUBLE"),
    },
    "Made.jsonl": {
        "user_id": ("string", "VARCHAR"),
        "parent_asin": ("string", "VARCHAR"),
        "rating": ("float64", "DOUBLE"),
        "timestamp": ("int64", "BIGINT"),
        "title": ("string", "VARCHAR"),
        "text": ("string", "VARCHAR"),
    },
}


def arrow_tables(folder: Path) -> list[pa.Table]:
    "The fields of the items and of the reviews, by Arrow's reader, whose blocks are read in parallel."
    tables = []
    for name, fields in RAW_FIELDS.items():
        schema = pa.schema([(field, kind) for field, (kind, _) in fields.items()])
        parse = pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
        tables.append(pj.read_json(folder / name, pj.ReadOptions(block_size=1 << 20), parse))
    return tables


def duckdb_tables(folder: Path) -> list[pa.Table]:
    "The same by DuckDB's reader, as Arrow tables."
    import duckdb

    tables = []
    for name, fields in RAW_FIELDS.items():
        columns = ", ".join(f"{field!r}: {kind!r}" for field, (_, kind) in fields.items())
        query = f"FROM read_json($path, format='newline_delimited', columns={{{columns}}})"
        tables.append(duckdb.sql(query, params={"path": str(folder / name)}).to_arrow_table())
    return tables


def arrow_read(folder: Path, out: Path) -> int:
    "How many reviews Arrow read."
    return len(arrow_tables(folder)[1])


def duckdb_read(folder: Path, out: Path) -> int:
    "How many reviews DuckDB read."
    return len(duckdb_tables(folder)[1])


SIDES: dict[str, dict[str, Callable[[Path, Path], int]]] = {
    "read": {"ours": ours_read, "plain": plain_read},
    "prepare": {"ours": ours, "plain": plain},
}
LIMITS: dict[str, Callable[[Path, Path], int]] = {"arrow": arrow_read}  # of reading: no table is made of it
if importlib.util.find_spec("duckdb"):
    LIMITS["duckdb"] = duckdb_read


def peak_mb() -> float:
    "The largest resident memory of this process so far, in MB."
    return (
        int(
            next(
                line
                for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith("VmHWM")
            ).split()[1]
        )
        / 1024
    )


def child(measure: str, side: str, folder: Path) -> dict:
    "One run, in the process that was started for it."
    if side == "duckdb":
        importlib.import_module(side)  # the others are imported above: no import is timed
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        start, cpu = time.perf_counter(), time.process_time()
        rows = {**SIDES[measure], **LIMITS}[side](folder, Path(scratch) / "out")
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {
        "rows": rows,
        "seconds": seconds,
        "rows_per_s": rows / seconds,
        "rows_per_cpu_s": rows / cpu,
        "peak_mb": peak_mb(),
    }


def fresh(measure: str, side: str, folder: Path) -> dict:
    "One run in a fresh process."
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--child", measure, side, str(folder)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(
            f"{measure} {side}:"
            f" {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'killed (out of memory?)'}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def same_tables(folder: Path) -> None:
    "Raise RuntimeError unless both sides write the same tables."
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        a, b = Path(scratch) / "ours", Path(scratch) / "plain"
        ours(folder, a)
        plain(folder, b)
        for name in ("items", "users", "train", "valid", "test"):
            try:
                pd.testing.assert_frame_equal(
                    pd.read_parquet(a / f"{name}.parquet"), pd.read_parquet(b / f"{name}.parquet")
                )
            except AssertionError as e:
                raise RuntimeError(f"the two sides do not write the same {name}: {e}") from None


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Medians of a measure and size: rows a second (by the clock and by the processor's time) of both
    sides, ratios pair by pair, peak memory; and by how much more seconds grew than rows.

    `arrow` and `arrow_ratio` are rows a second of Arrow's own reader, and their ratio to the plain side."""
    by, out = ["measure", "size"], []
    for column in ("rows_per_s", "rows_per_cpu_s"):
        wide = rows.pivot(index=[*by, "pair"], columns="side", values=column)
        limits = {f"{side}_ratio": wide[side] / wide.plain for side in LIMITS if side in wide}
        medians = wide.assign(ratio=wide.ours / wide.plain, **limits).groupby(by).median()
        for side in ("ours", "plain"):
            medians[f"{side}_growth"] = medians.groupby("measure")[side].transform(
                lambda v: v.xs("tenth", level="size").iloc[0] / v
            )
        out.append(medians.add_suffix("" if column == "rows_per_s" else "_cpu"))
    peak = rows.pivot_table(index=by, columns="side", values="peak_mb", aggfunc="max").add_suffix("_peak_mb")
    return pd.concat([rows.groupby(by).rows.first(), *out, peak], axis=1).reset_index()


def measure(table, sizes: dict[str, tuple[int, int]], pairs: dict[str, int], say: Callable) -> pd.DataFrame:
    "One row a run, the sides in turn, the order turned round every second pair."
    for size, (reviews, items) in sizes.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "raw"
            folder.mkdir()
            written = generate(folder, reviews, items)
            if size == "tenth":
                same_tables(folder)
            for name in SIDES:
                sides = ["ours", "plain", *(LIMITS if name == "read" else ())]
                for pair in range(pairs[size]):
                    for side in sides if pair % 2 == 0 else sides[::-1]:
                        row = {
                            "measure": name,
                            "size": size,
                            "reviews": reviews,
                            "items": items,
                            "raw_mb": sum(written.values()) / 1e6,
                            "pair": pair,
                            "side": side,
                            **fresh(name, side, folder),
                        }
                        table.add(row)
                        say(
                            f"{size:6s} {name:8s} {side:6s} {row['seconds']:8.2f} s {row['rows_per_s']:10.0f}"
                            f" rows/s {row['peak_mb']:7.0f} MB"
                        )
    return summary(pd.DataFrame(table.rows))


def main() -> None:
    "Command line."
    if sys.argv[1:2] == ["--child"]:
        return print(json.dumps(child(sys.argv[2], sys.argv[3], Path(sys.argv[4]))))
    from benchmarks.side_by_side import Table, arguments, folder, say

    parser = arguments(__doc__)
    parser.add_argument("--small", action="store_true", help="the same as --quick")
    args = parser.parse_args()
    args.quick = args.quick or args.small
    table = Table(
        "prepare",
        folder(args),
        quick=args.quick,
        data="synthetic: generated by benchmarks/prepare.py, in the layout of Amazon Reviews 2023",
        what=(
            "read: raw files to items and events in memory; prepare: raw files to parquet, on our side with"
            " leak checks, quality report and the candidates of all users, on the plain side without; each"
            " run in a fresh process; peak_mb: all of it, imports too; rows_per_cpu_s: by the time of the"
            " processor, which other programs on the machine disturb less; growth: 1 where time grows as"
            " rows do; arrow, duckdb: what these readers take for the same fields of the same files, without"
            " the checks and without the tables of items and events"
        ),
    )
    found = measure(
        table,
        SMALL if args.quick else SIZES,
        {s: args.pairs or (1 if args.quick else PAIRS[s]) for s in SIZES},
        say,
    )
    table.facts["summary"] = json.loads(found.to_json(orient="records", double_precision=3))
    table.add()
    say(found.to_string(index=False, float_format="%.4g"))


if __name__ == "__main__":
    main()
