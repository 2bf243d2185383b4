"""The page that a run ends with: from files, whole, the same again, and as a browser shows it."""

import html.parser
import json
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from uniq_jax.report import write_comparison, write_report
from uniq_jax.report.__main__ import main
from uniq_jax.report.findings import findings


def phase(name, method, bits):
    return {"name": name, "method": method, "weight_bits": bits, "activation_bits": bits}


CONFIG = {
    "seed": 3,
    "data": {"name": "digits <b>&", "batch_size": 64},
    "model": {"name": "resnet8", "options": {}},
    "phases": [phase("float", "float", 32), phase("quantized", "uniq", 2)],
}
RESULT = {
    "float_accuracy": 0.9944,
    "test_accuracy": 0.9861,
    "best_accuracy": 0.99,
    "weight_bits": 2,
    "activation_bits": 2,
    "float_bytes": 1_080_000,
    "packed_bytes": 78_800,
    "steps": 60,
    "seconds": 12.5,
}
ENVIRONMENT = {
    "started": "2026-01-02 03:04 UTC",
    "environment": {"jax": "1.2.3", "commit": "", "devices": "1 x cpu"},
    "changes": [{"started": "2026-01-03 03:04 UTC", "environment": {"jax": "9.8.7"}}],
}


def part(bits, edges, rng):
    edges = np.asarray(edges, float)
    width = edges[-1] - edges[0]
    sample = rng.normal(size=4000) * width / 4 + edges.mean()
    counts, _ = np.histogram(sample, 192, (edges[0] - 1.5 * width, edges[-1] + 1.5 * width))
    return {
        "method": "uniq",
        "bits": bits,
        "codes": [1000] * 2**bits,
        "histogram": {
            "low": edges[0] - 1.5 * width,
            "high": edges[-1] + 1.5 * width,
            "counts": counts.tolist(),
        },
        "thresholds": ((edges[1:] + edges[:-1]) / 2).tolist(),
        "levels": edges.tolist(),
    }


def layer(path, bits, rng):
    numbers = {"weight_flip_rate": 0.001, "weight_step": 0.1, "weight_step_gradient": 0.01}
    for what in ("weight", "input"):
        numbers |= {
            f"{what}_entropy": 0.9 * bits,
            f"{what}_clipped_low": 0.02,
            f"{what}_clipped_high": 0.03,
            f"{what}_dead_levels": 0,
        }
    numbers |= {"input_threshold_first": 0.5, "input_threshold_last": 2.5}
    n = 2**bits - 1
    return {
        "path": path,
        "type": "QuantConv",
        "kernel_shape": [3, 3, 4, 4],
        "weights": 144,
        "packed_bytes": 36,
        "float_bytes": 576,
        "numbers": numbers,
        "weight": part(bits, np.arange(n + 1) - n / 2, rng),
        "input": part(bits, np.arange(n + 1), rng),
    }


