"""The book: what it takes from the notebooks, what it may not show, and the built site in a real browser."""

import ast
import functools
import html
import re
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from unirec.core.params import read_params, write_params
from unirec.pipeline.project import requirement_lines

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import book  # noqa: E402

HERE = PurePosixPath(".")
PACKAGES = ("mkdocs", "material", "pymdownx", "math_core", "ziamath")
LACKING = [name for name in PACKAGES if find_spec(name) is None]
needs_packages = pytest.mark.skipif(
    bool(LACKING),
    reason=(
        f"{', '.join(LACKING)} not installed (pip install -r requirements/book.txt -c requirements/lock.txt)"
    ),
)


@pytest.fixture(scope="module")
def site(root, tmp_path_factory):
    "The built site: of the notebooks as they are, and of what the pipeline executed here, if it did."
    if LACKING:
        pytest.skip(needs_packages.kwargs["reason"])
    folder = tmp_path_factory.mktemp("book")
    book.build(root, folder / "site")
    return folder / "site"


def pages(site: Path, pattern: str = "**/*.html") -> list[Path]:
    "The pages of the site, but for the one that a server shows for a wrong address."
    return sorted(p for p in site.glob(pattern) if p.name != "404.html")


def write(path: Path, *cells) -> None:
    "Write a small notebook."
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=list(cells)), path)


# -- the table of contents


def test_every_notebook_has_one_place(root):
    parts = book.chapters(root / "nbs")
    placed = [name for names in parts.values() for name in names]
    assert len(placed) == len(set(placed))
    assert sorted(placed) == sorted(
        str(p.relative_to(root / "nbs").with_suffix(""))
        for p in (root / "nbs").rglob("*.ipynb")
        if ".ipynb_checkpoints" not in p.parts
    )
    assert placed[0] == "index" and all(parts.values())
    assert parts["The data"][0] == "data/01_schema" and list(parts)[-1] == "Helpers"
    assert parts["Helpers"][0].startswith("core/") and any(
        name.startswith("data/") for name in parts["Helpers"]
    )


def test_a_notebook_without_a_place_is_named(tmp_path):
    for name in ("index", "data/02_more", "data/03_jsonl", "elsewhere/99_other"):
        write(tmp_path / f"{name}.ipynb")
    with pytest.raises(ValueError, match="takes elsewhere/99_other: name it in PARTS"):
        book.chapters(tmp_path)
    (tmp_path / "elsewhere" / "99_other.ipynb").unlink()
    parts = book.chapters(tmp_path)
    assert parts["The data"] == ["data/02_more"] and parts["Helpers"] == ["data/03_jsonl"]


# -- what may be shown


@pytest.mark.parametrize(
    "entry, shown",
    [
        ({"redistributable": True}, True),
        ({"redistributable": False}, False),
        ({}, False),
        (None, False),
        ({"redistributable": "yes"}, False),
        ({"redistributable": 1}, False),
    ],
)
def test_only_sets_that_say_so_are_shown(entry, shown):
    assert book.may_show({"sets": {"shop": entry}}) == (["shop"] if shown else [])


def run_of(dataset: str):
    "Cells of an executed stage notebook."
    return (
        new_markdown_cell("# Stage 2: prepare\n> Words."),
        new_markdown_cell("More."),
        new_code_cell(f'# Parameters\ndataset = "{dataset}"', metadata={"tags": ["injected-parameters"]}),
        new_code_cell("show()", outputs=[new_output("stream", name="stdout", text=f"rows of {dataset}\n")]),
    )


def test_executed_notebooks_of_other_sets_stay_out(tmp_path):
    shown = {"ours": True, "theirs": False, "not_run": True}
    sets = {name: {"redistributable": allowed} for name, allowed in shown.items()}
    write_params(tmp_path, {"seed": 0, "sets": sets})
    for name in ("ours", "theirs", "all"):
        write(tmp_path / "reports" / name / "02_prepare.ipynb", *run_of(name))
    assert book.executed(tmp_path) == {"ours": [tmp_path / "reports" / "ours" / "02_prepare.ipynb"]}
    write(tmp_path / "reports" / "ours" / "03_embed.ipynb", *run_of("theirs"))
    with pytest.raises(ValueError, match="03_embed.ipynb was not executed on ours"):
        book.executed(tmp_path)


