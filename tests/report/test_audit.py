"""An audit of our own of the views, which needs no axe-core; and of the picture in the README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

VIEWS = ("overview", "viewer", "map", "rules", "gate")
AUDIT = r"""() => {
  const found = [], seen = (e) => e.checkVisibility();
  const rgb = (c) => { const k = document.createElement("canvas").getContext("2d");
    k.fillStyle = c; k.fillRect(0, 0, 1, 1); return [...k.getImageData(0, 0, 1, 1).data]; };
  const light = (c) => c.slice(0, 3).map((v) => v / 255).map((v) =>
    v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((a, v, i) => a + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => { for (; e; e = e.parentElement) {
    const c = rgb(getComputedStyle(e).backgroundColor); if (c[3] === 255) return c; }
    return [255, 255, 255, 255]; };
  for (const e of document.querySelectorAll("body *")) {
    if (!seen(e) || e.closest("script, style")) continue;
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (own && !(e instanceof SVGElement)) {
      const ink = light(rgb(getComputedStyle(e).color)), paper = light(behind(e));
      const a = Math.max(ink, paper), b = Math.min(ink, paper);
      const ratio = (a + 0.05) / (b + 0.05);
      if (ratio < 4.5) found.push(`contrast ${ratio.toFixed(2)} ${e.localName}.${e.className}`);
    }
    if (e.matches("select, input") && !e.labels.length) found.push(`no label ${e.id}`);
    if (e.matches("button") && !e.textContent.trim() && !e.ariaLabel) found.push("nameless button");
    if (e.matches("svg:not([aria-hidden], [aria-label])")) found.push("nameless picture");
    if (e.matches("img") && !e.alt) found.push("picture without words");
    if (e.matches("table") && !e.querySelector("th[scope]")) found.push(`no headers ${e.id}`);
  }
  const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
  if (new Set(ids).size < ids.length) found.push("an id twice");
  for (const name of ["aria-controls", "aria-labelledby"])
    for (const e of document.querySelectorAll(`[${name}]`))
      if (!document.getElementById(e.getAttribute(name))) found.push(`${name} leads nowhere`);
  if (document.documentElement.scrollWidth > innerWidth + 1) found.push("wider than the screen");
  if (!document.documentElement.lang || !document.title) found.push("no language or title");
  return [...new Set(found)];
}"""


@pytest.mark.parametrize(
    ("scheme", "width"),
    [
        ("light", 1100),
        ("dark", 420),
        pytest.param("dark", 1100, marks=pytest.mark.slow),
        pytest.param("light", 360, marks=pytest.mark.slow),
    ],
)
def test_accessibility_in_light_and_dark_wide_and_narrow(
    show: Any, scheme: str, width: int
) -> None:
    opened = show(color_scheme=scheme, viewport={"width": width, "height": 800})
    for view in VIEWS:
        opened.page.click(f"#tab-{view}")
        assert opened.page.evaluate(AUDIT) == [], view
    opened.page.click("#tab-viewer")
    for colour in ("entropy", "reverse_kl", "rank"):
        opened.page.select_option("#text-colour", colour)
        assert opened.page.evaluate(AUDIT) == [], colour


def test_the_audit_notices_what_is_wrong(show: Any) -> None:
    """Negative control: each fault is put on the page and has to be found."""
    opened = show()
    opened.page.evaluate("""() => {
      const add = (tag) => document.querySelector("main").appendChild(document.createElement(tag));
      const faint = add("p"); faint.textContent = "faint"; faint.style.color = "#bbb";
      add("select"); add("button"); add("img"); add("table"); add("div").id = "texts";
    }""")
    found = " ".join(opened.page.evaluate(AUDIT))
    for fault in ("contrast", "no label", "nameless button", "picture without", "an id twice"):
        assert fault in found


def test_every_text_of_the_picture_fits_its_box(browser: Any) -> None:
    """With the fonts that are here, and a tenth to spare for wider ones."""
    picture = Path(__file__).resolve().parents[2] / "docs" / "images" / "how-it-works.svg"
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(picture.as_uri())
        rooms = page.evaluate("""() => [...document.querySelectorAll("[data-box]")].flatMap((g) => {
          const box = g.querySelector("rect").getBBox();
          return [...g.querySelectorAll("text")].map((t) =>
            box.x + box.width - t.getBBox().x - 1.1 * t.getBBox().width);
        })""")
    assert len(rooms) > 12
    assert min(rooms) > 0
