"""report.html in a browser without a window: what it shows, light and dark, wide and narrow. Skipped without one."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from reports import a_full_report

from pqk.report.html.page import to_html

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
"""those that print the document that they made"""
LIGHT, DARK = 1, 0
PROBE = """
addEventListener('load', () => setTimeout(() => {
  const found = [...document.querySelectorAll('iframe')].map(frame => {
    const page = frame.contentDocument, view = frame.contentWindow, root = page.documentElement;
    const style = (query, what) => view.getComputedStyle(page.querySelector(query))[what];
    const pictures = [...page.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect());
    return {
      width: root.clientWidth, needed: root.scrollWidth, loaded: view.performance.getEntriesByType('resource').length,
      title: page.querySelector('h1').innerText, sections: page.querySelectorAll('section > h2').length,
      paper: style('body', 'backgroundColor'), ink: style('body', 'color'),
      accent: style('svg text[style*="--accent"]', 'fill'), label: style('svg text[style*="--muted"]', 'fill'),
      pictures: pictures.map(box => [box.width, box.height]), mode: page.compatMode,
      table: page.querySelector('table').getBoundingClientRect().height,
    };
  });
  document.title = JSON.stringify(found);
}, 0));
"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser is installed: {', '.join(BROWSERS[:3])}, … (Debian: apt install chromium)")
    return found


def opened(browser: str, page: str, scheme: int, folder: Path) -> list[dict[str, Any]]:
    """What the page is like in frames of three widths."""
    frame = '<iframe style="width:{0}px;height:4000px;border:0" srcdoc="{1}"></iframe>'
    frames = "".join(frame.format(width, html.escape(page)) for width in (360, 768, 1400))
    document = f"<!DOCTYPE html><meta charset='utf-8'><title>none</title>{frames}<script>{PROBE}</script>"
    (folder / "frames.html").write_text(document, encoding="utf-8")
    command = [
        browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        f"--user-data-dir={folder}/user", "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--blink-settings=preferredColorScheme={scheme}",
        "--window-size=1600,1000", "--virtual-time-budget=20000", "--dump-dom", f"file://{folder}/frames.html",
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "GLIBC_TUNABLES")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title is not None and title[1] != "none", done.stderr[-2000:]
    return list(json.loads(html.unescape(title[1])))


@pytest.mark.slow
def test_it_can_be_read_light_and_dark_wide_and_narrow(browser: str, tmp_path: Path) -> None:
    page = to_html(a_full_report())
    schemes = {}
    for name, scheme in (("light", LIGHT), ("dark", DARK)):
        (tmp_path / name).mkdir()
        schemes[name] = opened(browser, page, scheme, tmp_path / name)
    for frames in schemes.values():
        assert [frame["width"] for frame in frames] == [360, 768, 1400]
        for frame in frames:
            assert frame["needed"] == frame["width"], "the page scrolls sideways"
            assert frame["title"] == "The promise is kept" and frame["sections"] == 8
            assert frame["loaded"] == 0 and frame["mode"] == "CSS1Compat"
            assert len(frame["pictures"]) == 4 and all(w >= 300 and h >= 50 for w, h in frame["pictures"])
            assert frame["table"] > 0
    light, dark = schemes["light"][0], schemes["dark"][0]
    assert min(channels(light["paper"])) > 200 > 100 > max(channels(dark["paper"]))
    for what in ("ink", "accent", "label"):  # text in pictures, too
        assert contrast(light[what], light["paper"]) > 4.5 and contrast(dark[what], dark["paper"]) > 4.5, what


def channels(colour: str) -> list[int]:
    """Of `rgb(1, 2, 3)`."""
    return [int(n) for n in re.findall(r"\d+", colour)[:3]]


def contrast(a: str, b: str) -> float:
    """The contrast ratio of WCAG 2.2; text needs 4.5."""

    def luminance(colour: str) -> float:
        shares = [n / 255 for n in channels(colour)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)
