"""Raw files as they come: what is wrong in them is one error that names the place, or is left out and
counted; what is right comes back as it was."""

import gzip
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unirec.data import prepare as preparing
from unirec.data.interactions import arrow_batch, as_events, larger_batches, review_batches
from unirec.data.jsonl import ColumnDecoder, column_batches, decode_json, file_lines, line_blocks
from unirec.data.prepare import check_aggregates, check_candidates, check_parts, indexed, prepare
from unirec.data.readers import READERS
from unirec.data.schema import Attribute, Schema, SetSpec
from unirec.data.splits import in_order, leave_one_out, sample_candidates, train_aggregate
from unirec.data.values import canonical_value, item_sources, items_table, milliseconds

DAY, NOW = 86_400_000, 1_600_000_000_000  # ms
FIELDS = {
    "user_id": "user_id",
    "item_id": "parent_asin",
    "rating": "rating",
    "timestamp": "timestamp",
    "title": "title",
    "text": "text",
}
SCHEMA = {
    "title": {"type": "text"},
    "brand": {"type": "category", "source": "details.Brand"},
    "price": {"type": "number", "scale": "log"},
    "picture": {"type": "image", "source": "images"},
}
FLAT = {
    "title": {"type": "text"},
    "brand": {"type": "category"},
    "price": {"type": "number", "scale": "log"},
    "picture": {"type": "image"},
}


def spec(format, schema=None, **other) -> SetSpec:
    "A data set in a format."
    schema = schema or {
        "amazon2023": SCHEMA,
        "yelp": {"name": {"type": "text"}, "city": {"type": "category"}, "photo": {"type": "image"}},
    }.get(format, FLAT)
    return SetSpec.from_params(
        "toy",
        {
            "format": format,
            "source": "made up",
            "files": "Toy",
            "schema": schema,
            "k_core_users": 1,
            "k_core_items": 1,
            **other,
        },
    )


# small sets, one writer a format; `items` and `reviews` are records, or lines as they should stand in the
# file


def dump(path, rows, dumps=lambda r: json.dumps(r, ensure_ascii=False), pack=False):
    "Write records or ready lines."
    content = "".join((r if isinstance(r, str) else dumps(r)) + "\n" for r in rows).encode(
        "utf-8", "surrogatepass"
    )
    Path(path).write_bytes(gzip.compress(content) if pack else content)


def item(**other):
    return {
        "parent_asin": "a",
        "title": "Pot",
        "price": 5.0,
        "images": [{"variant": "MAIN", "large": "images/a.png"}],
        "details": {"Brand": "Acme"},
    } | other


def review(**other):
    return {
        "user_id": "u",
        "parent_asin": "a",
        "rating": 4.0,
        "timestamp": NOW,
        "title": "Good",
        "text": "Boils.",
    } | other


def amazon2023(folder, items=None, reviews=None, pack=False):
    suffix = ".jsonl.gz" if pack else ".jsonl"
    dump(folder / f"meta_Toy{suffix}", items or [item(), item(parent_asin="b")], pack=pack)
    dump(folder / f"Toy{suffix}", [review(user_id="v")] + (reviews or []), pack=pack)


def flat(record):
    return {
        "asin": record["parent_asin"],
        "title": record["title"],
        "price": record["price"],
        "brand": "Acme",
        "picture": "images/a.png",
    }


def old_review(**other):
    return {
        "reviewerID": "u",
        "asin": "a",
        "overall": 4.0,
        "unixReviewTime": NOW // 1000,
        "summary": "Good",
        "reviewText": "Boils.",
    } | other


def amazon2018(folder, items=None, reviews=None):
    dump(folder / "meta_Toy.json", items or [flat(item())])
    dump(folder / "Toy_5.json", [old_review(reviewerID="v")] + (reviews or []))


def amazon2014(folder, items=None, reviews=None):
    dump(folder / "meta_Toy.json", items or [flat(item())], dumps=repr)
    dump(folder / "reviews_Toy_5.json", [old_review(reviewerID="v")] + (reviews or []))


def stars(**other):
    return {
        "user_id": "u",
        "business_id": "a",
        "stars": 4.0,
        "date": "2018-07-07 22:09:11",
        "text": "Boils.",
    } | other


def yelp(folder, items=None, reviews=None, photos=None):
    dump(
        folder / "yelp_academic_dataset_business.json",
        items or [{"business_id": "a", "name": "Noodles", "city": "Nowhere"}],
    )
    dump(folder / "yelp_academic_dataset_review.json", [stars(user_id="v")] + (reviews or []))
    if photos:
        dump(folder / "photos.json", photos)


ATOMIC = (
    "item_id:token\ttitle:token_seq\tbrand:token\tprice:float\tpicture:token\na\tPot\tAcme\t5\timages/a.png\n"
)


def recbole(
    folder, items=ATOMIC, inter="", head="user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
):
    (folder / "Toy.item").write_bytes(items if isinstance(items, bytes) else items.encode())
    (folder / "Toy.inter").write_bytes(
        f"{head}v\ta\t4\t{NOW // 1000}\n".encode() + (inter if isinstance(inter, bytes) else inter.encode())
    )


def table(
    folder,
    items="item_id,title,brand,price,picture\na,Pot,Acme,5,images/a.png\n",
    inter="",
    head="user_id,item_id,rating,timestamp\n",
):
    (folder / "items.csv").write_bytes(items if isinstance(items, bytes) else items.encode())
    (folder / "interactions.csv").write_bytes(
        f"{head}v,a,4,{NOW // 1000}\n".encode() + (inter if isinstance(inter, bytes) else inter.encode())
    )


WRITERS = {
    "amazon2014": amazon2014,
    "amazon2018": amazon2018,
    "amazon2023": amazon2023,
    "recbole": recbole,
    "table": table,
    "yelp": yelp,
}


@dataclass
class Counted:
    """What a reader says when it goes on: counts that are there, and how many events are left (the good
    one included)."""

    dropped: dict = field(default_factory=dict)
    invalid: dict = field(default_factory=dict)
    events: int = 1


def cut(folder, name, by=8):
    "Cut bytes off the end of a file."
    path = folder / name
    path.write_bytes(path.read_bytes()[:-by])


def both(*steps):
    return lambda folder: [step(folder) for step in steps]


def raw_lines(*rows):
    return lambda folder: amazon2023(folder, reviews=list(rows))


def meta(**other):
    return lambda folder: amazon2023(folder, items=[item(), item(parent_asin="b", **other)])


def encoded(name, coding):
    return lambda folder: (folder / name).write_bytes(
        (folder / name).read_bytes().decode().replace("Boils", "Süß").encode(coding)
    )


