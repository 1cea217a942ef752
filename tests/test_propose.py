"""Proposed schemas: what is printed is accepted, and what is accepted can be read, on generated tables."""

import gzip
import json
import math

import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from unirec.data.formats import read_records
from unirec.data.jsonl import field_at
from unirec.data.propose import LIMITS, Column, as_yaml, guess, guess_number, propose, propose_file
from unirec.data.readers import READERS
from unirec.data.schema import Attribute, Schema, SetSpec, read_schema
from unirec.data.values import canonical_value, columns

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12)
VALUES = [
    st.integers(-5, 10**6),
    st.floats(allow_nan=True, allow_infinity=True),
    st.booleans(),
    WORDS,
    st.lists(WORDS, max_size=3),
    st.sampled_from(["red", "green|blue", "blue|red", "a, b", "b, c"]),
    st.sampled_from(["a.png", "img/b.jpg"]),
    st.builds(lambda n: {"large": f"{n}.jpg"}, st.integers(0, 9)),
    st.sampled_from(["1,5", "$3.00", "7"]),
    st.none(),
    st.dictionaries(WORDS, st.one_of(WORDS, st.integers()), max_size=2),
]


@st.composite
def tables(draw):
    "Records with columns of one kind each, holes in them, and names of all sorts."
    names = draw(
        st.lists(
            st.one_of(
                st.sampled_from(
                    [
                        "item_id",
                        "price",
                        "stars",
                        "review_count",
                        "title",
                        "yes",
                        "null",
                        "on",
                        "a.b",
                        "train:x",
                        "type",
                        "source",
                    ]
                ),
                WORDS,
            ),
            min_size=1,
            max_size=6,
            unique=True,
        )
    )
    kinds = {
        n: (
            st.one_of(draw(st.sampled_from(VALUES)), st.none())
            if draw(st.booleans())
            else draw(st.sampled_from(VALUES))
        )
        for n in names
    }
    return [{n: draw(k) for n, k in kinds.items()} for _ in range(draw(st.integers(0, 14)))]


def proposal(records):
    "What is proposed, None where nothing can be."
    try:
        return propose(records)
    except ValueError as error:
        assert "no column can be used" in str(error)
        return None


@given(records=tables())
def test_what_is_printed_is_accepted_unchanged(records):
    made = proposal(records)
    if made is None:
        return
    text = as_yaml(*made)
    block = yaml.safe_load(text)
    assert Schema.from_params(block) == Schema(tuple(Attribute(n, **g.spec) for n, g in made[0].items()))
    assert block == {n: g.spec for n, g in made[0].items()}
    body = [line for line in text.splitlines() if not line.startswith("#")]
    assert len(body) == len(block), "one line an attribute"


@given(records=tables())
def test_what_is_proposed_can_be_read(records):
    made = proposal(records)
    if made is None:
        return
    for a in Schema.from_params(yaml.safe_load(as_yaml(*made))):
        if a.from_train:
            continue
        wrong = there = 0
        for record in records:
            raw = field_at(record, a.source)
            if raw is None or raw == "" or isinstance(raw, float) and math.isnan(raw):
                continue
            there += 1
            try:
                canonical_value(raw, a)
            except (ValueError, TypeError):
                wrong += 1
        assert (
            wrong <= (1 - LIMITS.numbers) * there + 1e-9
            or a.type == "image"
            and wrong <= (1 - LIMITS.pictures) * there
        ), a


@given(records=tables())
def test_no_column_is_lost_in_silence(records):
    found = columns(records)
    made = proposal(records)
    if made is None:
        return
    kept, left, rows = made
    assert rows == len(records) and set(found) <= set(left) | {g.spec["source"] for g in kept.values()} | {
        s for s in found for g in kept.values() if f"column {s} knows" in g.note
    }
    assert all(left.values()) and all(g.note for g in kept.values())


@given(records=tables())
def test_a_proposal_is_the_same_twice(records):
    made = proposal(records)
    assert made is None or as_yaml(*made) == as_yaml(*propose(json.loads(json.dumps(records))))


