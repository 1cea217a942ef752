"""Cheap tests of the project's structure: they read files, they run no model."""

import ast
import configparser
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

LARGEST_NOTEBOOK = 300_000  # bytes, with outputs
LONGEST_MODULE = 400  # lines
LONGEST_LINE = 110  # characters
LARGEST_TEXT = 5_000_000  # bytes; above that a file is data
LONGEST_RUN = 3  # exported cells without an output or a test between them

# Notebooks, as wing/room, that still have longer runs of exported cells. Take a name out when it is mended.
LONG_RUNS = {
    "baselines/titles",
    "baselines/official_code",
    "core/device",
    "data/download",
    "data/quality",
    "data/commands",
    "model/fusion",
    "model/llm",
    "pipeline/profiles",
    "pipeline/operations",
    "pipeline/dry_run",
    "pipeline/cold_start",
    "pipeline/commands",
    "training/loop",
    "training/objective",
}

# in two pieces each, so that this file does not find itself
MACHINE_PATHS = [
    re.compile(pattern)
    for pattern in ("/ho" + r"me/\w", "/ro" + "ot/", "/Us" + r"ers/\w", r"(?<![\w.}])/wo" + "rk/")
]
REGISTRIES = re.compile(
    "|".join(
        re.escape(host)
        for host in (
            "pypi." + "org",
            "pythonhosted." + "org",
            "registry.npmjs." + "org",
            "registry.yarnpkg." + "com",
            "download.pytorch." + "org",
            "deb.debian." + "org",
            "conda.anaconda." + "org",
            "proxy.golang." + "org",
        )
    )
)
INDEX_OPTIONS = re.compile("--(extra-)?index-" + "url|--find-" + "links|--trusted-" + "host")


def read(path: Path) -> str | None:
    "A file's text, None when it is not text."
    if path.stat().st_size > LARGEST_TEXT:
        return None
    try:
        return path.read_text(encoding="utf8")
    except UnicodeDecodeError:
        return None


def tags(cell: dict) -> list[str]:
    "The tags of a notebook's cell."
    return cell["metadata"].get("tags", [])


def test_stage_notebooks_have_one_parameters_cell(root):
    wrong = {}
    for path in sorted((root / "nbs" / "stages").glob("*.ipynb")):
        tagged = [c for c in json.loads(path.read_text(encoding="utf8"))["cells"] if "parameters" in tags(c)]
        if len(tagged) != 1 or tagged[0]["cell_type"] != "code":
            wrong[path.name] = len(tagged)
    assert not wrong, f"cells tagged `parameters` (there must be one code cell): {wrong}"


