"""Build the book, a site that needs no network, from the notebooks as they are: `python tools/book.py
[root folder [site folder]]`."""

import ast
import base64
import html
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tokenize
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

import nbformat
import yaml
from readme import visible

from unirec.core.params import read_params

# Part -> names of notebooks under nbs/ in the order of reading; a pattern takes what no name before it took,
# in order of names. The last part takes first: helpers of a wing stand there and not among its chapters.
PARTS = {
    "Start": ["index", "guides/01_your_shop"],
    "The data": ["data/*"],
    "Encoders": ["encoders/*"],
    "The model": ["model/*"],
    "Evaluation": ["evaluation/*"],
    "Training": ["training/*"],
    "Baselines": ["baselines/*"],
    "The pipeline": ["pipeline/*", "00_cli", "guides/02_on_your_gpu", "stages/*"],
    "Experiments": ["experiments/*"],
    "Results": ["results/*"],
    "Pages and plots": ["report/*"],
    "Helpers": [
        "core/*",
        *(f"data/[0-9][0-9]_{name}" for name in ("download", "sources", "jsonl", "values", "formats")),
        "pipeline/[0-9][0-9]_project",
    ],
}
WORDS = re.compile(
    r"(?P<code>^(?P<fence>```+|~~~+).*?^(?P=fence)|(?P<tick>`+)(?!`).+?(?P=tick))"
    r"|\$\$(?P<block>.+?)\$\$|(?<![\\$])\$(?P<inline>[^\s$](?:[^$\n]*[^\s$\\])?)\$(?!\d)",
    re.M | re.S,
)
# code and outputs of chapters are not in the search, which would make every page slow; prose and the
# reference are
UNSOUGHT = 'data-search-exclude="1"'
PICTURES = (".png", ".svg")
LINK = re.compile(r"((?:\]\()|(?:(?:src|href)=\"))(?![a-z]+:|/|#)([^)\s\"#]+)")


def chapters(nbs: Path) -> dict[str, list[str]]:
    "Part -> notebooks under nbs/ without their suffix; a notebook that no part takes is an error."
    left = sorted(
        str(p.relative_to(nbs).with_suffix(""))
        for p in nbs.rglob("*.ipynb")
        if ".ipynb_checkpoints" not in p.parts
    )
    parts = {}
    for part in reversed(PARTS):
        parts[part] = []
        for pattern in PARTS[part]:
            taken = [name for name in left if fnmatch(name, pattern)]
            parts[part] += taken
            left = [name for name in left if name not in taken]
    if left:
        raise ValueError(f"no part of the book takes {', '.join(left)}: name it in PARTS of tools/book.py")
    return {part: parts[part] for part in PARTS}


def may_show(params: dict) -> list[str]:
    """The data sets whose rows and pictures may be passed on: those that say `redistributable: true`,
    nothing else."""
    return [
        name
        for name, entry in params["sets"].items()
        if isinstance(entry, dict) and entry.get("redistributable") is True
    ]


def executed(root: Path) -> dict[str, list[Path]]:
    "Data set -> the stages' notebooks that the pipeline executed on it, for sets that may be shown."
    params = read_params(root)
    found = {name: sorted((root / "reports" / name).glob("*.ipynb")) for name in may_show(params)}
    for name, paths in found.items():
        for path in paths:
            if f'dataset = "{name}"' not in "".join(
                c.source
                for c in nbformat.read(path, 4).cells
                if "injected-parameters" in c.metadata.get("tags", [])
            ):
                raise ValueError(f"{path} was not executed on {name}: it is not shown; run `make repro`")
    return {name: paths for name, paths in found.items() if paths}


def equation(tex: str, block: bool) -> str:
    "MathML of TeX, with what Markdown would take for its own written as character references."
    from math_core import LatexToMathML

    math = LatexToMathML().convert_with_local_state(tex, displaystyle=block)
    math = re.sub(r"[*_`\[\]\\|~]", lambda c: f"&#{ord(c[0])};", math.replace("\n", " "))
    return f'\n\n<div class="equation">{math}</div>\n\n' if block else math