FAULTS = {  # sentence -> format, what is written, an error's words or what is counted
    "a gzip of reviews that is cut names the file": (
        "amazon2023",
        both(lambda f: amazon2023(f, pack=True), lambda f: cut(f, "Toy.jsonl.gz")),
        r"Toy\.jsonl\.gz, after row \d+: the file is cut or damaged",
    ),
    "a gzip of items that is cut names the file": (
        "amazon2023",
        both(lambda f: amazon2023(f, pack=True), lambda f: cut(f, "meta_Toy.jsonl.gz")),
        r"meta_Toy\.jsonl\.gz, after row \d+: the file is cut or damaged",
    ),
    "a file called gz that is none is refused": (
        "amazon2023",
        both(amazon2023, lambda f: (f / "Toy.jsonl").rename(f / "Toy.jsonl.gz")),
        "the name says gzip, the content is not",
    ),
    "a file that is not there is named": (
        "amazon2023",
        both(amazon2023, lambda f: (f / "Toy.jsonl").unlink()),
        r"none of Toy\.jsonl\[\.gz\] is there",
    ),
    "a line that is cut names its row": (
        "amazon2023",
        both(raw_lines(review()), lambda f: cut(f, "Toy.jsonl", 20)),
        r"Toy\.jsonl, row 2: not JSON .* is the file whole",
    ),
    "a line that is no record names its row": (
        "amazon2023",
        raw_lines("[1, 2]"),
        r"Toy\.jsonl, row 2: expected a record, got list",
    ),
    "a line that is a bare word names its row": (
        "amazon2023",
        raw_lines("hello"),
        r"Toy\.jsonl, row 2: not JSON",
    ),
    "two records on one line name the row": (
        "amazon2023",
        raw_lines(json.dumps(review()) * 2),
        r"Toy\.jsonl, row 2: not JSON",
    ),
    "a record over two lines names the row": (
        "amazon2023",
        raw_lines(json.dumps(review()).replace(", ", ",\n", 1)),
        r"Toy\.jsonl, row 2: not JSON",
    ),
    "a row number counts empty lines": (
        "amazon2023",
        raw_lines("", "", "hello"),
        r"Toy\.jsonl, row 4: not JSON",
    ),
    "a line of items that is no JSON names its row": (
        "amazon2023",
        lambda f: amazon2023(f, items=[item(), "{"]),
        r"meta_Toy\.jsonl, row 2: not JSON",
    ),
    "a review without an item names the field": (
        "amazon2023",
        raw_lines({k: v for k, v in review().items() if k != "parent_asin"}),
        r"row 2: field 'parent_asin' is missing",
    ),
    "a review without a time names the field": (
        "amazon2023",
        raw_lines(review(timestamp=None)),
        r"row 2: field 'timestamp' is missing",
    ),
    "a user that is a list names the field": (
        "amazon2023",
        raw_lines(review(user_id=["u"])),
        r"Toy\.jsonl, row 2: field 'user_id': \['u'\] is no id",
    ),
    "a user that is true names the field": (
        "amazon2023",
        raw_lines(review(user_id=True)),
        "row 2: field 'user_id': True is no id",
    ),
    "a user that is half a character names the field": (
        "amazon2023",
        raw_lines(json.dumps(review(user_id="\ud83d"))),
        r"Toy\.jsonl, row 2: field 'user_id'",
    ),
    "a time that is a word names row and field": (
        "amazon2023",
        raw_lines(review(timestamp="noon")),
        "row 2: field 'timestamp' is 'noon', expected a time",
    ),
    "a time that is infinite names row and field": (
        "amazon2023",
        raw_lines(json.dumps(review(timestamp=math.inf))),
        "row 2: field 'timestamp' is inf, expected a time",
    ),
    "a file in Latin-1 names row and byte": (
        "amazon2023",
        both(amazon2023, encoded("Toy.jsonl", "latin-1")),
        r"Toy\.jsonl, row 1: byte 0xfc is not UTF-8; convert",
    ),
    "a file in UTF-16 says so": (
        "amazon2023",
        both(amazon2023, encoded("Toy.jsonl", "utf-16")),
        r"Toy\.jsonl, row 1: the file is UTF-16",
    ),
    "a NUL byte in a line names its row": (
        "amazon2023",
        both(
            raw_lines(review()),
            lambda f: (f / "Toy.jsonl").write_bytes((f / "Toy.jsonl").read_bytes() + b"\0\0\0\n"),
        ),
        r"Toy\.jsonl, row 3: a NUL byte",
    ),
    "an empty file of reviews leaves no event": (
        "amazon2023",
        both(amazon2023, lambda f: (f / "Toy.jsonl").write_text("")),
        "no event is left of 0",
    ),
    "files of different sets leave no event": (
        "amazon2023",
        lambda f: amazon2023(f, items=[item(parent_asin="other")]),
        "no event is left of 1: .*'event of an unknown item': 1",
    ),
    "metadata of 2014 that would run code is refused": (
        "amazon2014",
        lambda f: amazon2014(f, items=["__import__('os').getcwd()"]),
        r"meta_Toy\.json, row 1: not a Python literal",
    ),
    "metadata of 2014 that is cut names its row": (
        "amazon2014",
        lambda f: amazon2014(f, items=[flat(item()), "{'asin': "]),
        r"meta_Toy\.json, row 2: not a Python literal",
    ),
    "a date of Yelp that does not exist names the row": (
        "yelp",
        lambda f: yelp(f, reviews=[stars(date="2018-02-30 10:00:00")]),
        "row 2: field 'date' is '2018-02-30 10:00:00', expected a date",
    ),
    "a date of Yelp in another form names the row": (
        "yelp",
        lambda f: yelp(f, reviews=[stars(date="7 July 2018")]),
        "row 2: field 'date' is '7 July 2018', expected a date",
    ),
    "a photo of no business names the row": (
        "yelp",
        lambda f: yelp(f, photos=[{"photo_id": "p"}]),
        r"photos\.json, row 1: expected the texts business_id and photo_id",
    ),
    "an atomic file without types names the column": (
        "recbole",
        lambda f: recbole(f, head="user_id\titem_id:token\trating:float\ttimestamp:float\n"),
        r"Toy\.inter, row 1: column 'user_id' has no type",
    ),
    "an atomic file without times names the column": (
        "recbole",
        lambda f: recbole(f, head="user_id:token\titem_id:token\trating:float\twhen:float\n"),
        r"Toy\.inter, row 1: column timestamp is missing",
    ),
    "an atomic file with a short row names the row": (
        "recbole",
        lambda f: recbole(f, inter="u\ta\n"),
        r"Toy\.inter, row 3: 2 fields, the header has 4",
    ),
    "an atomic file with a long row names the row": (
        "recbole",
        lambda f: recbole(f, inter="u\ta\t4\t1600000000\t1\n"),
        r"Toy\.inter, row 3: 5 fields, the header has 4",
    ),
    "an atomic file with a word as time names the row": (
        "recbole",
        lambda f: recbole(f, inter="u\ta\t4\tnoon\n"),
        r"Toy\.inter, row 3: timestamp 'noon' is not a number",
    ),
    "an atomic file that is empty says so": (
        "recbole",
        lambda f: recbole(f, items=""),
        r"Toy\.item, row 1: the file is empty",
    ),
    "an atomic file in Latin-1 names row and byte": (
        "recbole",
        lambda f: recbole(f, inter="ü\ta\t4\t1600000000\n".encode("latin-1")),
        r"Toy\.inter, row 3: byte 0xfc is not UTF-8",
    ),
    "an atomic file with a NUL byte names its row": (
        "recbole",
        lambda f: recbole(f, inter=b"u\ta\t\0\t1600000000\n"),
        r"Toy\.inter, row 3: a NUL byte",
    ),
    "a table of JSON lines whose user is a list names row and column": (
        "table",
        both(
            table,
            lambda f: (f / "interactions.csv").unlink(),
            lambda f: dump(f / "interactions.jsonl", [{"user_id": ["u"], "item_id": "a", "timestamp": NOW}]),
        ),
        r"interactions\.jsonl, row 1: user_id: \['u'\] is no id",
    ),
    "a table of JSON lines without a time in one row names the row": (
        "table",
        both(
            table,
            lambda f: (f / "interactions.csv").unlink(),
            lambda f: dump(
                f / "interactions.jsonl",
                [{"user_id": "u", "item_id": "a", "timestamp": NOW}, {"user_id": "u", "item_id": "a"}],
            ),
        ),
        r"interactions\.jsonl, row 2: timestamp None is not a number",
    ),
    "a table whose later row has more fields names the line": (
        "table",
        lambda f: table(f, inter="u,a,4,1600000000,9\n"),
        r"interactions\.csv: not a whole csv table .*line 3",
    ),
    "a table with a row of times that are dates is refused": (
        "table",
        both(
            table,
            lambda f: (f / "interactions.csv").unlink(),
            lambda f: pd.DataFrame(
                {"user_id": ["u"], "item_id": ["a"], "timestamp": [pd.Timestamp(2020, 1, 1)]}
            ).to_parquet(f / "interactions.parquet"),
        ),
        r"interactions\.parquet, row 1: timestamp .* is not a number of seconds or milliseconds",
    ),
    "a table without a column of times names it": (
        "table",
        lambda f: table(f, head="user_id,item_id,rating,when\n"),
        r"interactions\.csv, row 1: column timestamp is missing",
    ),
    "a table with two columns of one name": (
        "table",
        lambda f: table(f, items="item_id,title,title\na,Pot,Pan\n"),
        r"items\.csv, row 1: column 'title' stands 2 times",
    ),
    "a table with a word as time names the row": (
        "table",
        lambda f: table(f, inter="u,a,4,noon\n"),
        r"interactions\.csv, row 3: timestamp 'noon' is not a number",
    ),
    "a table with more fields than its header names the row": (
        "table",
        lambda f: table(f, items="item_id,title\na,Pot,1\n"),
        r"items\.csv, row 2: more fields than the header",
    ),
    "a table that is not parquet inside is refused": (
        "table",
        both(
            table,
            lambda f: (f / "items.csv").unlink(),
            lambda f: (f / "items.parquet").write_bytes(b"PAR1 no"),
        ),
        r"items\.parquet: not a whole parquet table",
    ),
    "a table that is not there is named": (
        "table",
        both(table, lambda f: (f / "items.csv").unlink()),
        r"no items\.jsonl, items\.csv or items\.parquet",
    ),
    "a unit of time that is unknown is refused": (
        "table",
        lambda f: (table(f), {"options": {"time_unit": "days"}})[1],
        "options.time_unit: 'days', use s, ms or auto",
    ),
    # counted
    "a price that is NaN is missing": ("amazon2023", meta(price=math.nan), Counted()),
    "a price that is infinite is missing and counted": (
        "amazon2023",
        meta(price=math.inf),
        Counted(invalid={"price": 1}),
    ),
    "a price below zero is missing and counted": (
        "amazon2023",
        meta(price=-3.0),
        Counted(invalid={"price": 1}),
    ),
    "a price of a thousand billions is missing and counted": (
        "amazon2023",
        meta(price=1e12),
        Counted(invalid={"price": 1}),
    ),
    "a price that is a range is missing and counted": (
        "amazon2023",
        meta(price="$5.00 - $9.00"),
        Counted(invalid={"price": 1}),
    ),
    "a price that is true is missing and counted": (
        "amazon2023",
        meta(price=True),
        Counted(invalid={"price": 1}),
    ),
    "a price that is a record is missing and counted": (
        "amazon2023",
        meta(price={"usd": 5}),
        Counted(invalid={"price": 1}),
    ),
    "a price that is a word of 2018's style sheets is missing and counted": (
        "amazon2018",
        lambda f: amazon2018(f, items=[flat(item()), flat(item(parent_asin="b", price=".a-box{color:red}"))]),
        Counted(invalid={"price": 1}),
    ),
    "a title that is empty is missing": ("amazon2023", meta(title="  "), Counted()),
    "a title that is a record is missing and counted": (
        "amazon2023",
        meta(title={"en": "Pot"}),
        Counted(invalid={"title": 1}),
    ),
    "a title that is half a character is missing and counted": (
        "amazon2023",
        lambda f: amazon2023(f, items=[item(), json.dumps(item(parent_asin="b", title="\ud83d"))]),
        Counted(invalid={"title": 1}),
    ),
    "details that are no record have no brand": ("amazon2023", meta(details="none"), Counted()),
    "a picture above the folder is missing and counted": (
        "amazon2023",
        meta(images=[{"variant": "MAIN", "large": "../../secret.png"}]),
        Counted(invalid={"picture": 1}),
    ),
    "a picture at an absolute path is missing and counted": (
        "amazon2023",
        meta(images=["/etc/secret.png"]),
        Counted(invalid={"picture": 1}),
    ),
    "a picture above the folder by backslashes is missing and counted": (
        "table",
        lambda f: table(f, items="item_id,title,brand,price,picture\na,Pot,Acme,5,..\\..\\secret.png\n"),
        Counted(invalid={"picture": 1}),
    ),
    "an item listed again counts once": (
        "amazon2023",
        lambda f: amazon2023(f, items=[item(), item()]),
        Counted({"item listed again": 1}),
    ),
    "an item listed again with other values is counted apart": (
        "amazon2023",
        lambda f: amazon2023(f, items=[item(), item(title="Pan")]),
        Counted({"item listed again, with other values": 1}),
    ),
    "an item without an id is counted": (
        "amazon2023",
        lambda f: amazon2023(f, items=[item(), item(parent_asin=None)]),
        Counted({"item without an id": 1}),
    ),
    "an item whose id is a list is counted": (
        "amazon2023",
        lambda f: amazon2023(f, items=[item(), item(parent_asin=["b"])]),
        Counted({"item without an id": 1}),
    ),
    "an event of an unknown item is counted": (
        "amazon2023",
        raw_lines(review(parent_asin="z")),
        Counted({"event of an unknown item": 1}),
    ),
    "an event without a user is counted": (
        "amazon2023",
        raw_lines(review(user_id="")),
        Counted({"event without a user": 1}),
    ),
    "an event at time zero is counted": (
        "amazon2023",
        raw_lines(review(timestamp=0)),
        Counted({"event at time 0 or before": 1}),
    ),
    "an event before 1970 is counted": (
        "amazon2023",
        raw_lines(review(timestamp=-5)),
        Counted({"event at time 0 or before": 1}),
    ),
    "an event in the year 5000 is counted": (
        "amazon2023",
        raw_lines(review(timestamp=95_617_584_000_000)),
        Counted({"event in the future": 1}),
    ),
    "an event at a time beyond 64 bits is counted": (
        "amazon2023",
        raw_lines(review(timestamp=10**30)),
        Counted({"event in the future": 1}),
    ),
    "an event of Yelp in the future is counted": (
        "yelp",
        lambda f: yelp(f, reviews=[stars(date="4018-07-07 22:09:11")]),
        Counted({"event in the future": 1}),
    ),
    "an event of a table without a user is counted": (
        "table",
        lambda f: table(f, inter=",a,4,1600000000\n"),
        Counted({"event without a user": 1}),
    ),
    "an event of an atomic file without a user is counted": (
        "recbole",
        lambda f: recbole(f, inter="\ta\t4\t1600000000\n"),
        Counted({"event without a user": 1}),
    ),
    "a rating that is a word is missing and counted": (
        "amazon2023",
        raw_lines(review(rating="good")),
        Counted(invalid={"rating": 1}, events=2),
    ),
    "a rating that is infinite is missing and counted": (
        "amazon2023",
        raw_lines(json.dumps(review(rating=math.inf))),
        Counted(invalid={"rating": 1}, events=2),
    ),
    "a rating of an atomic file that is a word is missing and counted": (
        "recbole",
        lambda f: recbole(f, inter="u\ta\tgood\t1600000000\n"),
        Counted(invalid={"rating": 1}, events=2),
    ),
    "a rating of a table that is infinite is missing and counted": (
        "table",
        lambda f: table(f, inter="u,a,inf,1600000000\n"),
        Counted(invalid={"rating": 1}, events=2),
    ),
    "a review that is a number is missing and counted": (
        "amazon2023",
        raw_lines(review(text=7)),
        Counted(invalid={"review": 1}, events=2),
    ),
    "a review that is half a character is missing and counted": (
        "amazon2023",
        raw_lines(json.dumps(review(text="\ud83d"))),
        Counted(invalid={"review": 1}, events=2),
    ),
    # read
    "a category of digits with leading zeros stays as it was written": (
        "table",
        lambda f: table(f, items="item_id,title,brand,price,picture\na,007,0012,5,\nb,1.50,,,\n"),
        Counted(),
    ),
    "a user that is a number is its digits": ("amazon2023", raw_lines(review(user_id=12)), Counted(events=2)),
    "a time that is text is its number": (
        "amazon2023",
        raw_lines(review(timestamp=str(NOW))),
        Counted(events=2),
    ),
    "a time in seconds is read among milliseconds": (
        "amazon2023",
        raw_lines(review(timestamp=NOW // 1000)),
        Counted(events=2),
    ),
    "keys that nobody knows are passed over": (
        "amazon2023",
        raw_lines(review(more={"deep": [1, {"x": None}]})),
        Counted(events=2),
    ),
    "emoji and right-to-left text are read": (
        "amazon2023",
        raw_lines(review(text="\N{GRINNING FACE} \u05e9\u05dc\u05d5\u05dd \u202e")),
        Counted(events=2),
    ),
    "a mark of UTF-8 at the start is passed over": (
        "amazon2023",
        both(
            amazon2023,
            lambda f: (f / "Toy.jsonl").write_bytes(b"\xef\xbb\xbf" + (f / "Toy.jsonl").read_bytes()),
        ),
        Counted(),
    ),
    "lines that end as on Windows are read": (
        "amazon2023",
        both(
            raw_lines(review()),
            lambda f: (f / "Toy.jsonl").write_bytes((f / "Toy.jsonl").read_bytes().replace(b"\n", b"\r\n")),
        ),
        Counted(events=2),
    ),
    "a file that does not end with a line is read": (
        "amazon2023",
        both(raw_lines(review()), lambda f: cut(f, "Toy.jsonl", 1)),
        Counted(events=2),
    ),
    "all files packed are read": ("amazon2023", lambda f: amazon2023(f, pack=True), Counted()),
}


@pytest.mark.parametrize("sentence", FAULTS)
def test_fault(sentence, tmp_path):
    format, write, expected = FAULTS[sentence]
    options = write(tmp_path)
    block = spec(format, **(options if isinstance(options, dict) else {}))
    if isinstance(expected, str):
        with pytest.raises((ValueError, FileNotFoundError), match=expected):
            READERS[format](tmp_path, block)
        return
    items, events, quality = READERS[format](tmp_path, block)
    count = {k: v for k, v in quality["dropped"].items() if v}
    assert (count, quality["invalid"], len(events)) == (expected.dropped, expected.invalid, expected.events)
    assert quality["rows_read"] == len(events) + sum(v for k, v in count.items() if k.startswith("event"))
    assert events.timestamp.between(1, NOW * 2).all() and set(events.item_id) <= set(items.item_id)


def test_there_are_enough_faults():
    assert len(FAULTS) >= 40 and {f for f, _, _ in FAULTS.values()} == set(READERS)


@pytest.mark.parametrize("format", WRITERS)
def test_small_sets_without_a_fault_are_read(format, tmp_path):
    WRITERS[format](tmp_path)
    items, events, quality = READERS[format](tmp_path, spec(format))
    assert (
        len(items) >= 1
        and events.user_id.tolist() == ["v"]
        and not quality["invalid"]
        and not any(quality["dropped"].values())
    )


# values


@pytest.mark.parametrize(
    "raw, wanted",
    [("a\0b", "a\0b"), (5, "5"), ([" a", None, "b "], "a b"), ("\u2003x\x1c", "x"), ("", None), (None, None)],
)
def test_text_is_cleaned(raw, wanted):
    assert canonical_value(raw, Attribute("t", "text", "t")) == wanted


@pytest.mark.parametrize(
    "raw, unit, wanted",
    [
        ([1_600_000_000, NOW], "auto", [NOW, NOW]),
        ([5], "ms", [5]),
        ([NOW], "s", [NOW * 1000]),
        ([10**11 - 1, 10**11], "auto", [10**14 - 1000, 10**11]),
        ([-5, 0], "auto", [-5000, 0]),
    ],
)
def test_units_of_time_are_told_apart_by_the_rule(raw, unit, wanted):
    assert (
        milliseconds(np.array(raw), unit).tolist() == wanted
        and milliseconds(np.array(raw, float), unit).tolist() == wanted
    )


@settings(max_examples=200)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(st.characters()),
        lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3),
        max_leaves=8,
    )
)
def test_json_is_what_json_says(value):
    text = json.dumps(value)
    assert repr(decode_json(text)) == repr(json.loads(text))