def write_run(workdir, finished=True):
    """A run's directory, as training leaves it."""
    rng = np.random.default_rng(0)
    (workdir / "quantized").mkdir(parents=True)
    layers = [layer("conv1", 8, rng), layer("layer1/0/conv1", 2, rng), layer("thin", 1, rng)]
    layers[1]["numbers"]["weight_dead_levels"] = 2
    layers[1]["numbers"]["input_clipped_high"] = 0.4
    layers[2]["input"]["histogram"]["counts"][96] = 90_000
    del layers[2]["weight"]
    table = {"phase": "quantized", "step": 30, "layers": layers}
    table |= {"other_packed_bytes": 1000, "other_float_bytes": 1000}
    lines = []
    for name in ("float", "quantized"):
        for step in range(5, 31, 5):
            loss = "nan" if (name, step) == ("quantized", 15) else 2.0 / step
            values = {"loss": loss, "learning_rate": 0.1 / step}
            lines.append({"phase": name, "step": step, **values})
            if step % 10 == 0:
                values = {"test_loss": 3.0 / step, "test_accuracy": 1 - 1 / step}
                lines.append({"phase": name, "step": step, **values})
                if name == "quantized":
                    numbers = {row["path"]: row["numbers"] for row in layers}
                    lines.append({"phase": name, "step": step, "layers": numbers})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (workdir / "metrics.jsonl").write_text(text + '{"phase": "quan')  # A torn last line.
    for name, value in (("config", CONFIG), ("environment", ENVIRONMENT)):
        (workdir / f"{name}.json").write_text(json.dumps(value))
    (workdir / "quantized" / "layers.json").write_text(json.dumps(table))
    if finished:
        (workdir / "result.json").write_text(json.dumps(RESULT))
    return workdir


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Two runs, one of them not finished, their reports, and the page that compares them."""
    root = tmp_path_factory.mktemp("runs")
    done, begun = write_run(root / "done"), write_run(root / "begun", finished=False)
    comparison = write_comparison([done, begun], root / "comparison.html")
    return {"done": write_report(done), "begun": write_report(begun), "comparison": comparison}


VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(html.parser.HTMLParser):
    """What is checked of a page: that it nests, and what it refers to."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.problems = [], [], [], []
        self.feed(text)
        self.close()
        self.problems += [f"<{tag}> is never closed" for tag in self.open]

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open[-1] != tag:
            self.problems.append(f"</{tag}> closes {self.open[-1:]}")
        else:
            self.open.pop()

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def problems(text):
    """What is wrong with a page that should stand alone and be read by everyone."""
    page = Page(text)
    found = page.problems
    for tag, attributes in page.tags:
        for key in ("src", "href", "data", "action", "srcset"):
            value = attributes.get(key)
            if value is not None and not value.startswith(("#", "data:")):
                found.append(f"<{tag} {key}={value!r}> is fetched")
    found += [f"{url} in a style" for url in re.findall(r"url\((?!['\"]?(?:#|data:))[^)]*\)", text)]
    found += [f"{url} is an address" for url in re.findall(r"https?://[^\s\"'<]+", text)]
    found += ["an import"] * text.count("@import")
    found += ["no picture"] * (not page.all("svg"))
    for svg in page.all("svg"):
        if svg.get("role") != "img" or not svg.get("aria-label"):
            found.append(f"a picture without a description: {svg}")
    for image in page.all("img"):
        if not image.get("alt") or not image.get("src", "").startswith("data:"):
            found.append(f"an image without data or description: {image}")
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    found += [f"the id {name} twice" for name in ids if ids.count(name) > 1]
    found += [
        f"{attributes['href']} leads nowhere"
        for tag, attributes in page.tags
        if attributes.get("href", "").startswith("#") and attributes["href"][1:] not in ids
    ]
    if not page.all("html")[0].get("lang"):
        found.append("no language")
    found += ["a table without caption"] * (len(page.all("table")) - len(page.all("caption")))
    found += ["a header cell without scope" for th in page.all("th") if not th.get("scope")]
    return found


@pytest.mark.parametrize("name", ["done", "begun", "comparison"])
def test_a_page_stands_alone_and_is_well_formed(pages, name):
    text = pages[name].read_text()
    assert problems(text) == []
    assert len(text) < 1_000_000


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("</section>", "", "closes"),
        ("<h1>", '<img src="http://x.org/a.png" alt="a"><h1>', "is fetched"),
        ("<h1>", '<script src="a.js"></script><h1>', "is fetched"),
        ("<h1>", '<img src="data:,"><h1>', "without data or description"),
        ("fill: url(#", "fill: url(x", "in a style"),
        ('role="img"', "", "without a description"),
        ('lang="en"', "", "no language"),
        ("<caption>", "<b>", "without caption"),
    ],
)
def test_a_damaged_page_is_noticed(pages, old, new, problem):
    text = pages["done"].read_text().replace("clip-path: url(#", "fill: url(#")
    text = re.sub(r'clip-path="url\(#', 'style="fill: url(#', text).replace(old, new, 1)
    assert any(problem in found for found in problems(text)), problems(text)


def test_the_page_says_what_the_files_say(pages):
    text = " ".join(Page(pages["done"].read_text()).text)
    for words in (
        "98.61%",
        "-0.83 points",
        "13.7x smaller",
        "digits <b>&",  # Escaped, so that it comes back.
        "layer1/0/conv1",
        "weights: 2 dead levels; inputs: 40% clipped",
        "data.batch_size",
        "Started 2026-01-02 03:04 UTC",
        "1.2.3",
        "Another environment, from 2026-01-03 03:04 UTC",
        "Finished: 60 steps",
        "90% in the bin",
    ):
        assert words in text or words.replace("90%", "96%") in text, words
    page = Page(pages["done"].read_text())
    assert sum(tr.get("class") == "marked" for tr in page.all("tr")) == 1
    # Curves, numbers over the training, and a picture for each layer.
    assert len(page.all("svg")) == 2 + 3


def test_an_unfinished_run_is_drawn_too(pages, tmp_path):
    text = " ".join(Page(pages["begun"].read_text()).text)
    assert "Not finished: phase quantized is at step 30" in text
    assert "Result" in text
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text(json.dumps(CONFIG))
    text = " ".join(Page(write_report(bare).read_text()).text)
    assert "no step is logged yet" in text
    assert "No layer was measured" in text


