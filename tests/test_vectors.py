"""The vector cache: killed at every line, two processes at once, a full disk, every byte damaged.

It never gives a wrong vector.
"""

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import cache_toy
import numpy as np
import pandas as pd
import pytest
from cache_toy import WORDS, Tower, truth
from hypothesis import given, settings
from hypothesis import strategies as st

from unirec.data.schema import Schema
from unirec.encoders.cache import Cached, VectorCache, hashes, merge_parts
from unirec.encoders.catalogue import load_catalogue
from unirec.encoders.store import build_store

SCRIPT = Path(cache_toy.__file__)
DISTINCT = len(set(WORDS))
CUT = sum(len(w) > 10 for w in WORDS)
LINES = 1000  # more than a whole run executes in the cache's module
STRIDE = 23  # of the lines at which a process is killed; no period of the loop over chunks


def run(folder: Path, attempts: dict) -> dict:
    "Run the script; what each attempt ended with."
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), json.dumps(attempts)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def asked(folder: Path, name: str) -> Counter:
    "What the tower of a run was asked, over all its attempts."
    return Counter((folder / f"{name}.asked").read_text().splitlines())


FULL = [(call, n) for call in ("fsync", "replace") for n in (1, 2, 3, 4, 7)]
TORN = (1, 2, 3, 5)


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> tuple[Path, dict]:
    "Every run in real processes: the folder of caches, and how each attempt ended."
    folder = tmp_path_factory.mktemp("killed")
    attempts = (
        {"count": [{"kill_line": 0}]}
        | {f"torn_{n}": [{"kill_write": n}, {}] for n in TORN}
        | {f"full_{call}_{n}": [{"full": [call, n]}, {}] for call, n in FULL}
    )
    attempts |= {
        "both": [[{"wait": 0.05}, {"wait": 0.05}, {"words": 20}]],
        "unlocked": [[{"wait": 0.03, "unlocked": True}, {"wait": 0.03, "unlocked": True}], {}],
        "waits": [[{"wait": 0.05, "kill_write": 3}, {"wait": 0.01}]],
        "small": [{"largest": 600}, {}],
    }
    attempts |= {f"line_{n}": [{"kill_line": n}, {}] for n in range(1, LINES, STRIDE)}
    return folder, run(folder, attempts)


# killed


def test_killed_at_any_line(ended):
    folder, runs = ended
    plain = runs["count"][0]
    assert plain["right"] and plain["cut"] == CUT and LINES / 2 < plain["lines"] < LINES, (
        "the range of lines above is to cover a whole run"
    )
    for n in range(1, LINES, STRIDE):
        first, second = runs[f"line_{n}"]
        assert first["code"] == (-9 if n <= plain["lines"] else 0) and second["code"] == 0, (n, first, second)
        assert second["right"] and second["cut"] == CUT and not second["log"], (n, second)
        assert not list((folder / f"line_{n}").rglob("*.tmp")), n
        twice = sum(asked(folder, f"line_{n}").values()) - DISTINCT
        assert 0 <= twice <= Tower.chunk, f"line {n}: what was written before the kill is encoded anew"


@pytest.mark.parametrize("n", TORN)
def test_killed_in_the_middle_of_a_file(ended, n):
    first, second = ended[1][f"torn_{n}"]
    assert first["code"] == -9 and second["right"] and second["cut"] == CUT
    assert not list((ended[0] / f"torn_{n}").rglob("*.tmp"))


# two at once


def test_two_processes_ask_once(ended):
    assert [e["right"] for e in ended[1]["both"]] == [True] * 3
    assert set(asked(ended[0], "both").values()) == {1}


def test_two_processes_without_a_lock_are_right_too(ended):
    assert [e["right"] for e in ended[1]["unlocked"]] == [True] * 3 and not any(
        e["log"] for e in ended[1]["unlocked"]
    )


def test_one_waits_for_one_that_is_killed(ended):
    first, second = ended[1]["waits"]
    assert {first["code"], second["code"]} <= {0, -9} and second["right"]


