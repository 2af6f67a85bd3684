"""The page in a real browser. Needs chromium and chromedriver; fails where they are missing."""

import shutil
import time

import pytest

from rllib_distrl import load_run
from rllib_distrl.viewer.run_report import write_report
from rllib_distrl.viewer.token_page import table_of_samples, write_viewer
from tests.viewer.runs import make_run
from tests.viewer.tables import HOSTILE, make_table

pytestmark = pytest.mark.slow
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
READY_S = 20


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    from selenium import webdriver

    browser, service = shutil.which("chromium"), shutil.which("chromedriver")
    assert browser and service, "install the packages chromium and chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(service))
    yield driver
    driver.quit()


@pytest.fixture
def show(driver, tmp_path):
    """Opens a table and afterwards checks that the console stayed empty."""

    def open_page(table, name="view", **settings):
        page = write_viewer(table, tmp_path / f"{name}.html", **{"title": "Test", **settings})
        driver.set_window_size(1440, 900)
        driver.get(page.as_uri())
        wait(driver, "document.documentElement.dataset.ready === 'yes'")
        return page

    driver.get_log("browser")
    yield open_page
    assert driver.get_log("browser") == []


def wait(driver, condition):
    give_up = time.monotonic() + READY_S
    while not driver.execute_script(f"return {condition}"):
        assert time.monotonic() < give_up, condition
        time.sleep(0.02)


def press(driver, *keys):
    from selenium.webdriver import ActionChains

    for key in keys:
        ActionChains(driver).send_keys(key).perform()


def text(driver, element):
    return driver.execute_script(f"return document.getElementById('{element}').textContent")


def options(driver):
    return driver.execute_script(
        "return [...document.querySelectorAll('.row[data-c]')].map(row => Number(row.dataset.c))"
    )


def colours(driver):
    return driver.execute_script(
        "return [...document.querySelectorAll('#tokens span')]"
        ".map(s => getComputedStyle(s).backgroundColor)"
    )


def details(driver):
    return driver.execute_script(
        "const d = document.querySelectorAll('#numbers dt');"
        "return Object.fromEntries([...d].map(t => [t.textContent, t.nextSibling.textContent]))"
    )


def inked(driver, canvas):
    """Pixels of a canvas that are not empty."""
    return driver.execute_script(
        f"const c = document.getElementById('{canvas}');"
        "const p = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "let n = 0; for (let i = 3; i < p.length; i += 4) n += p[i] > 0; return n"
    )