@settings(max_examples=100)
@given(st.binary(max_size=200), st.integers(1, 50), st.booleans())
def test_blocks_put_together_are_the_file(content, size, pack):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        path.write_bytes(gzip.compress(content) if pack else content)
        if content.startswith(b"\x1f\x8b") and not pack:
            return
        try:
            wanted = content.decode()
        except UnicodeDecodeError:
            wanted = None
        if wanted is None or "\0" in wanted:
            with pytest.raises(
                ValueError, match=r"x, row \d+: (a NUL byte|byte 0x.. is not UTF-8|the file is UTF-16)"
            ):
                list(line_blocks(path, size))
            return
        wanted = wanted.removeprefix("\ufeff")
        assert b"".join(b for _, b in line_blocks(path, size)).decode() == wanted
        rows = dict(enumerate(wanted.split("\n"), 1))
        assert list(file_lines(path, size)) == [
            (k, v.strip(" \t\r")) for k, v in rows.items() if v.strip(" \t\r")
        ]


# the fast reader and the exact one

SAFE = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
ODD = (
    st.none()
    | st.booleans()
    | st.integers(-10, 2**70)
    | st.floats()
    | st.text(st.characters(), max_size=6)
    | st.lists(st.integers(), max_size=2)
    | st.dictionaries(SAFE, SAFE, max_size=2)
)
GOOD = st.fixed_dictionaries(
    {
        "user_id": SAFE.filter(bool),
        "parent_asin": st.sampled_from("abz"),
        "timestamp": st.integers(-(10**15), 10**15),
    },
    optional={
        "rating": st.none() | st.floats(-1e9, 1e9) | st.integers(0, 5),
        "title": st.none() | SAFE,
        "text": st.none() | SAFE,
        "more": ODD,
    },
)


