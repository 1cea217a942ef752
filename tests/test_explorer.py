"""The explorer of the results page, clicked through in a real browser, by mouse and by keyboard."""

import json

import pytest
from test_report import INJECTED, SETS, build, files, pages, visit  # noqa: F401  (fixtures)

from unirec.report.page import build_page


def chosen(page, name):
    "The text of the option that a select shows."
    return page.locator(f"#pick-{name}").evaluate(
        "part => part.selectedOptions[0] ? part.selectedOptions[0].textContent : ''"
    )


def lists(page):
    "Heading -> the lines of its list."
    return {
        box.locator("h4").inner_text(): box.locator("li").all_inner_texts()
        for box in page.locator("#explorer-user .three > div").all()
    }


def pick(page, **wishes):
    for name, label in wishes.items():
        page.locator(f"#pick-{name}").select_option(label=label)


@pytest.fixture()
def quiet(visit):  # noqa: F811
    "A page that has to have asked for nothing and complained about nothing when the test is over."
    opened = []

    def open_page(*args, **kwargs):
        opened.append(visit(*args, **kwargs))
        return opened[-1][0]

    yield open_page
    for page, seen in opened:
        assert seen["errors"] == []
        assert [url for url in seen["requests"] if not url.startswith("data:")] == [page.url]
        assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
        assert page.evaluate("window.taken") is None


@pytest.mark.parametrize("width", [1280, 390])
def test_every_choice_changes_what_is_shown(quiet, width):
    page = quiet(width)
    assert (chosen(page, "set"), chosen(page, "model"), chosen(page, "other"), chosen(page, "target")) == (
        "made_up",
        "unirec",
        "sasrec",
        "any item (10)",
    )
    pick(page, user="made_up-user-3, rank 4")
    assert list(lists(page)) == [
        "History, most recent first, the last 13 of 40",
        "Top ten of unirec",
        "Top ten of sasrec",
    ]
    history, ours, theirs = lists(page).values()
    assert "Thing old12" in history[0] and len(history) == 13 and len(ours) == 10 and len(theirs) == 10
    hits = page.locator("#explorer-user li.hit")
    assert (
        hits.count() == 1
        and "Thing target" in hits.inner_text()
        and hits.locator("strong").inner_text() == "hit"
        and hits.locator(".place").inner_text() == "4"
    )
    assert page.locator("#explorer-user .badge").all_inner_texts()[:2] == [
        "unirec: rank 4",
        "sasrec: rank 23.5",
    ]
    pick(page, model="sasrec", other="nothing")
    assert (
        list(lists(page))[1:] == ["Top ten of sasrec"]
        and chosen(page, "user") == "made_up-user-3, rank 23.5"
        and page.locator("#explorer-user li.hit").count() == 0
    )
    pick(page, model=INJECTED, user=INJECTED + ", rank 99")
    assert (
        INJECTED in page.locator("#explorer-user h3").inner_text()
        and INJECTED in "".join(lists(page)[f"Top ten of {INJECTED}"])
        and "W" * 300 in page.locator("#explorer-user").inner_text()
    )
    pick(page, set="borrowed", model="unirec", user="borrowed-user-2, rank 4")
    assert (
        "borrowed-user-2" in page.locator("#explorer-user h3").inner_text()
        and page.locator("#explorer-user img").count() == 0
    )


@pytest.mark.parametrize("width", [1280, 390])
def test_filters_keep_what_they_say_and_count_it(quiet, width):
    page = quiet(width)
    pick(page, target="cold (1)")
    assert (
        chosen(page, "user").startswith("made_up-user-9")
        and page.locator("#pick-user option").count() == 1
        and page.locator("#explorer-status").inner_text() == "1 of 1 users"
    )
    assert (
        "Thing cold" in page.locator(".target-item").inner_text()
        and "cold" in page.locator(".target-item .kind").inner_text()
    )
    pick(page, target="rare (0)")
    assert (
        page.locator("#explorer-user").inner_text() == "No such user among those that are kept."
        and page.locator("#step-on").is_disabled()
    )
    pick(page, target="popular (9)", items="popular items only")
    shown = page.locator("#explorer-user .three li .kind").all_inner_texts()
    assert (
        shown
        and set(shown) == {"popular"}
        and "3 of 10 shown" in page.locator("#explorer-user .three > div").nth(1).inner_text()
    )
    places = page.locator("#explorer-user .three > div").nth(1).locator(".place").all_inner_texts()
    assert places == ["3", "4", "8"], "a filtered list keeps the places"
    pick(page, items="all items")
    assert len(lists(page)["Top ten of unirec"]) == 10