def test_stage_notebooks_export_nothing(root):
    for path in sorted((root / "nbs" / "stages").glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf8"))["cells"]:
            assert not re.search(r"^#\|\s*(export|default_exp)", "".join(cell["source"]), re.M), path.name


def test_settings_keep_tags(root):
    settings = configparser.ConfigParser()
    settings.read(root / "settings.ini")
    assert "tags" in settings["DEFAULT"]["allowed_cell_metadata_keys"].split()
    assert settings["DEFAULT"]["clear_all"] == "False"
    assert settings["DEFAULT"]["update_pyproject"] == "False"


def test_nbdev_clean_keeps_tags(root, tmp_path):
    notebook = {
        "cells": [
            {
                "cell_type": "code",
                "execution_count": 3,
                "id": "a",
                "outputs": [],
                "source": ["epochs = 1"],
                "metadata": {"tags": ["parameters"], "collapsed": True},
            }
        ],
        "metadata": {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    (tmp_path / "nbs").mkdir()
    (tmp_path / "settings.ini").write_text((root / "settings.ini").read_text())
    path = tmp_path / "nbs" / "stage.ipynb"
    path.write_text(json.dumps(notebook))
    command = [str(Path(sys.executable).parent / "nbdev_clean"), "--fname", str(path)]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=300)
    cell = json.loads(path.read_text())["cells"][0]
    assert cell["metadata"] == {"tags": ["parameters"]} and cell["execution_count"] is None


def test_no_file_names_a_machine_or_a_registry(project_files, root):
    found = []
    for path in project_files:
        text = read(path)
        if text is None:
            continue
        for pattern in (*MACHINE_PATHS, REGISTRIES):
            found += [f"{path.relative_to(root)}: {match[0]}" for match in pattern.finditer(text)]
    assert not found, "\n".join(found[:20])


def test_no_index_options(root):
    for path in [
        *(root / "requirements").glob("*.txt"),
        *(root / ".ci").iterdir(),
        *(root / "tools").iterdir(),
        root / "Makefile",
        root / "pyproject.toml",
    ]:
        assert not path.is_file() or not INDEX_OPTIONS.search(path.read_text()), path.name


def test_exported_modules_say_so(root):
    modules = [
        p for p in sorted((root / "unirec").rglob("*.py")) if p.name not in ("__init__.py", "_modidx.py")
    ]
    assert modules
    for path in modules:
        assert "AUTOGENERATED! DO NOT EDIT! File to edit: " in path.read_text(encoding="utf8")[:400], (
            path.name
        )


WINGS = (
    "core",
    "data",
    "encoders",
    "model",
    "evaluation",
    "training",
    "baselines",
    "pipeline",
    "experiments",
    "report",
)  # a wing imports itself and those before it


def imported_modules(source: str, parts: tuple[str, ...]) -> set[str]:
    "The modules of the package that a module at `parts` imports anywhere in it, as `wing.module`."
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix("unirec.") for a in node.names if a.name.startswith("unirec.")}
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            base = [*parts[: -node.level], *(node.module or "").split(".")]
        elif (node.module or "").split(".")[0] == "unirec":
            base = node.module.split(".")[1:]
        else:
            continue
        base = [part for part in base if part]
        # `from unirec.data import prepare` imports a module, `from unirec.data.prepare import x` a name of it
        found |= {".".join([*base, a.name]) for a in node.names} if len(base) < 2 else {".".join(base)}
    return found


def module_imports(root: Path) -> dict[str, set[str]]:
    "Each module of a wing with the modules of wings that it imports."
    arrows = {}
    for path in sorted((root / "unirec").rglob("*.py")):
        parts = path.relative_to(root / "unirec").with_suffix("").parts
        if parts[-1] not in ("__init__", "_modidx"):
            arrows[".".join(parts)] = imported_modules(path.read_text(encoding="utf8"), parts)
    return arrows


@pytest.mark.parametrize(
    "source, modules",
    [
        ("from ..core.files import locate", {"core.files"}),
        ("from .schema import Schema", {"data.schema"}),
        ("from unirec.core.files import locate", {"core.files"}),
        ("from unirec.data import prepare", {"data.prepare"}),
        ("from .. import cli", {"cli"}),
        ("def f():\n    from ..model.llm import LLM", {"model.llm"}),
        ("import unirec.model.llm", {"model.llm"}),
        ("import numpy\nfrom torch import nn", set()),
    ],
)
def test_imports_of_modules_are_read(source, modules):
    assert imported_modules(source, ("data", "splits")) == modules


def test_wings_import_only_wings_before_them(root):
    arrows = module_imports(root)
    assert {name.split(".")[0] for name in arrows if "." in name} == set(WINGS)
    wrong = []
    for module, imported in arrows.items():
        if "." not in module:
            continue  # the command line stands above all wings
        rank = WINGS.index(module.split(".")[0])
        wrong += [
            f"{module} -> {other}"
            for other in imported
            if other.split(".")[0] not in WINGS or WINGS.index(other.split(".")[0]) > rank
        ]
    assert not wrong, f"imports against the order of the wings: {wrong}"


def test_modules_import_each_other_in_no_circle(root):
    arrows = module_imports(root)
    finished: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        assert module not in path, f"a circle of imports: {' -> '.join([*path, module])}"
        if module in finished:
            return
        for other in sorted(arrows.get(module, ())):
            visit(other, [*path, module])
        finished.add(module)

    for module in arrows:
        visit(module, [])


def dotted(node: ast.AST) -> str:
    "`a.b.c` of a chain of names; what is no name is a question mark."
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return "?"


def unsafe_calls(source: str) -> list[str]:
    "Calls that can run what a file or a string says."
    never = {
        "pickle.load",
        "pickle.loads",
        "pickle.Unpickler",
        "cPickle.load",
        "dill.load",
        "joblib.load",
        "pd.read_pickle",
        "pandas.read_pickle",
        "yaml.load",
        "yaml.unsafe_load",
        "yaml.full_load",
        "eval",
        "exec",
        "os.system",
    }
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        if (
            name in never
            or name == "torch.load"
            and given.get("weights_only") is not True
            or given.get("allow_pickle") is True
            or given.get("trust_remote_code") is True
            or name.startswith("subprocess.")
            and given.get("shell") is True
        ):
            found.append(f"line {node.lineno}: {name}")
    return found


@pytest.mark.parametrize(
    "source, count",
    [
        ("torch.load(path)", 1),
        ("torch.load(path, weights_only=False)", 1),
        ("torch.load(path, weights_only=True)", 0),
        ("pickle.load(file)", 1),
        ("yaml.load(text, Loader=x)", 1),
        ("yaml.safe_load(text)", 0),
        ("eval('1')", 1),
        ("model.eval()", 0),
        ("load(path).eval()", 0),
        ("np.load(path, allow_pickle=True)", 1),
        ("np.load(path)", 0),
    ],
)
def test_unsafe_calls_are_seen(source, count):
    assert len(unsafe_calls(source)) == count


def test_no_unsafe_calls(root):
    found = {
        str(p.relative_to(root)): calls
        for p in (root / "unirec").rglob("*.py")
        if (calls := unsafe_calls(p.read_text(encoding="utf8")))
    }
    assert not found


def test_mini_requirements_are_pinned_and_hashed(root):
    text = (root / "requirements" / "mini.txt").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) == 4
    for line in lines:
        assert re.fullmatch(r"[\w-]+==[\d.]+(\s+--hash=sha256:[0-9a-f]{64})+\s*", line), line