def test_the_comparison_tells_runs_and_configs_apart(pages, tmp_path):
    text = " ".join(Page(pages["comparison"].read_text()).text)
    assert "done, begun" in text
    assert "96.67%, not finished" in text
    assert "78.8 KB" in text
    other = write_run(tmp_path / "done")
    config = json.loads((other / "config.json").read_text())
    config["seed"] = 4
    (other / "config.json").write_text(json.dumps(config))
    first = pages["done"].parent
    text = " ".join(Page(write_comparison([first, other], tmp_path / "c.html").read_text()).text)
    for workdir in (first, other):
        assert f"{workdir.parent.name}/done" in text  # As much of the path as tells them apart.
    assert "seed" in text


def test_a_run_may_have_any_name(pages, tmp_path):
    """Those too that Matplotlib would take for a formula, or hide."""
    workdirs = [
        shutil.copytree(pages["done"].parent, tmp_path / name)
        for name in ("_a$x$", "<b>", "q\"'&", "$", r"\1\d")
    ]
    text = write_comparison(workdirs, tmp_path / "c.html").read_text()
    assert problems(text) == []
    drawn = re.findall(r"<text[^>]*>([^<]*)</text>", text)
    for workdir in workdirs:
        assert sum(html.unescape(t).strip() == workdir.name for t in drawn) == 2, workdir
    for workdir in workdirs:
        assert problems(write_report(workdir).read_text()) == []


def test_the_same_files_give_the_same_bytes(pages):
    before = pages["done"].read_bytes()
    assert write_report(pages["done"].parent).read_bytes() == before


def test_a_page_is_written_whole_or_not_at_all(pages, tmp_path, monkeypatch):
    workdir = shutil.copytree(pages["done"].parent, tmp_path / "run")
    before = (workdir / "report.html").read_bytes()
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match=r"report\.html"):
        write_report(workdir)
    assert (workdir / "report.html").read_bytes() == before
    assert not list(workdir.glob(".*"))


def test_the_command(pages, tmp_path, capsys, monkeypatch):
    workdir = pages["done"].parent
    assert main([str(workdir)]) == 0
    assert capsys.readouterr().out.strip() == str(workdir / "report.html")
    out = tmp_path / "both.html"
    assert main(["compare", str(workdir), str(pages["begun"].parent), "--out", str(out)]) == 0
    assert problems(out.read_text()) == []
    monkeypatch.chdir(workdir)
    assert main(["compare", ".", str(pages["begun"].parent), "--out", str(out)]) == 0
    assert f"{workdir.name}, begun" in " ".join(Page(out.read_text()).text)
    for arguments in (["--help"], ["compare", "--help"]):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 0
        assert "WORKDIR" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (None, None, "is not a directory"),
        ("other.txt", "", "is not the directory of a run: it has no config.json"),
        ("config.json", "{", "config.json is not JSON"),
        ("config.json", "[]", "config.json holds no JSON object"),
        ("config.json", "{}", "config.json is not the config of a run"),
        ("metrics.jsonl", "{}\n", "metrics.jsonl, line 1: no object with"),
        ("metrics.jsonl", "{\n", "metrics.jsonl, line 1: not JSON"),
        ("result.json", "x", "result.json is not JSON"),
    ],
)
def test_what_is_no_run_is_named(tmp_path, capsys, file, text, message):
    workdir = tmp_path / "run"
    if file is not None:
        workdir.mkdir()
        if file in ("metrics.jsonl", "result.json"):
            (workdir / "config.json").write_text(json.dumps(CONFIG))
        (workdir / file).write_text(text)
    assert main([str(workdir)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not (workdir / "report.html").exists()


def test_one_run_is_not_compared(pages, capsys):
    assert main(["compare", str(pages["done"].parent)]) == 1
    assert "needs two runs or more, not 1" in capsys.readouterr().err


def test_the_module_runs_without_jax(pages):
    """As a user runs it; -X importtime names every import."""
    command = [sys.executable, "-X", "importtime", "-m", "uniq_jax.report"]
    root = pathlib.Path(__file__).parents[1]
    workdir = str(pages["done"].parent)
    result = subprocess.run(
        [*command, workdir], cwd=root, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert not re.search(r"\| +jax\b", result.stderr)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"input_dead_levels": 1}, ["inputs: 1 dead level"]),
        ({"weight_entropy": 0.9}, ["weights: low entropy"]),
        ({"weight_flip_rate": 0.02}, ["weights: 2.0% flip in a step"]),
        ({"weight_clipped_low": 0.2, "weight_clipped_high": 0.2}, ["weights: 40% clipped"]),
        ({"input_clipped_low": 0.6}, []),  # Behind no ReLU: the quantizer is one.
        ({"input_clipped_high": 0.2}, ["inputs: 20% clipped"]),
        ({"weight_step": float("nan")}, ["not finite: weight_step"]),
    ],
)
def test_what_is_suspicious_is_said(changes, expected):
    row = layer("a", 2, np.random.default_rng(0))
    row["numbers"] |= changes
    assert findings(row) == expected