@st.composite
def files(draw):
    "Lines as bytes: mostly good reviews, some with an odd value, a key twice, two on a line, or a torn line."
    out = []
    for record in draw(st.lists(GOOD, min_size=1, max_size=6)):
        kind = draw(st.sampled_from(["good"] * 6 + ["odd", "twice", "double", "torn", "blank", "spaced"]))
        if kind == "odd":
            record = record | {draw(st.sampled_from(sorted(FIELDS.values()))): draw(ODD)}
        text = json.dumps(record, ensure_ascii=draw(st.booleans()))
        if kind == "twice":
            text = '{"title": "first", ' + text[1:-1] + ', "title": "last"}'
        out.append(
            {
                "double": text * 2,
                "torn": text[: draw(st.integers(1, len(text)))],
                "blank": "\n" + text,
                "spaced": " " + text + "\t",
            }.get(kind, text)
        )
    return (draw(st.sampled_from(["\n", "\r\n"])).join(out) + draw(st.sampled_from(["", "\n"]))).encode(
        "utf-8", "surrogatepass"
    )


def outcome(path, quick, size, dates=False):
    "All that a reader says of a file: the events and the counts, or the error."
    invalid = Counter()
    try:
        batches = [as_events(b) for b in review_batches(path, FIELDS, invalid, quick, size, dates)]
    except ValueError as e:
        return str(e)
    return pa.concat_tables(batches).to_pydict() if batches else None, dict(invalid)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(content=files(), size=st.sampled_from([40, 200, 10_000]))