def test_lock_satisfies_the_requirements(root):
    from packaging.requirements import Requirement

    lock = dict(
        line.strip().split("==")
        for line in (root / "requirements" / "lock.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    lock = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in lock.items()}
    for name in ("base.txt", "dev.txt", "book.txt"):
        for line in (root / "requirements" / name).read_text().splitlines():
            if line.strip() and not line.startswith("#"):
                wanted = Requirement(line.split(" #")[0])
                pinned = lock[re.sub(r"[-_.]+", "-", wanted.name).lower()]
                assert wanted.specifier.contains(pinned, prereleases=True), f"{line}: lock.txt has {pinned}"


def test_modules_are_short(root):
    "A module can be read at a sitting, and a line without scrolling."
    wrong = {}
    for path in sorted((root / "unirec").rglob("*.py")):
        lines = path.read_text(encoding="utf8").splitlines()
        longest = max(map(len, lines), default=0)
        if path.name != "_modidx.py" and (len(lines) > LONGEST_MODULE or longest > LONGEST_LINE):
            wrong[str(path.relative_to(root))] = len(lines), longest
    assert not wrong, f"lines, and characters of the longest line: {wrong}"


EXPORTED = re.compile(r"^#\|\s*exporti?\b", re.M)
CHECKED = re.compile(r"\bassert\b|\bexpect_fail\b|\bpytest\.raises\b|\btest_\w+\(")


def only_imports(source: str) -> bool:
    "Whether a cell imports names and does nothing else."
    imports = (ast.Import, ast.ImportFrom)
    return all(isinstance(node, imports) for node in ast.parse(source).body)


def longest_run(cells: list[dict]) -> int:
    "The most exported cells in a row that neither show an output nor are followed by one or by a test."
    run = longest = 0
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            continue
        if EXPORTED.search(source):
            run += not only_imports(source)
            longest = max(longest, run)
        if cell["outputs"] or not EXPORTED.search(source) and CHECKED.search(source):
            run = 0
    return longest


def code_cell(source: str, outputs: tuple = ()) -> dict:
    "A cell of a notebook."
    return {"cell_type": "code", "source": [source], "outputs": list(outputs)}


def test_runs_of_exported_cells_are_counted():
    export = code_cell("#| export\ndef f(): ...")
    private = code_cell("#| exporti\ndef _f(): ...")
    imports = code_cell("#| export\nimport os\nfrom pathlib import Path")
    text = {"cell_type": "markdown", "source": ["assert"]}
    assert longest_run([imports, export, text, private]) == 2
    assert longest_run([export, export, code_cell("test_eq(f(), None)"), export]) == 2
    assert longest_run([export, code_cell("f()", ({"output_type": "stream"},)), export]) == 1
    assert longest_run([export, code_cell("x = f()"), export]) == 2


def test_exported_cells_are_shown_or_tested(root):
    "A chapter shows or tests what it defines before it goes on."
    long = {}
    for path in sorted((root / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts:
            continue
        run = longest_run(json.loads(path.read_text(encoding="utf8"))["cells"])
        if run > LONGEST_RUN:
            long[f"{path.parent.name}/{re.sub('^[0-9]+_', '', path.stem)}"] = run
    new = {name: run for name, run in long.items() if name not in LONG_RUNS}
    assert not new, f"exported cells in a row without an output or a test between them: {new}"
    mended = LONG_RUNS - set(long)
    assert not mended, f"take these out of LONG_RUNS: {mended}"


def test_notebooks_are_small(root):
    large = {
        str(p.relative_to(root)): p.stat().st_size
        for p in (root / "nbs").rglob("*.ipynb")
        if ".ipynb_checkpoints" not in p.parts and p.stat().st_size > LARGEST_NOTEBOOK
    }
    assert not large


def test_this_tree_is_tested(root):
    import unirec

    assert Path(unirec.__file__).resolve().parent == root / "unirec"


def test_dvc_is_quiet_and_offline(root):
    config = configparser.ConfigParser()
    config.read_string(
        "\n".join(line.strip() for line in (root / ".dvc" / "config").read_text().splitlines())
    )
    core = config["core"]
    assert core["analytics"] == "false" and core["check_update"] == "false"
    page = (root / ".dvc" / config["plots"]["html_template"]).read_text(encoding="utf8")
    assert (
        "{plot_divs}" in page and "{scripts}" not in page and not re.search(r"<script[^>]*\bsrc=|<link", page)
    )
