"""The results page, made from made-up files and looked at by a real browser."""

import base64
import hashlib
import io
import json

import pandas as pd
import pytest
from PIL import Image

from unirec.report import comparison, tables
from unirec.report.page import build_page

INJECTED = (
    "<script>window.taken = true; document.title = 'taken'</script><img src=x onerror='window.taken = true'>"
)
KINDS = ("cold", "rare", "middle", "popular")
MODELS = {"unirec": 0.09, "unirec_id": 0.08, "sasrec": 0.07, INJECTED: 0.05}


def picture(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (96, 96), colour).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def item(name, picture=None, kind="middle"):
    return {"title": f"Thing {name}", "detail": "a detail " * 6, "kind": kind, "picture": picture}


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def append(path, rows):
    path.parent.mkdir(exist_ok=True)
    rows.to_csv(path, mode="a", header=not path.exists(), index=False)


def write_compared(folder, name):
    """A comparison in which UniRec trails sasrec, its reference, and what stands behind the means."""
    rows = [
        {
            "dataset": name,
            "protocol": protocol,
            "ranks": ranks,
            "best_by": "valid and test",
            "model": model,
            "reference": "sasrec",
            "seeds": 2,
            "mrr": mrr,
            "std": 0.001,
            "difference": mrr - 0.1,
            "low": mrr - 0.11,
            "high": mrr - 0.09,
            "holm_both": p,
            "detectable": 0.015,
            "verdict": verdict,
            "valid_mrr": mrr,
        }
        for protocol, ranks in (
            ("leave_one_out", "full"),
            ("leave_one_out", "full_shuffled"),
            ("leave_one_out", "sampled100"),
            ("last5", "full"),
        )
        for model, mrr, p, verdict in (
            ("sasrec", 0.1, None, "reference"),
            ("unirec", 0.098, 0.4, "undecided"),
            (INJECTED, 0.05, 0.0001, "worse"),
        )
    ]
    runs = {"dataset": name, "variant": "unirec", "seed": [0, 1], "protocol": "leave_one_out"}
    append(folder.parent / "comparison/comparison.table.csv", pd.DataFrame(rows))
    append(folder.parent / "comparison/comparison.runs.csv", pd.DataFrame(runs))
    rows = [
        (model, "target", label, users, level, level / 2, level * 2)
        for model, level in MODELS.items()
        for label, users in (("cold", 3), ("warm", 7))
    ]
    pd.DataFrame(rows, columns=tables.BREAKDOWNS).to_csv(folder / "breakdowns.csv", index=False)
    pd.DataFrame([(model, 10, 0.5, 0.4, 0.1, 0.3) for model in MODELS], columns=tables.LISTS).to_csv(
        folder / "lists.csv", index=False
    )
    pd.DataFrame([("unirec", "text", "image", 40, 0.125, 0.5, 0.025, 0.25)], columns=tables.RETRIEVAL).to_csv(
        folder / "retrieval.csv", index=False
    )
    pd.DataFrame(
        [(model, level, level - 0.0123) for model, level in MODELS.items()], columns=tables.TIES
    ).to_csv(folder / "ties.csv", index=False)


