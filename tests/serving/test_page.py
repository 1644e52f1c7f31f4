"""The page in a headless Chromium: what each kind of bundle can be asked for, and what is shown."""

import json
import shutil
import time

import pytest
from client import send
from server_process import started
from tiny_bundles import export_all, pipelines

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium, which drives the browser, is not installed")
from selenium.common.exceptions import WebDriverException  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import Select  # noqa: E402

pytestmark = pytest.mark.slow

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
SECONDS = 60


class Page:
    """The page in a browser, used as a person would."""

    def __init__(self, driver):
        self.driver = driver

    def find(self, name):
        return self.driver.find_element(By.ID, name)

    def wait(self, condition):
        end = time.monotonic() + SECONDS
        while True:
            try:
                if value := condition():
                    return value
            except WebDriverException:  # What is waited for is not there yet, or was replaced in this moment.
                pass
            assert time.monotonic() < end, self.find("wrong").text
            time.sleep(0.05)

    def open(self, url):
        self.driver.get(url)
        self.wait(lambda: self.find("run").is_displayed())

    def choose(self, model, task=None):
        Select(self.find("model")).select_by_visible_text(model)
        self.wait(lambda: self.find("run").is_displayed())  # Hidden at once, until the signatures are there.
        if task:
            buttons = self.driver.find_elements(By.CSS_SELECTOR, "nav button")
            next(button for button in buttons if button.text == task).click()

    def run(self, **fields):
        """Fills in fields and options, sends the form, and gives the text of what comes: a result or an error."""
        for name, value in fields.items():
            field = self.wait(lambda name=name: self.find(name))
            self.driver.execute_script(
                "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))", field, value
            )
        self.find("run").click()
        self.wait(lambda: self.find("run").is_enabled())
        return self.find("wrong" if self.find("wrong").is_displayed() else "result").text

    def bars(self):
        """Text and width of each bar, from 0 to 1."""
        rows = self.driver.find_elements(By.CSS_SELECTOR, ".bars li")
        widths = [row.find_element(By.CLASS_NAME, "fill").size["width"] / row.size["width"] for row in rows]
        return [(row.text.split("\n")[0], width) for row, width in zip(rows, widths, strict=True)]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("there is no Chromium with its driver (Debian's packages chromium and chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield Page(chrome)
    chrome.quit()


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bundles")
    bundles = export_all(directory, ("generator", "filler", "answerer"), attention=True)
    bundles |= export_all(directory, ("translator", "classifier", "tagger", "embedder"))
    with started("demo", *bundles.values(), "--port", 0) as server:
        yield server.url


def test_the_page_shows_what_each_bundle_says(page, url):
    page.open(url)
    options = {"option-temperature": 0.6, "option-top_k": 9, "option-top_p": 0.9, "option-max_new_tokens": 5}
    text = page.run(**{"field-text": "the cat", "option-seed": 7}, **options)
    expected = pipelines()["generator"]("the cat", seed=7, temperature=0.6, top_k=9, top_p=0.9, max_new_tokens=5)
    assert page.driver.execute_script("return document.querySelector('#written').textContent") == "the cat" + expected
    assert text

    page.choose("filler")
    page.run(**{"field-text": "the [MASK] sat"})
    filled = pipelines()["filler"]("the [MASK] sat")
    for (token, width), each in zip(page.bars(), filled, strict=True):
        assert token == each["token"].strip()
        assert width == pytest.approx(each["score"], abs=0.01)
    assert filled[0]["text"] in page.find("result").text
    assert "no mask token" in page.run(**{"field-text": "the cat sat"})

    page.choose("classifier")
    page.run(**{"field-text": "What a film!"})
    scores = pipelines()["classifier"]("What a film!")["scores"]
    assert [label for label, _ in page.bars()] == sorted(scores, key=scores.get, reverse=True)
    page.choose("classifier", "Classify pairs")
    page.run(**{"field-text": "What a film!", "field-pair": "the cat"})
    scores = pipelines()["classifier"]("What a film!", "the cat")["scores"]
    assert [label for label, _ in page.bars()] == sorted(scores, key=scores.get, reverse=True)

    page.choose("tagger")
    page.run(**{"field-text": "Ada 😀 lives in New York"})
    tags = page.driver.find_elements(By.CSS_SELECTOR, ".tag")
    entities = pipelines()["tagger"]("Ada 😀 lives in New York")
    assert [tag.text.replace("\n", "") for tag in tags] == [each["text"] + each["label"] for each in entities]

    page.choose("answerer")
    page.run(**{"field-question": "Who?", "field-context": "Ada Lovelace lives in New York"})
    answer = pipelines()["answerer"]("Who?", "Ada Lovelace lives in New York")
    assert page.driver.find_element(By.TAG_NAME, "mark").text == answer["answer"]

    page.choose("embedder")
    assert not page.find("tasks").is_displayed(), "there is one task only"
    assert "1.000" in page.run(**{"field-first": "the cat", "field-second": "the cat"})
    severe = [entry for entry in page.driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert not severe


def cells(page):
    """What is said of each cell, and its shade."""
    script = "return [...document.querySelectorAll('.cells td[title]')].map((each) => [each.title, each.ariaLabel,"
    return page.driver.execute_script(f"{script} getComputedStyle(each).getPropertyValue('--shade')])")


@pytest.mark.parametrize(("name", "texts"), [("generator", ["the cat"]), ("answerer", ["Who?", "Ada lives"])])
def test_attention_is_a_picture(page, url, name, texts):
    page.open(url)
    page.choose(name, "Attention")
    fields = ("text",) if len(texts) == 1 else ("question", "context")
    page.run(**{f"field-{field}": text for field, text in zip(fields, texts, strict=True)})
    tokens, attention = pipelines()[name].attention(*texts)
    tokens = [token.strip() for token in tokens]
    assert [each.text for each in page.driver.find_elements(By.CSS_SELECTOR, ".cells tbody th")] == tokens
    assert len(page.driver.find_elements(By.CSS_SELECTOR, ".cells thead th")) == len(tokens)
    pairs = [f"{one} → {other}: " for one in tokens for other in tokens]
    for layer, head, weights in [
        ("2", "mean of all", attention[1].mean(0)),
        ("1", "2", attention[0, 1]),
        ("1", "mean of all", attention[0].mean(0)),
    ]:
        Select(page.find("layer")).select_by_visible_text(layer)
        Select(page.find("head")).select_by_visible_text(head)
        shown = cells(page)
        assert [title for title, _, _ in shown] == [label for _, label, _ in shown]
        for pair, (title, _, shade), weight in zip(pairs, shown, weights.ravel(), strict=True):
            assert title.startswith(pair)
            assert float(title.removeprefix(pair).removesuffix(" %")) == pytest.approx(100 * weight, abs=0.06)
            assert float(shade) == pytest.approx((weight / weights.max()) ** 0.5, abs=1e-3)
    assert f"{100 * weights.max():.1f} %" in page.find("result").text


def test_text_comes_piece_by_piece(page, url):
    page.open(url)
    page.driver.execute_script(
        "window.sizes = []; const send = window.fetch;"
        "window.fetch = (path, request) => {"
        "  if (request?.body) sizes.push(JSON.parse(request.body).inputs.max_new_tokens[0]);"
        "  return send(path, request); }"
    )
    page.run(**{"field-text": "the cat", "option-seed": 7})
    assert page.driver.execute_script("return sizes") == [4, 6]


def test_a_page_talks_to_a_server_elsewhere_only_if_that_allows_it(page, tmp_path):
    bundle = export_all(tmp_path, ("classifier",))["classifier"]
    ports = ("--rest-port", 0, "--grpc-port", None)
    with (
        started("serve", bundle, *ports, "--allow-origin", True) as open_server,
        started("demo", "--server", open_server.url, "--models", "classifier", "--port", 0) as demo,
    ):
        assert json.loads(send(demo.url, "GET", "/config.json")[1]) == {
            "server": open_server.url,
            "models": ["classifier"],
        }
        page.open(demo.url)
        page.run(**{"field-text": "What a film!"})
        assert len(page.bars()) == 3
        with started("serve", bundle, *ports) as closed_server:
            page.driver.get(f"{demo.url}/?server={closed_server.url}&model=classifier")
            page.wait(lambda: "enable_cors_support" in page.find("wrong").text)


@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_fits_and_every_control_has_a_name(page, url, width):
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    page.open(url)
    page.run(**{"field-text": "x" * 400})
    assert page.driver.execute_script("return document.documentElement.scrollWidth") <= width
    page.choose("filler", "Attention")
    page.run(**{"field-text": "the cat sat on the mat " * 6})
    assert len(cells(page)) > 900
    assert page.driver.execute_script("return document.documentElement.scrollWidth") <= width
    unnamed = page.driver.execute_script(
        "return [...document.querySelectorAll('input, textarea, select, button')]"
        ".filter((each) => !each.labels?.length && !each.textContent.trim()).map((each) => each.outerHTML)"
    )
    assert unnamed == []


def test_the_page_needs_nothing_from_elsewhere(url):
    status, content, headers = send(url, "GET", "/")
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    text = content.decode()
    assert "src=" not in text
    assert [line for line in text.splitlines() if "href=" in line] == ['<link rel="icon" href="data:,">']
    assert "https://" not in text
