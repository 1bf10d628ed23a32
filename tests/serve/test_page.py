"""The page, as a person uses it: in a browser."""

import re
import shutil

import pytest

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: install the system's package")
sync_api.expect.set_options(timeout=60_000)  # milliseconds until what is expected has to be there, on a busy machine
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens the page of a server; what the browser complains of is a failure."""
    contexts, complaints = [], []

    def open_page(server, **settings):
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console", lambda line: complaints.append(line.text) if "Content Security Policy" in line.text else None
        )
        page.goto(server.url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def expect(thing):
    return sync_api.expect(thing)


def columns(page) -> int:
    return int(page.locator("#neurons").get_attribute("data-tokens") or 0)


def test_it_completes_and_shows_the_neurons(open_page, server):
    page = open_page(server)
    expect(page.locator("#model")).to_have_value("tiny")
    page.locator("#max_tokens").fill("30")
    page.locator("#temperature").fill("0")
    page.locator("#prompt").fill("Once upon")
    page.locator("#send").click()
    expect(page.locator("#neurons")).to_have_attribute("data-tokens", "30")
    expect(page.locator("#count-tokens")).to_contain_text("30")
    expect(page.locator("#count-prompt")).to_contain_text("9")
    shown = page.locator("#output").text_content()
    expected = server.text("Once upon", max_tokens=30)
    assert re.sub(r"\s+", "", expected) in re.sub(r"\s+", "", shown)
    page.locator("#neurons").focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#neuron-details")).to_contain_text(re.compile("[0-9]"))


def test_it_stops_and_the_server_does_too(open_page, server):
    page = open_page(server)
    page.locator("#max_tokens").fill("16000")
    page.locator("#prompt").fill("Once upon")
    page.locator("#prompt").press("Control+Enter")
    expect(page.locator("#neurons")).not_to_have_attribute("data-tokens", "0")
    page.locator("#stop").click()
    server.idle()
    expect(page.locator("#send")).to_be_enabled()
    before = columns(page)
    page.wait_for_timeout(300)
    assert columns(page) == before


def test_parameters_are_sent_and_remembered(open_page, server):
    page = open_page(server)
    page.locator("#max_tokens").fill("7")
    page.locator("#temperature").fill("0.5")
    page.locator("#seed").fill("3")
    page.locator("#stops").fill("never\nnow")
    page.locator("#activations").uncheck()
    page.locator("#prompt").fill("abc")
    with page.expect_request("**/v1/completions") as asked:
        page.locator("#send").click()
    sent = asked.value.post_data_json
    assert (sent["max_tokens"], sent["temperature"], sent["seed"]) == (7, 0.5, 3)
    assert sent["stop"] == ["never", "now"]
    assert "bdh" not in sent
    page.reload()
    expect(page.locator("#temperature")).to_have_value("0.5")
    expect(page.locator("#activations")).not_to_be_checked()


def test_it_chats(open_page, chat_server):
    page = open_page(chat_server)
    page.locator("#mode-chat").click()
    page.locator("#max_tokens").fill("12")
    page.locator("#temperature").fill("0")
    page.locator("#system").fill("Be brief.")
    for number in (1, 2):
        page.locator("#message").fill(f"Question {number}?")
        page.locator("#send").click()
        expect(page.locator(".message")).to_have_count(2 * number)
        expect(page.locator("#send")).to_be_enabled()
    roles = [each.get_attribute("data-role") for each in page.locator(".message").all()]
    assert roles == ["user", "assistant", "user", "assistant"]
    page.locator("#new-chat").click()
    expect(page.locator(".message")).to_have_count(0)


def test_a_model_without_template_does_not_chat(open_page, server):
    expect(open_page(server).locator("#mode-chat")).to_be_disabled()


def test_errors_are_shown_and_a_missing_key_is_asked_for(open_page, server, guarded):
    page = open_page(server)
    page.locator("#prompt").fill("abc")
    page.locator("#max_tokens").fill("1000000")
    page.locator("#send").click()
    expect(page.locator("#error")).to_contain_text("max_tokens")
    page = open_page(guarded)
    expect(page.locator("#error")).to_contain_text("API key")
    page.locator("#key").fill("secret-of-ann")
    page.locator("#key").press("Tab")
    expect(page.locator("#model")).to_have_value("tiny")
    page.locator("#prompt").fill("abc")
    page.locator("#max_tokens").fill("5")
    page.locator("#send").click()
    expect(page.locator("#count-tokens")).to_contain_text("5")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(open_page, server, scheme):
    page = open_page(server, viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True)
    page.locator("#prompt").fill("a word that is very long " + "x" * 300)
    page.locator("#max_tokens").fill("40")
    page.locator("#send").click()
    expect(page.locator("#neurons")).to_have_attribute("data-tokens", "40")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 360


def test_everything_is_reached_by_the_keyboard(open_page, server):
    page = open_page(server)
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("() => document.activeElement.id"))
    assert {
        "model",
        "key",
        "mode-complete",
        "prompt",
        "send",
        "max_tokens",
        "temperature",
        "theme",
        "activations",
    } <= reached


def test_the_page_may_load_nothing_from_elsewhere(server):
    policy = server.http.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"""(src|href)=["']?https?:""", server.http.get("/").text)