def prose(text: str, here: PurePosixPath, linked: set[str]) -> str:
    """Markdown of a notebook as the site's Markdown: equations, links to notebooks, and links to files of
    the project, which are put into `linked`."""

    def link(match: re.Match) -> str:
        if match[2].endswith(".ipynb"):
            return match[1] + match[2].removesuffix(".ipynb") + ".md"
        file = os.path.normpath(PurePosixPath("nbs", here, match[2]))
        linked.add(file)
        return match[1] + os.path.relpath(f"files/{file}" + ("" if file.endswith(PICTURES) else ".md"), here)

    def word(match: re.Match) -> str:
        if match["code"]:
            return match[0]
        return equation(match["block"] or match["inline"], block=match["block"] is not None)

    text = WORDS.sub(word, text)
    # a list may follow a line directly
    text = re.sub(r"^(?!\s*[-*+|>#]|\s*\d+\. )(.+)\n(?=[-*+] |\d+\. )", r"\1\n\n", text, flags=re.M)
    return LINK.sub(link, text)


def output(out: dict, name: str, write, here: PurePosixPath, linked: set[str]) -> str:
    "Markdown of one output of a cell; `write` keeps a picture."
    data = out.get("data", {})
    if "image/png" in data:
        file = write(base64.b64decode(data["image/png"]))
        return f'<p class="output"><img src="{file}" alt="plot of {name}" loading="lazy"></p>'
    if "text/markdown" in data:
        return prose("".join(data["text/markdown"]), here, linked)
    if "text/html" in data:
        table = re.sub(
            r"<style.*?</style>| (?:border|class|style)=\"[^\"]*\"",
            "",
            "".join(data["text/html"]),
            flags=re.S,
        )
        return f'<div class="scroll frame" {UNSOUGHT}>' + re.sub(r"\s*\n\s*", "", table) + "</div>"
    text = "".join(out.get("text", data.get("text/plain", "\n".join(out.get("traceback", [])))))
    text = html.escape(re.sub("\x1b[^m]*m", "", text).rstrip())
    return f'<pre class="output" {UNSOUGHT}>{text}</pre>' if text else ""


def page(path: Path, name: str, docs: Path, linked: set[str], note: str = "") -> str:
    "Write the page of a notebook and its pictures below `docs`; its title."
    notebook, here, pictures = visible(nbformat.read(path, as_version=4)), PurePosixPath(name).parent, 0
    (docs / here).mkdir(parents=True, exist_ok=True)

    def write(picture: bytes) -> str:
        nonlocal pictures
        pictures += 1
        file = docs / here / f"{PurePosixPath(name).name}-{pictures}.png"
        file.write_bytes(picture)
        return file.name

    parts = []
    for cell in notebook.cells:
        if cell.cell_type != "code":
            parts.append(prose(cell.source, here, linked))
        elif cell.source.strip() and "injected-parameters" not in cell.metadata.get("tags", []):
            if "transient" not in cell.metadata:
                parts.append(f"~~~~~~{{.python {UNSOUGHT}}}\n{cell.source.strip()}\n~~~~~~")
            parts += [
                output(out, path.stem, write, here, linked)
                for out in cell.outputs
                if out.get("name") != "stderr"
            ]
    if note:
        parts.insert(1, note)
    (docs / f"{name}.md").write_text("\n\n".join(parts) + "\n", encoding="utf8")
    return re.match(r"#\s+(.+)", parts[0])[1]


class Comments:
    """The comments of a module: fastcore's docments stand at the end of a parameter's line or on the lines
    above it."""

    def __init__(self, source: str):
        self.at_end, self.alone = {}, {}  # line number -> text
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                place = self.alone if token.line.lstrip().startswith("#") else self.at_end
                place[token.start[0]] = token.string.lstrip("# ")

    def of(self, line: int, end: int | None = None) -> str:
        "What is said of the parameter on a line: at its end, or above it."
        for number in range(line, (end or line) + 1):
            if number in self.at_end:
                return self.at_end[number]
        above = line - 1
        while above in self.alone:
            above -= 1
        return " ".join(self.alone[number] for number in range(above + 1, line))

    def of_return(self, node: ast.FunctionDef) -> str:
        "What is said of the value that a function returns: between its type and the function's body."
        lines = range(node.returns.lineno, max(node.body[0].lineno, node.returns.end_lineno + 1))
        at_end = [self.at_end[number] for number in lines if number in self.at_end]
        return " ".join(at_end or [self.alone[number] for number in lines if number in self.alone])


def cell(text: str) -> str:
    "HTML of a word or two of Markdown: only `code` is known."
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def fields_of(node: ast.ClassDef) -> list[tuple]:
    "Name, type, default, first and last line of every field of a class."
    fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
    return [(f.target.id, f.annotation, f.value, f.lineno, f.end_lineno) for f in fields]