def test_the_fast_reader_and_the_exact_one_agree(tmp_path, content, size):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    assert repr(outcome(path, True, size)) == repr(outcome(path, False, size))


def test_the_fast_reader_is_used_for_good_lines():
    block = "".join(
        json.dumps(review(user_id=f"u{k}", text="für \N{GRINNING FACE}"), ensure_ascii=k % 2 == 0) + "\n"
        for k in range(50)
    ).encode()
    table = arrow_batch(block, FIELDS)
    assert table["text"].to_pylist() == ["für \N{GRINNING FACE}"] * 50
    assert table["user_id"].to_pylist() == [f"u{k}" for k in range(50)]


@pytest.mark.parametrize("dates", [False, True])
@pytest.mark.parametrize(
    "other, taken",  # other: what a raw review says otherwise; taken: does Arrow's parser take it?
    [
        ('"rating": 4', True),
        ('"rating": null', True),
        ('"rating": NaN', False),
        ('"rating": 1e999', False),
        ('"rating": 1e200', False),
        ('"rating": "5.0"', False),
        ('"rating": true', False),
        (f'"rating": {10**400}', False),
        ('"timestamp": 1.5', False),
        ('"timestamp": 1600000000000.0', False),
        (f'"timestamp": {2**63}', False),
        (f'"timestamp": {-(2**63) - 1}', False),
        ('"timestamp": "1600000000000"', False),
        ('"timestamp": "2018-02-30 00:00:00"', False),
        ('"timestamp": null', False),
        ('"user_id": 12', False),
        ('"user_id": null', False),
        (f'"parent_asin": {10**30}', False),
        ('"title": "a", "title": "b"', False),
        ('"title": 7, "title": "b"', False),
        ('"title": ["a"]', False),
        ('"title": {"text": "a"}', False),
        ('"text": "\\u0000 \\ud83d\\ude00 \\"\\n"', True),
        ('"text": "\\ud83d"', False),
        ('"text": "\\ude00\\ud83d"', False),
        ('"other": {"title": "deep", "text": [{"user_id": 1}]}', True),
        ('"other": 01', False),
    ],
)
def test_an_odd_value_is_read_as_the_exact_reader_reads_it(tmp_path, other, taken, dates):
    "In the middle of good reviews; a message names the row."
    time = '"2018-07-07 22:09:11"' if dates else "1600000000000"
    good = f'{{"user_id": "u", "parent_asin": "a", "timestamp": {time}, '
    if dates and other.startswith('"timestamp": 1'):
        taken = False
    path = tmp_path / "x.jsonl"
    values = ['"title": "t", "text": " good "'] * 6
    values[3] = other
    path.write_text("".join(good + value + "}\n" for value in values))
    both = [outcome(path, quick, 10_000, dates) for quick in (True, False)]
    assert repr(both[0]) == repr(both[1])
    assert "row 4" in both[0] if isinstance(both[0], str) else len(both[0][0]["user_id"]) == 6
    (_, block), *_ = line_blocks(path)
    assert (arrow_batch(block, FIELDS, dates) is not None) == taken


THING = (
    st.none()
    | SAFE
    | st.lists(st.none() | SAFE, max_size=2)
    | st.integers(-5, 10**10)
    | st.floats(allow_nan=False, allow_infinity=False)
)
ITEM = st.fixed_dictionaries(
    {"parent_asin": st.sampled_from(["a", "b", "c", "", None])},
    optional={
        "title": THING | ODD,
        "details": (
            st.none()
            | st.fixed_dictionaries({}, optional={"Brand": THING, "Color": THING, "more": ODD})
            | ODD
        ),
        "price": st.none() | st.floats(-1, 1e9) | ODD,
        "images": THING,
        "more": ODD,
    },
)


@st.composite
def item_files(draw):
    "Lines of items as bytes, some of them torn, blank, two on a line, or with a key twice."
    out = []
    for record in draw(st.lists(ITEM, min_size=1, max_size=8)):
        kind, text = (
            draw(st.sampled_from(["good"] * 12 + ["twice", "double", "torn", "blank", "spaced"])),
            json.dumps(record, ensure_ascii=draw(st.booleans())),
        )
        out.append(
            {
                "twice": '{"title": "first", ' + text[1:],
                "double": text * 2,
                "torn": text[:-1],
                "blank": "\n" + text,
                "spaced": " " + text,
            }.get(kind, text)
        )
    return (draw(st.sampled_from(["\n", "\r\n"])).join(out) + draw(st.sampled_from(["", "\n"]))).encode(
        "utf-8", "surrogatepass"
    )


def items_of(path, quick, size):
    "All that a reader says of a file of items: the table and the counts, or the error."
    schema, quality = Schema.from_params(SCHEMA | {"colour": {"type": "text", "source": "details.Color"}}), {}
    try:
        items = items_table(
            column_batches(path, ["parent_asin", *item_sources(schema)], quick, size),
            "parent_asin",
            schema,
            quality,
        )
    except ValueError as e:
        return str(e)
    return items.to_dict("list"), [str(t) for t in items.dtypes], quality["dropped"], quality["invalid"]


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(content=item_files(), size=st.sampled_from([40, 200, 10_000]))
def test_the_decoder_and_the_exact_reader_of_items_agree(tmp_path, content, size):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    assert repr(items_of(path, True, size)) == repr(items_of(path, False, size))


def test_the_decoder_is_used_for_good_items():
    block = "".join(
        json.dumps(
            item(parent_asin=f"p{k}", title=["für", "\N{GRINNING FACE}"], price=k), ensure_ascii=k % 2 == 0
        )
        + "\n"
        for k in range(50)
    ).encode()
    found = ColumnDecoder(["parent_asin", "title", "details.Brand", "price"])(block)
    assert (
        found["title"] == [["für", "\N{GRINNING FACE}"]] * 50
        and found["details.Brand"] == ["Acme"] * 50
        and found["price"] == list(range(50))
    )


# what is written comes back