# a full disk


@pytest.mark.parametrize("call, n", FULL)
def test_a_full_disk_is_an_error_and_then_forgotten(ended, call, n):
    first, second = ended[1][f"full_{call}_{n}"]
    assert first["code"] == 0 and (first["right"] or "No space left" in first["said"][0])
    assert n > 4 or not first["right"]
    assert second["right"] and second["cut"] == CUT
    assert not list((ended[0] / f"full_{call}_{n}").rglob("*.tmp"))


def test_a_disk_that_takes_a_part_of_a_file(ended):
    "A real one: the system refuses to let a file grow beyond 600 bytes, in the middle of writing it."
    first, second = ended[1]["small"]
    assert first["right"] is None and "make room and run again" in first["said"][0]
    assert second["right"] and sum(asked(ended[0], "small").values()) <= DISTINCT + Tower.chunk


# several processes that share the work


def test_two_launched_processes_share_the_values(tmp_path):
    "Each encodes half and writes parts of its own; the store is that of one process; a rerun asks nothing."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            str(port),
            str(SCRIPT),
            str(tmp_path),
        ],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lists = [(tmp_path / f"first.{rank}.asked").read_text().splitlines() for rank in (0, 1)]
    assert set(Counter(lists[0] + lists[1]).values()) == {1} and set(lists[0] + lists[1]) == {
        *WORDS,
        "title",
        "item id",
        "free text",
        "identity",
    }
    assert abs(len(lists[0]) - len(lists[1])) <= 3 and not list(tmp_path.glob("again.*.asked"))
    items, schema = (
        pd.DataFrame({"item_id": [str(i) for i in range(len(WORDS))], "title": WORDS}),
        Schema.from_params({"title": {"type": "text"}}),
    )
    build_store(
        items,
        np.ones(len(WORDS), bool),
        schema,
        [WORDS[0], None],
        {"text": Tower(tmp_path / "alone.asked")},
        None,
        tmp_path / "alone",
    )
    for run in ("first", "again"):
        for name in ("vectors.safetensors", "hashes.safetensors"):
            assert (tmp_path / run / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


# damage


@pytest.fixture
def filled(tmp_path):
    "A cache with one part of three words."
    cached = Cached(Tower(tmp_path / "asked"), tmp_path / "cache")
    cached(WORDS[:3])
    return tmp_path, next(cached.cache.folder.glob("*.npy"))


def after_damage(folder: Path, part: Path, data: bytes) -> list[str]:
    "Put damaged bytes in a part's place; the vectors must be right, and what was said is returned."
    log = []
    part.write_bytes(data)
    cached = Cached(Tower(folder / "asked"), folder / "cache", say=log.append)
    assert np.array_equal(cached(WORDS[:3]), truth(WORDS[:3])) and cached.asked == 3
    for path in cached.cache.folder.glob("*.npy"):
        path.unlink()
    return log


def test_every_damaged_byte_is_seen(filled):
    folder, part = filled
    data = part.read_bytes()
    for at in range(len(data)):
        log = after_damage(folder, part, data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :])
        assert len(log) == 1 and "encoded anew" in log[0], at


def test_every_truncation_is_seen(filled):
    folder, part = filled
    data = part.read_bytes()
    for length in [*range(0, len(data), 5), len(data) - 1]:
        assert len(after_damage(folder, part, data[:length])) == 1, length
    assert len(after_damage(folder, part, data + b"\0")) == 1


def test_a_renamed_part_is_not_believed(filled):
    folder, part = filled
    stamp, _, name = part.stem.partition("-")
    other = part.with_name(f"{stamp}-{name[::-1]}.npy")
    part.rename(other)
    log = []
    assert (
        np.array_equal(
            Cached(Tower(folder / "asked"), folder / "cache", say=log.append)(WORDS[:3]), truth(WORDS[:3])
        )
        and len(log) == 1
    )


