"""Pages of data whose names are markup and code: of images, categories, detectors and folders."""

import html.parser
import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image
from test_page import browser  # noqa: F401
from test_propose import weights  # noqa: F401

from oln_d2.auditing import audit
from oln_d2.loading import load
from oln_d2.pages.comparison import compare
from oln_d2.propose import propose_files

MARKUP = "\"'><img src=x onerror=x=1><svg onload=x=1>&lt;"
NAMES = [
    f"{MARKUP}.png",
    "javascript:x=1.png",
    "{{ 7 * 7 }} $\\alpha$ `${x=1}` %3Cb%3E #1?.png",
    "constructor\n__proto__.png",
]
CATEGORIES = [*NAMES, "</script><script>x=1//", "--><script>x=1</script><!--", "__proto__"]
SEEN = CATEGORIES[:2]


@pytest.fixture(scope="module")
def pages(weights, tmp_path_factory):  # noqa: F811
    """The folders of a page of `propose`, of `compare` and of `audit`."""
    folder = tmp_path_factory.mktemp("hostile") / MARKUP
    photos = folder / "photos"
    photos.mkdir(parents=True)
    boxes = [[10.0, 8.0, 40.0, 30.0], [60.0, 20.0, 50.0, 40.0]]
    images, annotations = [], []
    for i, name in enumerate(NAMES, 1):
        pixels = np.random.RandomState(i).randint(0, 256, (90, 120, 3), np.uint8)
        Image.fromarray(pixels).save(photos / name, "PNG")
        images.append({"id": i, "file_name": name, "width": 120, "height": 90})
        for k, box in enumerate(boxes):
            entry = {"image_id": i, "category_id": 1 + (2 * i + k) % len(CATEGORIES), "bbox": box}
            annotations.append({**entry, "id": 2 * i + k, "area": 1200, "iscrowd": 0})
    categories = [{"id": i, "name": name} for i, name in enumerate(CATEGORIES, 1)]
    gt = folder / f"{MARKUP}.json"
    content = {"images": images, "annotations": annotations, "categories": categories}
    gt.write_text(json.dumps(content))
    results = []
    for i, name in enumerate((f"a {MARKUP}", "javascript:x=1"), 1):
        found = [{k: a[k] for k in ("image_id", "bbox")} | {"score": 0.5 / i} for a in annotations]
        results.append(folder / f"{name}.json")
        results[-1].write_text(json.dumps(found[:: i + 1]))
    made = {name: folder / name for name in ("propose", "compare", "audit")}
    proposer = load(weights, device="cpu")
    propose_files(proposer, [str(photos)], made["propose"], html=True, top_k=10)
    compare(gt, results, made["compare"], seen=SEEN, images=photos, samples=10)
    audit(gt, photos, made["audit"], proposer=proposer, top_k=10)
    return made


class Reader(html.parser.HTMLParser):
    """Collects the elements of a page, and what is in its scripts."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] == "script":
            self.scripts.append(data.strip())


@pytest.mark.parametrize("command", ["propose", "compare", "audit"])
def test_names_are_text(pages, command):
    """A name could become an element, an attribute or code of the page that shows it."""
    folder = pages[command]
    reader = Reader((folder / "index.html").read_text())
    scripts = [attributes for tag, attributes in reader.elements if tag == "script"]
    files = "audit_files" if command == "audit" else "index_files"
    code = "review" if command == "audit" else "page"
    assert scripts == [{"src": f"{files}/data.js"}, {"src": f"{files}/{code}.js"}]
    assert not any(reader.scripts)
    for tag, attributes in reader.elements:
        assert tag not in ("iframe", "object", "embed", "base", "link", "form"), tag
        assert not [name for name in attributes if name.startswith("on")], attributes
        for name in "src", "href":
            assert re.fullmatch(r"[#\w./]*", attributes.get(name, "")), attributes
    data = (folder / files / "data.js").read_text()
    assert data.isascii()  # also what only some programs take for the end of a line
    listed = data.partition("const images = ")[2].rstrip().rstrip(";")
    images = json.loads(listed.rstrip()) if listed else json.loads(data[14:-2])["images"]
    assert images and {image["name"] for image in images} <= set(NAMES)
    for image in images:
        target = image.get("full") or image["file"]
        assert re.fullmatch(r"[\w./%~-]+", target), target
    for figure in folder.glob("**/*.svg"):
        for element in ET.parse(figure).iter():
            assert element.tag.rpartition("}")[2] not in ("script", "a", "foreignObject", "image")
            assert not [name for name in element.attrib if name.startswith("on")]


@pytest.mark.heavy
@pytest.mark.parametrize("command", ["propose", "compare", "audit"])
def test_no_script_runs(pages, command, browser):  # noqa: F811
    """The code in the names would run in the browser of who looks at the page."""
    problems, requests = [], []
    page = browser.new_page()
    page.set_default_timeout(20_000)
    for event in "pageerror", "console", "dialog":
        page.on(event, lambda what: problems.append(str(getattr(what, "text", what))))
    page.on("request", lambda request: requests.append(request.url))
    page.goto((pages[command] / "index.html").as_uri())
    if command == "audit":
        page.wait_for_function("picture(images[current().image]).naturalWidth > 0")
        assert page.locator("#categories button").count() == len(CATEGORIES)
        options = page.locator("#names option").evaluate_all("all => all.map((o) => o.value)")
        assert sorted(options) == sorted(CATEGORIES)
        for key in "x", "a", "1", "?", "e", "ArrowRight", "Backspace":
            page.keyboard.press(key)
        assert any(name in page.locator("#about").text_content() for name in NAMES)
    else:
        page.locator("#images").scroll_into_view_if_needed()
        page.wait_for_function("near.size > 0")
        page.wait_for_function("[...document.images].every((image) => image.complete)")
        shown = page.locator(".card figcaption").all_text_contents()
        assert sorted(shown) == sorted(NAMES)
        page.locator(".card button").first.click()
        page.wait_for_function("document.querySelector('#large img').naturalWidth > 0")
        for _ in NAMES:
            page.keyboard.press("ArrowRight")
            page.keyboard.press("Tab")
    assert page.evaluate("typeof x") == "undefined"
    assert page.locator("[onerror], [onload], script:not([src])").count() == 0
    assert not problems and all(url.startswith("file:") for url in requests)
    page.close()