@pytest.mark.parametrize("width", [1280, 390])
def test_it_can_be_used_by_keyboard_alone(quiet, width):
    page = quiet(width)
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = false)")
    page.locator("#pick-set").focus()
    names = []
    for _ in range(8):
        names.append(page.evaluate("document.activeElement.id"))
        outline = page.evaluate(
            "getComputedStyle(document.activeElement).outlineStyle +"
            " getComputedStyle(document.activeElement).outlineWidth"
        )
        if names[-1] == "pick-set":
            page.keyboard.press("ArrowDown")
        if names[-1] == "step-on":
            page.keyboard.press("Enter")
        page.keyboard.press("Tab")
    assert (
        names[:7]
        == ["pick-set", "pick-model", "pick-other", "pick-target", "pick-user", "pick-items", "step-on"]
        and outline == "solid3px"
    )
    assert (
        chosen(page, "set") == "borrowed"
        and page.locator("#explorer-status").inner_text() == "2 of 10 users"
        and "borrowed-user-1" in page.locator("#explorer-user h3").inner_text()
    )
    page.locator(".why summary").first.focus()
    page.keyboard.press("Enter")
    why = page.locator(".why").first
    assert (
        why.evaluate("part => part.open")
        and "Attention of the item's queries" in why.inner_text()
        and "cosine by the model's own embeddings" in why.inner_text()
    )
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY", "the next reason is one step away"


def test_why_shows_what_was_read_and_what_is_near(quiet):
    page = quiet()
    pick(page, user="made_up-user-3, rank 4", other="sasrec")
    bars = page.locator("#explorer-user .three > div").nth(1).locator("li").first.locator(".bar")
    assert bars.locator("b").all_text_contents() == ["63%", "38%", "0.75", "0.50"] and bars.locator(
        "span"
    ).all_text_contents() == ["title", INJECTED, "Thing old12", "Thing old11"]
    first = page.locator("#explorer-user .three > div").nth(1).locator(".why").first
    first.locator("summary").click()
    widths = [bar.bounding_box()["width"] for bar in first.locator(".bar i").all()]
    assert widths[0] > 1.5 * widths[1] > 0 and widths[2] > 1.3 * widths[3] > 0
    other = page.locator("#explorer-user .three > div").nth(2).locator("li .why").first
    assert "Attention" not in other.text_content() and "cosine by the frozen vectors" in other.text_content()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_charts_follow_the_choice(quiet, scheme):
    page = quiet(scheme=scheme)
    drawn = page.locator("#explorer-charts svg")
    assert (
        page.locator("#explorer-charts h3").all_inner_texts()
        == ["Comparison", "Learning curves: pretrain", "Learning curves: finetune"]
        and drawn.count() == 3
    )
    assert all(
        drawn.nth(i).get_attribute("aria-label") for i in range(3)
    ) and "unirec_id 0.0800" in drawn.nth(2).get_attribute("aria-label")
    assert (
        "unirec" in drawn.nth(0).text_content()
        and "MRR minus that of sasrec" in drawn.nth(0).text_content()
        and "MRR on valid" in drawn.nth(2).text_content()
        and "training loss" in drawn.nth(1).text_content()
    )
    before = drawn.nth(2).inner_html()
    pick(page, model="sasrec")
    page.wait_for_function(
        "before => document.querySelectorAll('#explorer-charts svg')[2].innerHTML !== before", arg=before
    )
    pick(page, set="borrowed")
    page.wait_for_selector("#explorer-charts[data-ready='1']")
    assert drawn.count() == 3


def test_labels_belong_to_their_fields(quiet):
    page = quiet()
    for label, name in (
        ("Data set", "set"),
        ("Model", "model"),
        ("Beside it", "other"),
        ("Chosen next was", "target"),
        ("User", "user"),
        ("Show in the lists", "items"),
    ):
        assert page.get_by_label(label, exact=True).get_attribute("id") == f"pick-{name}"
    assert page.locator("#explorer-status").get_attribute("role") == "status"


def test_changing_fast_leaves_one_set_of_charts(quiet):
    page = quiet()
    for _ in range(4):
        pick(page, set="borrowed"), pick(page, set="made_up")
    page.wait_for_selector("#explorer-charts[data-ready='0']")
    page.wait_for_timeout(500)
    assert page.locator("#explorer-charts svg").count() == 3


def test_an_item_that_nothing_is_known_of_is_named(files):  # noqa: F811
    path = files / "predictions/made_up/examples.json"
    examples = json.loads(path.read_text())
    del examples["items"]["item3"]
    path.write_text(json.dumps(examples))
    with pytest.raises(ValueError, match="examples.json: not the expected form .*'item3' is in a list"):
        build(files)


def test_without_a_comparison_the_chart_has_this_runs_figures(files):  # noqa: F811
    (files / "results/comparison/comparison.table.csv").unlink()
    build_page(
        files / "results",
        files / "predictions",
        files / "x.html",
        sets={"made_up": SETS["made_up"]},
        budget="quick",
        audience="local",
    )
    text = (files / "x.html").read_text()
    views = json.loads(text.split('id="explorer-data">')[1].split("</script>")[0])
    assert (
        views[0]["charts"][0]["caption"].startswith("Test; this run")
        and "MRR, whole catalogue" in views[0]["charts"][0]["words"]
    )
