"""The page of results, driven in Chromium (`--html` of `propose` and `visualize`)."""

import re
import shutil

import numpy as np
import pytest
from PIL import Image

from oln_d2.drawing import FOLD_IOU, Objects
from oln_d2.pages import Item, write_page
from oln_d2.results import Proposals

pytestmark = pytest.mark.heavy

NAMES = [
    "b.png",
    "a \"quoted\" <b>bold</b> & '10%'.png",
    "c\nd é 漢 #1?.png",
    "</script><script>x=1//",
]
SIZE = (300, 400)  # height, width
BOXES = np.array(
    # The first finds the dog, the second is its near copy, the third finds the zebra.
    [[10.0, 10, 110, 110], [12, 12, 112, 112], [200, 50, 300, 150], [20, 200, 80, 260]]
)
SCORES = np.array([0.9, 0.8, 0.5, 0.2])
OBJECTS = Objects(
    np.array([[11.0, 11, 111, 111], [200, 55, 300, 155], [320, 200, 380, 290]]),
    np.array([True, False, False]),
    ["dog", "zebra", "pizza <i>"],
)


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    commands = "chromium", "chromium-browser", "google-chrome"
    path = next(filter(None, map(shutil.which, commands)), None)
    if path is None:
        pytest.skip("there is no Chromium; apt-get install chromium")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture
def show(browser, tmp_path):
    """Opens a page of items; every error and every request to other than files fails the test."""
    problems, contexts = [], []

    def show(items, width=1200, scheme="light", **arguments):
        assert write_page(tmp_path / "page", items, **arguments) == []
        contexts.append(
            browser.new_context(
                viewport={"width": width, "height": 800}, color_scheme=scheme, has_touch=width < 500
            )
        )
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text))
        page.on("request", lambda request: requests.append(request.url))
        page.goto((tmp_path / "page/index.html").as_uri())
        page.wait_for_function("near.size > 0 || images.length === 0")
        return page

    requests = []
    yield show
    for context in contexts:
        context.close()
    assert not problems
    assert all(url.startswith("file:") for url in requests)


def make_items(tmp_path, names=NAMES, objects=OBJECTS):
    """One image a name; in the second one, no zebra is found."""
    for i, name in enumerate(names):
        path = tmp_path / f"photos #1/{i} {name.replace('/', '_')}"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", SIZE[::-1], (90, 40 * i % 250, 90)).save(path, "PNG")
        keep = np.array([True, True, i != 1, True])
        found = Proposals(BOXES, SCORES, size=SIZE, objectness=SCORES / 2)[keep]
        yield Item(name, path, [found], objects)


def names(page):
    return page.locator(".card figcaption").all_text_contents()


def counts(page):
    return page.locator(".card .count").all_text_contents()


def slide(page, name, value):
    page.locator(f"#{name}").fill(str(value))
    page.wait_for_function("!waiting")


def kinds(page):
    """Of the boxes in the enlarged image."""
    return sorted(page.locator("#large g").evaluate_all("all => all.map(g => g.className.baseVal)"))


def test_found_follows_the_controls(show, tmp_path):
    """What is counted as found has to be found by the boxes that are shown, with any setting."""
    page = show(make_items(tmp_path), number=20)
    page.uncheck("#fold")
    told = set()
    for score in 0, 0.5, 0.85, 1:
        for number in 1, 3, 4:
            slide(page, "score", score)
            slide(page, "number", number)
            page.wait_for_timeout(50)
            hits = OBJECTS.found_by(BOXES[:number][SCORES[:number] >= score])
            novel, known = hits[~OBJECTS.seen].sum(), hits[OBJECTS.seen].sum()
            told.add(counts(page)[0])
            assert counts(page)[0] == f"found {novel} of 2 novel, {known} of 1 known"
    assert len(told) > 2


def test_near_copies(show, tmp_path):
    """One of a heap of copies has to stay; it says how many there are. Without, all are shown."""
    assert FOLD_IOU == 0.5
    page = show(make_items(tmp_path, ["a.png"]), number=2)
    page.locator(".card button").click()
    proposals = page.locator("#large g.proposals")
    texts = [re.sub(r"\s+", " ", t) for t in proposals.evaluate_all("a => a.map(g => g.ariaLabel)")]
    assert sorted(texts) == [
        "proposal 1: score 0.900 c 0.450 (centerness) 1 near copy folded",
        "proposal 2: score 0.500 c 0.250 (centerness)",
    ]
    page.uncheck("#fold")
    page.wait_for_timeout(50)
    scores = proposals.evaluate_all("all => all.map(g => g.ariaLabel.match(/score (.*)/)[1])")
    assert sorted(scores) == ["0.800", "0.900"]
    assert counts(page) == ["found 0 of 2 novel, 1 of 1 known"]


