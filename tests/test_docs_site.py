"""What the documentation's hooks make of pages: notebooks that are run, pictures that are drawn."""

import importlib.util
import pathlib
import re

import jax
import pytest
from mkdocs.exceptions import PluginError

from uniq_jax import plots

DOCS = pathlib.Path(__file__).parents[1] / "docs"


def hook(name):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / "_hooks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


notebooks, pictures, offline = hook("notebooks"), hook("pictures"), hook("offline")
results = hook("results")


@pytest.mark.parametrize(
    ("name", "drawn"), [("train_and_deploy", 0), ("own_quantizer", 3)], ids=lambda value: str(value)
)
def test_a_notebook_runs(name, drawn):
    text = (DOCS / "notebooks" / f"{name}.py").read_text()
    page = notebooks.render(text, name)
    assert "mismatching codes: 0 of" in page
    assert page.count("<figure><svg") == drawn
    assert page.startswith("# ")
    shares = [float(share) for share in re.findall(r"([\d.]+)% of 360 test images", page)]
    assert shares
    assert min(shares) > 90


def test_every_notebook_is_run():
    names = {path.stem for path in (DOCS / "notebooks").glob("*.py")}
    assert names == {"train_and_deploy", "own_quantizer"}


def test_a_page_has_code_and_what_it_printed():
    text = "# %% [markdown]\n# # Title\n#\n# Text.\n\n"
    text += '# %%\nx = 2\nprint("x")\nx + 1\n\n# %%\n"<svg>"\n'
    assert notebooks.render(text, "page") == (
        '# Title\n\nText.\n\n```python\nx = 2\nprint("x")\nx + 1\n```\n\n```text\nx\n3\n```\n\n'
        '```python\n"<svg>"\n```\n\n<figure><svg></figure>\n'
    )


def test_links_to_notebooks_are_of_files_here_and_of_pages_there():
    text = "[a](notebooks/own_quantizer.py) `notebooks/b.py` [c](https://x.org/notebooks/c.py)"
    assert notebooks.on_page_markdown(text) == text.replace("own_quantizer.py", "own_quantizer.md")


def test_links_lead_to_files_of_the_repository():
    pages = [*DOCS.parent.glob("*.md"), *DOCS.rglob("*.md")]
    links = [(p, x) for p in pages for x in re.findall(r"\]\(([^)#:]+)[)#]", p.read_text())]
    assert len(links) > 50
    assert [(p.name, x) for p, x in links if not (p.parent / x).exists()] == []


def test_a_notebook_that_fails_is_an_error():
    with pytest.raises(ZeroDivisionError):
        notebooks.render("# %%\n1 / 0\n", "page")


def test_a_notebook_begins_with_a_cell():
    with pytest.raises(ValueError, match="must begin with a line '# %%'"):
        notebooks.render("import jax\n", "page")


def test_the_gallery_shows_every_picture():
    shown = re.findall(r'<figure data-picture="([^"]*)">', (DOCS / "quantizers.md").read_text())
    assert sorted(shown) == sorted(pictures._PICTURES)


def test_a_picture_takes_its_place():
    page = '<p>before</p><figure data-picture="pact_activation"></figure><p>after</p>'
    done = pictures.on_post_page(page, page=None, config=None)
    assert re.fullmatch(r"<p>before</p><figure><svg .*</svg></figure><p>after</p>", done, re.DOTALL)
    assert "pact_activation, forward and backward" in done
    with pytest.raises(KeyError):
        pictures.on_post_page('<figure data-picture="missing"></figure>')


def test_pictures_are_of_the_functions(monkeypatch):
    """Another quantizer gives another picture: nothing drawn is typed in."""
    before = pictures.picture("pact_activation")
    monkeypatch.setattr(
        pictures.quantizers, "pact_activation", lambda x, clip, **_: jax.numpy.minimum(x, clip)
    )
    assert pictures.picture("pact_activation") != before


def test_panels_have_their_lines_and_one_legend():
    panels = [
        plots.Panel("first", {"a": [0, 1, 2], "b": [2, 1, 0]}, marks=[0.5]),
        plots.Panel("second", {"a": [0, 1, 0], "b": [0, 2, 0]}),
    ]
    drawn = plots.functions([0, 1, 2], panels, "x", "two panels")
    assert drawn.startswith('<svg role="img" aria-label="two panels"')
    for title in ("first", "second"):
        assert f">{title}<" in drawn
    assert [drawn.count(f">{name}<") for name in "abx"] == [1, 1, 2]


class _Page:
    class file:
        src_uri = "page.md"


@pytest.mark.parametrize(
    "element",
    [
        '<script src="https://unpkg.com/mathjax"></script>',
        '<link rel="stylesheet" href="//fonts.googleapis.com/css">',
        "<img alt='' src=http://example.com/a.png>",
    ],
)
def test_a_page_that_needs_a_network_is_an_error(element):
    with pytest.raises(PluginError, match=r"page\.md would load .*//"):
        offline.on_post_page(f"<p>{element}</p>", page=_Page)


def test_a_page_may_link_to_other_sites():
    page = '<a href="https://arxiv.org/abs/2104.00210">paper</a><script src="assets/a.js"></script>'
    assert offline.on_post_page(page, page=_Page) == page


def test_the_table_of_benchmarks_is_put_in_where_there_is_one(tmp_path):
    name = "benchmarks/results.md"
    assert "`make bench` has not been run here" in results.table(tmp_path, name)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / name).write_text("| a |\n")
    assert results.table(tmp_path, name) == "| a |\n"
    page = (DOCS / "benchmarks.md").read_text()
    assert "<!--" in page
    assert "<!--" not in results.on_page_markdown(page)
