"""Pages of the docs are in the navigation, and what they refer to exists."""

import re

import pytest

from tests.helpers import ROOT

PAGES = sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md"))


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_in_the_navigation_and_its_links_lead_somewhere(page):
    assert re.search(rf"[ :]{re.escape(page)}$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    path = ROOT / "docs" / page
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
        if "://" not in link:
            assert (path.parent / link).exists(), link


def test_the_links_of_the_readme_lead_somewhere():
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", (ROOT / "README.md").read_text()):
        assert "://" in link or (ROOT / link).exists(), link


def test_every_picture_is_shown():
    shown = "".join((ROOT / "docs" / page).read_text() for page in PAGES) + (ROOT / "README.md").read_text()
    assert {path.name for path in (ROOT / "docs/images").iterdir()} == {
        path.name for path in (ROOT / "docs/images").iterdir() if f"images/{path.name}" in shown
    }