def test_keyboard_steps_through_tokens_and_completions(driver, show):
    from selenium.webdriver.common.keys import Keys

    table = make_table()
    show(table)
    assert text(driver, "tokens") == "c0t0 c0t1 c0t2 c0t3 c0t4 "
    assert text(driver, "position") == "token 1 of 5 · id 0"
    press(driver, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert text(driver, "position") == "token 3 of 5 · id 2"
    press(driver, Keys.END)
    assert text(driver, "chosen") == "c0t4"
    press(driver, Keys.ARROW_RIGHT)  # stays at the end
    assert text(driver, "position") == "token 5 of 5 · id 4"
    press(driver, Keys.ARROW_DOWN)
    wait(driver, "document.getElementById('position').textContent === 'token 1 of 5 · id 100'")
    press(driver, "j", Keys.ARROW_LEFT, "k")
    wait(driver, "document.getElementById('position').textContent === 'token 1 of 5 · id 100'")
    press(driver, "m", "4", "m")
    assert text(driver, "position") == "token 1 of 5 · id 100"  # |−2| is the strongest advantage
    shown = details(driver)
    assert shown["Probability"] == "76.7 %"
    assert shown["Log-probability"] == "-0.266"
    assert shown["Advantage"] == "-0.500"
    assert shown["… as trained on"] == "-2.000"
    assert shown["Bonus"] == "0.125"
    assert float(shown["Learner / sampler"]) == pytest.approx(1.1331, abs=1e-4)
    quantiles = table.completions["quantiles"][1][:4].astype(float)
    assert float(shown["Value"]) == pytest.approx(quantiles.mean(), abs=2e-3)
    assert float(shown["Spread"]) == pytest.approx(quantiles.std(), abs=2e-3)
    top = driver.execute_script(
        "return [...document.querySelectorAll('#top li')].map(l => l.textContent)"
    )
    assert top == ["first50.0 %", "second25.0 %", "third12.5 %", "c1t0 76.7 %"]


def test_mouse_clicks_hovers_and_colours(driver, show):
    from selenium.webdriver import ActionChains

    show(make_table())
    tokens = driver.find_elements("css selector", "#tokens span")
    ActionChains(driver).move_to_element(tokens[3]).perform()
    assert text(driver, "chosen") == "c0t3"
    ActionChains(driver).move_to_element(driver.find_element("id", "title")).perform()
    assert text(driver, "chosen") == "c0t0"  # hovering only looks
    tokens[2].click()
    ActionChains(driver).move_to_element(driver.find_element("id", "title")).perform()
    assert text(driver, "chosen") == "c0t2"
    strip = driver.find_element("id", "strip")
    ActionChains(driver).move_to_element_with_offset(
        strip, strip.size["width"] // 2 - 20, 0
    ).click().perform()
    assert text(driver, "position").startswith("token 5 of 5")
    assert inked(driver, "strip") > 5000
    assert inked(driver, "dots") > 100
    seen = []
    for button in driver.find_elements("css selector", "#modes button"):
        button.click()
        assert button.get_attribute("aria-pressed") == "true"
        seen.append(tuple(colours(driver)))
    assert len(set(seen)) == 6
    assert seen[3][0] != seen[3][4]  # advantages of −2 and 2
    driver.find_elements("css selector", ".row[data-c]")[4].click()
    wait(driver, "document.getElementById('tokens').textContent.startsWith('c4t0')")


def test_replies_stand_where_they_came_and_are_no_tokens(driver, show):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    hostile = "<img src=x onerror='window.hacked = 1'>"
    replies = [[(2, "too low "), (4, hostile)], [], [(5, "the end")]]
    show(make_table(completions=3, replies=replies))
    assert text(driver, "tokens") == f"c0t0 c0t1 too low c0t2 c0t3 {hostile}c0t4 "
    assert driver.execute_script("return [window.hacked, document.images.length]") == [None, 0]
    assert "5 tokens in 3 turns" in text(driver, "verdict")
    first, _ = driver.find_elements("css selector", "#tokens .reply")
    assert first.get_attribute("title") == "reply of the environment: not sampled"
    key = driver.find_element("css selector", "#legend .reply-key")
    assert key.is_displayed() and key.text == "reply of the environment, not sampled"
    turns, positions = [], []
    for _ in range(5):
        turns.append(details(driver)["Turn"])
        positions.append(
            driver.execute_script("return document.querySelector('.chosen').innerText")
        )
        press(driver, Keys.ARROW_RIGHT)
    assert turns == ["1 of 3", "1 of 3", "2 of 3", "2 of 3", "3 of 3"]
    assert [p.strip() for p in positions] == [f"c0t{t}" for t in range(5)]
    first.click()  # Nothing is known about a reply.
    ActionChains(driver).move_to_element(driver.find_element("id", "title")).perform()
    assert text(driver, "chosen") == "c0t4"
    style = "const s = getComputedStyle(arguments[0]); return [s.backgroundColor, s.borderTopStyle]"
    seen = {tuple(driver.execute_script(style, first))}
    press(driver, "2", "4")
    again = driver.find_element("css selector", "#tokens .reply")
    seen.add(tuple(driver.execute_script(style, again)))  # The same, whatever colours tokens.
    [(tint, border)] = seen
    assert tint.startswith("color(srgb") and border == "dashed"
    press(driver, Keys.ARROW_DOWN)
    wait(driver, "current.c === 1")
    assert text(driver, "tokens") == "c1t0 c1t1 c1t2 c1t3 c1t4 "
    assert not driver.find_element("css selector", "#legend .reply-key").is_displayed()
    assert "Turn" not in details(driver)
    press(driver, Keys.ARROW_DOWN)
    wait(driver, "current.c === 2")
    assert text(driver, "tokens").endswith("c2t4 the end")


def test_replies_stay_on_their_page(driver, show):
    from selenium.webdriver.common.keys import Keys

    said = [(1499, "a"), (1500, "b"), (1501, "c"), (1600, "d")]
    show(make_table(completions=1, tokens=1600, replies=[said]))
    shown = "return [...document.querySelectorAll('#tokens .reply')].map(r => r.textContent)"
    assert driver.execute_script(shown) == ["a"]
    press(driver, Keys.END)
    assert driver.execute_script(shown) == ["b", "c", "d"]
    assert text(driver, "chosen") == "c0t1599"
    assert text(driver, "tokens").startswith("bc0t1500 cc0t1501 ")


def test_filters_and_search(driver, show):
    from selenium.webdriver.common.keys import Keys

    show(make_table(completions=30))
    names = [b.text for b in driver.find_elements("css selector", "#filters button")]
    assert names == [
        "All 30",
        "Correct 10",
        "Wrong 20",
        "Truncated 10",
        "Most uncertain",
        "Largest bonus",
    ]
    press(driver, "f")
    assert options(driver)[:4] == [0, 3, 6, 9]
    press(driver, "f", "f")
    assert options(driver)[:3] == [2, 5, 8]
    assert text(driver, "count") == "10 of 30 completions"
    wait(driver, "document.getElementById('tokens').textContent.startsWith('c2t0')")
    assert "cut at the limit" in text(driver, "verdict")
    driver.find_elements("css selector", "#filters button")[5].click()
    assert options(driver) == [29, 28, 27]  # the bonus grows with the number
    driver.find_elements("css selector", "#filters button")[0].click()
    press(driver, "/")
    press(driver, *"c17t0")
    assert options(driver) == [17]
    press(driver, Keys.ESCAPE, "2")
    assert driver.find_element("id", "search").get_attribute("value") == "c17t0"
    assert (
        driver.find_elements("css selector", "#modes button")[1].get_attribute("aria-pressed")
        == "true"
    )
    press(driver, "/", Keys.CONTROL + "a", Keys.BACKSPACE)
    driver.execute_script(
        "document.getElementById('search').value = 'nothing like it';"
        "document.getElementById('search').dispatchEvent(new Event('input'))"
    )
    assert options(driver) == []


def test_hostile_completions_are_text(driver, show):
    texts = [[piece] for piece in HOSTILE]
    texts[8] = []  # a completion without tokens
    table = make_table(completions=len(texts), texts=texts)
    table.completions["prompt"] = table.completions["completion"]
    show(table, title=HOSTILE[0], note=HOSTILE[2])
    for number, hostile in enumerate(HOSTILE):
        driver.execute_script(f"open({number})")
        wait(driver, f"current.c === {number}")
        assert driver.execute_script("return window.hacked") is None
        inside = driver.execute_script(
            "return document.querySelectorAll('img, iframe, #tokens script, a').length"
        )
        assert inside == 0
        shown = text(driver, "tokens")
        if number in (0, 1, 2, 3, 5, 6):
            assert shown == hostile
    assert text(driver, "tokens").endswith("… (1,000,000 letters)")
    driver.execute_script("open(4)")
    wait(driver, "current.c === 4")
    shown = text(driver, "tokens")
    assert "␀␁␇␛[31m" in shown
    assert "⟨U+202E⟩evil⟨U+202C⟩" in shown
    assert "\u202e" not in shown
    driver.execute_script("open(5)")
    wait(driver, "current.c === 5")
    assert driver.find_element("id", "tokens").get_attribute("dir") == "rtl"


def test_right_to_left_reads_with_the_arrow_keys(driver, show):
    from selenium.webdriver.common.keys import Keys

    show(make_table(completions=2, texts=[["שלום", " עולם"], ["三", "七"]]))
    press(driver, Keys.ARROW_LEFT)
    assert text(driver, "chosen") == "עולם"
    first, second = driver.find_elements("css selector", "#tokens span")
    assert first.rect["x"] > second.rect["x"]


def test_of_two_thousand_completions_only_those_in_view_are_drawn(driver, show):
    from selenium.webdriver.common.keys import Keys

    table = make_table(completions=2000, tokens=120, n_quantiles=16, generations=8)
    show(table)
    url = driver.current_url.split("#")[0]
    driver.get("about:blank")
    driver.get(url)
    wait(driver, "document.documentElement.dataset.ready === 'yes'")
    rows = driver.execute_script("return document.querySelectorAll('.row').length")
    assert 10 < rows < 60  # the list is virtual
    driver.execute_script("document.getElementById('list').scrollTop = 1e9")
    wait(driver, "[...document.querySelectorAll('.row')].some(row => row.dataset.c === '1999')")
    driver.execute_script("open(1999)")
    wait(driver, "current.c === 1999")
    press(driver, Keys.END)
    assert text(driver, "chosen") == "c1999t119"


def test_a_long_completion_is_shown_in_pages(driver, show):
    from selenium.webdriver.common.keys import Keys

    show(make_table(completions=1, tokens=20_000))
    assert driver.execute_script("return document.querySelectorAll('#tokens span').length") == 1500
    press(driver, Keys.END)
    assert text(driver, "page") == "19,501–20,000 of 20,000 tokens"
    assert text(driver, "chosen") == "c0t19999"


def test_narrow_windows_and_dark_colours(driver, show):
    show(make_table())
    light = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    press(driver, "t")
    assert driver.execute_script("return getComputedStyle(document.body).backgroundColor") != light
    driver.set_window_size(640, 700)  # what a window of 1280 has left at 200 % zoom
    wide = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    assert driver.execute_script(f"return {wide}")
    assert driver.find_element("id", "tokens").is_displayed()


def test_two_hundred_percent_zoom(driver, show):
    """Browser zoom: half of the window's pixels to lay out in, twice the pixels to draw with."""
    from selenium.webdriver.common.keys import Keys

    zoomed = {"width": 640, "height": 400, "deviceScaleFactor": 2, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", zoomed)
    try:
        show(make_table())
        assert driver.execute_script("return [innerWidth, devicePixelRatio]") == [640, 2]
        wide = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        assert driver.execute_script(f"return {wide}")
        for panel in ("tokens", "strip", "dots", "numbers"):
            element = driver.find_element("id", panel)
            driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
            box = "const r = arguments[0].getBoundingClientRect(); return [r.left, r.right]"
            left, right = driver.execute_script(box, element)
            assert 0 <= left < right <= 640, panel
        sharp = "const c = document.getElementById('strip'); return c.width / c.clientWidth"
        assert driver.execute_script(sharp) == pytest.approx(2, abs=0.02)
        press(driver, Keys.ARROW_RIGHT)
        assert text(driver, "position") == "token 2 of 5 · id 1"
        cut = driver.execute_script(
            "return [...document.querySelectorAll('button, dt, dd, h1, h2, label')].filter(e =>"
            " e.offsetParent && e.scrollWidth > e.clientWidth + 1 && e.clientWidth)"
            ".map(e => e.textContent)"
        )
        assert cut == []
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_reports_are_readable_on_a_phone_and_in_the_dark(driver, tmp_path):
    runs = [load_run(make_run(tmp_path / name)) for name in ("one", "two")]
    page = write_report(runs, tmp_path / "report.html")
    phone = {"width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        backgrounds = []
        for theme in ("light", "dark"):
            media = [{"name": "prefers-color-scheme", "value": theme}]
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
            driver.get(page.as_uri())
            script = "return getComputedStyle(document.body).backgroundColor"
            backgrounds.append(driver.execute_script(script))
        assert backgrounds == ["rgb(246, 247, 249)", "rgb(16, 20, 24)"]
        wide = "return document.documentElement.scrollWidth - innerWidth"
        assert driver.execute_script(wide) == 0  # Wide figures scroll in their section.
        texts = driver.execute_script(
            "return [...document.querySelectorAll('svg text')].map(t => {"
            "const m = t.getScreenCTM(); return parseFloat(getComputedStyle(t).fontSize)"
            " * Math.hypot(m.c, m.d); })"
        )
        assert len(texts) > 50 and min(texts) >= 7
        assert driver.get_log("browser") == []
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_completions_without_tokens(driver, show, tmp_path):
    names = ["problem", "sample", "prompt", "completion", "score", "status", "finish_reason"]
    make_table().completions[names].to_parquet(tmp_path / "after.parquet")
    show(table_of_samples(tmp_path / "after.parquet"), note="by word")
    assert text(driver, "tokens") == "c0t0 c0t1 c0t2 c0t3 c0t4 "
    assert text(driver, "position") == "word 1 of 6"
    assert not any(b.is_enabled() for b in driver.find_elements("css selector", "#modes button"))
    assert not driver.find_element("id", "strip").is_displayed()