def test_an_executed_notebook_as_a_page(tmp_path):
    write(tmp_path / "run.ipynb", *run_of("ours"))
    assert (
        book.page(tmp_path / "run.ipynb", "runs/ours/run", tmp_path / "docs", set(), "The note.")
        == "Stage 2: prepare"
    )
    text = (tmp_path / "docs" / "runs" / "ours" / "run.md").read_text()
    assert (
        text.index("Words.") < text.index("The note.") < text.index("show()") < text.index("rows of ours")
        and "# Parameters" not in text
    )


def test_the_site_shows_no_row_of_a_closed_set(root, site):
    import pandas as pd

    sets = read_params(root)["sets"]
    shown = book.may_show({"sets": sets})
    assert {p.parts[1] for p in (path.relative_to(site) for path in pages(site, "runs/**/*.html"))} <= set(
        shown
    )
    closed = [root / "prepared" / name / "items.parquet" for name in sets if name not in shown]
    titles = {
        t
        for path in closed
        if path.exists()
        for t in pd.read_parquet(path).get("title", pd.Series(dtype=str)).dropna()
        if len(str(t)) >= 12
    }
    if not titles:
        pytest.skip("no set that may not be shown is prepared here")
    begins = {}
    for title in titles:
        begins.setdefault(title[:12], []).append(title)
    words = "\n".join(
        html.unescape(re.sub(r"<[^>]+>", "", path.read_text(encoding="utf8"))) for path in pages(site)
    )
    places = (i for i in range(len(words)) if words[i : i + 12] in begins)
    assert not [title for i in places for title in begins[words[i : i + 12]] if words.startswith(title, i)]


# -- pages


def test_hidden_cells_and_directives_are_left_out(tmp_path):
    write(
        tmp_path / "a.ipynb",
        new_markdown_cell("# Title\n> Quote."),
        new_code_cell("#| default_exp a"),
        new_code_cell("#| hide\nsecret = 1"),
        new_code_cell("#| export\ndef f():\n    return 1"),
        new_code_cell(
            "#| echo: false\nshow()", outputs=[new_output("stream", name="stdout", text="seen <b>\n")]
        ),
        new_code_cell("warn()", outputs=[new_output("stream", name="stderr", text="noise")]),
    )
    assert book.page(tmp_path / "a.ipynb", "a", tmp_path, set()) == "Title"
    text = (tmp_path / "a.md").read_text()
    assert "def f" in text and "seen &lt;b&gt;" in text and not re.search(r"#\||secret|show\(\)|noise", text)


def test_links_lead_to_pages_and_files_stay_inside(tmp_path):
    linked = set()
    text = book.prose(
        "[a](06_triplets.ipynb#x) ![b](images/m.png) [c](../params.yaml) [d](https://dvc.org) [e](#here)",
        HERE,
        linked,
    )
    assert (
        text
        == "[a](06_triplets.md#x) ![b](files/nbs/images/m.png) [c](files/params.yaml.md) [d](https://dvc.org)"
        " [e](#here)"
    )
    assert linked == {"params.yaml", "nbs/images/m.png"}
    assert (
        book.prose("[a](../index.ipynb) [c](../../params.yaml)", PurePosixPath("stages"), linked)
        == "[a](../index.md) [c](../files/params.yaml.md)"
    )
    (tmp_path / "project").mkdir()
    (tmp_path / "secret.txt").write_text("x")
    with pytest.raises(ValueError, match="outside the project"):
        book.listing(tmp_path / "project", "../secret.txt", tmp_path / "docs")


@needs_packages
def test_equations_become_mathml_and_prices_and_code_do_not():
    text = book.prose(
        "A price $12.99 or $8, `a $x$ b`, and $x_1 * y_2$:\n\n$$\\frac{a}{b}$$\n\n```\n$y$\n```\n",
        HERE,
        set(),
    )
    assert (
        text.count("<math") == 2
        and "$12.99 or $8" in text
        and "`a $x$ b`" in text
        and "```\n$y$\n```" in text
    )
    assert '<div class="equation"><math' in text and "<mfrac>" in text
    assert not set("*_`[]") & set(re.search(r"<math.*?</math>", text)[0])
    with pytest.raises(Exception, match="nosuchcommand"):
        book.prose(r"$\nosuchcommand x$", HERE, set())


