"""The interactive pages in a browser: that they draw, answer to pointer and keys, and complain about nothing.

Needs Debian's packages chromium and chromium-driver, and selenium.
"""

import io
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from fisherscope import plots
from fisherscope.landscape import Axis, Landscape
from fisherscope.landscape.surface import Geometry, Marker

pytestmark = pytest.mark.browser

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--enable-unsafe-swiftshader", "--use-angle=swiftshader", "--window-size=1000,1300",
)  # fmt: skip
EVIL = "<script>window.bad = 1</script><img src=x onerror='window.bad = 1'>"


def bowl(points: tuple[int, ...], steep: float = 1.0, **facts: Any) -> Landscape:
    grids = np.meshgrid(*(np.linspace(-1, 1, n) for n in points), indexing="ij")
    loss = 2 + steep * np.sum([(k + 1) * (g - 0.1 * k) ** 2 + 0.3 * g for k, g in enumerate(grids)], axis=0)
    axes = tuple(Axis(f"axis{k}", np.linspace(-1, 1, n), 3.0, 1234567) for k, n in enumerate(points))
    settings = {"references": {"uniform": 8.0, "unigram": 5.0}} | facts
    return Landscape(axes, loss, np.ones(points, dtype=bool), **settings)


FIRST = bowl(
    (9, 7), title=EVIL, geometry=Geometry(9 * np.eye(2), 30.0), markers=(Marker(EVIL, (0.5, 0.3), 1.0, 3.0, 2.9),)
)
SECOND = bowl((9, 7), 9.0, title="steep")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    paths = [shutil.which("chromium"), shutil.which("chromedriver")]
    if None in paths:
        pytest.fail("these tests need a browser: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(paths[1]))
    yield driver
    driver.quit()


def until(is_so: Callable[[], Any]) -> None:
    """Wait, as pages draw a frame later."""
    end = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < end, "the page did not get there"
        time.sleep(0.05)


class Page:
    """A page that is open, and what it shows."""

    def __init__(self, driver: Any, path: Path) -> None:
        self.driver, self.url = driver, path.resolve().as_uri()
        driver.get(self.url)

    def js(self, code: str) -> Any:
        return self.driver.execute_script(f"return {code}")

    def text(self, id: str) -> str:
        return self.js(f"document.getElementById('{id}').textContent")

    def cut(self, number: int) -> tuple[list[float], list[Any]]:
        """Steps and losses of the chosen landscape."""
        trace = self.js(f"document.getElementById('cut{number}').data.at(-1)")
        return trace["x"], trace["y"]

    def here(self) -> tuple[float, float]:
        """Where the cross-hair of the map is."""
        across, up = self.js("document.getElementById('map').layout.shapes")
        return across["x0"], up["y0"]

    def pointer(self, steps: tuple[float, float], *, click: bool) -> None:
        """Move the pointer to a point of the map."""
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.by import By

        plot = self.driver.find_element(By.ID, "map")
        self.js("window.scrollTo(0, 0)")
        x, y = self.js(
            f"(g => {{ const l = g._fullLayout, s = l._size, d = g.getBoundingClientRect();"
            f" return [l.xaxis._offset + l.xaxis.l2p({steps[0]}) - d.width / 2,"
            f" l.yaxis._offset + l.yaxis.l2p({steps[1]}) - d.height / 2] }})(document.getElementById('map'))"
        )
        chain = ActionChains(self.driver).move_to_element_with_offset(plot, round(x) - 3, round(y)).pause(0.2)
        chain = chain.move_by_offset(3, 0).pause(0.2)
        (chain.click() if click else chain).perform()

    def press(self, id: str, *keys: str) -> None:
        from selenium.webdriver.common.by import By

        self.driver.find_element(By.ID, id).send_keys(*keys)

    def complaints(self) -> list[str]:
        """Errors in the console since the last time; a software renderer's warnings about speed are none."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def coloured(self, selector: str) -> float:
        """The share of the pixels of an element that are neither white nor grey."""
        from selenium.webdriver.common.by import By

        element = self.driver.find_element(By.CSS_SELECTOR, selector)
        pixels = np.asarray(imread(io.BytesIO(element.screenshot_as_png)))[..., :3]
        return float((np.ptp(pixels, axis=-1) > 0.08).mean())


@pytest.fixture(scope="module")
def opened(driver: Any, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of two landscapes, opened once, as browsers without a graphics card take seconds."""
    return Page(driver, plots.page([FIRST, SECOND], tmp_path_factory.mktemp("page") / "page.html"))


@pytest.fixture
def page(opened: Page) -> Iterator[Page]:
    """The page as it begins; complaints fail the test."""
    if opened.driver.current_url != opened.url:
        opened.driver.get(opened.url)
    opened.js("(Object.assign(state, {panel: 0, quantity: 0, at: [0, 0], pinned: false}), draw())")
    yield opened
    assert opened.complaints() == []


def test_map_surface_and_cuts_are_drawn(page: Page):
    least = {"#box": 0.05, "#map": 0.1, "#cut0": 0.001, "#cut1": 0.001}
    until(lambda: all(page.coloured(plot) > share for plot, share in least.items()))


def test_the_cuts_begin_at_the_model(page: Page):
    assert page.here() == (0.0, 0.0)
    assert page.cut(0) == (FIRST.axes[0].steps.tolist(), FIRST.loss[:, 3].tolist())
    assert page.cut(1) == (FIRST.axes[1].steps.tolist(), FIRST.loss[4, :].tolist())


def test_a_click_on_the_map_moves_the_cuts_and_the_point_on_the_surface(page: Page):
    at = (float(FIRST.axes[0].steps[6]), float(FIRST.axes[1].steps[1]))
    page.pointer(at, click=True)
    until(lambda: page.here() == at)
    assert page.cut(0)[1] == FIRST.loss[:, 1].tolist()
    assert page.cut(1)[1] == FIRST.loss[6, :].tolist()
    point = page.js("(t => [t.x[0], t.y[0], t.z[0]])(document.getElementById('box').data[3])")
    assert point == [*at, float(FIRST.loss[6, 1])]
    assert f"{FIRST.loss[6, 1]:#.5g}" in page.text("readout") and f"{SECOND.loss[6, 1]:#.5g}" in page.text("readout")
    assert f"‖δ‖ = {100 * math.hypot(*at) * 3 / 30:#.3g} % of ‖θ‖" in page.text("readout")


def test_the_cross_hair_follows_the_pointer_until_a_click_holds_it(page: Page):
    from selenium.webdriver.common.keys import Keys

    places = [
        (float(FIRST.axes[0].steps[i]), float(FIRST.axes[1].steps[j])) for i, j in ((2, 2), (5, 4), (7, 1), (1, 5))
    ]
    page.pointer(places[0], click=False)
    until(lambda: page.here() == places[0])
    page.pointer(places[1], click=True)
    until(lambda: page.here() == places[1])
    page.pointer(places[2], click=False)
    time.sleep(0.3)
    assert page.here() == places[1]
    page.press("map", Keys.ESCAPE)
    page.pointer(places[3], click=False)
    until(lambda: page.here() == places[3])


def test_arrow_keys_move_the_cross_hair_by_one_point(page: Page):
    from selenium.webdriver.common.keys import Keys

    page.press("map", Keys.ARROW_RIGHT, Keys.ARROW_UP, Keys.ARROW_UP)
    until(lambda: page.cut(1)[1] == FIRST.loss[5, :].tolist() and page.cut(0)[1] == FIRST.loss[:, 5].tolist())
    page.press("map", *[Keys.ARROW_LEFT] * 20)
    until(lambda: page.here() == (-1.0, FIRST.axes[1].steps[5]))
    page.press("map", Keys.HOME)
    until(lambda: page.here() == (0.0, 0.0))


def test_buttons_choose_the_landscape(page: Page):
    from selenium.webdriver.common.by import By

    buttons = page.driver.find_elements(By.CSS_SELECTOR, "#panels button")
    assert [button.text for button in buttons] == [EVIL, "steep"]
    buttons[1].click()
    until(lambda: page.cut(0)[1] == SECOND.loss[:, 3].tolist())
    assert page.js("document.getElementById('map').data[0].z") == SECOND.loss.T.tolist()
    assert [button.get_attribute("aria-pressed") for button in buttons] == ["false", "true"]


@pytest.mark.parametrize(
    ("number", "place", "told"), [(1, np.log, lambda x: x), (2, lambda x: x, np.exp)], ids=["logarithm", "perplexity"]
)
def test_the_loss_can_be_shown_otherwise(page: Page, number: int, place: Any, told: Any):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.select import Select

    Select(page.driver.find_element(By.ID, "quantity")).select_by_index(number)
    until(lambda: page.cut(0)[1] == pytest.approx(place(FIRST.loss[:, 3])))
    assert np.array(page.js("document.getElementById('map').data[0].z")) == pytest.approx(place(FIRST.loss.T))
    assert f"{told(FIRST.loss[4, 3]):#.5g}" in page.text("readout")


def test_titles_and_names_stay_text(page: Page):
    time.sleep(0.3)
    assert page.js("window.bad === undefined && document.images.length === 0")
    assert EVIL in page.text("facts") and EVIL in page.text("map")


def test_a_page_fetches_nothing(page: Page):
    assert page.js("performance.getEntriesByType('resource').map(entry => entry.name)") == []


@pytest.mark.parametrize("width", [420, 1000, 1366, 1920])
def test_a_page_fits_its_window(page: Page, width: int):
    page.driver.set_window_size(width + page.js("window.outerWidth - window.innerWidth"), 1100)
    try:
        until(lambda: page.js("document.documentElement.scrollWidth <= document.documentElement.clientWidth"))
        plot = "document.querySelector('#cut0 .main-svg').getBoundingClientRect().width"
        until(lambda: abs(page.js(f"{plot} - document.getElementById('cut0').clientWidth")) < 2)
    finally:
        page.driver.set_window_size(1000, 1300)


def test_holes_are_holes(driver: Any, tmp_path: Path):
    given = bowl((9, 7))
    given.loss[4, 2], given.evaluated[1, 1] = math.nan, False
    page = Page(driver, plots.page(given, tmp_path / "page.html"))
    shown = np.array(page.js("document.getElementById('map').data[0].z"), dtype=float).T
    assert np.argwhere(np.isnan(shown)).tolist() == [[1, 1], [4, 2]]
    page.pointer((0.0, float(given.axes[1].steps[1])), click=True)
    until(lambda: page.here() == (0.0, given.axes[1].steps[1]))
    assert [y is None for y in page.cut(1)[1]] == [False, False, True, False, False, False, False]
    assert page.complaints() == []


def test_one_axis_is_a_plot_that_keys_move_along(driver: Any, tmp_path: Path):
    from selenium.webdriver.common.keys import Keys

    given = bowl((9,))
    page = Page(driver, plots.page(given, tmp_path / "page.html"))
    assert page.js("[...document.querySelectorAll('.plot')].map(plot => plot.id)") == ["cut0"]
    page.press("cut0", Keys.ARROW_LEFT)
    until(lambda: f"{given.loss[3]:#.5g}" in page.text("readout"))
    assert page.complaints() == []


def test_a_volume_is_drawn_as_surfaces_and_as_slices_that_move(driver: Any, tmp_path: Path):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    given = bowl((7, 7, 7), 2.0)
    given.loss[0, 0, 0] = math.nan
    page = Page(driver, plots.volume(given, tmp_path / "volume.html"))
    until(lambda: page.coloured("#fisherscope") > 0.03)
    assert page.js("document.getElementById('fisherscope').data.map(trace => trace.visible)") == [None, False]
    page.driver.find_elements(By.CSS_SELECTOR, "g.updatemenu-button")[1].click()
    until(lambda: page.js("document.getElementById('fisherscope').data.map(trace => trace.visible)") == [False, True])
    until(lambda: page.coloured("#fisherscope") > 0.03)
    rail = page.driver.find_elements(By.CSS_SELECTOR, ".slider-rail-touch-rect")[1]
    ActionChains(page.driver).move_to_element_with_offset(rail, rail.size["width"] // 4, 0).click().perform()
    until(lambda: page.js("document.getElementById('fisherscope').data[1].slices.y.locations[0]") > 0.1)
    assert page.complaints() == []
