"""Draw the wings and the imports between them, and list the rooms: `python tools/architecture.py [root]`.

Writes nbs/images/architecture.svg and the list in ARCHITECTURE.md, both from the files of the package.
"""

import ast
import re
import sys
from collections import Counter
from html import escape
from pathlib import Path

WINGS = {  # in order: a wing imports only those above it
    "core": "files, devices, parameters",
    "data": "schemas, readers, splits, prepared tables",
    "encoders": "frozen vectors of texts, pictures, numbers",
    "model": "triplets, Q-Formers, fusion, language model",
    "evaluation": "metrics, significance, breakdowns",
    "training": "the loop and its objective",
    "baselines": "simpler recommenders and their registry",
    "pipeline": "the seven stages and what runs them",
    "experiments": "studies: plan, runs, judge, tuning",
    "report": "figures, tables, the results page",
}
# of the arrows that leave a wing
COLOURS = (
    "#57606a",
    "#0a6c67",
    "#d9622b",
    "#6b74c9",
    "#b0578d",
    "#8f7a3a",
    "#2f7fd1",
    "#5f9140",
    "#c2506a",
    "#7a5c00",
)
WIDTH, HEIGHT, STEP, LEFT = 330, 46, 64, 250
STYLE = """
.box{fill:#eef6f5;stroke:#0a6c67;stroke-width:1.4}.name{font:600 15px sans-serif;fill:#0a4a46}
.text{font:12px sans-serif;fill:#57606a}.arrow{fill:none}
"""


def modules(package: Path) -> dict[str, Path]:
    "`wing.module` -> its file."
    return {
        f"{p.parent.name}.{p.stem}": p for wing in WINGS for p in sorted((package / wing).glob("[!_]*.py"))
    }


def imported(path: Path, wing: str) -> set[str]:
    "The wings that a module of a wing imports, itself left out."
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        parts = (node.module or "").split(".")
        if node.level == 2 and parts[0]:
            found.add(parts[0])
        elif node.level == 2:  # from .. import wing
            found |= {alias.name for alias in node.names}
        elif not node.level and parts[0] == "unirec" and len(parts) > 1:
            found.add(parts[1])
    return (found & set(WINGS)) - {wing}


def arrows(files: dict[str, Path]) -> Counter:
    "(importing wing, imported wing) -> how many modules of the first import the second."
    count = Counter()
    for name, path in files.items():
        wing = name.split(".")[0]
        count.update((wing, other) for other in imported(path, wing))
    return count


def arrow(start: int, end: int, modules: int) -> str:
    "An arc from a wing up to one above it: neighbours on the left, the others on the right."
    top, bottom = 30 + STEP * end + HEIGHT * 0.62, 30 + STEP * start + HEIGHT * 0.38
    near = start - end == 1
    x, reach = (LEFT, -26) if near else (LEFT + WIDTH, 20 + 23 * (start - end))
    width = min(1 + modules / 3, 4)
    tip = 7 if reach > 0 else -7
    return (
        f'<path class="arrow" stroke="{COLOURS[start]}" stroke-width="{width:.1f}"'
        f' d="M{x},{bottom:.0f} C{x + reach},{bottom:.0f} {x + reach},{top:.0f} {x + tip},{top:.0f}"/>'
        f'<path fill="{COLOURS[start]}" d="M{x},{top:.0f} l{tip * 1.3:.1f},-5 v10 z"/>'
    )


def picture(root: Path) -> str:
    "The wings as boxes from top to bottom, an arrow from each to every wing that it imports."
    files = modules(root / "unirec")
    order = list(WINGS)
    height = 40 + STEP * len(order)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 {height}" role="img">',
        "<title>The wings of the package: an arrow leads to what a wing imports</title>",
        f"<style>{STYLE}</style>",
        f'<rect width="860" height="{height}" fill="#fff"/>',
    ]
    for (wing, other), count in sorted(arrows(files).items()):
        parts.append(arrow(order.index(wing), order.index(other), count))
    for place, (wing, words) in enumerate(WINGS.items()):
        mine = [path for name, path in files.items() if name.startswith(f"{wing}.")]
        top = 30 + STEP * place
        parts += [
            f'<rect class="box" x="{LEFT}" y="{top}" width="{WIDTH}" height="{HEIGHT}" rx="9"/>',
            f'<text class="name" x="{LEFT + 14}" y="{top + 20}">{wing}</text>',
            f'<text class="text" x="{LEFT + 14}" y="{top + 37}">{escape(words)}</text>',
            f'<text class="text" x="{LEFT - 40}" y="{top + 28}" text-anchor="end">{len(mine)} modules</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def rooms(root: Path) -> str:
    "A table a wing: every module with the first sentence of its docstring, linked to its notebook."
    parts = []
    for wing, words in WINGS.items():
        parts.append(f"### {wing}: {words}\n\n| room | what it is |\n|---|---|")
        for name, path in modules(root / "unirec").items():
            if not name.startswith(f"{wing}."):
                continue
            source = path.read_text(encoding="utf8")
            notebook = SOURCE.search(source)
            module, about = (
                name.partition(".")[2],
                (ast.get_docstring(ast.parse(source)) or "").split("\n")[0],
            )
            link = f"[{module}](nbs/{notebook[1]})" if notebook else module
            parts.append(f"| {link} | {about.replace('|', '/')} |")
        parts.append("")
    return "\n".join(parts)


def with_rooms(text: str, table: str) -> str:
    "ARCHITECTURE.md with its list of rooms replaced."
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n\n{table}\n{END}{rest.partition(END)[2]}"


SOURCE = re.compile(r"^# AUTOGENERATED! DO NOT EDIT! File to edit: [./]*nbs/(\S+\.ipynb)", re.M)
BEGIN, END = "<!-- rooms, written by tools/architecture.py -->", "<!-- end of rooms -->"

if __name__ == "__main__":
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    (root / "nbs" / "images" / "architecture.svg").write_text(picture(root), encoding="utf8")
    page = root / "ARCHITECTURE.md"
    page.write_text(with_rooms(page.read_text(encoding="utf8"), rooms(root)), encoding="utf8")