# In a browser

# Says what a reader would not see: text outside of its picture, pictures without size.
CHECK = """<script>
window.problems = [];
window.addEventListener("error", event => problems.push("error: " + event.message), true);
window.addEventListener("load", () => {
  for (const image of document.images)
    if (!(image.complete && image.naturalWidth > 0)) problems.push("not loaded: " + image.alt);
  for (const svg of document.querySelectorAll("svg")) {
    const box = svg.getBoundingClientRect();
    const label = svg.getAttribute("aria-label");
    if (box.width < 100 || box.height < 50) problems.push("no size: " + label);
    if (!svg.querySelector("path[style*='stroke']")) problems.push("nothing drawn: " + label);
    for (const text of svg.querySelectorAll("text")) {
      const inner = text.getBoundingClientRect();
      if (inner.left < box.left - 1 || inner.right > box.right + 1
          || inner.top < box.top - 1 || inner.bottom > box.bottom + 1)
        problems.push("cut off: " + text.textContent + " in " + label);
    }
    const texts = [...svg.querySelectorAll("text")];
    texts.forEach((one, i) => texts.slice(i + 1).forEach(other => {
      const a = one.getBoundingClientRect(), b = other.getBoundingClientRect();
      if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
          && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3)
        problems.push("overlap: " + one.textContent + " and " + other.textContent + " in " + label);
    }));
  }
  if (document.documentElement.scrollWidth > window.innerWidth) problems.push("too wide");
  const result = document.createElement("pre");
  result.id = "checked";
  result.textContent = JSON.stringify(problems);
  document.body.append(result);
});
</script>
"""


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """Loads a page in headless Chromium: (problems found in it, what it logged, a screenshot)."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is on the PATH")
    directory = tmp_path_factory.mktemp("browser")

    def load(text, width=1280):
        wrapped = directory / "wrapped.html"
        wrapped.write_text(text.replace("<style>", CHECK + "<style>", 1))
        picture = directory / "picture.png"
        picture.unlink(missing_ok=True)
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        options += ["--enable-logging=stderr", "--v=0", f"--user-data-dir={directory}/profile"]
        options += [f"--window-size={width},2000", "--dump-dom", f"--screenshot={picture}"]
        result = subprocess.run(
            [browser, *options, wrapped.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        found = re.search(r'<pre id="checked">(.*?)</pre>', result.stdout, re.DOTALL)
        assert found, result.stdout[-2000:]
        console = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
        return json.loads(html.unescape(found[1])), console, picture

    return load


@pytest.mark.parametrize(
    ("name", "width"), [("done", 1280), ("done", 500), ("begun", 1280), ("comparison", 1280)]
)
def test_a_browser_shows_every_picture_and_no_error(pages, browse, name, width):
    found, console, picture = browse(pages[name].read_text(), width)
    assert found == []
    assert console == []
    assert picture.stat().st_size > 20_000


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("<main>", '<main><img src="data:image/png;base64,AAAA" alt="a">', "not loaded: a"),
        ("</svg>", '<text x="9000" y="9">far</text></svg>', "cut off: far"),
        (
            ">loss</text>",
            ">loss</text><text x='99' y='99'>one</text><text x='99' y='99'>two</text>",
            "overlap: one and two",
        ),
        ("<main>", "<main><script>nothing()</script>", "nothing is not defined"),
        ("<main>", '<main><svg width="5" height="5"></svg>', "no size"),
        ("<main>", '<main><p style="width: 3000px; max-width: none">wide</p>', "too wide"),
    ],
)
def test_the_browser_would_notice(pages, browse, old, new, problem):
    found, _, _ = browse(pages["begun"].read_text().replace(old, new, 1))
    assert any(problem in one for one in found), found


def test_the_integer_network_is_shown_where_there_is_one(tmp_path):
    workdir = write_run(tmp_path / "run")
    frozen = {"codes": 12345, "mismatching_codes": 0, "file_bytes": 108_000}
    frozen |= {"float_ms": 3.0, "integer_ms": 1.5, "not_exported": ""}
    (workdir / "result.json").write_text(json.dumps(RESULT | frozen))
    text = " ".join(Page(write_report(workdir).read_text()).text)
    assert "0 of 12345" in text
    assert "108.0 KB 10.0x smaller" in " ".join(text.split())
    assert "2.0x as fast" in text
    assert "not exported" not in text
    broken = RESULT | {"codes": None, "file_bytes": None, "integer_ms": None, "not_exported": "no"}
    (workdir / "result.json").write_text(json.dumps(broken))
    text = write_report(workdir).read_text()
    assert "mismatching codes" not in text
    assert "not exported" in text
