"""Downloads against a real server on loopback that cuts, stalls, lies and changes its mind."""

import errno
import gzip
import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import zipfile
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from unirec.core.files import advise_on_disk_errors, gunzip, sibling_path, unzip, write_json
from unirec.core.params import read_params
from unirec.data import sources
from unirec.data.download import FetchError, Patience, fetch
from unirec.data.pictures import PictureLimits, examine, fetch_pictures, packed_names, picture_urls
from unirec.data.prepare import prepare
from unirec.data.releases import RELEASES, RawFile, Release, five_core, join_reviews
from unirec.data.schema import SetSpec
from unirec.data.sources import ManualDownload, download, fetch_hub, fetch_release
from unirec.data.values import clean_image
from unirec.encoders.modalities import picture_bytes

ROOT = Path(__file__).resolve().parent.parent
BODY = bytes(range(256)) * 1200
RIGHT = hashlib.sha256(BODY).hexdigest()
QUICK = Patience(attempts=3, wait=0.001, longest=0.5, connect=5.0, idle=5.0)


class Handler(BaseHTTPRequestHandler):
    "Answers as the server's routes say: path -> function of (handler, how often the path was asked before)."

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        with self.server.lock:
            n = len(self.server.asked.setdefault(self.path, []))
            self.server.asked[self.path].append(dict(self.headers))
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        try:
            self.server.routes.get(self.path, status(404))(self, n)
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with self.server.lock:
                self.server.now -= 1

    do_HEAD = do_GET

    def head(self, code, **headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def body(self, data):
        self.wfile.write(data)
        self.server.sent += len(data)

    def hang_up(self):
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


class Server(ThreadingHTTPServer):
    "Counts what it is asked, what it sends and how many ask at once."

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.routes, self.asked, self.sent, self.lock, self.now, self.most = {}, {}, 0, threading.Lock(), 0, 0

    def handle_error(self, *args):
        pass

    def url(self, path):
        return f"http://127.0.0.1:{self.server_port}{path}"

    def ranges(self, path):
        return [h.get("Range") for h in self.asked.get(path, [])]


def status(code, **headers):
    return lambda h, n: h.head(code, Content_Length=0, **headers)


def then(*answers):
    "One answer after the other; the last one stays."
    return lambda h, n: answers[min(n, len(answers) - 1)](h, n)


def file(data=BODY, etag='"v1"', ranges=True, obey=True, cut=None, length=True, step=None):
    """A file: with or without Range, with or without regard to If-Range, cut after so many bytes of this
    answer."""

    def answer(h, n):
        wanted = h.headers.get("Range")
        fits = not obey or h.headers.get("If-Range") in (None, etag)
        start = int(wanted[6:-1]) if wanted and ranges and fits else 0
        part = data[start:]
        headers = ({"ETag": etag} if etag else {}) | (
            {"Content_Length": len(part)} if length else {"Connection": "close"}
        )
        if start:
            h.head(206, Content_Range=f"bytes {start}-{len(data) - 1}/{len(data)}", **headers)
        else:
            h.head(200, **headers)
        stop = min(len(part), cut if cut is not None else step or len(part))
        h.body(part[:stop])
        if stop < len(part) or not length:
            h.hang_up()

    return answer


@pytest.fixture()
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    s = Server()
    threading.Thread(target=s.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield s
    s.shutdown()
    s.server_close()


@pytest.fixture()
def dead():
    "An address at which nobody listens."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{s.getsockname()[1]}/f.bin"


def left(folder):
    "What lies in a folder, without locks."
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".lock")


HALF = len(BODY) // 2
FINE = {  # name -> answers in order, ranges that must have been asked
    "plain": ([file()], [None]),
    "cut, then the rest": ([file(cut=HALF), file()], [None, f"bytes={HALF}-"]),
    "cut, and Range is ignored": ([file(cut=HALF), file(ranges=False)], [None, f"bytes={HALF}-"]),
    "cut, and only the length is known": (
        [file(cut=HALF, etag=None), file(etag=None)],
        [None, f"bytes={HALF}-"],
    ),
    "changed in between": ([file(b"old" * 9000, '"v0"', cut=9000), file()], [None, "bytes=9000-"]),
    "changed, and If-Range is ignored": (
        [file(b"old" * 9000, '"v0"', cut=9000), file(obey=False), file()],
        [None, "bytes=9000-", None],
    ),
    "changed, as long as before, and If-Range is ignored": (
        [file(BODY[::-1], '"v0"', cut=HALF), file(obey=False), file()],
        [None, f"bytes={HALF}-", None],
    ),
    "changed in length, and no validator": (
        [file(b"old" * 9000, None, cut=9000), file(etag=None, obey=False), file(etag=None)],
        [None, "bytes=9000-", None],
    ),
    "only a weak ETag, cut": ([file(etag='W/"a"', cut=HALF), file(etag='W/"a"')], [None, f"bytes={HALF}-"]),
    "kept too much: 416": ([file(cut=HALF), status(416), file()], [None, f"bytes={HALF}-", None]),
    "cut before the first byte": ([lambda h, n: h.hang_up(), file()], [None, None]),
    "429, wait 0": ([status(429, Retry_After="0"), file()], [None, None]),
    "429, wait a moment": (
        [status(429, Retry_After=formatdate(time.time() - 5, usegmt=True)), file()],
        [None, None],
    ),
    "429 in the middle": (
        [file(cut=HALF), status(429, Retry_After="0"), file()],
        [None, f"bytes={HALF}-", f"bytes={HALF}-"],
    ),
    "408": ([status(408), file()], [None, None]),
    "500": ([status(500), file()], [None, None]),
    "503 twice": ([status(503), status(503), file()], [None] * 3),
    "cut more often than there are attempts": (
        [file(step=len(BODY) // 12 + 1)],
        [None] + [f"bytes={(len(BODY) // 12 + 1) * i}-" for i in range(1, 12)],
    ),
}


@pytest.mark.parametrize("case", FINE)
def test_a_file_comes_whole(case, server, tmp_path):
    answers, ranges = FINE[case]
    server.routes["/f.bin"] = then(*answers)
    path = fetch([server.url("/f.bin")], tmp_path / "f.bin", patience=QUICK)
    assert path.read_bytes() == BODY
    assert server.ranges("/f.bin") == ranges
    assert left(tmp_path) == ["f.bin", "f.bin.sha256.json"]
    assert json.loads((tmp_path / "f.bin.sha256.json").read_text()) == {
        "from": server.url("/f.bin"),
        "sha256": RIGHT,
    }


def test_nothing_is_sent_twice(server, tmp_path):
    server.routes["/f.bin"] = then(file(cut=1000), status(500), file(cut=50_000), file())
    fetch([server.url("/f.bin")], tmp_path / "f.bin", RIGHT, QUICK)
    assert server.sent == len(BODY)
    assert left(tmp_path) == ["f.bin"]  # a pinned file needs no record


def test_waits_double_and_a_server_is_obeyed(server, tmp_path, monkeypatch):
    "What would be slept, without sleeping."
    slept = []
    monkeypatch.setattr("tenacity.nap.time.sleep", slept.append)
    server.routes["/f.bin"] = then(
        status(500), status(502), status(503), status(429, Retry_After="7"), file()
    )
    fetch([server.url("/f.bin")], tmp_path / "f.bin", RIGHT, Patience(attempts=5, wait=1.0, longest=60.0))
    assert [int(s) for s in slept[:3]] == [1, 2, 4] and slept[3] == 7.0 and len(slept) == 4
    assert any(s % 1 for s in slept[:3])  # with jitter


def endless(h, n):
    h.head(200, Transfer_Encoding="chunked")
    for _ in range(1000):  # 65 MB, which is endless for who takes half a megabyte
        h.wfile.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")


def trickle(h, n):
    h.head(200, Content_Length=len(BODY))
    for i in range(500):
        h.body(BODY[i : i + 1])
        h.wfile.flush()
        time.sleep(0.02)


def stall(h, n):
    h.head(200, Content_Length=len(BODY))
    h.body(BODY[:10])
    h.wfile.flush()
    time.sleep(1.5)


BAD = {  # name -> answer, cause, how often it is asked
    "401": (status(401), "401 Unauthorized", 1),
    "403": (status(403), "403 Forbidden", 1),
    "404": (status(404), "404 Not Found", 1),
    "410": (status(410), "410 Gone", 1),
    "500 for ever": (status(500), "500 Internal Server Error", 3),
    "429 for an hour": (status(429, Retry_After="3600"), "asks to wait for 3600 s", 1),
    "a login page": (
        lambda h, n: (
            h.head(200, Content_Type="text/html; charset=utf-8", Content_Length=5),
            h.body(b"login"),
        ),
        "a web page came",
        1,
    ),
    "compressed unasked": (
        lambda h, n: h.head(200, Content_Encoding="gzip", Content_Length=0),
        "compressed",
        1,
    ),
    "neither length nor sha256": (file(length=False), "cannot be told from a cut one", 1),
    "too long, and says so": (lambda h, n: h.head(200, Content_Length=10**9), "are more than", 1),
    "endless": (endless, "more than 500,000 bytes", 1),
    "trickles": (trickle, "slower than", 1),
    "stalls": (stall, "Read timed out", 1),
    "redirects in a circle": (lambda h, n: h.head(302, Location="/f.bin", Content_Length=0), "redirects", 31),
    "redirects to a local file": (
        lambda h, n: h.head(302, Location="file:///etc/passwd", Content_Length=0),
        "No connection adapters",
        1,
    ),
    "cut at the same byte for ever": (
        file(ranges=False, cut=HALF),
        f"Connection broken: IncompleteRead({HALF} bytes read, {HALF} more expected)",
        6,
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_help_is_left_for_the_next_mirror(case, server, tmp_path):
    answer, cause, times = BAD[case]
    once = case in ("trickles", "stalls")
    patience = Patience(
        attempts=1 if once else 3, wait=0.001, longest=0.5, idle=0.3, slowest=2000.0, largest=500_000
    )
    server.routes["/f.bin"] = answer
    with pytest.raises(FetchError) as e:
        fetch([server.url("/f.bin")], tmp_path / "alone.bin", patience=patience)
    assert (
        cause in str(e.value)
        and server.url("/f.bin") in str(e.value)
        and str(tmp_path / "alone.bin") in str(e.value)
    )
    assert not (tmp_path / "alone.bin").exists()
    if not once:
        assert len(server.asked["/f.bin"]) == times
    server.routes["/g.bin"] = file()
    assert (
        fetch(
            [server.url("/f.bin"), server.url("/g.bin")], tmp_path / "f.bin", patience=patience
        ).read_bytes()
        == BODY
    )


def test_redirect_is_followed(server, tmp_path):
    server.routes |= {
        "/old": lambda h, n: h.head(301, Location="/new", Content_Length=0),
        "/new": then(file(cut=HALF), file()),
    }
    assert fetch([server.url("/old")], tmp_path / "f.bin", patience=QUICK).read_bytes() == BODY
    assert server.ranges("/new") == [None, f"bytes={HALF}-"]


def test_a_length_is_not_needed_where_the_hash_is_known(server, tmp_path):
    server.routes["/f.bin"] = then(file(length=False, cut=HALF), file(length=False))
    with pytest.raises(FetchError, match="its sha256 is"):
        fetch([server.url("/f.bin")], tmp_path / "f.bin", RIGHT, QUICK)
    assert fetch([server.url("/f.bin")], tmp_path / "f.bin", RIGHT, QUICK).read_bytes() == BODY


def test_a_wrong_hash_is_refused(server, tmp_path):
    server.routes |= {"/wrong": file(BODY[::-1]), "/right": file()}
    with pytest.raises(FetchError, match=f"expected {RIGHT}") as e:
        fetch([server.url("/wrong")], tmp_path / "f.bin", RIGHT, QUICK)
    assert left(tmp_path) == [] and f"(sha256 {RIGHT})" in str(e.value)
    assert (
        fetch([server.url("/wrong"), server.url("/right")], tmp_path / "f.bin", RIGHT, QUICK).read_bytes()
        == BODY
    )


def test_old_bytes_never_get_a_new_note(server, tmp_path, monkeypatch):
    """A process that dies when the note of another version is written leaves nothing that a later run
    would continue."""

    def killed(*args):
        raise KeyboardInterrupt

    server.routes["/f.bin"] = file()
    (tmp_path / "f.bin.part").write_bytes(b"x" * HALF)
    write_json(
        tmp_path / "f.bin.part.json", {"url": server.url("/f.bin"), "validator": '"v0"', "total": len(BODY)}
    )
    monkeypatch.setattr("unirec.data.download.write_body", killed)
    with pytest.raises(KeyboardInterrupt):
        fetch([server.url("/f.bin")], tmp_path / "f.bin", patience=QUICK)
    monkeypatch.undo()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert fetch([server.url("/f.bin")], tmp_path / "f.bin", patience=QUICK).read_bytes() == BODY


def test_a_rotten_part_is_thrown_away(server, tmp_path):
    """What an earlier run left may be damaged: the hash says so, and the file is fetched once more from
    its start."""
    server.routes["/f.bin"] = file()
    (tmp_path / "f.bin.part").write_bytes(b"x" * HALF)
    write_json(
        tmp_path / "f.bin.part.json", {"url": server.url("/f.bin"), "validator": '"v1"', "total": len(BODY)}
    )
    assert fetch([server.url("/f.bin")], tmp_path / "f.bin", RIGHT, QUICK).read_bytes() == BODY
    assert server.ranges("/f.bin") == [f"bytes={HALF}-", None]


@pytest.mark.parametrize("sha256, ranges", [(RIGHT, [f"bytes={HALF}-"]), (None, [None])])
def test_a_mirror_continues_only_what_a_hash_will_check(sha256, ranges, server, tmp_path):
    server.routes |= {"/a": then(file(cut=HALF), status(404)), "/b": file(etag='"other"')}
    assert fetch([server.url("/a"), server.url("/b")], tmp_path / "f.bin", sha256, QUICK).read_bytes() == BODY
    assert server.ranges("/b") == ranges


def test_a_part_without_a_note_is_not_trusted(server, tmp_path):
    server.routes["/f.bin"] = file()
    (tmp_path / "f.bin.part").write_bytes(b"x" * HALF)
    (tmp_path / "f.bin.part.json").write_text('{"url": "http')  # torn
    assert fetch([server.url("/f.bin")], tmp_path / "f.bin", patience=QUICK).read_bytes() == BODY
    assert server.ranges("/f.bin") == [None]


@pytest.mark.parametrize("sha256", [RIGHT, None])
def test_a_file_put_by_hand_is_taken(sha256, server, tmp_path):
    server.routes["/f.bin"] = file()
    (tmp_path / "f.bin").write_bytes(BODY)
    fetch([server.url("/f.bin")], tmp_path / "f.bin", sha256, QUICK)
    assert not server.asked
    (tmp_path / "f.bin").write_bytes(BODY[:-1])  # and one that is damaged later is not
    assert fetch([server.url("/f.bin")], tmp_path / "f.bin", sha256, QUICK).read_bytes() == BODY


def test_without_a_network_one_message_says_all(dead, tmp_path):
    urls = [dead, "http://no-such-host.invalid/f.bin", "ftp://127.0.0.1/f.bin"]
    (tmp_path / "f.bin").write_bytes(b"not it")
    with pytest.raises(FetchError) as e:
        fetch(urls, tmp_path / "f.bin", RIGHT, QUICK)
    said = str(e.value)
    assert all(u in said for u in urls) and str(tmp_path / "f.bin") in said and RIGHT in said
    assert "Connection refused" in e.value.causes[dead] and "no such host" in e.value.causes[urls[1]]
    assert "as it lies there" in said and "object at 0x" not in said
    assert (tmp_path / "f.bin").read_bytes() == b"not it"


def test_of_two_at_once_one_fetches(server, tmp_path):
    server.routes["/f.bin"] = file()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: fetch([server.url("/f.bin")], tmp_path / "f.bin", patience=QUICK), range(2)))
    assert len(server.asked["/f.bin"]) == 1


def test_the_folder_is_a_file(server, tmp_path):
    (tmp_path / "data").write_text("")
    with pytest.raises(OSError, match="choose another folder") as e:
        fetch([server.url("/f.bin")], tmp_path / "data" / "raw" / "f.bin", patience=QUICK)
    assert not isinstance(e.value, FetchError) and not server.asked


def test_the_folder_is_read_only(server):
    "Root may write anywhere: for this test it is nobody."
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            with pytest.raises(PermissionError, match="change its permissions") as e:
                fetch([server.url("/f.bin")], Path(folder) / "f.bin", patience=QUICK)
        finally:
            if root:
                os.seteuid(0)
            Path(folder).chmod(0o755)
        assert not os.listdir(folder) and not isinstance(e.value, FetchError)


def test_a_full_disk_is_told_as_such(tmp_path):
    "/dev/full answers every write with ENOSPC."
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with (
        pytest.raises(OSError, match="free some space") as e,
        advise_on_disk_errors(tmp_path / "f.bin"),
        open("/dev/full", "wb", buffering=0) as f,
    ):
        f.write(b"x")
    assert e.value.errno == errno.ENOSPC and not isinstance(e.value, FetchError)


def test_a_disk_that_is_too_small_is_seen_before(server, tmp_path, monkeypatch):
    server.routes["/f.bin"] = file()
    monkeypatch.setattr("shutil.disk_usage", lambda p: types.SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=f"{len(BODY):,} bytes are to come, 1,000 are free: free some space"):
        fetch([server.url("/f.bin")], tmp_path / "f.bin", patience=QUICK)
    assert left(tmp_path) == []


def child(code, *args):
    "A Python of its own that runs some lines."
    env = os.environ | {"PYTHONPATH": str(ROOT), "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


FETCH = """
import sys, resource
from pathlib import Path
from unirec.data.download import Patience, fetch
if len(sys.argv) > 3: resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
fetch([sys.argv[1]], Path(sys.argv[2]), patience=Patience(attempts=3, wait=0.001))
"""


def test_a_disk_that_takes_no_more(server, tmp_path):
    """The system refuses to let the file grow: the error is the machine's, what has come is kept, the next
    run brings the rest only."""
    server.routes |= {"/f.bin": file(), "/second.bin": file()}
    run = child(FETCH, server.url("/f.bin"), tmp_path / "f.bin", 100_000)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 1 and "raise the limit on file sizes" in said and "FetchError" not in said
    assert (
        left(tmp_path) == ["f.bin.part", "f.bin.part.json"]
        and (tmp_path / "f.bin.part").stat().st_size == 100_000
    )
    assert fetch([server.url("/f.bin")], tmp_path / "f.bin", patience=QUICK).read_bytes() == BODY
    assert server.ranges("/f.bin")[-1] == "bytes=100000-"


def test_a_run_that_is_killed_goes_on(server, tmp_path):
    "SIGKILL in the middle of the body leaves `.part` only; the next run asks for the rest."
    held = threading.Event()

    def hold(h, n):
        h.head(200, Content_Length=len(BODY), ETag='"v1"')
        h.body(BODY[:HALF])
        h.wfile.flush()
        held.wait(30)

    server.routes["/f.bin"] = then(hold, file())
    run = child(FETCH, server.url("/f.bin"), tmp_path / "f.bin")
    part = tmp_path / "f.bin.part"
    for _ in range(3000):
        if part.exists() and part.stat().st_size == HALF or run.poll() is not None:
            break
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.communicate(timeout=30)
    held.set()
    assert run.returncode == -signal.SIGKILL
    assert left(tmp_path) == ["f.bin.part", "f.bin.part.json"]
    assert fetch([server.url("/f.bin")], tmp_path / "f.bin", patience=QUICK).read_bytes() == BODY
    assert server.ranges("/f.bin") == [None, f"bytes={HALF}-"] and server.sent == len(BODY)


def hub(data=BODY, cuts=0):
    "A file as the hub answers for it; so many answers are cut in the middle."

    def answer(h, n):
        start = int((h.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        more = {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        h.head(
            206 if start else 200,
            ETag=f'"{hashlib.sha256(data).hexdigest()}"',
            X_Repo_Commit="0" * 40,
            Content_Length=len(data) - start,
            **more,
        )
        if h.command == "GET" and n <= cuts:
            h.body(data[start : (start + len(data)) // 2])
            h.hang_up()
        elif h.command == "GET":
            h.body(data[start:])

    return answer


def test_a_file_of_the_hub(server, tmp_path):
    place = f"/datasets/owner/shop/resolve/{'0' * 40}/raw/items.csv"
    server.routes[place] = hub(cuts=1)
    home = server.url("")
    path = fetch_hub("owner/shop", "raw/items.csv", tmp_path / "items.csv", "0" * 40, endpoint=home)
    assert path.read_bytes() == BODY and left(tmp_path) == ["items.csv", "items.csv.sha256.json"]
    asked = len(server.asked[place])
    fetch_hub("owner/shop", "raw/items.csv", tmp_path / "items.csv", "0" * 40, endpoint=home)
    assert len(server.asked[place]) == asked
    with pytest.raises(FetchError, match="expected 000"):
        fetch_hub("owner/shop", "raw/items.csv", tmp_path / "other.csv", "0" * 40, "0" * 64, endpoint=home)
    with pytest.raises(FetchError, match="hub:owner/shop@main/gone.csv") as e:
        fetch_hub("owner/shop", "gone.csv", tmp_path / "gone.csv", endpoint=home)
    assert str(tmp_path / "gone.csv") in str(e.value)


def zipped(*members):
    "A zip's bytes; a member is (name, content) or a ZipInfo and its content."
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in members:
            z.writestr(name, content)
    return memory.getvalue()


@pytest.mark.parametrize(
    "name", ["../out.txt", "a/../../out.txt", "/tmp/out.txt", "..\\out.txt", "C:\\out.txt", "\\out.txt", "."]
)
def test_a_member_that_leaves_is_refused(name, tmp_path):
    (tmp_path / "a.zip").write_bytes(zipped(("good.txt", "good"), (name, "bad")))
    with pytest.raises(ValueError, match="the archive is refused"):
        unzip(tmp_path / "a.zip", tmp_path / "inner" / "a")
    assert left(tmp_path) == ["a.zip"]


def test_links_and_bombs_are_refused(tmp_path):
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    (tmp_path / "a.zip").write_bytes(zipped((link, "/etc/passwd")))
    with pytest.raises(ValueError, match="is a link"):
        unzip(tmp_path / "a.zip", tmp_path / "a")
    (tmp_path / "a.zip").write_bytes(zipped(("zeros", bytes(10**6))))
    with pytest.raises(ValueError, match="more than 1,000"):
        unzip(tmp_path / "a.zip", tmp_path / "a", largest=1000)
    (tmp_path / "b.gz").write_bytes(gzip.compress(bytes(10**6)))
    with pytest.raises(ValueError, match="more than 1,000"):
        gunzip(tmp_path / "b.gz", tmp_path / "b", largest=1000)
    assert left(tmp_path) == ["a.zip", "b.gz"]


def picture(kind="PNG", size=(20, 10), mode="RGB", **more):
    memory = io.BytesIO()
    Image.new(mode, size, 3 if mode in "1LP" else None).save(memory, kind, **more)
    return memory.getvalue()


def noise(size=(64, 64)):
    memory = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)).save(memory, "JPEG")
    return memory.getvalue()


GOOD = {
    "rgb.png": picture(),
    "grey.jpg": picture("JPEG", mode="L"),
    "cmyk.jpg": picture("JPEG", mode="CMYK"),
    "palette.png": picture(mode="P"),
    "alpha.png": picture(mode="RGBA"),
    "one.bmp": picture("BMP"),
    "moving.gif": picture("GIF", save_all=True, append_images=[Image.new("RGB", (20, 10), "red")]),
    "web.webp": picture("WEBP"),
}
BROKEN = {
    "empty.png": b"",
    "page.jpg": b"<html>404</html>",
    "cut.jpg": noise()[:900],
    "cut.png": picture(size=(300, 300))[:60],
    "bomb.png": picture(size=(9000, 9000), mode="1"),
    "drawing.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n",
    "vector.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "heavy.jpg": noise((700, 700)),
    "format.ppm": picture("PPM"),
}
LIMITS = PictureLimits(largest=200_000, pixels=10**6)


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_picture_is_refused(name):
    with pytest.raises(ValueError):
        examine(BROKEN[name], LIMITS)


def shop(server, pictures):
    "Routes of pictures, and their addresses by name."
    server.routes |= {f"/{n}": file(data, etag=None) for n, data in pictures.items()}
    return {f"images/{n}": server.url(f"/{n}") for n in pictures}


def test_pictures_are_packed_or_listed(server, tmp_path):
    urls = shop(server, GOOD | BROKEN) | {
        "images/gone.jpg": server.url("/gone.jpg"),
        "../../x.png": server.url("/rgb.png"),
        "/etc/x.png": server.url("/rgb.png"),
        "images/local.png": "file:///etc/passwd",
        "images/late.png": server.url("/late.png"),
    }
    server.routes["/late.png"] = then(status(500), status(429, Retry_After="0"), file(picture(), etag=None))
    counts = fetch_pictures(urls, tmp_path / "images.zip", limits=LIMITS, patience=QUICK)
    failures = json.loads((tmp_path / "images.zip.failures.json").read_text())
    good = {f"images/{n}" for n in GOOD} | {"images/late.png"}
    assert packed_names(tmp_path / "images.zip") == good and set(failures) == set(urls) - good
    assert all(f["cause"] and f["url"] == urls[n] for n, f in failures.items())
    assert counts == {
        "asked": len(urls),
        "there": 0,
        "fetched": len(good),
        "cmyk": 1,
        "animated": 1,
        "failed": len(failures),
    }
    assert (
        left(tmp_path) == ["images.zip", "images.zip.failures.json"]
        and not (tmp_path.parent / "x.png").exists()
    )
    read, bad = picture_bytes(list(urls), tmp_path)  # as the embedding store reads them
    assert set(read) == good and set(bad) == set(failures)
    assert read["images/cmyk.jpg"] == GOOD["cmyk.jpg"]


@pytest.mark.parametrize("loose", [True, False], ids=["loose files", "packed by download"])
def test_pictures_of_ones_own_are_read_or_listed(loose, tmp_path):
    """What was not fetched is looked at when it is encoded: CMYK and animated pictures are read, the
    others are listed with a cause, and no path leaves the folder."""
    site = tmp_path / "mine"
    (site / "images").mkdir(parents=True)
    for name, data in (GOOD | BROKEN).items():
        (site / "images" / name).write_bytes(data)
    (tmp_path / "secret.png").write_bytes(picture())
    (site / "items.csv").write_text("item_id,title\na,Pot\n")
    (site / "interactions.csv").write_text("user_id,item_id,timestamp\nu,a,1600000000\n")
    if not loose:
        download(
            SetSpec.from_params(
                "mine",
                {
                    "format": "table",
                    "source": str(site),
                    "files": "items",
                    "schema": {"title": {"type": "text"}},
                },
            ),
            tmp_path / "raw",
        )
    (site / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    refused = {
        "images/empty.png",
        "images/page.jpg",
        "images/cut.jpg",
        "images/cut.png",
        "images/bomb.png",
        "images/vector.svg",
        "images/link.png",
        "images/gone.png",
        "../secret.png",
        str(tmp_path / "secret.png"),
    }
    read, bad = picture_bytes([*(f"images/{n}" for n in GOOD), *refused], site if loose else tmp_path / "raw")
    assert (
        read == {f"images/{n}": data for n, data in GOOD.items()}
        and set(bad) == refused
        and all(bad.values())
    )


def test_a_shard_is_the_same_in_every_order(server, tmp_path):
    urls = shop(server, GOOD)
    fetch_pictures(urls, tmp_path / "a.zip", workers=8, patience=QUICK)
    fetch_pictures(dict(reversed(urls.items())), tmp_path / "b.zip", workers=1, patience=QUICK)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_pictures_that_are_there_are_not_asked_for(server, tmp_path):
    urls = shop(server, GOOD)
    first = dict(list(urls.items())[:3])
    fetch_pictures(first, tmp_path / "images.zip", patience=QUICK)
    server.asked.clear()
    counts = fetch_pictures(urls, tmp_path / "images.zip", patience=QUICK)
    assert (counts["there"], counts["fetched"]) == (3, len(GOOD) - 3)
    assert set(server.asked) == {f"/{n}" for n in GOOD} - {
        u.removeprefix(server.url("")) for u in first.values()
    }
    # a damaged shard is made anew
    (tmp_path / "images.zip").write_bytes((tmp_path / "images.zip").read_bytes()[:-40])
    assert fetch_pictures(urls, tmp_path / "images.zip", patience=QUICK)["fetched"] == len(GOOD)
    data = bytearray((tmp_path / "images.zip").read_bytes())
    data[data.index(GOOD["rgb.png"]) + 20] ^= 1  # one bit, in the middle of a picture
    (tmp_path / "images.zip").write_bytes(data)
    assert fetch_pictures(urls, tmp_path / "images.zip", patience=QUICK)["fetched"] == len(GOOD)


def test_so_many_pictures_at_a_time(server, tmp_path):
    pictures = {f"{i}.png": picture(size=(i + 1, 1)) for i in range(12)}
    urls = shop(server, pictures)
    for n, data in pictures.items():
        server.routes[f"/{n}"] = lambda h, k, data=data: (time.sleep(0.03), file(data, etag=None)(h, k))
    fetch_pictures(urls, tmp_path / "images.zip", workers=3, patience=QUICK)
    assert 2 <= server.most <= 3


PICTURES = """
import json, sys
from pathlib import Path
from unirec.data.download import Patience
from unirec.data.pictures import fetch_pictures
patience = Patience(attempts=2, wait=0.001)
fetch_pictures(json.loads(sys.argv[1]), Path(sys.argv[2]), workers=1, patience=patience)
"""


def test_pictures_go_on_after_a_kill(server, tmp_path):
    urls = shop(server, {f"{i}.png": picture(size=(i + 1, 1)) for i in range(6)})
    held = threading.Event()
    server.routes["/3.png"] = then(lambda h, n: held.wait(30), file(picture(size=(4, 1)), etag=None))
    run = child(PICTURES, json.dumps(urls), tmp_path / "images.zip")
    for _ in range(3000):
        if "/3.png" in server.asked or run.poll() is not None:
            break
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.communicate(timeout=30)
    held.set()
    assert not (tmp_path / "images.zip").exists()
    assert fetch_pictures(urls, tmp_path / "images.zip", workers=1, patience=QUICK) == {
        "asked": 6,
        "there": 3,
        "fetched": 3,
        "cmyk": 0,
        "animated": 0,
        "failed": 0,
    }
    assert [len(server.asked[f"/{i}.png"]) for i in range(6)] == [1, 1, 1, 2, 1, 1]


def test_a_full_disk_is_no_fault_of_a_picture(server, tmp_path, monkeypatch):
    def full(part, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("unirec.data.pictures.move_into_place", full)
    with pytest.raises(OSError, match="free some space"):
        fetch_pictures(shop(server, GOOD), tmp_path / "images.zip", patience=QUICK)
    assert not (tmp_path / "images.zip").exists() and not (tmp_path / "images.zip.failures.json").exists()


def test_a_picture_has_the_name_that_the_items_table_gives_it(tmp_path):
    images = [
        {"variant": "PT01", "large": "https://shop.invalid/b.jpg"},
        {"variant": "MAIN", "large": "https://shop.invalid/I/a.jpg", "hi_res": None},
    ]
    (tmp_path / "meta.jsonl").write_text(
        json.dumps({"parent_asin": "x", "images": images})
        + "\n"
        + json.dumps({"parent_asin": "y", "images": []})
        + "\n"
    )
    assert picture_urls(tmp_path / "meta.jsonl") == {clean_image(images): "https://shop.invalid/I/a.jpg"}
    for value in (
        "https://shop.invalid/a.jpg",
        ["https://shop.invalid/a.jpg", "https://shop.invalid/b.jpg"],
        {"large": None, "thumb": "https://shop.invalid/a.jpg"},
    ):
        # a Python literal
        (tmp_path / "meta_Old.json.gz").write_bytes(
            gzip.compress(f"{ {'asin': 'x', 'imUrl': value}!r}\n".encode())
        )
        assert picture_urls(tmp_path / "meta_Old.json.gz", ["imUrl", "none"]) == {
            clean_image(value): "https://shop.invalid/a.jpg"
        }
    (tmp_path / "meta_Old.json.gz").write_bytes((tmp_path / "meta_Old.json.gz").read_bytes()[:-6])
    with pytest.raises(ValueError, match=r"meta_Old.json.gz, after row \d: the file is cut or damaged"):
        picture_urls(tmp_path / "meta_Old.json.gz", ["imUrl"])
    (tmp_path / "meta.jsonl").write_text('{"images": []}\n{"images"')
    with pytest.raises(ValueError, match="meta.jsonl, row 2"):
        picture_urls(tmp_path / "meta.jsonl")


def listing(server, folder, stem, add=""):
    "Files of a folder as a site has them, packed."
    for name in (f"{stem}.csv", f"{stem}.jsonl", f"meta_{stem}.jsonl"):
        server.routes[f"/{name}.gz"] = file(gzip.compress((folder / name).read_bytes()))
    names = (f"{stem}.csv", f"{stem}.jsonl", f"meta_{stem}.jsonl")
    return Release(
        stem,
        "none",
        server.url(""),
        tuple(RawFile(n, (server.url(f"/gone/{n}"), server.url(f"/{n}.gz"))) for n in names),
        five_core(stem, f"{stem}.csv"),
    )


def test_a_set_by_name_goes_through_the_download_stage(server, tmp_path, monkeypatch):
    site = tmp_path / "site"
    site.mkdir()
    events = [
        (f"u{u}", f"i{(u + k) % 6}", 5.0, 1_600_000_000_000 + 1000 * k + u)
        for u in range(6)
        for k in range(5)
    ]
    (site / "Toys.csv").write_text(
        "user_id,parent_asin,rating,timestamp\n" + "".join(",".join(map(str, e)) + "\n" for e in events)
    )
    lines = [
        json.dumps(
            {"user_id": u, "parent_asin": i, "rating": r, "timestamp": t, "title": "t", "text": f"{u} on {i}"}
        )
        for u, i, r, t in events
    ]
    (site / "Toys.jsonl").write_text(
        "\n".join(
            [
                *reversed(lines),
                json.dumps({"user_id": "other", "parent_asin": "i1", "rating": 1.0, "timestamp": 1}),
            ]
        )
        + "\n"
    )
    items = [
        {
            "parent_asin": f"i{i}",
            "title": f"toy {i}",
            "images": [{"variant": "MAIN", "large": server.url(f"/{i}.png")}],
        }
        for i in range(9)
    ]
    (site / "meta_Toys.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    # the sixth is gone
    server.routes |= {f"/{i}.png": file(picture(size=(i + 1, 2)), etag=None) for i in range(5)}
    monkeypatch.setitem(RELEASES, "toys", listing(server, site, "Toys"))
    monkeypatch.setenv("UNIREC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        sources, "fetch_pictures", lambda urls, shard: fetch_pictures(urls, shard, patience=QUICK)
    )
    spec = SetSpec.from_params(
        "toys",
        {
            "format": "amazon2023",
            "source": "get:toys",
            "files": "Toys",
            "options": {"pictures": True},
            "schema": {"title": {"type": "text"}, "picture": {"type": "image", "source": "images"}},
        },
    )
    files = download(spec, tmp_path / "raw")
    assert (
        set(files)
        == {"Toys.jsonl", "images.zip", "images.zip.failures.json", "meta_Toys.jsonl", "source.json"}
        and not sibling_path(tmp_path / "raw", ".part").exists()
    )
    said = json.loads((tmp_path / "raw" / "source.json").read_text())
    assert (
        said["counts"]["events"] == len(events)
        and said["counts"]["without a raw review"] == 0
        and said["counts"]["pictures"]["failed"] == 1
    )
    # in the order of the list, the other user left out
    assert (tmp_path / "raw" / "Toys.jsonl").read_text().splitlines() == lines
    quality = prepare(tmp_path / "raw", spec, tmp_path / "prepared", negatives=1)
    assert (quality["users"], quality["items"], quality["events"]) == (6, 6, 30)
    asked = {p: len(a) for p, a in server.asked.items()}
    first = {p.name: p.read_bytes() for p in (tmp_path / "raw").iterdir()}
    download(spec, tmp_path / "raw")
    assert {p.name: p.read_bytes() for p in (tmp_path / "raw").iterdir() if p.suffix != ".json"} == {
        n: b for n, b in first.items() if not n.endswith(".json")
    }
    # only what failed is asked for again
    assert {p: len(a) for p, a in server.asked.items()} == asked | {"/5.png": asked["/5.png"] + 1}


OLD = {
    "amazon2014": ("imUrl", "reviews_Toys_5.json.gz", repr, lambda url: url),
    "amazon2018": ("imageURLHighRes", "Toys_5.json.gz", json.dumps, lambda url: [url, url + "?second"]),
}


@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("format", OLD)
def test_pictures_of_older_amazon_sets_come_by_their_addresses(
    format, by_name, server, tmp_path, monkeypatch
):
    """The main picture of each item is in the shard under the name that the items table has.

    What fails is listed, and alone asked for again.
    """
    (source, reviews, dumps, value), site = OLD[format], tmp_path / "site"
    site.mkdir()
    lines = {
        "meta_Toys.json.gz": [
            dumps({"asin": f"i{k}", "title": "t", source: value(server.url(f"/I/{k}.png")), "also": None})
            for k in range(4)
        ],
        reviews: [
            json.dumps(
                {
                    "reviewerID": f"u{u}",
                    "asin": f"i{k}",
                    "overall": 5.0,
                    "unixReviewTime": 1_500_000_000 + u + k,
                }
            )
            for u in range(4)
            for k in range(4)
        ],
    }
    for name, texts in lines.items():
        (site / name).write_bytes(gzip.compress("".join(t + "\n" for t in texts).encode()))
    server.routes |= {f"/{name}": file((site / name).read_bytes()) for name in lines} | {
        f"/I/{k}.png": file(picture(size=(k + 1, 2)), etag=None) for k in range(3)
    }
    monkeypatch.setitem(
        RELEASES,
        "toys",
        Release("Toys", "none", server.url(""), tuple(RawFile(n, (server.url(f"/{n}"),)) for n in lines)),
    )
    monkeypatch.setenv("UNIREC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        sources, "fetch_pictures", lambda urls, shard: fetch_pictures(urls, shard, patience=QUICK)
    )
    spec = SetSpec.from_params(
        "toys",
        {
            "format": format,
            "source": "get:toys" if by_name else str(site),
            "files": "Toys",
            "options": {"pictures": True},
            "k_core_users": 3,
            "k_core_items": 1,
            "schema": {"title": {"type": "text"}, "picture": {"type": "image", "source": source}},
        },
    )
    for _ in range(2):
        assert {"images.zip", "images.zip.failures.json", "source.json", *lines} == set(
            download(spec, tmp_path / "raw")
        )
    assert json.loads((tmp_path / "raw" / "source.json").read_text())["counts"]["pictures"] == {
        "asked": 4,
        "there": 3,
        "fetched": 0,
        "cmyk": 0,
        "animated": 0,
        "failed": 1,
    }
    assert list(json.loads((tmp_path / "raw" / "images.zip.failures.json").read_text()).values()) == [
        {"url": server.url("/I/3.png"), "cause": "404 Not Found"}
    ]
    assert [len(server.asked[f"/I/{k}.png"]) for k in range(4)] == [1, 1, 1, 2]
    prepare(tmp_path / "raw", spec, tmp_path / "prepared", negatives=0)
    pictures = pd.read_parquet(tmp_path / "prepared" / "items.parquet").picture
    assert packed_names(tmp_path / "raw" / "images.zip") == set(pictures[:3]) and pictures[
        3
    ] not in packed_names(tmp_path / "raw" / "images.zip")
    assert picture_bytes(list(pictures[:3]), tmp_path / "raw")[0] == {
        pictures[k]: picture(size=(k + 1, 2)) for k in range(3)
    }
    download(
        SetSpec.from_params(
            "toys",
            {"format": format, "source": str(site), "files": "Toys", "schema": {"title": {"type": "text"}}},
        ),
        tmp_path / "plain",
    )
    assert set(left(tmp_path / "plain")) == set(lines), "nothing is fetched that was not asked for"


@pytest.mark.parametrize("by_name", [True, False])
def test_photos_of_yelp_are_taken_along(by_name, tmp_path, monkeypatch):
    """The first photo of each business is packed, one that is not there or leaves the folder is listed,
    others are left where they are."""
    monkeypatch.setenv("UNIREC_CACHE", str(tmp_path / "cache"))
    shelf = tmp_path / "cache" / "downloads" / "yelp" if by_name else tmp_path / "mine"
    (shelf / "photos").mkdir(parents=True)
    (shelf / "yelp_academic_dataset_business.json").write_text(
        "".join(json.dumps({"business_id": b, "name": b}) + "\n" for b in "abcd")
    )
    (shelf / "yelp_academic_dataset_review.json").write_text(
        "".join(
            json.dumps({"user_id": u, "business_id": b, "stars": 4.0, "date": f"2018-07-0{1 + k} 10:00:00"})
            + "\n"
            for u in "uvw"
            for k, b in enumerate("abcd")
        )
    )
    spec = SetSpec.from_params(
        "yelp",
        {
            "format": "yelp",
            "source": "get:yelp" if by_name else str(shelf),
            "files": "yelp",
            "k_core_users": 3,
            "k_core_items": 1,
            "schema": {"name": {"type": "text"}, "photo": {"type": "image"}},
        },
    )
    (shelf / "photos" / "p.jpg").write_bytes(picture("JPEG"))
    with pytest.raises(FileNotFoundError, match="photos.json, which says whose they are, is not"):
        download(spec, tmp_path / "raw")
    assert not (tmp_path / "raw").exists()
    (shelf / "photos.json").write_text(
        "".join(
            json.dumps({"business_id": b, "photo_id": p}) + "\n"
            for b, p in [("a", "p"), ("a", "q"), ("b", "gone"), ("c", "../../secret")]
        )
    )
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    download(spec, tmp_path / "raw")
    assert json.loads((tmp_path / "raw" / "source.json").read_text())["counts"]["pictures"] == {
        "asked": 3,
        "there": 1,
        "failed": 2,
    }
    failures = json.loads((tmp_path / "raw" / "images.zip.failures.json").read_text())
    assert {n: f["cause"] for n, f in failures.items()} == {
        "photos/gone.jpg": "it is not in the folder photos",
        "photos/../../secret.jpg": "its name leaves the folder",
    }
    quality = prepare(tmp_path / "raw", spec, tmp_path / "prepared", negatives=0)
    items = pd.read_parquet(tmp_path / "prepared" / "items.parquet")
    assert [p if isinstance(p, str) else None for p in items.photo] == [
        "photos/p.jpg",
        "photos/gone.jpg",
        None,
        None,
    ] and quality["invalid_values"] == {"photo": 1}
    assert packed_names(tmp_path / "raw" / "images.zip") == {"photos/p.jpg"} and picture_bytes(
        ["photos/p.jpg"], tmp_path / "raw"
    )[0] == {"photos/p.jpg": picture("JPEG")}
    for path in (shelf / "photos" / "p.jpg", shelf / "photos.json"):
        path.unlink()
    (shelf / "photos").rmdir()
    assert not {"images.zip", "photos.json"} & set(download(spec, tmp_path / "raw")), "photos are optional"


def test_a_download_that_fails_leaves_no_raw_folder(dead, tmp_path, monkeypatch):
    monkeypatch.setenv("UNIREC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(RELEASES, "toys", Release("Toys", "none", dead, (RawFile("Toys.csv", (dead,)),)))
    monkeypatch.setattr(sources.fetch_release, "__defaults__", (None, (), QUICK))
    spec = SetSpec.from_params(
        "toys",
        {
            "format": "amazon2023",
            "source": "get:toys",
            "files": "Toys",
            "schema": {"title": {"type": "text"}},
        },
    )
    with pytest.raises(FetchError, match="put it at") as e:
        download(spec, tmp_path / "raw")
    assert dead in str(e.value) and str(tmp_path / "cache" / "downloads" / "toys" / "Toys.csv") in str(
        e.value
    )
    assert not (tmp_path / "raw").exists()


def test_yelp_says_what_to_do_and_takes_what_was_put_there(tmp_path):
    with pytest.raises(ManualDownload) as e:
        fetch_release("yelp", tmp_path / "raw", tmp_path / "shelf")
    said = str(e.value)
    assert (
        RELEASES["yelp"].page in said
        and "licence" in said
        and str(tmp_path / "shelf") in said
        and "yelp_academic_dataset_review.json" in said
    )
    (tmp_path / "shelf").mkdir()
    for f in RELEASES["yelp"].files:
        (tmp_path / "shelf" / f.name).write_text("{}\n")
    fetch_release("yelp", tmp_path / "raw", tmp_path / "shelf")
    assert {f.name for f in RELEASES["yelp"].files} <= set(left(tmp_path / "raw"))


def test_every_named_set_of_params_has_a_source_with_its_files():
    sets = read_params(ROOT)["sets"]
    named = {
        n: SetSpec.from_params(n, block) for n, block in sets.items() if block["source"].startswith("get:")
    }
    assert {"beauty", "baby"} <= set(named)
    for spec in named.values():
        assert {f"{spec.files}.jsonl", f"meta_{spec.files}.jsonl"} <= {
            f.name for f in RELEASES[spec.source.removeprefix("get:")].files
        }


def test_a_zip_by_name(server, tmp_path, monkeypatch):
    data = zipped(
        ("ml-100k/u.data", "1\t2\t5\t3\n"),
        ("ml-100k/u.item", "2|x\n"),
        ("ml-100k/README", "terms"),
        ("ml-100k/u.user", "1|a\n"),
    )
    server.routes["/ml-100k.zip"] = then(file(data, cut=50), file(data))
    pinned = RawFile("ml-100k.zip", (server.url("/ml-100k.zip"),), hashlib.sha256(data).hexdigest())
    monkeypatch.setitem(
        RELEASES, "small", Release("small", "none", "", (pinned,), RELEASES["movielens_zip"].make)
    )
    fetch_release("small", tmp_path / "raw", tmp_path / "shelf", patience=QUICK)
    assert left(tmp_path / "raw") == ["README", "source.json", "u.data", "u.item"] and left(tmp_path) == [
        "raw",
        "shelf",
    ]


def test_every_event_of_a_list_finds_its_review(tmp_path):
    """Thousands of events, raw in another order and among others: each line of the list gets its own text,
    and three that are not raw are counted."""
    rng = np.random.default_rng(1)
    events = [
        (f"u{u}", f"i{i}", 1.0 + k % 5, 10**12 + k)
        for k, (u, i) in enumerate(rng.integers(0, 500, (3000, 2)))
    ]
    raw = [
        json.dumps(
            {"user_id": u, "parent_asin": i, "rating": r, "timestamp": t + late, "text": f"{t + late}"}
        )
        for u, i, r, t in events[3:]
        for late in (0, 10**6)
    ]
    (tmp_path / "x.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        + "".join(f"{u}\t{i}\t{r}\t{t}.0\n" for u, i, r, t in [*events, events[9]])
    )
    # no newline at the end
    (tmp_path / "x.jsonl").write_text("\n".join(raw[i] for i in rng.permutation(len(raw))))
    counts, items = join_reviews(tmp_path / "x.inter", tmp_path / "x.jsonl", tmp_path / "out.jsonl")
    assert counts == {
        "events": 3001,
        "listed twice": 1,
        "without a raw review": 3,
        "raw reviews there again": 0,
    } and items == {i for _, i, _, _ in events}
    out = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(r["user_id"], r["parent_asin"], r["rating"], r["timestamp"]) for r in out] == [
        *events,
        events[9],
    ]
    assert [r.get("text") for r in out[:3000]] == [None] * 3 + [str(t) for _, _, _, t in events[3:]]


@pytest.mark.parametrize(
    "text, row",
    [
        ("", 1),
        ("user_id,item\n", 1),
        ("user_id,parent_asin,rating,timestamp\nu,i,5.0,1\nu,i", 3),
        ("user_id,parent_asin,rating,timestamp\nu,i,good,1\n", 2),
    ],
)
def test_a_bad_list_is_named_with_its_row(text, row, tmp_path):
    (tmp_path / "x.csv").write_text(text)
    (tmp_path / "x.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=f"x.csv, row {row}: expected"):
        join_reviews(tmp_path / "x.csv", tmp_path / "x.jsonl", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    "line", ['{"user_id": "u", "parent_asin": "i", "timest', "[1]", "3", '{"user_id": "u"}', "null", "\ufeff"]
)
def test_a_bad_raw_review_is_named_with_its_row(line, tmp_path):
    (tmp_path / "x.csv").write_text("user_id,parent_asin,rating,timestamp\nu,i,5.0,1\n")
    (tmp_path / "x.jsonl").write_text('{"user_id": "u", "parent_asin": "i", "timestamp": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match="x.jsonl, row 2: expected a review"):
        join_reviews(tmp_path / "x.csv", tmp_path / "x.jsonl", tmp_path / "out.jsonl")


def test_the_official_list_and_raw_files_give_the_reference_split(server, tmp_path, monkeypatch):
    """The real All_Beauty 5-core, as a list without texts and as raw files in another order with reviews
    that do not count, comes out with the same split."""
    extra = os.environ.get("UNIREC_EXTRA_ROOT")
    real = Path(extra or "absent") / "amazon2023_all_beauty_5core"
    if not real.is_dir():
        pytest.skip("all_beauty may not be passed on: set UNIREC_EXTRA_ROOT to the folder that holds it")
    site, lines = tmp_path / "site", (real / "All_Beauty.jsonl").read_text().splitlines()
    site.mkdir()
    reviews = [json.loads(line) for line in lines]
    rows = sorted((r["user_id"], r["timestamp"], r["parent_asin"], r["rating"]) for r in reviews)
    (site / "All_Beauty.csv").write_text(
        "user_id,parent_asin,rating,timestamp\n" + "".join(f"{u},{i},{r},{t}\n" for u, t, i, r in rows)
    )
    noise = (
        [json.dumps(r | {"user_id": "X" + r["user_id"]}) for r in reviews[:300]]
        + [json.dumps(r | {"timestamp": r["timestamp"] + 1}) for r in reviews[:300]]
        + lines[:50]
    )
    order = np.random.default_rng(0).permutation(len(lines) + len(noise))
    (site / "All_Beauty.jsonl").write_text("\n".join([*lines, *noise][i] for i in order) + "\n")
    (site / "meta_All_Beauty.jsonl").write_text(
        json.dumps({"parent_asin": "not in it"}) + "\n" + (real / "meta_All_Beauty.jsonl").read_text()
    )
    assert [f.name for f in RELEASES["all_beauty_5core"].files] == [
        "All_Beauty.csv",
        "All_Beauty.jsonl",
        "meta_All_Beauty.jsonl",
    ]
    monkeypatch.setitem(RELEASES, "all_beauty_5core", listing(server, site, "All_Beauty"))
    monkeypatch.setenv("UNIREC_CACHE", str(tmp_path / "cache"))
    params = read_params(ROOT)["sets"]["all_beauty"]
    spec = SetSpec.from_params("all_beauty", params | {"source": "get:all_beauty_5core"})
    download(spec, tmp_path / "raw")
    counts = json.loads((tmp_path / "raw" / "source.json").read_text())["counts"]
    assert counts == {
        "events": 2535,
        "listed twice": 0,
        "without a raw review": 0,
        "raw reviews there again": 50,
        "items": 356,
        "items without metadata": 0,
    }
    quality = prepare(tmp_path / "raw", spec, tmp_path / "prepared")
    assert quality["test_split_sha256"] == "de2bbc1ab36e08f6b044e22b9d02aa77c8394ec4539f917ca92e7b7a7d7f8eb8"