def arguments_of(node: ast.FunctionDef) -> list[tuple]:
    "Name, type, default, first and last line of every parameter of a function."
    args = node.args
    positional = args.posonlyargs + args.args
    defaults = dict(zip([arg.arg for arg in positional[::-1]], args.defaults[::-1]))
    defaults |= {arg.arg: value for arg, value in zip(args.kwonlyargs, args.kw_defaults) if value}
    stars = {id(args.vararg): "*", id(args.kwarg): "**"}
    rows = []
    for arg in [*positional, args.vararg, *args.kwonlyargs, args.kwarg]:
        if arg and arg.arg not in ("self", "cls"):
            default = defaults.get(arg.arg)
            end = default.end_lineno if default else arg.end_lineno
            rows.append((stars.get(id(arg), "") + arg.arg, arg.annotation, default, arg.lineno, end))
    return rows


def parameters(node: ast.AST, comments: Comments) -> str:
    "A table of the parameters of a function or the fields of a class: name, type, default, meaning."
    rows = fields_of(node) if isinstance(node, ast.ClassDef) else arguments_of(node)
    last = {
        line: i for i, (*_, line, _) in enumerate(rows)
    }  # a comment belongs to the last parameter of its line
    table = []
    for i, (name, kind, default, line, end) in enumerate(rows):
        meaning = comments.of(line, end) if last[line] == i else ""
        table.append((f"<code>{name}</code>", kind, default, meaning))
    if isinstance(node, ast.FunctionDef) and node.returns:
        table.append(("<em>returns</em>", node.returns, None, comments.of_return(node)))
    if not table:
        return ""
    lines = ["<tr><th>parameter</th><th>type</th><th>default</th><th>meaning</th></tr>"]
    for name, kind, default, meaning in table:
        code = [f"<code>{html.escape(ast.unparse(part))}</code>" if part else "" for part in (kind, default)]
        lines.append("<tr>" + "".join(f"<td>{text}</td>" for text in (name, *code, cell(meaning))) + "</tr>")
    return f'<div class="scroll parameters"><table>{"".join(lines)}</table></div>'


def signature(node: ast.AST, name: str) -> str:
    "How a function is called, or a class made, without what the table says."
    if isinstance(node, ast.ClassDef):
        bases = f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else ""
        return f"class {name}{bases}"
    args = ast.unparse(node.args)
    return f"{name}({re.sub(r'^(self|cls)(, )?', '', args)})" + (
        f" -> {ast.unparse(node.returns)}" if node.returns else ""
    )


def defined(node: ast.AST) -> list[str]:
    "The names that a statement at the top of a module defines."
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = (
        node.targets
        if isinstance(node, ast.Assign)
        else [node.target]
        if isinstance(node, ast.AnnAssign)
        else []
    )
    return [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]


def entry(
    node: ast.AST, symbol: str, source: str, comments: Comments, module: str, owner: str = ""
) -> list[str]:
    """The entry of one symbol: heading, signature, docstring, parameters, link to its source.

    Then the methods of a class.
    """
    link = f"[source](../files/unirec/{module.replace('.', '/')}.py.md#__codelineno-0-{node.lineno})"
    name = owner + symbol
    if isinstance(node, ast.Assign | ast.AnnAssign):
        text = ast.get_source_segment(source, node).splitlines()
        more = [f"# {len(text) - 12} lines more: see the source"] if len(text) > 12 else []
        return [
            f"## `{name}` {{ #{name} }}",
            "~~~~~~python\n" + "\n".join(text[:12] + more) + "\n~~~~~~",
            link,
        ]
    parts = [
        f"{'###' if owner else '##'} `{name}` {{ #{name} }}",
        f"~~~~~~python\n{signature(node, name)}\n~~~~~~",
    ]
    parts += [html.escape(ast.get_docstring(node) or "", quote=False), parameters(node, comments), link]
    if isinstance(node, ast.ClassDef):
        methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
        parts[3:4] = [parameters(n, comments) for n in methods if n.name == "__init__"] or parts[3:4]
        for method in methods:
            if not method.name.startswith("_") or method.name == "__call__":
                parts += entry(method, method.name, source, comments, module, f"{name}.")
    return [part for part in parts if part]


