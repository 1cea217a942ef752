"""Exit 0 when the Python that runs this satisfies requirements/.

Otherwise one line says what is missing: `check_env.py [book]`.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def missing(further: list[str]) -> list[str]:
    "The requirements that this environment does not satisfy, those of further files among them."
    sys.path.insert(0, str(ROOT))
    try:
        from unirec.pipeline.project import missing_packages, requirement_lines

        return missing_packages(requirement_lines(ROOT / "requirements", further))
    except ModuleNotFoundError as error:
        return [str(error.name)]


if __name__ == "__main__":
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        sys.exit(f"The active environment has Python {sys.version.split()[0]}, not 3.11, 3.12 or 3.13.")
    gaps = missing(sys.argv[1:])
    if gaps:
        more = f" and {len(gaps) - 3} more" if len(gaps) > 3 else ""
        sys.exit(f"The active environment lacks {', '.join(gaps[:3])}{more}.")
