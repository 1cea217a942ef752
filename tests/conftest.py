"""What all tests share."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this tree's package, whatever else is installed
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

settings.register_profile("house", deadline=None, derandomize=True)
settings.load_profile("house")


@pytest.fixture(scope="session")
def root() -> Path:
    "The top folder of the project."
    return ROOT


@pytest.fixture(scope="session")
def project_files(root: Path) -> list[Path]:
    """Every file that is, or would be, tracked: from git where there is a checkout, else all but the usual
    leftovers."""
    if (root / ".git").exists():
        listed = (
            subprocess.run(
                ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
                cwd=root,
                capture_output=True,
                check=True,
            )
            .stdout.decode()
            .split("\0")
        )
        return sorted(root / name for name in listed if name and (root / name).is_file())
    ignored = {line.strip().strip("/") for line in (root / ".gitignore").read_text().splitlines()} | {
        "cache",
        "tmp",
    }
    files = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in ignored and not name.endswith(".egg-info")]
        files += [Path(folder) / name for name in names if name not in ignored]
    return sorted(files)


@pytest.fixture(scope="session")
def chromium():
    "A real browser; tests skip where there is none."
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if binary is None:
        pytest.skip("no chromium is installed (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def toy_project(tmp_path_factory) -> tuple[Path, dict]:
    """Folder and parameters of one toy run of all steps (40 products, 60 customers).

    Read it, change nothing in it.
    """
    from unirec.pipeline.stages import toy

    folder = tmp_path_factory.mktemp("toy")
    return folder, toy(folder)