def module_of(root: Path, path: Path) -> str:
    "`wing.module` of a file of the package."
    return ".".join(path.relative_to(root / "unirec").with_suffix("").parts)


def test_reference_has_every_exported_symbol(root):
    modules = sorted(p for p in (root / "unirec").rglob("*.py") if not p.name.startswith("_"))
    assert modules
    for path in modules:
        text = book.reference(path, module_of(root, path), "chapter", "Chapter")
        tree = ast.parse(path.read_text(encoding="utf8"))
        exported = next(
            ast.literal_eval(n.value)
            for n in tree.body
            if isinstance(n, ast.Assign) and n.targets[0].id == "__all__"
        )
        entries = re.findall(r"^##+ `([\w.]+)` \{ #\1 \}$", text, re.M)
        assert [name for name in entries if "." not in name] == exported, path.name
        methods = {
            f"{c.name}.{f.name}"
            for c in tree.body
            if isinstance(c, ast.ClassDef) and c.name in exported
            for f in c.body
            if isinstance(f, ast.FunctionDef)
            if not f.name.startswith("_")
        }
        assert methods <= set(entries) and text.count("[source](") == len(entries)


def test_an_entry_has_signature_words_and_parameters(tmp_path):
    (tmp_path / "m.py").write_text(""""What it is."
__all__ = ["F", "C", "f", "g"]
F = {"a": 1}
class C:
    "A class."
    def __init__(self, n: int = 3):  # how many
        self.n = n
    def go(self, x: list[int],  # (N,) `steps`
           *, fast: bool = False, **more) -> str:  # where it ends
        "Walk < run."
    def _inner(self): pass
def f(
    # a long word on the line
    # above its parameter
    a,
    b=None,
) -> (
    dict  # of names
):
    "Two."
def g(c) -> int:  # how many
    # no comment on the value
    return c
""")
    text = book.reference(tmp_path / "m.py", "m", "00_m", "Chapter M")
    assert (
        "> What it is." in text
        and "[Chapter M](../00_m.md)" in text
        and '{"a": 1}' in text
        and "_inner" not in text
    )
    assert "C.go(x: list[int], *, fast: bool=False, **more) -> str" in text and "Walk &lt; run." in text
    assert "<td><code>n</code></td><td><code>int</code></td><td><code>3</code></td><td>how many</td>" in text
    assert (
        "<td><code>x</code></td><td><code>list[int]</code></td><td></td><td>(N,) <code>steps</code></td>"
        in text
    )
    assert (
        "<td><em>returns</em></td><td><code>str</code></td><td></td><td>where it ends</td>" in text
        and "<code>**more</code>" in text
    )
    assert (
        "<td><code>a</code></td><td></td><td></td><td>a long word on the line above its parameter</td>"
        in text
    )
    assert "<td><code>dict</code></td><td></td><td>of names</td>" in text
    assert "<td><code>int</code></td><td></td><td>how many</td>" in text


def test_the_packages_of_the_book_are_a_part_of_their_own(root):
    more = set(requirement_lines(root / "requirements", ["book"])) - set(
        requirement_lines(root / "requirements")
    )
    assert {re.split("[<>=]", line)[0] for line in more} == {
        "mkdocs",
        "mkdocs-material",
        "pymdown-extensions",
        "math-core",
        "ziamath",
    }
    assert "book:" in (root / "Makefile").read_text() and "NEEDS=book" in (root / "Makefile").read_text()


# -- the site


def test_site_has_every_chapter_with_its_neighbours(root, site):
    order = [f"{name}.html" for names in book.chapters(root / "nbs").values() for name in names]
    for name in order:
        text = (site / name).read_text(encoding="utf8")
        assert ("md-footer__link--next" in text) and (
            "md-footer__link--prev" in text or name == "index.html"
        ), name
    for path in (root / "unirec").rglob("[!_]*.py"):
        assert (site / "reference" / f"{module_of(root, path)}.html").exists()
        assert (site / "files" / f"{path.relative_to(root)}.html").exists()