def write_set(root, name, synthetic, redistributable):
    """One data set with everything a page needs.

    Its first user carries the injected words and refused pictures.
    """
    folder = root / "results" / name
    folder.mkdir(parents=True)
    rows = [
        (name, model, seed, protocol, metric, level + 0.001 * seed)
        for model, level in MODELS.items()
        for seed in (0, 1)
        for protocol in ("full", "sampled100", "last5")
        for metric in ("mrr", "hit@10", "ndcg@10", "hit@20")
    ]
    pd.DataFrame(rows, columns=["dataset", "model", "seed", "protocol", "metric", "value"]).to_csv(
        folder / "comparison.csv", index=False
    )
    rows = [
        (model, stage, epoch, 3 / (epoch + 1), level if stage == "finetune" else None, 1.0)
        for model, level in MODELS.items()
        for stage in ("pretrain", "finetune")
        for epoch in range(3)
    ]
    pd.DataFrame(rows, columns=["model", "stage", "epoch", "loss", "mrr", "seconds"]).to_csv(
        folder / "curves.csv", index=False
    )
    write_json(
        folder / "llm_share.json",
        {
            "unirec": {"mrr": 0.09, "mrr_without_llm": 0.08, "norm_share": 0.1, "gate": 0.05},
            INJECTED: {"mrr": None},
        },
    )
    write_json(
        folder / "run_evaluate.json",
        {
            "stage": "evaluate",
            "dataset": name,
            "params": {"note": INJECTED},
            "git_revision": None,
            "data_sha256": "0" * 64,
            "seconds": 61.0,
        },
    )
    write_json(
        folder / "run_embed.json",
        {
            "stage": "embed",
            "dataset": name,
            "seconds": 5,
            "peak_memory_mb": 900.4,
            "tokens_per_second": 12345.6,
        },
    )
    write_json(
        folder / "quality.json",
        {
            "users": 10,
            "items": 40,
            "events": 90,
            "rows_read": 100,
            "rows_kept": 90,
            "dropped": {INJECTED: 10},
            "coverage": {"title": 1.0, INJECTED: 0.25},
            "invalid_values": {INJECTED: 3},
            "tied_events": 9,
            "valid_users": 10,
            "test_users": 9,
            "cold_users": 1,
            "events_of_cold_users": 4,
            "cold_items": 6,
            "cold_test_targets": 2,
            "split": "by_time",
            "ties": "file",
            "repeats": "keep",
        },
    )
    write_compared(folder, name)
    cards = {
        f"item{place}": item(f"item{place}", picture("orange"), KINDS[place % 4]) for place in range(1, 10)
    } | {f"old{step}": item(f"old{step}", picture("gray")) for step in range(13)}
    cards |= {
        "target": item("target", picture("teal"), "popular"),
        "cold": item("cold", None, "cold"),
        "item10": item("item10", None, "rare"),
    }
    cards |= {
        "a": item("a", "javascript:window.taken=true"),
        "b": item("b", "https://elsewhere.invalid/b.png"),
        "c": item("c", "data:image/svg+xml;base64,PHN2Zy8+"),
        "d": item("d", 'data:image/png;base64,AA" onload="window.taken=true'),
    }
    cards |= {"e": item("e") | {"title": INJECTED, "detail": INJECTED}, "f": item("f") | {"title": "W" * 300}}

    def places(*names):
        return [
            {"item": one, "score": 1 / place, "nearest": [["old12", 0.75], ["old11", 0.5]]}
            for place, one in enumerate(names, 1)
        ]

    ten = [f"item{place}" for place in range(1, 10)]
    users = [
        {
            "user": f"{name}-user-{number}",
            "history": [f"old{step}" for step in range(13)],
            "events": 40,
            "target": "cold" if number == 9 else "target",
            "rank": {"unirec": 4.0, "sasrec": 23.5, INJECTED: 99},
            "top": {
                "unirec": places(*ten[:3], "target", *ten[3:]),
                "sasrec": places(*ten, "item10"),
                INJECTED: places("e", "f"),
            },
        }
        for number in range(10)
    ]
    users[0] |= {"user": INJECTED, "history": ["a", "b", "c", "d", "e", "f"]}
    shares = {i: {"title": 0.625, INJECTED: 0.375} for i in cards}
    write_json(
        root / "predictions" / name / "examples.json",
        {
            "dataset": name,
            "synthetic": synthetic,
            "redistributable": redistributable,
            "items": cards,
            "users": users,
            "models": {
                "unirec": {"nearest": "the model's own embeddings", "attention": shares},
                "sasrec": {"nearest": "the frozen vectors", "attention": {}},
                INJECTED: {"nearest": INJECTED, "attention": {}},
            },
        },
    )


def write_sets(root):
    write_set(root, "made_up", synthetic=True, redistributable=True)
    write_set(root, "borrowed", synthetic=False, redistributable=False)
    (root / "results" / "elsewhere").mkdir(parents=True)
    write_compared(root / "results" / "elsewhere", "elsewhere")
    return root


@pytest.fixture()
def files(tmp_path):
    return write_sets(tmp_path)