WORDS = SAFE.map(lambda t: t.strip() or None)
PLAIN = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="<&"), max_size=10).map(
    lambda t: t.strip() or None
)
CELL = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"], exclude_characters='"'), max_size=10
).map(lambda t: t.strip() or None)
IDS = st.text(
    st.characters(min_codepoint=48, max_codepoint=122, categories=["Lu", "Ll"]), min_size=1, max_size=6
)
PRICES = st.none() | st.floats(0, 1e6)
TIMES = st.integers(1, NOW // 1000)


def sets(words, ids=IDS):
    "Items (id -> title, brand, price) and events (user, item, rating, seconds, review) of a made-up set."
    items = st.dictionaries(ids, st.tuples(words, words, PRICES), min_size=1, max_size=4)
    return items.flatmap(
        lambda i: st.tuples(
            st.just(i),
            st.lists(
                st.tuples(ids, st.sampled_from(sorted(i)), st.sampled_from([1.0, 2.5, 5.0]), TIMES, words),
                min_size=1,
                max_size=6,
            ),
        )
    )


def compare(result, made, reviews=True):
    "The canonical tables say what was made."
    items, events, quality = result

    def none(values):
        return [None if v is None or v != v else v for v in values]

    assert items.item_id.tolist() == list(made[0]) and none(items.title) == [
        t for t, _, _ in made[0].values()
    ]
    assert [list(b) for b in items.brand] == [[b] if b else [] for _, b, _ in made[0].values()] and none(
        items.price
    ) == [p for _, _, p in made[0].values()]
    assert list(zip(events.user_id, events.item_id, events.rating, events.timestamp)) == [
        (u, i, r, 1000 * t) for u, i, r, t, _ in made[1]
    ]
    assert none(events.review) == ([t for *_, t in made[1]] if reviews else [None] * len(made[1]))
    assert (
        not quality["invalid"]
        and not any(quality["dropped"].values())
        and quality["rows_read"] == len(made[1])
    )


ROUND = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
SIMPLE = {k: v for k, v in FLAT.items() if k != "picture"}


@ROUND
@given(made=sets(WORDS), pack=st.booleans())
def test_amazon2023_comes_back(tmp_path_factory, made, pack):
    folder = tmp_path_factory.mktemp("set")
    suffix = ".jsonl.gz" if pack else ".jsonl"
    dump(
        folder / f"meta_Toy{suffix}",
        [
            {"parent_asin": i, "title": t, "details": {"Brand": b}, "price": p}
            for i, (t, b, p) in made[0].items()
        ],
        pack=pack,
    )
    dump(
        folder / f"Toy{suffix}",
        [
            {
                "user_id": u,
                "parent_asin": i,
                "rating": r,
                "timestamp": 1000 * t if t > 10**8 else t,
                "text": x,
            }
            for u, i, r, t, x in made[1]
        ],
        pack=pack,
    )
    compare(
        READERS["amazon2023"](
            folder, spec("amazon2023", {k: v for k, v in SCHEMA.items() if k != "picture"})
        ),
        made,
    )


@ROUND
@given(made=sets(PLAIN), format=st.sampled_from(["amazon2018", "amazon2014"]), pack=st.booleans())
def test_older_amazon_sets_come_back(tmp_path_factory, made, format, pack):
    folder = tmp_path_factory.mktemp("set")
    end = ".gz" if pack else ""
    dump(
        folder / f"meta_Toy.json{end}",
        [{"asin": i, "title": t, "brand": b, "price": p} for i, (t, b, p) in made[0].items()],
        **({"dumps": repr} if format == "amazon2014" else {}),
        pack=pack,
    )
    name = f"reviews_Toy_5.json{end}" if format == "amazon2014" else f"Toy_5.json{end}"
    dump(
        folder / name,
        [
            {"reviewerID": u, "asin": i, "overall": r, "unixReviewTime": t, "reviewText": x}
            for u, i, r, t, x in made[1]
        ],
        pack=pack,
    )
    compare(READERS[format](folder, spec(format, SIMPLE)), made)


@ROUND
@given(made=sets(WORDS))
def test_yelp_comes_back(tmp_path_factory, made):
    folder = tmp_path_factory.mktemp("set")
    dump(
        folder / "yelp_academic_dataset_business.json",
        [{"business_id": i, "title": t, "brand": b, "price": p} for i, (t, b, p) in made[0].items()],
    )

    def date(t):
        return pd.Timestamp(t, unit="s").strftime("%Y-%m-%d %H:%M:%S")

    dump(
        folder / "yelp_academic_dataset_review.json",
        [
            {"user_id": u, "business_id": i, "stars": r, "date": date(t), "text": x}
            for u, i, r, t, x in made[1]
        ],
    )
    compare(READERS["yelp"](folder, spec("yelp", SIMPLE)), made)


@ROUND
@given(made=sets(CELL))
def test_atomic_files_come_back(tmp_path_factory, made):
    folder = tmp_path_factory.mktemp("set")

    def cell(v):
        return "" if v is None else repr(v) if isinstance(v, float) else str(v)

    dump(
        folder / "Toy.item",
        [
            "item_id:token\ttitle:token_seq\tbrand:token\tprice:float",
            *("\t".join(map(cell, (i, *v))) for i, v in made[0].items()),
        ],
    )
    dump(
        folder / "Toy.inter",
        [
            "user_id:token\titem_id:token\trating:float\ttimestamp:float",
            *("\t".join(map(cell, e[:4])) for e in made[1]),
        ],
    )
    (folder / "Toy.user").write_text("user_id:token\n")
    result = READERS["recbole"](folder, spec("recbole", SIMPLE))
    compare(result, made, reviews=False)
    assert "Toy.user is there and is not used" in result[2]["notes"][0]


@ROUND
@given(made=sets(CELL), form=st.sampled_from(["csv", "jsonl", "parquet"]))
def test_tables_come_back(tmp_path_factory, made, form):
    folder = tmp_path_factory.mktemp("set")
    frames = {
        "items": (
            pd.DataFrame(
                [(i, *v) for i, v in made[0].items()], columns=["item_id", "title", "brand", "price"]
            ).astype({"price": float})
        ),
        "interactions": pd.DataFrame(
            made[1], columns=["user_id", "item_id", "rating", "timestamp", "review"]
        ),
    }
    for name, frame in frames.items():
        path = folder / f"{name}.{form}"
        if form == "csv":
            frame.to_csv(path, index=False)
        elif form == "parquet":
            frame.to_parquet(path)
        else:
            dump(path, [{k: None if v != v else v for k, v in r.items()} for r in frame.to_dict("records")])
    compare(READERS["table"](folder, spec("table", SIMPLE)), made)


# files that are larger than what is kept of them


def write_many(folder, form, rows):
    """A set of which one item and one event are kept: the other items have no id, the other events an item
    that nobody lists."""
    items = pd.DataFrame(
        {"item_id": ["a"] + [None] * rows, "title": "A pot that boils", "brand": "Acme", "price": 5.0}
    )
    events = pd.DataFrame(
        {"user_id": "v", "item_id": ["a"] + ["gone"] * rows, "rating": 4.0, "timestamp": NOW}
    )
    for name, frame in (("items", items), ("interactions", events)):
        path = folder / f"{name}.{form}"
        if form == "csv":
            frame.to_csv(path, index=False)
        elif form == "parquet":
            frame.to_parquet(path, row_group_size=1000)
        elif form == "jsonl":
            frame.to_json(path, orient="records", lines=True)
        else:
            frame.rename(columns=lambda c: f"{c}:token").to_csv(
                folder / f"Toy.{'item' if name == 'items' else 'inter'}", sep="\t", index=False
            )


POOLS = []  # what is in a pool may live longer than a test


def peak_of(read) -> int:
    "Bytes that Python and numpy, and Arrow, had at once while a function ran, at most."
    usual = pa.default_memory_pool()
    POOLS.append(pool := pa.proxy_memory_pool(usual))
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        read()
        return tracemalloc.get_traced_memory()[1] + pool.max_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(usual)


@pytest.mark.parametrize("form", ["inter", "csv", "jsonl", "parquet"])
def test_rows_of_a_table_pass_by(form, tmp_path, monkeypatch):
    "Six times the rows take no more memory where nothing more is kept."
    monkeypatch.setattr("unirec.data.formats.ROWS", 1000)
    monkeypatch.setattr(larger_batches, "__defaults__", (1000,))
    for function in (line_blocks, file_lines):
        monkeypatch.setattr(function, "__defaults__", (1 << 14,))
    peaks, format = [], "recbole" if form == "inter" else "table"
    for rows in (4_000, 24_000):
        (folder := tmp_path / str(rows)).mkdir()
        write_many(folder, form, rows)
        found = []
        peaks.append(peak_of(lambda: found.extend(READERS[format](folder, spec(format, SIMPLE)))))
        assert (
            len(found[0]) == len(found[1]) == 1
            and found[2]["dropped"]["item without an id"]
            == found[2]["dropped"]["event of an unknown item"]
            == rows
        )
    assert peaks[1] < 1.3 * peaks[0], f"{peaks[0]:,} bytes became {peaks[1]:,}"


# prepare


def plain_core(events: pd.DataFrame, users: int, items: int) -> tuple[pd.DataFrame, dict]:
    "The k-core of a table by its ids, and counts of what was dropped."
    kept, rounds = events, 0
    while True:
        rounds += 1
        of_item = kept.groupby("item_id").item_id.transform("size")
        of_user = kept.groupby("user_id").user_id.transform("size")
        enough = (of_item >= items) & (of_user >= users)
        if enough.all():
            break
        kept = kept[enough]
    dropped = {
        "events": len(events) - len(kept),
        "users": events.user_id.nunique() - kept.user_id.nunique(),
        "items": events.item_id.nunique() - kept.item_id.nunique(),
        "rounds": rounds,
    }
    return kept, dropped


def plain_candidates(touched, targets, n_items, negatives, seed):
    "Candidates from the list of all items that a user has not touched."
    rng, drawn = np.random.default_rng(seed), []
    for target, seen in zip(targets, touched, strict=True):
        untouched = np.setdiff1d(np.arange(n_items), seen)
        drawn.append([target, *rng.choice(untouched, negatives, replace=False)])
    return np.array(drawn)


EVENTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6), st.integers(1, 9)), min_size=1, max_size=80)


