"""Write README.md from nbs/index.ipynb: `python tools/readme.py [root folder]`."""

import re
import sys
from pathlib import Path, PurePosixPath

import nbformat
from nbconvert import MarkdownExporter

DIRECTIVE = re.compile(r"^#\|\s*(\w+)\s*:?\s*(.*?)\s*$")


def directives(source: str) -> dict[str, str]:
    "The `#| name: value` lines at the head of a cell."
    found = {}
    for line in source.splitlines():
        match = DIRECTIVE.match(line)
        if match is None:
            break
        found[match[1]] = match[2]
    return found


def visible(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    "The notebook as a reader should see it: hidden cells, sources and outputs dropped."
    cells = []
    for cell in notebook.cells:
        told = directives(cell.source) if cell.cell_type == "code" else {}
        if "hide" in told or told.get("include") == "false":
            continue
        cell.source = "\n".join(cell.source.splitlines()[len(told) :])
        if cell.cell_type == "code":
            if told.get("output") == "false":
                cell.outputs = []
            if told.get("echo") == "false":
                cell.metadata["transient"] = {"remove_source": True}
        cells.append(cell)
    notebook.cells = cells
    return notebook


def from_root(text: str) -> str:
    "Links that are relative to nbs/ made relative to the root, where README.md lies."

    def moved(match: re.Match) -> str:
        parts = []
        for part in PurePosixPath("nbs", match[2]).parts:
            if part == ".." and parts:
                parts.pop()
            else:
                parts.append(part)
        return match[1] + "/".join(parts) + match[3]

    relative = r"(?![a-z]+:|/|#)([^)\s\"#]+)"
    text = re.sub(r"(\]\()" + relative + r"([)#\s])", moved, text)
    return re.sub(r"((?:src|href)=\")" + relative + r"([\"#])", moved, text)


def readme(root: Path) -> str:
    "The text of README.md."
    notebook = visible(nbformat.read(root / "nbs" / "index.ipynb", as_version=4))
    notebook.metadata["language_info"] = {"name": "python"}  # nbdev_clean drops it; it names the code blocks
    body, resources = MarkdownExporter().from_notebook_node(notebook)
    if resources.get("outputs"):
        raise ValueError("nbs/index.ipynb prints pictures: link a file of the repository instead")
    body = from_root(re.sub(r"\n{3,}", "\n\n", body).strip())
    note = "<!-- Made from nbs/index.ipynb by `make readme`: edit that notebook. -->\n"
    return note + body + "\n"


if __name__ == "__main__":
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    (root / "README.md").write_text(readme(root), encoding="utf8")