def test_switches(show, tmp_path):
    """Each switch must hide its own boxes and no others, on cards as on the enlarged image."""
    page = show(make_items(tmp_path, ["a.png"]))
    card = "document.querySelector('canvas').boxes.map((box) => box.kind).sort()"
    page.locator(".card button").click()
    all_of_them = ["found", "known", "missed", "proposals", "proposals", "proposals"]
    assert kinds(page) == page.evaluate(card) == all_of_them
    for kind in set(all_of_them):
        page.uncheck(f"#{kind}")
        page.wait_for_timeout(50)
        assert kinds(page) == page.evaluate(card) == [k for k in all_of_them if k != kind]
        page.check(f"#{kind}")
    drawn = "(() => { const c = document.querySelector('canvas'); return c.toDataURL() })()"
    before = page.evaluate(drawn)
    page.uncheck("#proposals")
    page.wait_for_timeout(50)
    assert page.evaluate(drawn) != before


def test_weak_boxes_are_thin(show, tmp_path):
    """The boxes that matter have to stand out."""
    page = show(make_items(tmp_path, ["a.png"]))
    page.locator(".card button").click()
    widths = {}
    for rank in 1, 3:
        line = page.locator(f"#large g[aria-label^='proposal {rank}'] .line")
        widths[rank] = float(line.evaluate("e => parseFloat(getComputedStyle(e).strokeWidth)"))
    assert widths[1] > 2 * widths[3] > 1


def test_sorting(show, tmp_path):
    """By name as people count, or first those where most is missed."""
    page = show(make_items(tmp_path, ["img10.png", "img9.png", "img1.png"]))
    assert names(page) == ["img1.png", "img9.png", "img10.png"]
    page.select_option("#sort", "missed")
    assert names(page)[0] == "img9.png"  # the second of those written
    page.select_option("#sort", "name")
    assert names(page)[0] == "img1.png"


def test_enlarging(show, tmp_path):
    """A click shows the full picture, keys and buttons go on and back, Escape ends at the card."""
    page = show(make_items(tmp_path))
    viewed = page.locator("#viewed")
    page.locator(".card button").first.click()
    for i, name in enumerate(names(page)):
        assert viewed.text_content() == f"{name} ({i + 1} of 4)"
        picture = page.locator("#large img")
        page.wait_for_function(
            "document.querySelector('#large img').src !== current.card.querySelector('img').src"
        )
        assert picture.evaluate("image => [image.naturalHeight, image.naturalWidth]") == list(SIZE)
        page.keyboard.press("ArrowRight")
    assert page.locator("#next").is_disabled()
    page.keyboard.press("ArrowLeft")
    assert "(3 of 4)" in viewed.text_content()
    page.locator("#previous").click()
    assert "(2 of 4)" in viewed.text_content()
    page.locator("#score").focus()
    page.keyboard.press("ArrowRight")  # moves the slider only
    assert "(2 of 4)" in viewed.text_content() and page.locator("#score").input_value() == "0.01"
    page.locator("#actual").click()
    frame = page.locator("#large .frame").bounding_box()
    assert (frame["height"], frame["width"]) == SIZE
    page.keyboard.press("Escape")
    page.wait_for_function("document.activeElement.closest('.card') === order[1].card")
    assert not page.locator("#viewer").is_visible() and page.locator("#controls").is_visible()


def test_boxes_say_what_they_are(show, tmp_path):
    """Under the mouse on cards, and by the keyboard on the enlarged image."""
    page = show(make_items(tmp_path, ["a.png"]))
    tip = page.locator("#tip")
    canvas = page.locator("canvas").bounding_box()
    unit = canvas["width"] / SIZE[1]
    page.mouse.move(canvas["x"] + 350 * unit, canvas["y"] + 250 * unit)
    assert tip.text_content() == "pizza <i>\nnovel, missed"
    page.mouse.move(canvas["x"] + 50 * unit, canvas["y"] + 230 * unit)
    assert tip.text_content().startswith("proposal 3: score 0.200\nc 0.100 (centerness)")
    page.mouse.move(canvas["x"] + 150 * unit, canvas["y"] + 280 * unit)
    assert not tip.is_visible()
    page.locator(".card button").click()
    page.locator("#close").focus()
    told = set()
    for _ in range(6):
        page.keyboard.press("Tab")
        assert tip.is_visible()
        told.add(tip.text_content().split("\n")[0].split(":")[0])
    assert told == {"dog", "zebra", "pizza <i>", "proposal 1", "proposal 2", "proposal 3"}