@pytest.mark.parametrize("name", ["items.csv", "items.jsonl", "items.parquet", "schema.yaml"])
@given(
    data=st.one_of(
        st.binary(max_size=60),
        st.text("abc,;\"'\n\r\t{}[]:0123456789.|-\\ ", max_size=60).map(str.encode),
        st.text('{"a":1,[]}\n', max_size=30).map(lambda s: b'{"item_id": 1, "b": ' + s.encode() + b"}"),
    )
)
def test_a_broken_file_is_named_and_nothing_else_happens(name, data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(data)
    try:
        read_schema(path) if name == "schema.yaml" else yaml.safe_load(propose_file(path))
    except ValueError as error:
        assert name in str(error)


SHOP = pd.DataFrame(
    {
        "item_id": [f"p{i}" for i in range(12)],
        "title": [f"A thing of number {i}, made by hand" for i in range(12)],
        "brand": ["Nord", "Sol", None] * 4,
        "tags": ["a|b", "b", "c|a", "a"] * 3,
        "price": [1.0, 2, 2, 3, 3, 4, 5, 6, 7, 9, 12, 900],
        "rating_number": range(12),
        "photo": [f"images/p{i}.png" for i in range(12)],
        "ean": [f"40{i:011d}" for i in range(12)],
    }
)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_shop_goes_through_the_reader_with_what_was_proposed(suffix, tmp_path):
    path = tmp_path / f"items.{suffix}"
    {
        "csv": lambda: SHOP.to_csv(path, index=False),
        "jsonl": lambda: SHOP.to_json(path, orient="records", lines=True),
        "parquet": lambda: SHOP.to_parquet(path),
    }[suffix]()
    pd.DataFrame(
        {"user_id": ["u"] * 12, "item_id": SHOP.item_id, "timestamp": range(1_600_000_000, 1_600_000_012)}
    ).to_csv(tmp_path / "interactions.csv", index=False)
    (tmp_path / "schema.yaml").write_text(propose_file(path))
    schema = read_schema(tmp_path / "schema.yaml")
    assert [(a.name, a.type, a.source, a.split, a.scale) for a in schema] == [
        ("title", "text", "title", None, "linear"),
        ("brand", "category", "brand", None, "linear"),
        ("tags", "category", "tags", "|", "linear"),
        ("price", "number", "price", None, "log"),
        ("rating_number", "number", "train:count", None, "log"),
        ("photo", "image", "photo", None, "linear"),
    ]
    items, events, quality = READERS["table"](tmp_path, SetSpec("shop", "table", ".", "items", schema))
    assert len(items) == 12 and len(events) == 12 and not quality["invalid"]
    assert (
        items.tags[0] == ["a", "b"]
        and items.price[11] == 900
        and items.photo[3] == "images/p3.png"
        and items.brand[2] == []
    )
    assert "ean: looks like an id" in (tmp_path / "schema.yaml").read_text()


@pytest.mark.parametrize(
    "name, data, told",
    [
        ("a.csv", b"item_id,title\na,b,c\n", "a.csv, row 2: more fields than the header has; expected 2"),
        ("a.csv", b"item_id,title\na,b\nc,\0\n", "a.csv, row 3: a NUL byte"),
        (
            "a.csv",
            "item_id,title\na,S\u00fc\u00df\n".encode("latin-1"),
            "a.csv: cannot be read as csv .*0xfc",
        ),
        ("a.csv", "item_id,title\na,b\n".encode("utf-16"), "a.csv: cannot be read as csv .*0xff"),
        ("a.csv", b"item_id,title\n", "a.csv: no column can be used: the table is empty"),
        ("a.csv", b"", "a.csv: cannot be read as csv"),
        ("a.csv", b'item_id,title\na,"b\n', "a.csv: cannot be read as csv .*EOF inside string"),
        (
            "a.jsonl",
            b'{"item_id": ' + b"[" * 5000 + b"]" * 5000 + b"}\n",
            "a.jsonl, row 1: not JSON .*recursion",
        ),
        ("a.jsonl", b'{"item_id": 1}\n\0\n', "a.jsonl, row 2: a NUL byte"),
        ("a.jsonl", b"[1]\n", "a.jsonl, row 1: expected a record"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"item_id": "a"}\n' * 999, mtime=0)[:-9],
            "a.jsonl.gz, after row 0: the file is cut or damaged",
        ),
        ("a.jsonl.gz", b'{"item_id": "a"}\n', "a.jsonl.gz: the name says gzip, the content is not"),
        ("a.csv.gz", b"no", "a.csv.gz: cannot be read as csv"),
        ("a.parquet", b"PAR1 no", "a.parquet: cannot be read as parquet"),
        ("a.txt", b"x", "expected a name that ends in .csv"),
        ("a.gz", b"x", "expected a name that ends in .csv"),
        ("a.parquet.gz", b"x", "expected a name that ends in .csv"),
    ],
)
def test_what_is_wrong_with_a_table_is_one_sentence(name, data, told, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=told):
        propose_file(tmp_path / name)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_packed_tables_are_read(suffix, tmp_path):
    {
        "csv": lambda p: SHOP.to_csv(p, index=False),
        "jsonl": lambda p: SHOP.to_json(p, orient="records", lines=True),
    }[suffix](plain := tmp_path / f"items.{suffix}")
    (tmp_path / f"items.{suffix}.gz").write_bytes(gzip.compress(plain.read_bytes()))
    assert (
        propose_file(tmp_path / f"items.{suffix}.gz").splitlines()[1:] == propose_file(plain).splitlines()[1:]
    )


def test_only_the_first_rows_are_read(tmp_path):
    for path, write in (
        (tmp_path / "a.csv", lambda p: SHOP.to_csv(p, index=False)),
        (tmp_path / "a.parquet", SHOP.to_parquet),
        (tmp_path / "a.jsonl", lambda p: SHOP.to_json(p, orient="records", lines=True)),
    ):
        write(path)
        assert len(read_records(path, 5)) == 5 and "from 5 rows" in propose_file(path, 5)


@pytest.mark.parametrize(
    "name",
    [
        "average_rating",
        "averageRating",
        "avg_rating",
        "stars",
        "rating",
        "rating_number",
        "review_count",
        "reviewCount",
        "num_reviews",
        "number_of_ratings",
    ],
)
def test_snapshots_of_the_future_come_from_train_with_a_warning(name):
    made = guess(name, [1, 5, 3, 4])
    assert made.spec["source"].startswith("train:") and "WARNING" in made.note and name in made.note


@pytest.mark.parametrize("name", ["helpful_vote", "sales_rank", "units_sold", "likes", "popularity"])
def test_what_only_the_future_knows_is_left_out(name):
    assert guess(name, [1, 5, 3, 4]).spec is None and "future" in guess(name, [1, 5, 3, 4]).note


@given(values=st.lists(st.floats(0, 1e6), min_size=20, max_size=40))
def test_a_logarithm_is_only_proposed_where_it_can_be_taken(values):
    made = guess_number(Column("weight", values))
    assert made is None or made.spec is None or made.spec.get("scale") != "log" or min(values) >= 0
    negative = guess_number(Column("weight", [-1.5, *values]))
    assert negative.spec is None or "scale" not in negative.spec
