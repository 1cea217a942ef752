"""The vector cache with a stand-in tower in processes that are killed, starved of disk or run at once.

It belongs to test_vectors.py. `python tests/cache_toy.py FOLDER '{"name": [{...}, {...}]}'` runs each name's
attempts one after the other, each in a forked process (imports are paid once); a list inside the list is
run at once. Without the JSON it is one of several launched processes. Printed as JSON: name -> what each
attempt ended with, its exit code (minus the signal) and what it says of itself.
"""

import errno
import json
import os
import resource
import signal
import sys
import time
import zlib
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from unirec.core import device
from unirec.encoders import cache as vectors

WORDS = [f"word {i % 23} " + "x" * (i % 5) for i in range(40)]
WIDTH = 8


def truth(words) -> np.ndarray:
    "What the tower says of texts: a vector that the text's own bytes seed."
    return np.array(
        [np.random.default_rng(zlib.crc32(w.encode())).normal(size=WIDTH) for w in words], np.float32
    ).reshape(-1, WIDTH)


class Tower:
    "A stand-in with a model's interface that writes down what it is asked."

    key, width, chunk = {"encoder": "stand-in", "weights_sha256": {"none": "0"}}, WIDTH, 7

    def __init__(self, log: Path, wait: float = 0.0):
        self.log, self.wait = log, wait

    def __call__(self, words):
        with self.log.open("a") as f:
            f.writelines(f"{w}\n" for w in words)
        time.sleep(self.wait)
        self.was_cut = np.array([len(w) > 10 for w in words])
        return truth(words)


def kill_at_line(n: int, count: list) -> None:
    "Kill this process before the n-th line of unirec/encoders/cache.py that it executes; n = 0: count them."

    def local(frame, event, arg):
        if event == "line":
            count[0] += 1
            if count[0] == n:
                os.kill(os.getpid(), signal.SIGKILL)
        return local

    sys.settrace(lambda frame, event, arg: local if frame.f_code.co_filename == vectors.__file__ else None)


def kill_in_write(n: int) -> None:
    "Kill this process in the middle of the n-th file that it writes: half of its bytes are there."
    real, seen = os.fsync, []

    def fsync(handle):
        if not os.path.isdir(f"/proc/self/fd/{handle}"):
            seen.append(handle)
            if len(seen) == n:
                os.ftruncate(handle, os.fstat(handle).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
        real(handle)

    os.fsync = fsync


def fail(call: str, n: int) -> None:
    "The n-th call of os.fsync or os.replace says that the disk is full."
    real, count = getattr(os, call), []

    def broken(*args):
        count.append(1)
        if len(count) == n:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    setattr(os, call, broken)


def attempt(
    folder: Path,
    out: Path,
    *,
    kill_line: int | None = None,
    kill_write: int = 0,
    full: list | None = None,
    largest: int = 0,
    wait: float = 0.0,
    words: int = len(WORDS),
    unlocked: bool = False,
) -> None:
    "Encode the words, and say whether all vectors are right."
    count, said, log = [0], [], []
    if largest:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    if full:
        fail(*full)
    if kill_write:
        kill_in_write(kill_write)
    if kill_line is not None:
        kill_at_line(kill_line, count)
    if unlocked:
        vectors.VectorCache.lock = lambda self: vectors.nullcontext()
    try:
        once = vectors.Cached(Tower(folder.parent / f"{folder.name}.asked", wait), folder, say=log.append)
        found = once(WORDS[:words])
        right, cut = bool(np.array_equal(found, truth(WORDS[:words]))), once.cut
    except OSError as e:
        said, right, cut = [str(e)], None, None
    finally:
        sys.settrace(None)
    if largest:
        resource.setrlimit(resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE)[1:] * 2)
    out.write_text(json.dumps({"right": right, "cut": cut, "said": said, "log": log, "lines": count[0]}))


def start(folder: Path, out: Path, options: dict) -> int:
    "Fork an attempt; its process id."
    if pid := os.fork():
        return pid
    try:
        attempt(folder, out, **options)
        os._exit(0)
    except BaseException as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr, flush=True)
        os._exit(1)


def launched(top: Path) -> None:
    """One of several processes (accelerate launch): build a store of the words, the second process being
    slow to look; print what this one asked."""
    import pandas as pd

    from unirec.data.schema import Schema
    from unirec.encoders.store import build_store

    group = device.process_group()
    if group.process_index == 1:
        real = vectors.VectorCache.refresh
        vectors.VectorCache.refresh = lambda self: (time.sleep(0.2), real(self))[1]
    items, schema = (
        pd.DataFrame({"item_id": [str(i) for i in range(len(WORDS))], "title": WORDS}),
        Schema.from_params({"title": {"type": "text"}}),
    )
    for run in ("first", "again"):
        tower = Tower(top / f"{run}.{group.process_index}.asked")
        build_store(
            items,
            np.ones(len(WORDS), bool),
            schema,
            [WORDS[0], None],
            {"text": tower},
            None,
            top / run,
            top / "cache",
            group,
        )
    group.destroy_process_group()


def main() -> None:
    "Run all attempts."
    if len(sys.argv) == 2:
        return launched(Path(sys.argv[1]))
    top, ended = Path(sys.argv[1]), {}
    for name, attempts in json.loads(sys.argv[2]).items():
        ended[name] = []
        for options in attempts:
            together = options if isinstance(options, list) else [options]
            outs = [top / f"{name}.{i}.json" for i in range(len(together))]
            for path in outs:
                path.unlink(missing_ok=True)
            pids = [start(top / name, path, o) for path, o in zip(outs, together)]
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
            ended[name] += [
                {"code": code} | (json.loads(path.read_text()) if path.exists() else {})
                for code, path in zip(codes, outs)
            ]
    print(json.dumps(ended))


if __name__ == "__main__":
    main()
