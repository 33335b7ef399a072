"""The page at /, in a real browser: a text is read and asked about, memories are listed and deleted."""

import re
import shutil

import pytest
import tiny_folder

pytest.importorskip("uvicorn")
sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("no Chromium is installed", allow_module_level=True)

import tiny_server  # noqa: E402
from tiny_server import running, served  # noqa: E402

pytestmark = pytest.mark.slow
expect = sync_api.expect


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    model = tiny_server.model(tmp_path_factory.mktemp("models"))
    with running(served(model, tmp_path_factory.mktemp("memories"))) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, address):
    """opened(**options): the page in a window of its own; errors of its program fail the test."""
    wrong, contexts = [], []

    def call(**options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: wrong.append(error))
        page.goto(address)
        expect(page.locator("h1")).to_have_text("tiny")
        return page

    yield call
    for context in contexts:
        context.close()
    assert not wrong


def test_a_text_is_read_asked_about_and_deleted(opened):
    page = opened()
    said, memory = page.locator("#said"), page.locator("#memory")
    page.get_by_role("button", name="Read", exact=True).click()
    expect(said).to_have_text("Give a text and a name for its memory.")
    seen = page.evaluate_handle(
        "() => { const seen = []; new MutationObserver(() => seen.push($('progress').value))"
        ".observe($('said'), {childList: true}); return seen; }"
    )
    page.locator("#file").set_input_files(
        {"name": "the sea.txt", "mimeType": "text/plain", "buffer": tiny_folder.WORDS[:600].encode()}
    )
    expect(page.locator("#name")).to_have_value("the-sea")
    page.get_by_role("button", name="Read", exact=True).click()
    expect(said).to_have_text('"the-sea" is read and kept.', timeout=20_000)
    progress = seen.json_value()
    assert 0 <= progress[0] < 1 and progress == sorted(progress) and progress[-1] == 1
    expect(page.locator("#progress")).to_be_hidden()
    expect(memory).to_have_value("the-sea")
    expect(memory.locator("option")).to_have_text(["none", re.compile(r"the-sea \([\d,]+ tokens\)")])

    grew = page.evaluate_handle(
        "() => { const grew = []; new MutationObserver(() => grew.push($('talk').textContent.length))"
        ".observe($('talk'), {childList: true, subtree: true, characterData: true}); return grew; }"
    )
    for question in ("the whale?", "the <b>ship</b>?"):
        page.locator("#question").fill(question)
        page.locator("#question").press("Enter")
        expect(page.locator("#send")).to_be_enabled(timeout=20_000)
        expect(said).to_have_text("")
    assert page.locator("#talk .user").all_text_contents() == ["the whale?", "the <b>ship</b>?"]
    assert all(page.locator("#talk .assistant").all_text_contents())
    assert len(set(grew.json_value())) > 3  # it came in pieces: two questions and two whole answers would be 3 or 4
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("#talk p")).to_have_count(0)

    page.get_by_role("button", name="Delete").click()
    expect(memory.locator("option")).to_have_text(["none"])
    expect(page.get_by_role("button", name="Delete")).to_be_disabled()


def test_an_answer_can_be_stopped_and_errors_are_shown(opened):
    page = opened()
    page.route("**/v1/chat/completions", lambda route: None)  # an answer that never comes
    page.locator("#question").fill("the whale?")
    page.get_by_role("button", name="Ask").click()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#send")).to_be_enabled()
    expect(page.locator("#talk .assistant")).to_have_count(0)
    page.locator("#text").fill("the sea")
    page.locator("#name").fill("../sea")
    page.get_by_role("button", name="Read", exact=True).click()
    expect(page.locator("#said.error")).to_contain_text("name: ")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_dark_where_asked_and_fits_a_narrow_window(opened, scheme):
    page = opened(color_scheme=scheme, viewport={"width": 320, "height": 640})
    page.locator("#question").fill("x" * 100)
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#send")).to_be_enabled(timeout=20_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    shown = page.evaluate("getComputedStyle(document.documentElement).colorScheme")
    dark = page.evaluate("getComputedStyle($('question')).color")
    light = sum(map(int, re.findall(r"\d+", dark)[:3])) > 380
    assert shown == "light dark" and light == (scheme == "dark")