def test_site_loads_nothing_from_outside(site):
    loads = re.compile(
        r"<(?:img|script|link|iframe|source|object|embed)\b[^>]*\b(?:src|href|data)=[\"']?(?:https?:)?//[^>]*>"
    )
    found = [f"{p.name}: {m[0]}" for p in pages(site) for m in loads.finditer(p.read_text(encoding="utf8"))]
    for path in site.rglob("*.css"):
        found += [
            f"{path.name}: {m[0]}"
            for m in re.finditer(
                r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^\s)]*", path.read_text(encoding="utf8")
            )
        ]
    assert not found
    assert (site / "stix-two-math.ttf").stat().st_size > 100_000


def test_site_shows_no_directive_and_no_raw_equation(site):
    for path in pages(site):
        text = re.sub(r"<(script|style)\b.*?</\1>", "", path.read_text(encoding="utf8"), flags=re.S)
        assert not re.search(r"^\s*#\|", re.sub(r"<[^>]+>", "", text), re.M), path.name
        words = re.sub(r"<(pre|code|math)\b.*?</\1>", "", text, flags=re.S)
        assert not re.search(r"\$\$|\\(?:frac|mathrm|text)\b|<merror", words), path.name


@pytest.fixture(scope="module")
def served(site):
    "The site behind a plain web server."

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.browser
def test_every_chapter_in_a_browser_at_phone_width(site, chromium):
    page, seen, wrong = chromium.new_context(viewport={"width": 390, "height": 844}).new_page(), [], {}
    page.on("console", lambda m: seen.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: seen.append(str(error)))
    # aborted: by going on to the next page
    page.on("requestfailed", lambda r: seen.append(r.url) if r.failure != "net::ERR_ABORTED" else None)
    page.on(
        "request",
        lambda r: seen.append(r.url) if not r.url.startswith(("file:", "data:", "blob:", "about:")) else None,
    )
    check = """width => [
        ...(document.documentElement.scrollWidth > width ? ["the page scrolls sideways"] : []),
        ...[...document.querySelectorAll("article *")].filter(part => {
            if (part.getBoundingClientRect().right <= width + 0.5) return false;
            for (let box = part.parentElement; box; box = box.parentElement)
                if (["auto", "scroll", "hidden"].includes(getComputedStyle(box).overflowX)) return false;
            return true; }).map(part => "too wide: " + part.outerHTML.slice(0, 80)),
        ...[...document.querySelectorAll("math")]
            .filter(m => m.getBoundingClientRect().height < 8)
            .map(m => "no equation: " + m.outerHTML.slice(0, 80)),
        ...[...document.images]
            .filter(i => i.loading != "lazy" && !i.naturalWidth)
            .map(i => "no picture: " + i.src)]"""
    # made by two functions: a part of them stands for all
    alike = pages(site, "reference/*.html") + pages(site, "files/**/*.html")
    for path in [*(p for p in pages(site) if p not in set(alike)), *alike[::8]]:
        seen.clear()
        page.goto(path.as_uri())
        if found := page.evaluate(check, 390) + seen:
            wrong[str(path.relative_to(site))] = found[:3]
    assert not wrong


@pytest.mark.browser
@pytest.mark.parametrize("where", ["disk", "server"])
@pytest.mark.parametrize("start", ["index.html", "reference/model.qformer.html"])
def test_search_finds_a_chapter_and_a_symbol(site, served, chromium, where, start):
    page, outside = chromium.new_context(viewport={"width": 1280, "height": 900}).new_page(), []
    base = site.as_uri() if where == "disk" else served
    page.on(
        "request",
        lambda r: outside.append(r.url) if not r.url.startswith((base, "data:", "blob:", "about:")) else None,
    )
    page.goto(f"{base}/{start}")
    for words, target in (("Gumbel", "simulation.html"), ("split_hash", "reference/data.splits.html")):
        page.locator("[data-md-component=search-query]").fill("")
        page.locator("[data-md-component=search-query]").press_sequentially(words)
        page.locator(f'.md-search-result__link[href*="{target}"]').first.wait_for(timeout=60_000)
    assert not outside