SETS = {
    "made_up": {"synthetic": True, "redistributable": True},
    "borrowed": {"synthetic": False, "redistributable": False},
}
# in the comparison only; known, and compared with nothing
OTHERS = {"elsewhere": {"synthetic": False}, "never_compared": {}}


def build(root, **other):
    options = {"sets": SETS, "budget": "quick", "audience": "local"} | other
    return build_page(root / "results", root / "predictions", root / "reports" / "index.html", **options)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The page for each audience, built once: audience -> (file, what build_page returned)."""
    root = write_sets(tmp_path_factory.mktemp("pages"))
    return {
        audience: (
            file,
            build_page(
                root / "results",
                root / "predictions",
                file,
                sets=SETS,
                budget="quick",
                audience=audience,
                others=OTHERS,
            ),
        )
        for audience in ("local", "public")
        for file in [root / f"{audience}.html"]
    }


@pytest.fixture()
def visit(chromium, pages):
    """Open a page at a width, every fold open, and return it with what it asked for and complained about."""
    contexts = []

    def open_page(width=1280, scheme="light", audience="local", script=True):
        file, report = pages[audience]
        context = chromium.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=script
        )
        contexts.append(context)
        page, seen = context.new_page(), {"requests": [], "errors": [], "report": report}
        page.on("request", lambda request: seen["requests"].append(request.url))
        page.on(
            "console",
            lambda message: (
                seen["errors"].append(message.text) if message.type in ("error", "warning") else None
            ),
        )
        page.on("pageerror", lambda error: seen["errors"].append(str(error)))
        page.goto(file.as_uri())
        if not script:
            return page, seen
        page.wait_for_selector("#explorer-charts[data-ready]")
        page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
        page.wait_for_load_state("networkidle")
        return page, seen

    yield open_page
    for context in contexts:
        context.close()


def test_all_compared_sets_stand_in_one_section(visit):
    page, _ = visit()
    links = ["made_up", "borrowed", "recorded comparison", "explore test users"]
    assert page.locator("nav a.badge").all_text_contents() == links
    page.click("nav a:text('recorded comparison')")
    card = page.locator("#comparison")
    assert card.locator("h3").all_text_contents() == ["made_up", "borrowed", "elsewhere"]
    assert card.locator("table.recorded tbody tr").count() == 3 * 2 * 3
    assert "never_compared" not in page.content()
    sentences = card.locator(":scope > p").all_text_contents()[1:]
    assert len(sentences) == 2 and all("3 data sets" in text for text in sentences)


def test_page_stays_at_home_and_injected_words_stay_words(visit):
    page, seen = visit()
    assert [url for url in seen["requests"] if not url.startswith("data:")] == [page.url]
    assert seen["errors"] == []
    assert page.evaluate("window.taken") is None and page.title() == "UniRec companion: results"
    assert (
        page.locator("iframe, object, embed, [onerror], [onload], script[src]").count() == 0
        and page.locator("script").count() == 3
    )
    # it is there to be read: model, user, title, reason, parameters
    assert page.get_by_text(INJECTED).count() >= 10
    assert seen["report"]["pictures_refused"] == 4
    assert (
        "Pictures left out" in page.locator("footer").inner_text()
        and "elsewhere.invalid" not in page.content()
    )


def test_only_the_pages_own_scripts_may_run(visit):
    page, _ = visit()
    allowed = page.locator("meta[http-equiv=Content-Security-Policy]").get_attribute("content")
    scripts = page.evaluate(
        "[...document.querySelectorAll('script:not([type])')].map(part => part.textContent)"
    )
    wanted = [
        "'sha256-" + base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() + "'"
        for code in scripts
    ]
    assert (
        allowed.startswith(f"default-src 'none'; script-src {' '.join(wanted)}; img-src data:;")
        and "unsafe-eval" not in allowed
        and len(wanted) == 2
    )
    page.evaluate(
        "(() => { const part = document.createElement('script'); part.textContent = 'window.taken = true';"
        " document.body.append(part); })()"
    )
    assert page.evaluate("window.taken") is None


def test_tables_and_figures_need_no_script(visit):
    page, _ = visit(script=False)
    assert (
        page.locator("#explorer").get_by_text("need JavaScript").is_visible()
        and not page.locator("#explorer-form").is_visible()
    )
    assert (
        page.locator("#set-1 .comparison tbody tr").count() == 4
        and page.locator("#set-1 figure svg").first.is_visible()
    )


def test_badge_and_figures_are_shown(visit):
    page, _ = visit()
    made_up, borrowed = page.locator("#set-1"), page.locator("#set-2")
    assert (
        made_up.locator(".badge.synthetic").inner_text() == "synthetic data"
        and made_up.locator(".badge.synthetic").is_visible()
    )
    assert borrowed.locator(".badge.synthetic").count() == 0
    assert "claims never come from it" in page.locator("header").inner_text()
    assert made_up.locator(".comparison tbody th").all_inner_texts()[0].startswith("unirec")
    best = made_up.locator(".comparison td.best").first
    assert "0.0905" in best.inner_text() and "± 0.0007" in best.inner_text()
    assert [row.split()[0] for row in made_up.locator(".runs tbody th").all_inner_texts()] == [
        "embed",
        "evaluate",
    ]


@pytest.mark.parametrize("width", [390, 1280])
def test_no_horizontal_scroll(visit, width):
    page, _ = visit(width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wide = page.evaluate(
        """width => [...document.querySelectorAll('body *')]
        .filter(part => !part.closest('.scroll') && !part.closest('svg')
        && part.getBoundingClientRect().right > width + 0.5).map(part => part.outerHTML.slice(0, 80))""",
        width,
    )
    assert wide == []


def test_page_is_accessible(visit):
    page, _ = visit()
    levels = page.evaluate(
        "[...document.querySelectorAll('h1,h2,h3,h4,h5,h6')].map(head => +head.tagName[1])"
    )
    assert (
        levels[0] == 1
        and levels.count(1) == 1
        and all(after - before <= 1 for before, after in zip(levels, levels[1:]))
    )
    assert (
        page.locator("th:not([scope])").count() == 0 and page.locator("table:not(:has(caption))").count() == 0
    )
    assert page.locator("img:not([alt]), img[alt=''], svg:not([aria-label])").count() == 0
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(part => part.id)")
    assert len(ids) == len(set(ids))
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")


CONTRAST = """() => {
  const parts = colour => colour.match(/[0-9.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b]
    .map(v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = part => {
    for (; part; part = part.parentElement) {
      const c = parts(getComputedStyle(part).backgroundColor);
      if (c.length < 4 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  const texts = 'h1,h2,h3,h4,h5,p,dt,dd,th,td,small,figcaption,summary,select,button:not(:disabled),label,' +
    '.badge,.kind,.what,.place,a,svg text';
  return [...document.querySelectorAll(texts)].map(part => {
    const style = getComputedStyle(part);
    const a = light(parts(part.closest('svg') ? style.fill : style.color)), b = light(ground(part));
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), part.outerHTML.slice(0, 80)];
  }).filter(([ratio]) => ratio < 4.5);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_themes(visit, scheme):
    page, _ = visit(scheme=scheme)
    assert page.evaluate(CONTRAST) == []


def test_what_may_not_be_passed_on_stays_here(visit):
    local, _ = visit()
    assert (
        local.locator("#set-2").get_by_text("shown on this machine only").is_visible()
        and local.locator("#explorer img").count() > 15
    )
    local.locator("#pick-set").select_option(label="borrowed")
    assert (
        local.locator("#explorer").get_by_text("Shown on this machine only").is_visible()
        and local.locator("#explorer img").count() == 0
        and local.locator("#explorer li").count() > 10
    )
    public, seen = visit(audience="public")
    public.locator("#pick-set").select_option(label="borrowed")
    assert (
        public.locator("#explorer img, #explorer li").count() == 0 and "borrowed-user" not in public.content()
    )
    assert (
        public.locator("#set-2").get_by_text("does not allow passing").is_visible()
        and public.locator("#explorer").get_by_text("does not allow passing").is_visible()
        and seen["report"]["rows_withheld"] == ["borrowed"]
    )


@pytest.mark.parametrize(
    "entry, said",
    [
        ({}, True),
        ({"redistributable": True}, False),
        ({"redistributable": "yes"}, True),
        ({"redistributable": True}, None),
    ],
)
def test_silence_means_no(files, entry, said):
    """Rows are passed on only if both the parameters and the examples say so."""
    path = files / "predictions" / "borrowed" / "examples.json"
    examples = json.loads(path.read_text())
    path.write_text(json.dumps(examples | {"redistributable": said}))
    report = build(files, sets={"borrowed": entry}, audience="public")
    assert report["rows_withheld"] == ["borrowed"] and report["pictures"] == 0
    assert "borrowed-user" not in (files / "reports" / "index.html").read_text()


@pytest.mark.parametrize(
    "file",
    [
        "results/made_up/comparison.csv",
        "results/made_up/curves.csv",
        "results/made_up/llm_share.json",
        "predictions/made_up/examples.json",
    ],
)
def test_missing_file_is_named_with_its_stage(files, file):
    (files / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"{file} .written by the stage `evaluate`"):
        build(files)
    assert not (files / "reports").exists()


def test_broken_file_is_named(files):
    (files / "predictions/made_up/examples.json").write_text('{"users": [{"user": "1"}]}')
    with pytest.raises(ValueError, match="examples.json: not the expected form"):
        build(files)
    (files / "results/made_up/llm_share.json").write_text("{")
    with pytest.raises(ValueError, match="llm_share.json is not valid JSON|examples.json"):
        build(files)


def test_tables_agree_with_the_file(files):
    table = tables.results_table(files / "results", ["made_up"])
    assert list(table["model"]) == list(MODELS) and table["full mrr"].tolist() == pytest.approx(
        [level + 0.0005 for level in MODELS.values()]
    )
    text = tables.results_markdown(table)
    assert "**0.0905** ± 0.0007" in text and "<script" not in text
    assert tables.results_table(files / "results")["dataset"].unique().tolist() == ["borrowed", "made_up"]


def test_comparison_with_seeds_is_shown(visit):
    page, _ = visit()
    made_up = page.locator("#comparison details.recorded").first
    recorded = made_up.locator("table.recorded")
    assert recorded.count() == 2 and "Last five events held out" in made_up.inner_text()
    rows = recorded.first.locator("tbody tr").all_inner_texts()
    assert [row.split()[0] for row in rows[:2]] == ["sasrec", "unirec"]
    assert "-0.0120 to +0.0080" in rows[1] and rows[1].endswith("undecided")
    assert "unirec trails by 2.0%, verdict: undecided" in made_up.inner_text()
    assert "2 runs are recorded" in made_up.inner_text()
    heads = ["model", "last event, full", "ties shuffled", "among 100", "last five, full"]
    assert made_up.locator(".robust thead th").all_inner_texts() == heads
    assert made_up.locator("svg").count() == 2
    assert "Better, worse, undecided" in page.locator("main").inner_text()


def test_groups_lists_and_ties_are_shown(visit):
    page, _ = visit()
    folded = page.locator("#set-1 .evaluation")
    for text in ("target: cold", "text finds image", "12.5%", "0.0777", "+0.10"):
        assert text in folded.inner_text()
    assert folded.locator("svg").count() == 1


@pytest.mark.parametrize("width", [390, 1280])
def test_what_was_read_kept_and_dropped_is_a_table(visit, width):
    page, _ = visit(width)
    part = page.locator("#set-1 .quality")
    counts, attributes = (
        table.locator("tbody tr").all_inner_texts() for table in part.locator("table").all()
    )
    cells = [[cell.strip() for cell in row.split("\t")] for row in counts]
    assert cells[:3] == [
        ["rows read", "100", ""],
        ["rows kept", "90", "90.0% of rows"],
        [f"dropped: {INJECTED}", "10", ""],
    ]
    assert (
        ["cold users: no event in train", "1", "10.0% of users"] in cells
        and ["cold items: no event in train", "6", "15.0% of items"] in cells
        and any(row[0].startswith("events at the same time") and row[1] == "9" for row in cells)
    )
    assert [[cell.strip() for cell in row.split("\t")] for row in attributes] == [
        ["title", "100.0%", "0"],
        [INJECTED, "25.0%", "3"],
    ]
    assert "Split: by_time; ties in time: in the order of the file" in page.locator("#set-1").inner_text()
    for box in part.locator(".scroll").all():
        inside, shown = box.evaluate("part => [part.scrollWidth, part.clientWidth]")
        assert inside <= shown, "read without scrolling sideways"


@pytest.mark.parametrize(
    "report",
    [
        None,
        {},
        {"users": 3},
        {"users": "many", "dropped": None, "coverage": {"title": None}, "rows_kept": float("nan")},
    ],
)
def test_a_quality_report_may_lack_things(files, report):
    """An earlier version wrote fewer figures: what is not there is not shown, what is no number is a dash."""
    path = files / "results/made_up/quality.json"
    path.unlink() if report is None else path.write_text(json.dumps(report))
    build(files, sets={"made_up": SETS["made_up"]})
    text = (files / "reports/index.html").read_text()
    assert ("No quality report for this set" in text) == (not report) and ('class="quality"' in text) == bool(
        report and "coverage" in report
    )
    assert (
        "None" not in text.split("Comparison</h3>")[0]
        and "nan" not in text.split("Comparison</h3>")[0].split("</header>")[1]
    )


def test_without_a_comparison_one_line_says_what_makes_it(files):
    for name in ("comparison/comparison.table", "comparison/comparison.runs", "made_up/breakdowns"):
        (files / f"results/{name}.csv").unlink()
    build(files, sets={"made_up": SETS["made_up"]}, wanted={"made_up": 40})
    text = (files / "reports/index.html").read_text()
    assert "has not been run here: 0 of 40 runs are recorded; unirec run comparison makes it" in text
    for absent in ('class="recorded"', 'class="evaluation"', "Smallest difference found"):
        assert absent not in text


def test_an_earlier_versions_comparison_says_so(files):
    folder = files / "results/comparison"
    (folder / "comparison.table.csv").rename(folder / "0.1.0.csv")
    build(files, sets={"made_up": SETS["made_up"]})
    text = (files / "reports/index.html").read_text()
    assert '<span class="badge note">version 0.1.0</span>' in text and 'class="recorded"' in text
    # the chart of the explorer has the figures of the run itself
    assert "MRR minus that of" not in text.split('id="explorer-data">')[1].split("</script>")[0]


def test_sentences_follow_the_verdicts(files):
    path = files / "results/comparison/comparison.table.csv"
    table = pd.read_csv(path)
    before = comparison.comparison_markdown(files / "results", SETS, {"made_up": 40})
    assert (
        "better on 0, undecided on 2 (made\\_up (synthetic) -2.0%, borrowed -2.0%), worse on 0" in before
        and "2 of 40 runs are recorded" in before
        and "<script" not in before
    )
    ours = (table["model"] == "unirec") & (table["dataset"] == "made_up")
    table.loc[ours, ["difference", "low", "high", "verdict"]] = [0.005, 0.001, 0.009, "better"]
    table.to_csv(path, index=False)
    after = comparison.comparison_markdown(files / "results", SETS)
    assert (
        "better on 1 (made\\_up (synthetic) +5.0%), undecided on 1 (borrowed -2.0%)" in after
        and "unirec leads by 5.0%, verdict: better" in after
    )


def test_unirec_is_picked_by_valid_not_by_test(files):
    table = comparison.recorded_comparison(files / "results").tables["made_up"]
    lucky = table[table["model"] == "unirec"].assign(
        model="unirec_id", mrr=0.2, valid_mrr=0.01, difference=0.1, verdict="better"
    )
    assert comparison.data_set_sentence(pd.concat([table, lucky]), "leave_one_out").startswith(
        "unirec (the form of UniRec that is best on validation)"
    )


def test_broken_comparison_is_named(files):
    path = files / "results/comparison/comparison.table.csv"
    pd.read_csv(path).drop(columns="verdict").to_csv(path, index=False)
    with pytest.raises(ValueError, match="comparison.table.csv: the columns .'verdict'. are missing"):
        build(files)