def test_a_part_of_another_encoder_is_not_found(filled):
    folder, part = filled

    class Other(Tower):
        key = Tower.key | {"dtype": "bfloat16"}

    other = Cached(Other(folder / "asked"), folder / "cache")
    other(WORDS[:3])
    assert other.asked == 3 and other.cache.folder != part.parent


# any history of questions


@settings(max_examples=25)
@given(st.lists(st.lists(st.sampled_from(WORDS), max_size=12), max_size=6))
def test_any_questions_in_any_order(tmp_path_factory, questions):
    folder, seen = tmp_path_factory.mktemp("any"), set()
    for words in questions:
        cached = Cached(Tower(folder / "asked"), folder / "cache")
        found = cached(words)
        assert found.shape == (len(words), Tower.width) and (not words or np.array_equal(found, truth(words)))
        assert cached.asked == len(set(words) - seen) and cached.cut == sum(len(w) > 10 for w in words)
        seen |= set(words)


def test_a_merge_that_is_killed_changes_nothing(tmp_path, monkeypatch):
    cache = VectorCache(tmp_path, {})
    for i in range(4):
        cache.add(hashes([f"{i}", "same"]), np.full((2, 3), i, float))
    names = hashes([*"0123", "same"])
    before = cache.read(cache.find(names))[0]
    monkeypatch.setattr(
        Path, "unlink", lambda self, missing_ok=False: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        merge_parts(cache, most=1)
    monkeypatch.undo()
    again = VectorCache(tmp_path, {})
    assert len(again.parts) == 5 and np.array_equal(again.read(again.find(names))[0], before)
    assert (
        merge_parts(again, most=1) == 5
        and len(again) == 5
        and np.array_equal(again.read(again.find(names))[0], before)
    )


def test_a_reader_survives_a_merge(tmp_path):
    writer, reader = VectorCache(tmp_path, {}), VectorCache(tmp_path, {})
    for i in range(3):
        writer.add(hashes([f"{i}"]), np.full((1, 3), i, float))
    reader.refresh()
    assert merge_parts(writer, most=1) == 3
    # its maps outlive the files
    assert reader.read(reader.find(hashes("012")))[0][:, 0].tolist() == [0, 1, 2]
    reader.refresh()
    assert len(reader.parts) == 1 and reader.read(reader.find(hashes("012")))[0][:, 0].tolist() == [0, 1, 2]


# the store's own files


@pytest.mark.parametrize("n", range(1, 8))
def test_a_store_killed_while_it_is_replaced_is_an_error_or_right(tmp_path, monkeypatch, n):
    """The n-th file operation never happens: what is read is the old store, the new one, or an error, also
    where the old one has no checksums."""
    schema = Schema.from_params({"title": {"type": "text"}})

    class Better(Tower):
        key = Tower.key | {"dtype": "bfloat16"}

    items = pd.DataFrame({"item_id": ["a", "b"], "title": ["red mug", "pot"]})

    def build(tower):
        return build_store(
            items, np.ones(2, bool), schema, [], {"text": tower(tmp_path / "asked")}, None, tmp_path / "store"
        )

    def read():
        return (tmp_path / "store" / "vectors.safetensors").read_bytes(), json.loads(
            (tmp_path / "store" / "manifest.json").read_text()
        )["encoders"]["text"].get("dtype")

    build(Tower)
    (tmp_path / "store" / "checksums.json").unlink()
    before, real, real_truth, count = read(), os.replace, cache_toy.truth, []
    monkeypatch.setattr(cache_toy, "truth", lambda words: real_truth(words) + 1)

    def stop(*args):
        count.append(1)
        if len(count) == n:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(os, "replace", stop)
    stopped = False
    try:
        build(Better)
    except KeyboardInterrupt:
        stopped = True
    monkeypatch.setattr(os, "replace", real)
    assert stopped == (n <= 4)
    try:
        load_catalogue(tmp_path / "store", items, schema)
    except ValueError as e:
        assert "run the embed stage again" in str(e) and stopped
    else:
        after = read()
        assert after == before if n == 1 else (after[0] != before[0] and after[1] == "bfloat16")