@settings(max_examples=150)
@given(rows=EVENTS, users=st.integers(1, 4), items=st.integers(1, 4))
def test_numbers_give_what_the_ids_give(rows, users, items):
    "k-core and indices against the way by ids."
    events = pd.DataFrame(
        [(f"u{u}", f"i{i}", 1.0, t * DAY, None) for u, i, t in rows],
        columns=["user_id", "item_id", "rating", "timestamp", "review"],
    )
    catalogue = pd.DataFrame({"item_id": [f"i{k}" for k in range(7)]})
    block = spec("table", k_core_users=users, k_core_items=items)
    kept, dropped = plain_core(events, users, items)
    if kept.empty:
        with pytest.raises(ValueError, match="no event is left"):
            indexed(events, catalogue, block)
        return
    table, user_table, item_table, left_out = indexed(events, catalogue, block)
    assert user_table.user_id.tolist() == list(pd.unique(kept.user_id)) and left_out["core"] == dropped
    assert item_table.item_id.tolist() == [
        i for i in catalogue.item_id if items == 1 or i in set(kept.item_id)
    ]
    assert (
        user_table.user_id[table.user].tolist() == kept.user_id.tolist()
        and item_table.item_id[table.item].tolist() == kept.item_id.tolist()
    )
    assert table.timestamp.tolist() == kept.timestamp.tolist() and table.row.tolist() == kept.index.tolist()


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.integers(0, 11_999), min_size=1, max_size=8), min_size=1, max_size=5),
    st.sampled_from([12_000, 30_000]),
    st.integers(0, 5),
    st.integers(1, 4),
)
def test_candidates_are_those_of_the_plain_way(touched, n_items, seed, size):
    touched = [np.array(t) for t in touched]
    targets, users = (
        np.array([t[-1] for t in touched]),
        np.repeat(np.arange(len(touched)), [len(t) for t in touched]),
    )
    made = np.concatenate(
        list(
            sample_candidates(
                users, np.concatenate(touched), np.arange(len(targets)), targets, n_items, 7, seed, size
            )
        )
    )
    assert (made == plain_candidates(touched, targets, n_items, 7, seed)).all()


COUNTED = {
    "title": {"type": "text"},
    "mean": {"type": "number", "source": "train:mean_rating"},
    "count": {"type": "number", "source": "train:count"},
}


@pytest.fixture
def shop(tmp_path) -> tuple[Path, SetSpec]:
    """Six users with five events each over eight items, and one with a single event.

    Raw files and their block.
    """
    items = [{"item_id": f"i{k}", "title": f"item {k}"} for k in range(8)]
    rows = [
        {
            "user_id": f"u{u}",
            "item_id": f"i{(u + k * k) % 8}",
            "rating": 1.0 + k,
            "timestamp": 1_500_000_000 + 86_400 * k,
            "review": None if k else "first",
        }
        for u in range(6)
        for k in range(5)
    ]
    (tmp_path / "raw").mkdir()
    dump(tmp_path / "raw" / "items.jsonl", items)
    dump(
        tmp_path / "raw" / "interactions.jsonl",
        [
            *rows,
            {"user_id": "once", "item_id": "i0", "rating": 1.0, "timestamp": 1_500_000_000, "review": None},
        ],
    )
    return tmp_path, spec("table", COUNTED, k_core_users=3)


def test_a_user_with_one_event_is_left_out_and_counted(shop):
    report = prepare(shop[0] / "raw", shop[1], shop[0] / "out", 3)
    assert (
        report["k_core"] == {"events": 1, "users": 1, "items": 0, "rounds": 2}
        and report["dropped"] == {"event below the k-core": 1}
        and report["users"] == 6
    )
    assert report["rows_read"] == report["rows_kept"] + sum(report["dropped"].values())
    assert json.loads((shop[0] / "out" / "quality.json").read_text()) == report


def test_a_set_that_is_empty_after_the_k_core_is_an_error(shop):
    with pytest.raises(
        ValueError, match=r"no event is left after the k-core \(users >= 9, items >= 1\) of 31 events"
    ):
        prepare(shop[0] / "raw", spec("table", COUNTED, k_core_users=9), shop[0] / "out", 3)
    assert not (shop[0] / "out").exists()


def test_users_that_cannot_be_split_are_an_error(shop):
    with pytest.raises(ValueError, match="1 users have fewer than 3 events"):
        prepare(shop[0] / "raw", spec("table", COUNTED), shop[0] / "out", 3)


@pytest.mark.parametrize("rule, kept", [("keep", 31), ("first", 19), ("last", 19)])
def test_repeated_pairs_are_kept_or_not_by_the_rule(shop, rule, kept):
    report = prepare(
        shop[0] / "raw",
        spec("table", {"title": {"type": "text"}}, k_core_users=3, repeats=rule),
        shop[0] / "out",
        3,
    )
    assert report["dropped"].get("event of a repeated pair", 0) == 31 - kept and report["repeated_pairs"] == (
        12 if rule == "keep" else 0
    )
    assert report["rows_read"] == report["rows_kept"] + sum(report["dropped"].values())