def test_names_do_no_harm(show, tmp_path):
    """Quotes, markup and line ends in names are text."""
    title = "</title><script>x = 1</script>"
    page = show(make_items(tmp_path), title=title, detectors=["<b>mine</b>"])
    assert sorted(names(page)) == sorted(NAMES)
    assert page.title() == title and page.locator("h1").text_content() == title
    assert counts(page)[0].startswith("<b>mine</b>: found")
    assert page.evaluate("typeof x") == "undefined" and page.locator("main b, main i").count() == 0
    loaded = "document.querySelectorAll('.card img').length"
    assert page.evaluate(loaded) == len(NAMES)
    page.wait_for_function("[...document.images].every((image) => image.naturalWidth > 0)")


def test_dark_and_light(show, tmp_path):
    """As the system is set, and by the switch."""
    ground = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g)[0] < 128"
    for scheme in "light", "dark":
        page = show(make_items(tmp_path), scheme=scheme)
        assert page.evaluate(ground) == page.locator("#dark").is_checked() == (scheme == "dark")
        page.locator("#dark").click()
        assert page.evaluate(ground) == (scheme == "light")


@pytest.mark.parametrize("width", [320, 700, 1800])
def test_any_width(show, tmp_path, width):
    """Nothing may lie beyond the screen's side; each control has a name."""
    page = show(make_items(tmp_path, [*NAMES, "long" * 40]), width=width)
    if width < 500:  # folded away, for room
        assert not page.locator("#score").is_visible()
        page.locator("summary").tap()
    inside = "document.documentElement.scrollWidth <= innerWidth"
    assert page.locator("#score").is_visible() and page.evaluate(inside)
    unnamed = "[...document.querySelectorAll('input, select')].filter((e) => !e.labels.length)"
    assert page.evaluate(f"{unnamed}.length") == 0
    page.locator(".card button").first.click()
    assert page.evaluate(inside)
    for element in page.locator("dialog button").all():
        box = element.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width


def test_many_images(show, tmp_path):
    """Only what is near the screen may be loaded and drawn, or large sets would take minutes."""
    page = show(make_items(tmp_path, [f"{i}.png" for i in range(300)]))
    loaded = "[...document.querySelectorAll('.card img')].filter((image) => image.src).length"
    drawn = "[...document.querySelectorAll('canvas')].filter((c) => c.boxes && c.width).length"
    at_first = page.evaluate(loaded)
    assert 4 < at_first < 60
    page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
    page.wait_for_function("near.has(order.at(-1).card)")
    assert at_first < page.evaluate(loaded) < 120
    page.wait_for_function("!near.has(order[0].card)")
    assert 4 < page.evaluate(drawn) < 60


def test_without_objects_and_without_files(show):
    """Frames of videos are no files, `propose` knows no objects: such controls are not there."""
    frame = Image.new("RGB", SIZE[::-1], "red")
    found = Proposals(BOXES, SCORES, size=SIZE)
    page = show([Item("video.mp4/000001.jpg", frame, [found])])
    assert page.locator("#missed, #known").count() == 0 and not page.locator("#sort").is_visible()
    assert counts(page) == ["3 boxes"]
    page.locator(".card button").click()
    page.wait_for_function("document.querySelector('#large img').src.includes('full')")
    assert len(kinds(page)) == 3


def test_without_images(show):
    """The page has to open also where no image can be shown."""
    assert "0 images" in show([]).locator("#total").text_content()


def test_side_by_side(show, tmp_path):
    """Several detectors on the same image, first where they differ most."""
    items = list(make_items(tmp_path, ["a.png", "b.png"]))
    none = Proposals(BOXES[:0], [], size=SIZE)
    items = [
        item._replace(found=[item.found[0], other])
        for item, other in zip(items[::-1], [items[1].found[0], none])
    ]
    page = show(items, detectors=["mine", "other"])
    assert names(page) == ["a.png", "b.png"]
    assert counts(page)[:2] == [
        "mine: found 1 of 2 novel, 1 of 1 known",
        "other: found 0 of 2 novel, 0 of 1 known",
    ]
    page.select_option("#sort", "missed")
    page.locator(".card button").last.click()
    assert page.locator("#large svg").count() == 2


def test_missing_images(tmp_path):
    """An image that is gone costs a sentence, not the page."""
    items = list(make_items(tmp_path, ["a.png", "b.png"]))
    items[0].image.unlink()
    (failure,) = write_page(tmp_path / "page", items)
    assert "no such file" in failure
    assert len(list((tmp_path / "page/index_files").glob("*.jpg"))) == 1