def reference(path: Path, module: str, chapter: str, title: str) -> str:
    "The page of one module: every exported symbol in the order of `__all__`."
    source = path.read_text(encoding="utf8")
    tree, comments = ast.parse(source), Comments(source)
    known = {name: node for node in tree.body for name in defined(node)}
    parts = [
        "---\nsearch: {boost: 0.5}\n---",
        f"# unirec.{module}",
        f"> {ast.get_docstring(tree)}",
        f"Chapter: [{title}](../{chapter}.md)",
    ]
    for name in ast.literal_eval(known["__all__"].value):
        parts += entry(known[name], name, source, comments, module)
    return "\n\n".join(parts) + "\n"


def listing(root: Path, file: str, docs: Path) -> None:
    "Put a file of the project into the book: a picture as it is, a text as a page."
    source, to = root / file, docs / "files" / file
    if root.resolve() not in source.resolve().parents:
        raise ValueError(f"a notebook links to {file}, which is outside the project")
    to.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix in PICTURES:
        shutil.copyfile(source, to)
        return
    kind = '{.python linenums="1"}' if source.suffix == ".py" else "{.text}"
    content = source.read_text(encoding="utf8").rstrip()
    text = f"---\nsearch: {{exclude: true}}\n---\n# {file}\n\n~~~~~~{kind}\n{content}\n~~~~~~\n"
    to.with_name(to.name + ".md").write_text(text, encoding="utf8")


def prepare(root: Path, folder: Path) -> list[dict]:
    "Write the pages to `folder`/docs and mkdocs.yml beside them; the table of contents."
    docs, linked, contents, modules = folder / "docs", set(), [], {}
    for part, names in chapters(root / "nbs").items():
        entries = []
        for name in names:
            module = re.search(
                r"^#\|\s*default_exp\s+([\w.]+)",
                "\n".join(c.source for c in nbformat.read(root / "nbs" / f"{name}.ipynb", 4).cells),
                re.M,
            )
            note = (
                f"Module `unirec.{module[1]}`: [reference](reference/{module[1]}.md)\n{{: .module }}"
                if module
                else ""
            )
            title = page(root / "nbs" / f"{name}.ipynb", name, docs, linked, note)
            modules |= {module[1]: (name, title)} if module else {}
            entries.append({title: f"{name}.md"})
        contents.append({part: entries})
    for name, paths in executed(root).items():
        note = f"The pipeline executed this notebook on the set `{name}`."
        runs = [
            {page(p, f"runs/{name}/{p.stem}", docs, linked, note): f"runs/{name}/{p.stem}.md"} for p in paths
        ]
        next(part for part in contents if "The pipeline" in part)["The pipeline"].append(
            {f"Executed on {name}": runs}
        )
    (docs / "reference").mkdir()
    for module, chapter in sorted(modules.items()):
        source = f"unirec/{module.replace('.', '/')}.py"
        (docs / "reference" / f"{module}.md").write_text(
            reference(root / source, module, *chapter), encoding="utf8"
        )
        linked.add(source)
    contents.append({"Reference": [{module: f"reference/{module}.md"} for module in sorted(modules)]})
    for file in sorted(linked):
        listing(root, file, docs)
    look = root / "tools" / "book"
    for name in ("book.css", "iframe-worker.js"):
        shutil.copyfile(look / name, docs / name)
    (docs / "images").mkdir()
    shutil.copyfile(look / "favicon.svg", docs / "images" / "favicon.svg")
    settings = {"docs_dir": str(docs), "nav": contents}
    (folder / "mkdocs.yml").write_text(
        (look / "mkdocs.yml").read_text(encoding="utf8")
        + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=1000),
        encoding="utf8",
    )
    return contents


def build(root: Path, site: Path) -> None:
    "Build the site; a broken link or an unknown equation is an error."
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(root, folder)
        font = Path(find_spec("ziamath").submodule_search_locations[0]) / "fonts" / "STIXTwoMath-Regular.ttf"
        shutil.copyfile(font, folder / "docs" / "stix-two-math.ttf")
        subprocess.run(
            [
                sys.executable,
                "-m",
                "mkdocs",
                "build",
                "--quiet",
                "--strict",
                "--config-file",
                folder / "mkdocs.yml",
                "--site-dir",
                site.resolve(),
            ],
            check=True,
            env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        )


if __name__ == "__main__":
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    site = Path(sys.argv[2]) if len(sys.argv) > 2 else root / "_book"
    build(root, site)
    print(f"The book: {site.resolve() / 'index.html'}")