def tables_of(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("step", ["write_part", "check_candidates", "write_candidates"])
@pytest.mark.parametrize("before", [False, True], ids=["nothing was there", "an older run was there"])
def test_a_run_that_is_killed_half_way_leaves_nothing_that_looks_whole(shop, step, before):
    folder, block = shop
    prepare(folder / "raw", block, folder / "wanted", 3)
    if before:
        prepare(folder / "raw", block, folder / "out", 2)
    old = tables_of(folder / "out") if before else None
    code = f"""
import os, sys
sys.path[:0] = {[str(Path(preparing.__file__).parents[2]), str(Path(__file__).parent)]!r}
import test_readers as t, unirec.data.prepare as p
from pathlib import Path
p.{step} = lambda *a: os._exit(9)
spec = t.spec("table", t.COUNTED, k_core_users=3)
p.prepare(Path({str(folder / "raw")!r}), spec, Path({str(folder / "out")!r}), 3)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 9
    assert (tables_of(folder / "out") == old) if before else not (folder / "out").exists()
    prepare(folder / "raw", block, folder / "out", 3)
    assert tables_of(folder / "out") == tables_of(folder / "wanted")
    assert sorted(p.name for p in folder.iterdir()) == ["out", "raw", "wanted"]


LIMITED = """
import resource, sys
sys.path[:0] = sys.argv[1:3]
import test_readers as t, unirec.data.prepare as p
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[5]),) * 2)
p.prepare(Path(sys.argv[3]), t.spec("table", t.COUNTED, k_core_users=3), Path(sys.argv[4]), 3)
"""


@pytest.mark.parametrize("limit", [500, 3000])
@pytest.mark.parametrize("before", [False, True], ids=["nothing was there", "an older run was there"])
def test_a_disk_that_takes_no_more_leaves_the_tables_as_they_were(shop, limit, before):
    "The system refuses to let a file grow beyond the limit, as a quota does."
    folder, block = shop
    if before:
        prepare(folder / "raw", block, folder / "out", 2)
    old = tables_of(folder / "out") if before else None
    places = [
        Path(preparing.__file__).parents[2],
        Path(__file__).parent,
        folder / "raw",
        folder / "out",
        limit,
    ]
    run = subprocess.run([sys.executable, "-c", LIMITED, *map(str, places)], capture_output=True, text=True)
    assert (
        run.returncode == 1
        and "raise the limit on file sizes" in run.stderr
        and "no table was written or replaced" in run.stderr
    )
    assert (tables_of(folder / "out") == old) if before else not (folder / "out").exists()
    assert sorted(p.name for p in folder.iterdir()) == ["out", "raw"] if before else ["raw"]


def test_a_folder_that_is_read_only_is_named(shop):
    "Root may write anywhere: for this test it is nobody."
    prepare(shop[0] / "raw", shop[1], shop[0] / "out", 3)
    with tempfile.TemporaryDirectory() as place:
        shutil.copytree(shop[0] / "raw", Path(place) / "raw")
        for path, mode in ((Path(place) / "raw", 0o755), (Path(place), 0o555)):
            path.chmod(mode)
        if root := os.geteuid() == 0:
            os.seteuid(65534)
        try:
            with pytest.raises(
                PermissionError, match="choose another folder or change its permissions.*no table was written"
            ) as e:
                prepare(Path(place) / "raw", shop[1], Path(place) / "out", 3)
        finally:
            if root:
                os.seteuid(0)
            Path(place).chmod(0o755)
        assert str(Path(place) / "out") in str(e.value) and os.listdir(place) == ["raw"]


# leaks, planted


def planted():
    "Tables without a leak: train, valid, test; aggregates; candidates; and what the checks need."
    rows = pd.DataFrame(
        [(u, (u + k) % 7, float(k + 1), (k + 1) * DAY) for u in range(3) for k in range(4)],
        columns=["user", "item", "rating", "timestamp"],
    ).assign(row=range(12))
    schema = Schema.from_params(
        {
            "mean": {"type": "number", "source": "train:mean_rating"},
            "count": {"type": "number", "source": "train:count"},
        }
    )
    parts = leave_one_out(in_order(rows))

    def made(frame):
        return pd.DataFrame({a.name: train_aggregate(frame, 7, a.source.partition(":")[2]) for a in schema})

    targets = parts["test"].item.to_numpy()
    lists = np.concatenate(
        list(
            sample_candidates(
                rows.user.to_numpy(), rows.item.to_numpy(), np.arange(len(targets)), targets, 7, 3
            )
        )
    )

    def check(parts=parts, items=made(parts["train"]), lists=lists):
        check_parts(parts, 12)
        check_aggregates(items, parts["train"], schema)
        list(
            check_candidates(
                iter([lists]), rows.user.to_numpy(), rows.item.to_numpy(), np.arange(len(targets)), targets, 7
            )
        )

    return rows, parts, made, lists, check


def test_tables_without_a_leak_pass():
    planted()[-1]()


@pytest.mark.parametrize(
    "leak",
    [
        "the target is in what precedes it",
        "an event later than the target is in train",
        "an event is in train and in test",
        "aggregates know valid and test",
        "a candidate was touched by the user",
    ],
)
def test_a_planted_leak_is_caught(leak):
    rows, parts, made, lists, check = planted()
    train, test = parts["train"], parts["test"]
    if leak == "the target is in what precedes it":
        with pytest.raises(ValueError, match="leak: user 0 has an event of valid before one of train"):
            check(parts | {"train": pd.concat([train, test[:1]]), "test": test[1:]})
    elif leak == "an event later than the target is in train":
        late = train.assign(timestamp=train.timestamp.where(train.row != 5, 99 * DAY))
        with pytest.raises(ValueError, match="leak: user 1 has an event of test before one of train"):
            check(parts | {"train": late})
    elif leak == "an event is in train and in test":
        with pytest.raises(ValueError, match="leak: an event is in more than one"):
            check(parts | {"train": pd.concat([train, test[:1]])})
    elif leak == "aggregates know valid and test":
        with pytest.raises(ValueError, match="leak: (mean|count) of item"):
            check(items=made(rows))
    else:
        lists = lists.copy()
        lists[2, 1] = rows.item[8]
        with pytest.raises(ValueError, match="leak: the candidates of user 2 hold item"):
            check(lists=lists)


@pytest.mark.parametrize("planted_in", ["split", "train_aggregate", "sample_candidates"])
def test_every_preparation_checks(shop, monkeypatch, planted_in):
    "A leak that is planted in the steps themselves stops `prepare`, which leaves no tables."
    whole = getattr(preparing, planted_in)
    if planted_in == "split":

        def leaky(frame, rule):
            return (lambda p: p | {"train": pd.concat([p["train"], p["test"][:1]]), "test": p["test"]})(
                whole(frame, rule)
            )
    elif planted_in == "train_aggregate":

        def leaky(train, n, what):
            return whole(train, n, what) + 1
    else:

        def leaky(user, item, *rest):
            return (np.where(np.arange(c.shape[1]) == 1, item[0], c) for c in whole(user, item, *rest))

    monkeypatch.setattr(preparing, planted_in, leaky)
    with pytest.raises(ValueError, match="leak"):
        prepare(shop[0] / "raw", shop[1], shop[0] / "out", 3)
    assert not (shop[0] / "out").exists()
