"""Site: it builds without a warning, and a browser shows formulas and figures without asking any other host."""
import http.server
import shutil
import subprocess
import sys
import threading
from functools import partial

import pytest
from tree import CHAIN_NOTEBOOKS, PAPER_NOTEBOOKS, ROOT

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]
CHAINS = sorted({notebook.parent.name for notebook in CHAIN_NOTEBOOKS})
RICHEST = [max((n for n in CHAIN_NOTEBOOKS if n.parent.name == chain), key=lambda n: n.read_text(encoding="utf-8").count("$"))
           for chain in CHAINS]  # the notebook of each chain with the most formulas
PAPERS = {f"nbs/{n.parent.name}/{n.stem}" for n in PAPER_NOTEBOOKS}
PAGES = ["index", "nbs/index", *(f"nbs/{n.parent.name}/{n.stem}" for n in RICHEST), *(f"api/{chain}" for chain in CHAINS),
         "gallery/viabench"]
SITE = ROOT / "build" / "site"


@pytest.fixture(scope="session")
def site():
    """The built site. Sphinx reads only what changed since it was last built."""
    command = ["sphinx-build", "-q", "-W", "--keep-going", "-j", "1", "-b", "html", "docs", str(SITE)]
    done = subprocess.run([sys.executable, "-m", "sphinx", *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)} says\n{done.stderr}"
    return SITE


@pytest.fixture(scope="session")
def address(site):
    """Address of a server of the built site, on this machine only."""
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A headless Chromium with an empty profile."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"the pages were built but not looked at: no {' or '.join(BROWSERS)} on the PATH (apt-get install chromium)")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(tmp_path_factory.mktemp("profile")), executable_path=program, headless=True, args=FLAGS)
        yield context
        context.close()


def test_the_site_builds_without_a_warning(site):
    missing = [page for page in PAGES if not (site / f"{page}.html").is_file()]
    assert not missing, f"pages {missing} were not written"


@pytest.mark.parametrize("name", PAGES)
def test_the_browser_shows_the_page(address, browser, name):
    page, trouble = browser.new_page(), []
    page.on("console", lambda said: trouble.append(f"console: {said.text}") if said.type == "error" else None)
    page.on("pageerror", lambda error: trouble.append(f"script: {error}"))
    page.on("request", lambda asked: None if asked.url.startswith((address, "data:", "blob:"))
            else trouble.append(f"asks another host: {asked.url}"))
    page.on("requestfailed", lambda asked: trouble.append(f"not loaded: {asked.url}"))
    page.goto(f"{address}/{name}.html", wait_until="networkidle")
    assert page.locator("h1").count() == 1
    if page.locator(".math").count():
        page.evaluate("MathJax.startup.promise.then(() => true)")
        wrong = page.evaluate("[...document.querySelectorAll('.math')].filter(m => !m.querySelector('mjx-container') "
                              "|| m.querySelector('mjx-merror, [data-mjx-error]')).map(m => m.textContent.trim())")
        assert not wrong, f"formulas that MathJax does not set: {wrong}"
    assert page.locator("mjx-container").count() or name not in PAPERS, "no formula on the page of a paper's notebook"
    broken = page.evaluate("[...document.images].filter(i => !(i.complete && i.naturalWidth > 0)).map(i => i.src)")
    assert not broken, f"pictures that do not show: {broken}"
    page.close()
    assert not trouble, f"{name}: {trouble}"


def test_the_map_shows_its_tables(site):
    page = (site / "nbs" / "index.html").read_text(encoding="utf-8")
    assert page.count("<table") == 3, "papers, shared chains, how to use: a table of the map is shown as running text"


def test_the_gallery_slides_through_the_strengths(address, browser):
    page = browser.new_page()
    page.goto(f"{address}/gallery/viabench.html", wait_until="networkidle")
    figures = page.locator(".vb-gallery figure")
    sliders = figures.get_by_role("slider")
    assert figures.count() == sliders.count() > 0
    for figure, slider in zip(figures.all(), sliders.all(), strict=True):
        picture, window = figure.locator("img"), figure.locator("div")
        assert figure.get_attribute("id") in slider.get_attribute("aria-label"), "the slider is not named after its family"
        assert picture.evaluate("i => i.naturalWidth == 5 * i.naturalHeight"), "a strip has five pictures"
        for step, strength in ((0, "0"), (2, "0.5"), (4, "1")):
            slider.fill(str(step))
            assert figure.locator("output").inner_text() == strength
            shown, frame = picture.bounding_box(), window.bounding_box()
            assert abs(frame["x"] - shown["x"] - step * frame["width"]) < 1, "the slider does not show the picture of its strength"
    sliders.first.focus()
    page.keyboard.press("ArrowLeft")
    assert figures.first.locator("output").inner_text() == "0.75", "the slider does not answer the keyboard"
    page.close()


def test_the_gallery_is_complete_without_a_script(address, browser):
    context = browser.browser.new_context(java_script_enabled=False) if browser.browser else None
    if context is None:
        pytest.skip("this browser keeps one profile: no page without a script")
    page = context.new_page()
    page.goto(f"{address}/gallery/viabench.html")
    shown = page.locator(".vb-gallery img").first.bounding_box()
    assert abs(shown["width"] / shown["height"] - 5) < 0.1, "the whole strip must be seen"
    context.close()
