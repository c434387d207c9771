"""Pages of maps and trees, read back as a browser does: their JSON, and that names of networks are text alone."""

import base64
import hashlib
import json
import shutil
import subprocess
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise

import numpy as np
import pytest
import torch

from sne_fast.similarity import Edge, Lineage, map_page

HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    "<!--<script>",
    "]]>&lt;b&quot;'\"",
    "line\u2028break\x00 \udc80",
    "@@{script} $x {{y}}",
]


class Page(HTMLParser):
    """The tags of a page with their attributes, and the text of the elements that matter."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.texts, self._open = [], {}, None
        self.feed(text)
        self.close()
        self.data = json.loads(self.texts["data"])

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append((tag, given))
        self._open = given.get("id") or tag if tag in ("script", "style", "title", "h1") else None

    def handle_endtag(self, tag):
        self._open = None

    def handle_data(self, data):
        if self._open:
            self.texts[self._open] = self.texts.get(self._open, "") + data

    def policy(self):
        return next(
            given["content"] for tag, given in self.tags if given.get("http-equiv") == "Content-Security-Policy"
        )


def is_closed(page):
    """Check that a page fetches nothing and that its own script and style are all that may run."""
    for tag, given in page.tags:
        assert not {"src", "href", "style"} & set(given) and not any(name.startswith("on") for name in given), (
            tag,
            given,
        )
    kinds = [tag for tag, _ in page.tags if tag in ("script", "style", "img", "iframe", "link", "base", "object")]
    assert kinds == ["style", "script", "script"]
    for kind in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(page.texts[kind].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in page.policy()
    assert page.policy().startswith("default-src 'none';") and "://" not in page.texts["script"] + page.texts["style"]
    ids = [given["id"] for _, given in page.tags if "id" in given]
    assert len(ids) == len(set(ids))
    return True


def test_templates_are_data_of_the_package():
    names = {entry.name for entry in (files("sne_fast.similarity") / "templates").iterdir()}
    assert names == {"page.html", "page.css", "page.js", "map.html", "map.js", "tree.html", "tree.js"}


def test_a_map_holds_positions_names_and_columns():
    places = np.random.default_rng(0).normal(0, 40, (5, 2)).astype(np.float32)
    columns = {
        "kind": ["b", "a", None, "a", "c"],
        "accuracy": [0.5, None, float("nan"), np.float32(0.25), 1],
        "weights": torch.arange(5),
        "trained": [True, False, None, True, True],
        "mixed": [1, "x", None, (2, 3), 4],
        "unknown": [None] * 5,
        "seed": [2**60 + 1, 7, None, 7, 0],
    }
    near = [[1, 2]] * 5
    text = map_page(places, HOSTILE, columns, title="<b>&", colour="weights", neighbours=near)
    text.encode()
    page = Page(text)
    assert is_closed(page)
    data = page.data
    assert page.texts["title"] == page.texts["h1"] == "<b>&"
    assert data["names"][:3] == HOSTILE[:3] and data["names"][4] == HOSTILE[4]
    assert data["names"][3] == "line\u2028break\x00 \\udc80"
    np.testing.assert_allclose(np.stack([data["x"], data["y"]], 1), places, rtol=1e-5)
    assert data["near"] == near and data["colour"] == 2
    found = {column.pop("name"): column for column in data["columns"]}
    assert found["kind"] == {"kind": "group", "groups": ["a", "b", "c"], "values": [1, 0, None, 0, 2]}
    assert found["accuracy"] == {"kind": "number", "values": [0.5, None, None, 0.25, 1]}
    assert found["weights"] == {"kind": "number", "values": [0, 1, 2, 3, 4]}
    assert found["trained"] == {"kind": "group", "groups": ["true", "false"], "values": [0, 1, None, 0, 0]}
    assert found["mixed"] == {"kind": "group", "groups": ["(2, 3)", "1", "4", "x"], "values": [1, 3, None, 0, 2]}
    assert found["unknown"] == {"kind": "number", "values": [None] * 5}
    seeds = {"kind": "group", "groups": ["7", "0", str(2**60 + 1)], "values": [2, 0, None, 0, 1]}
    assert found["seed"] == seeds
    plain = Page(map_page(np.zeros((0, 2)), [])).data
    assert plain["colour"] == -1 and plain["near"] is None and plain["columns"] == []


def test_errors_of_maps():
    places, names = np.zeros((2, 2)), ["a", "b"]
    with pytest.raises(ValueError, match=r"positions must be finite, \(3, 2\) for as many names, got \(2, 2\)"):
        map_page(places, [*names, "c"])
    with pytest.raises(ValueError, match="positions must be finite"):
        map_page(places + np.nan, names)
    with pytest.raises(ValueError, match="the column 'x' must have 2 values, has 1"):
        map_page(places, names, {"x": [1]})
    with pytest.raises(ValueError, match="colour must be a column, one of x; got 'y'"):
        map_page(places, names, {"x": [1, 2]}, colour="y")
    with pytest.raises(ValueError, match=r"neighbours must be \(2, k\), got \(1, 2\)"):
        map_page(places, names, neighbours=[[0, 1]])
    for wrong in ([[2], [0]], [[-1], [0]], [[0.0], [1.0]]):
        with pytest.raises(ValueError, match="neighbours must be places of the 2 networks"):
            map_page(places, names, neighbours=wrong)
    assert Page(map_page(places, names, neighbours=[[], []])).data["near"] == [[], []]


def tree(*edges, names):
    return Lineage(names, tuple(Edge(a, b, relation, 0.25, evidence) for a, b, relation, evidence in edges))


def shown(page):
    return [(row["depth"], page.data["names"][row["network"]], row["again"]) for row in page.data["rows"]]


def test_a_tree_holds_every_network_and_edge_once():
    edges = [
        ("a", "c", "train", 0.2),
        ("a", "m", "merge", 1.0),
        ("c", "m", "merge", 1.0),
        ("m", HOSTILE[0], "prune", 0.9),
    ]
    found = tree(*edges, ("x", "y", "round", 0.9), names=("x", "y", "a", "c", "m", HOSTILE[0], *HOSTILE[1:]))
    page = Page(found.html("Trees & more"))
    assert is_closed(page) and page.texts["h1"] == "Trees & more"
    assert shown(page) == [
        (0, "a", False), (1, "c", False), (2, "m", False), (3, HOSTILE[0], False), (1, "m", True),
        (0, "x", False), (1, "y", False),
    ]  # fmt: skip
    assert sorted(row["edge"] for row in page.data["rows"] if row["edge"] is not None) == list(range(len(edges) + 1))
    assert [edge["guess"] for edge in page.data["edges"]] == [True, False, False, False, False]
    assert page.data["edges"][0] == {"relation": "train", "distance": 0.25, "evidence": 0.2, "guess": True}
    assert page.data["alone"] == [6, 7, 8, 9] and page.data["names"][6] == HOSTILE[1]
    assert page.data["summary"] == "2 trees of 6 networks, 4 without relatives"


def test_circles_and_long_chains_end():
    circle = tree(("a", "b", "train", 0.1), ("b", "a", "merge", 1.0), ("c", "a", "merge", 1.0), names=("a", "b", "c"))
    assert shown(Page(circle.html())) == [(0, "c", False), (1, "a", False), (2, "b", False), (3, "a", True)]
    closed = tree(("a", "b", "train", 0.1), ("b", "a", "train", 0.1), names=("a", "b"))
    assert shown(Page(closed.html())) == [(0, "a", False), (1, "b", False), (2, "a", True)]
    names = tuple(map(str, range(3000)))
    chain = tree(*((a, b, "train", 0.5) for a, b in pairwise(names)), names=names)
    depths = [depth for depth, _, _ in shown(Page(chain.html()))]
    assert depths == [min(k, 100) for k in range(3000)]


def in_browser(text, folder):
    """Return the page that a browser has made of a page's text by its script."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium")
    (folder / "page.html").write_text(text, encoding="utf-8")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command = [browser, *options, "--virtual-time-budget=1000", "--dump-dom", (folder / "page.html").as_uri()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        pytest.skip("chromium took too long")
    return Page(done.stdout)


def test_a_browser_shows_a_map_and_runs_nothing_of_its_names(tmp_path):
    places = np.random.default_rng(0).normal(size=(5, 2))
    page = in_browser(map_page(places, HOSTILE, {HOSTILE[0]: HOSTILE, "accuracy": np.arange(5)}), tmp_path)
    tags = [tag for tag, _ in page.tags]
    assert "img" not in tags and tags.count("script") == 2
    assert tags.count("option") == 3  # the script has run
    assert [given["aria-pressed"] for _, given in page.tags if "aria-pressed" in given] == ["false"] * 5


def test_a_browser_shows_a_tree(tmp_path):
    names = ("root", *HOSTILE)
    page = in_browser(tree(*(("root", name, "train", 0.1) for name in HOSTILE[:3]), names=names).html(), tmp_path)
    tags = [tag for tag, _ in page.tags]
    assert "img" not in tags and tags.count("script") == 2
    assert tags.count("li") == 6 and tags.count("details") == 2
