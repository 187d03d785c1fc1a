"""Pages in a real browser: charts are drawn, nothing is complained about, asked for from elsewhere, or run."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import Chromium, Page, find_chromium
from hostile_run import HOSTILE, write_hostile_run
from run_folders import training_rows, write_run

from foveal.report.compare import compare_runs, write_comparison
from foveal.report.report import write_report

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium on this machine (chromium in PATH)")

DRAWN = "document.documentElement.dataset.charts === 'drawn'"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report of a hostile run, one of a pipeline, and a comparison."""
    folder = tmp_path_factory.mktemp("pages")
    run = write_hostile_run(folder / "hostile")
    plain = write_run(folder / "chain" / "pretrain", rows=training_rows(5000), summary={"val_top1": 0.5})
    write_run(folder / "chain" / "finetune", stage="finetune", rows=training_rows(), summary={"val_top1": 0.9})
    write_comparison(compare_runs([plain, run], folder / "compare.html"), folder / "compare.html")
    return {
        "hostile": write_report(run),
        "pipeline": write_report(folder / "chain"),
        "comparison": folder / "compare.html",
    }


def assert_quiet(page: Page, file: Path) -> None:
    assert page.complaints() == []
    assert page.requests() == [file.as_uri()]


@pytest.mark.parametrize("name", ["hostile", "pipeline", "comparison"])
def test_a_page_is_drawn(name: str, browser: Chromium, pages: dict[str, Path]) -> None:
    with browser.open_page(pages[name].as_uri()) as page:
        page.wait_for(DRAWN)
        places = page.evaluate("document.querySelectorAll('[data-chart]').length")
        drawn = "Array.from(document.querySelectorAll('[data-chart]')).filter(place => place.querySelector('svg'))"
        assert places == page.evaluate(f"{drawn}.length") >= 5
        curves = "document.querySelectorAll('.scatterlayer path.js-line, .scatterlayer path.point').length"
        assert page.evaluate(curves) > places
        for width in (1400, 500):
            page.set_size(width, 1000)
            widths = (
                "Array.from(document.querySelectorAll('.plot .main-svg')).map(svg => svg.getBoundingClientRect().width)"
            )
            page.wait_for(f"Math.max(...{widths}) < {width}")  # the charts follow, some time later
            for dark in (False, True):
                page.set_dark(dark)
                assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert_quiet(page, pages[name])


def test_texts_of_users_are_texts(browser: Chromium, pages: dict[str, Path]) -> None:
    with browser.open_page(pages["hostile"].as_uri()) as page:
        page.wait_for(DRAWN)
        text = re.sub(r"\s+", " ", page.evaluate("document.body.textContent"))
        legends = page.evaluate("Array.from(document.querySelectorAll('.legendtext')).map(each => each.textContent)")
        for hostile in HOSTILE:
            assert re.sub(r"\s+", " ", hostile) in text
            assert " ".join(hostile.split()) in legends
        assert (
            page.evaluate("document.querySelectorAll('img[src=x], main b, main a[href^=javascript], svg a').length")
            == 0
        )
        assert page.evaluate("document.querySelectorAll('script').length") == 3
        assert_quiet(page, pages["hostile"])


def test_the_inks_follow_light_dark_and_print(browser: Chromium, pages: dict[str, Path]) -> None:
    ink = "getComputedStyle(document.querySelector('.plot .xtick text')).fill"
    paper = "getComputedStyle(document.body).backgroundColor"
    with browser.open_page(pages["pipeline"].as_uri()) as page:
        page.wait_for(DRAWN)
        seen = []
        for dark, media in ((False, ""), (True, ""), (True, "print")):
            page.set_dark(dark, media=media)
            seen.append((page.evaluate(ink), page.evaluate(paper)))
        inks, papers = zip(*seen, strict=True)
        assert len(set(inks)) == len(set(papers)) == 3
        assert papers[2] == "rgb(255, 255, 255)"


def test_a_page_is_printed_with_its_charts(browser: Chromium, pages: dict[str, Path]) -> None:
    with browser.open_page(pages["pipeline"].as_uri()) as page:
        page.wait_for(DRAWN)
        page.evaluate(
            "window.addEventListener('beforeprint', () => { window.printed = "
            "Array.from(document.querySelectorAll('.plot .main-svg')).map(svg => svg.getAttribute('width')) })"
        )
        assert page.print_to_pdf().startswith(b"%PDF")
        assert set(page.evaluate("window.printed")) == {"660"}
        assert_quiet(page, pages["pipeline"])


def test_keys_reach_the_scale_and_the_numbers(browser: Chromium, pages: dict[str, Path]) -> None:
    with browser.open_page(pages["pipeline"].as_uri()) as page:
        page.wait_for(DRAWN)
        scale = "document.getElementById('stage-1-loss').layout.yaxis.type"
        before = page.evaluate(scale)
        page.evaluate("document.querySelector('button[data-log=stage-1-loss]').focus()")
        _press(page, "Enter", "\r")
        assert page.evaluate(scale) != before
        page.evaluate("document.querySelector('figure.chart summary').focus()")
        _press(page, "Enter", "\r")
        assert page.evaluate("document.querySelector('figure.chart details').open")


def test_a_comparison_changes_its_axis(browser: Chromium, pages: dict[str, Path]) -> None:
    with browser.open_page(pages["comparison"].as_uri()) as page:
        page.wait_for(DRAWN)
        page.evaluate(
            "const select = document.querySelector('select[data-axis]'); select.value = 'images'; "
            "select.dispatchEvent(new Event('change'))"
        )
        assert page.evaluate("document.querySelector('[data-axis-group=step]').hidden")
        shown = "document.querySelector('[data-axis-group=images] .plot .main-svg').getBoundingClientRect().width"
        assert page.evaluate(shown) > 400
        assert_quiet(page, pages["comparison"])


def _press(page: Page, key: str, text: str) -> None:
    for kind in ("keyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, text=text, windowsVirtualKeyCode=13)
