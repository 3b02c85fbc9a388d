"""report.html: one page that harms nobody, asks for nothing, and is readable in light, dark and narrow."""

from __future__ import annotations

import re

import numpy as np
import pytest

from dist_esm.config import ReportKind
from dist_esm.jobs.report.draw import draw_page
from dist_esm.jobs.report.job import rebuild_report
from dist_esm.jobs.report.sample import MAX_POINTS, principal_components, read_sample, spread
from dist_esm.names import printable
from helpers.browser import CHROMIUM, Browser, chromium
from helpers.standin import embed_directory

HOSTILE = "</title></svg><script>document.title='owned'</script><img/src=x&quot;'onerror=alert(1)>"
MAX_BYTES = 400_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run over files with hostile names and ids, of which two fail."""
    folder = tmp_path_factory.mktemp("page")
    inputs = folder / "in"
    inputs.mkdir()
    letters = "ACDEFGHIKLMNPQRSTVWY"
    for file in range(9):
        records = [
            f">{HOSTILE}{i} a header\n{letters[(file + i) % 20 :]}{letters[: 3 + i]}\n" for i in range(12)
        ]
        (inputs / f"{file}.fasta").write_text("".join(records))
    (inputs / "<b>bold&amp; \u202e\x1b[31m\n.fasta").write_text(">a\nMKT\n")
    (inputs / "<i onclick=alert(1)>.fasta").write_text("<script>alert(2)</script> no header\n")
    (inputs / "no.fasta").write_text("no header\n")
    embed_directory(inputs, folder / "out", poison=[])
    return folder


def draw(output_dir) -> str:
    draw_page(rebuild_report(output_dir), output_dir)
    return (output_dir / "report.html").read_text()


def test_the_page_is_small_and_has_all_parts(folder):
    text = draw(folder / "out")
    assert len(text.encode()) < MAX_BYTES
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings == [
        "What each rank did when",
        "Tokens a second",
        "Lengths",
        "What became of the records",
        "Map of the embeddings",
        "Failures",
        "Ranks",
        "Next",
        "What the numbers depend on",
    ]
    assert text.count("<circle") == 9 * 12 + 1
    assert "weights are random, so this map means nothing" in text
    assert not re.search(r"https?:|<script|<img|<link(?! rel=\"icon\" href=\"data:,\")|url\(|@import", text)


def test_a_run_makes_its_page_and_only_if_it_is_wanted(folder, tmp_path):
    assert (folder / "out" / "report.html").exists()
    embed_directory(folder / "in" / "1.fasta", tmp_path / "out", report=ReportKind.json)
    assert not (tmp_path / "out" / "report.html").exists()
    embed_directory(folder / "in" / "1.fasta", tmp_path / "out")
    assert (tmp_path / "out" / "report.html").exists()


def test_a_page_that_cannot_be_written_is_a_warning(folder, tmp_path, caplog):
    embed_directory(folder / "in" / "1.fasta", tmp_path / "out")
    (tmp_path / "out" / "report.html").unlink()
    (tmp_path / "out" / "report.html").mkdir()
    (tmp_path / "out" / "report.html" / "file").write_text("")
    report = embed_directory(folder / "in" / "1.fasta", tmp_path / "out").report
    assert report.status == "complete"
    assert "report.html cannot be written (IsADirectoryError" in caplog.text


def test_principal_components_are_those_of_the_covariance():
    chance = np.random.default_rng(0)
    vectors = (chance.normal(size=(50, 2)) @ chance.normal(size=(2, 7)) * 3 + 5).astype(np.float32)
    points, shares = principal_components(vectors)
    values = np.linalg.eigvalsh(np.cov(vectors.T.astype(np.float64)))[::-1]
    assert np.allclose(points.var(0, ddof=1), values[:2], rtol=1e-4)
    assert np.allclose(shares.sum(), 1.0)
    between = np.linalg.norm(vectors[:, None] - vectors[None], axis=-1)
    assert np.allclose(np.linalg.norm(points[:, None] - points[None], axis=-1), between, atol=1e-3)


def test_a_sample_is_spread_over_all_outputs(folder):
    outputs = sorted((folder / "out").glob("[0-9]_ESM.pt"))
    sample = read_sample([*outputs, folder / "out" / "gone.pt"])
    assert (sample.num_outputs, len(sample.ids), len(sample.lengths)) == (9, 108, 108)
    assert sample.lengths[:12] == [len("ACDEFGHIKLMNPQRSTVWY"[i:]) + 3 + i for i in range(12)]
    assert len(spread(10**6, MAX_POINTS)) == MAX_POINTS


def texts(browser: Browser, selector: str) -> list[str]:
    """The text of all elements that a selector finds."""
    return browser.evaluate(f"[...document.querySelectorAll({selector!r})].map(one => one.textContent)")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_in_a_real_browser(folder, tmp_path):
    page = folder / "out" / "report.html"
    draw(folder / "out")
    with chromium(tmp_path / "profile") as browser:
        pictures = {}
        for name, width, scheme in (
            ("light", 1100, "light"),
            ("dark", 1100, "dark"),
            ("narrow", 360, "light"),
        ):
            browser.open(page, width=width, scheme=scheme)
            assert browser.complaints() == []
            assert browser.requests() == []
            assert browser.evaluate("document.documentElement.scrollWidth") <= width, "it scrolls sideways"
            back = browser.evaluate("getComputedStyle(document.body).backgroundColor")
            light = sum(map(int, re.findall(r"\d+", back)[:3])) / 3
            assert (light < 64) == (scheme == "dark")
            pictures[name] = browser.screenshot(tmp_path / f"{name}.png")
        assert browser.evaluate("document.querySelectorAll('script, img, b:not(.tiles b), i').length") == 0
        assert browser.evaluate("document.title").startswith("partial: ")
        titles = texts(browser, "#map circle title")
        assert len(titles) == 109
        assert sum(title.startswith("</title></svg>") for title in titles) == 108
        cells = browser.evaluate("[...document.querySelectorAll('td')].map(e => e.textContent)")
        assert printable(str(folder / "in" / "<i onclick=alert(1)>.fasta")) in cells
        colours = (
            "new Set([...document.querySelectorAll('#map circle')].map(e => getComputedStyle(e).fill)).size"
        )
        by_file = browser.evaluate(colours)
        browser.evaluate("document.getElementById('by-length').click()")
        assert (by_file, browser.evaluate(colours)) == (9, 6)
        shown = "getComputedStyle(document.querySelector('ul.by-length')).display"
        assert browser.evaluate(shown) == "flex"
    assert len({path.read_bytes() for path in pictures.values()}) == 3
