"""Run every check of the project and count them.

`python tests/run_all.py [--only house style notebooks pytest]`

The last line is `N passed, N failed`, notebooks and tests together; the exit code is 1 when anything failed.
Nothing in this tree is changed: what export, clean and the README would change is found in a copy.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORKERS = 2
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # each worker has a core of its own
LIMIT = 3600  # seconds: far above what any notebook takes, only against hanging


def report(counts: Counter, passed: bool | None, name: str, detail: str = "") -> None:
    "Count one result and print its line; `passed` None means skipped."
    word = {True: "passed", False: "failed", None: "skipped"}[passed]
    counts[word] += 1
    print(f"{word:8}{name}" + (f"  {detail}" if detail else ""), flush=True)


def run(command: list[str], folder: Path, **more_env: str) -> tuple[int, str]:
    "Run a command in a folder; its exit code and all it printed."
    env = os.environ | {"PYTHONPATH": str(folder)} | more_env
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=env,
            text=True,
            errors="replace",
            timeout=LIMIT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    except subprocess.TimeoutExpired:
        return 1, f"stopped after {LIMIT} s"
    return done.returncode, done.stdout


def tool(name: str) -> str:
    "The command that belongs to the Python that runs this."
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else name


def sources(root: Path) -> dict[str, bytes]:
    "What the notebooks define: notebooks, exported modules, the README and the list of rooms."
    written = [root / "README.md", root / "ARCHITECTURE.md", root / "nbs" / "images" / "architecture.svg"]
    files = [*(root / "nbs").rglob("*.ipynb"), *(root / "unirec").rglob("*.py"), *written]
    return {
        str(f.relative_to(root)): f.read_bytes()
        for f in files
        if f.is_file() and ".ipynb_checkpoints" not in f.parts
    }


def check_house(counts: Counter) -> None:
    "Export, clean and README change nothing."
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "copy"
        copy.mkdir()
        for name in ("nbs", "unirec", "tools"):
            shutil.copytree(
                ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
            )
        for name in ("settings.ini", "pyproject.toml", "README.md", "ARCHITECTURE.md"):
            if (ROOT / name).exists():
                shutil.copy2(ROOT / name, copy / name)
        for name, command in (
            ("tools/export.py changes nothing", [sys.executable, "tools/export.py", str(copy)]),
            ("nbdev_clean changes nothing", [tool("nbdev_clean")]),
            ("README.md is what nbs/index.ipynb makes", [sys.executable, "tools/readme.py", str(copy)]),
        ):
            before = sources(copy)
            code, output = run(command, copy)
            after = sources(copy)
            changed = sorted(f for f in before.keys() | after.keys() if before.get(f) != after.get(f))
            report(
                counts, code == 0 and not changed, name, f"changed: {', '.join(changed)}" if changed else ""
            )
            if code != 0:
                print(output, flush=True)


def check_style(counts: Counter) -> None:
    "Format, lint and types of notebooks, package and tests."
    for name, command in (
        ("ruff format --check", [tool("ruff"), "format", "--check", "."]),
        ("ruff check", [tool("ruff"), "check", "."]),
        ("pyright", [tool("pyright")]),
    ):
        code, output = run(command, ROOT)
        missing = name == "pyright" and code not in (0, 1)  # it fetches its own program once, from npm
        report(counts, None if missing else code == 0, name, "it does not run here" if missing else "")
        if code != 0:
            print(output[-20_000:], flush=True)


def check_notebook(path: Path) -> tuple[Path, bool | None, float, str]:
    "Run one notebook by nbdev_test, in a process of its own."
    start = time.monotonic()
    code, output = run(
        [tool("nbdev_test"), "--path", str(path), "--n_workers", "0"],
        ROOT,
        MPLBACKEND="agg",
        **ONE_THREAD,
    )
    skipped = code == 0 and "No files were eligible" in output
    return path, None if skipped else code == 0, time.monotonic() - start, output


def check_notebooks(counts: Counter) -> None:
    "Run every notebook under nbs/, two at a time."
    found = sorted(
        p
        for p in (ROOT / "nbs").rglob("*.ipynb")
        if not any(part.startswith((".", "_")) for part in p.relative_to(ROOT).parts)
    )
    if not found:
        report(counts, False, "notebooks", "there are none under nbs/")
    with ThreadPoolExecutor(WORKERS) as pool:
        for done, (path, passed, seconds, output) in enumerate(pool.map(check_notebook, found), 1):
            report(counts, passed, str(path.relative_to(ROOT)), f"{seconds:.0f} s  [{done}/{len(found)}]")
            if passed is False:
                print(output, flush=True)


def check_pytest(counts: Counter) -> None:
    "Run pytest and add up what its report says."
    with tempfile.TemporaryDirectory() as scratch:
        xml = Path(scratch) / "junit.xml"
        done = subprocess.run(
            # a file's tests stay together: they share what its fixtures made
            [
                *(sys.executable, "-m", "pytest", "-v", "--durations=15", f"--junitxml={xml}"),
                *("-n", str(WORKERS), "--dist", "loadfile"),
            ],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | ONE_THREAD,
        )
        if not xml.exists():
            report(counts, False, "pytest", f"it ended with {done.returncode} and wrote no report")
            return
        before = counts["failed"]
        for suite in ET.parse(xml).getroot().iter("testsuite"):
            total, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
            failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
            counts.update(passed=max(total - skipped - failed, 0), failed=failed, skipped=skipped)
        if done.returncode != 0 and counts["failed"] == before:
            report(counts, False, "pytest", f"it ended with {done.returncode}")


PARTS = {"house": check_house, "style": check_style, "notebooks": check_notebooks, "pytest": check_pytest}


def main() -> int:
    "Run the parts that were asked for; 1 when anything failed."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="only these parts")
    counts = Counter()
    for name in parser.parse_args().only:
        print(f"\n== {name}", flush=True)
        PARTS[name](counts)
    print()
    print(
        f"{counts['passed']} passed, {counts['failed']} failed"
        + (f", {counts['skipped']} skipped" if counts["skipped"] else ""),
        flush=True,
    )
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
