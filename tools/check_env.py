"""Exit 0 when the Python that runs this satisfies requirements/.

Otherwise one line says what is missing: `check_env.py [book]`.
"""

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def requirements(folder: Path, more: list[str]) -> list[str]:
    "The requirement lines of base.txt, dev.txt, mini.txt and more such files, without comments and hashes."
    lines = []
    for name in ("base", "dev", "mini", *more):
        text = (folder / f"{name}.txt").read_text(encoding="utf8").replace("\\\n", " ")
        lines += [re.split(r"\s+(?:#|--hash)", line)[0].strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def missing(lines: list[str]) -> list[str]:
    "The requirements that this environment does not satisfy."
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return ["packaging"]
    out = []
    for line in lines:
        wanted = Requirement(line)
        try:
            if not wanted.specifier.contains(version(wanted.name), prereleases=True):
                out.append(f"{line} (it has {version(wanted.name)})")
        except PackageNotFoundError:
            out.append(line)
    return out


if __name__ == "__main__":
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        sys.exit(f"The active environment has Python {sys.version.split()[0]}, not 3.11, 3.12 or 3.13.")
    gaps = missing(requirements(Path(__file__).resolve().parent.parent / "requirements", sys.argv[1:]))
    if gaps:
        more = f" and {len(gaps) - 3} more" if len(gaps) > 3 else ""
        sys.exit(f"The active environment lacks {', '.join(gaps[:3])}{more}.")
