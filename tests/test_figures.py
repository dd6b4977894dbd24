"""Figures are display only: what can break is the page around them, so this is what is tested."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tiltlib import figures

ROOT = Path(__file__).parents[1]
VOID = {"input", "meta", "br"}


def drawn(colour="#000000", **options):
    fig, ax = figures.figure(**options)
    ax.plot([0, 1], [0, 1], color=colour, label="one")
    ax.plot([0, 1], [1, 0], "o", color=colour)
    ax.fill_between([0, 1], [0, 1], color="black", hatch="//")
    ax.set_title(r"$\pi^*$")
    ax.legend()
    return fig


def ids(html):
    return re.findall(r' id="([^"]+)"', html)


class Balanced(HTMLParser):
    """Fails on a tag that closes another one: a broken figure would swallow the page below it."""

    def __init__(self, html):
        super().__init__()
        self.open, self.text = [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


EVERY_KIND = {
    "figure": lambda alt: figures.show(drawn(), alt),
    "slider": lambda alt: figures.slider([drawn(), drawn()], ["a", "b"], alt),
    "explorable": lambda alt: figures.explorable("tilt", alt),
    "samples": lambda alt: figures.samples({"before": ["ab"]}, "a", alt),
}


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_alt_is_required_and_is_what_prints(kind):
    with pytest.raises(ValueError, match="alt must say in words what the picture shows, got ' '"):
        EVERY_KIND[kind](" ")
    shown = EVERY_KIND[kind]('a "quote" <b>\n and more')
    bundle = shown._repr_mimebundle_()
    assert set(bundle) == {"text/html", "text/plain"}
    assert bundle["text/plain"] == repr(shown)
    assert bundle["text/plain"].startswith(f"[{kind}]")
    assert 'a "quote" <b> and more' in bundle["text/plain"].splitlines()[0]
    assert "a &quot;quote&quot; &lt;b&gt; and more" in bundle["text/html"]
    Balanced(bundle["text/html"])


def test_text_is_one_line():
    assert repr(figures.show(drawn(), "It falls.")) == "[figure] It falls."
    assert repr(figures.explorable("tilt", "Move it.", n=4)) == "[explorable] tilt: Move it."


def test_black_becomes_the_colour_of_the_text():
    svg = figures.show(drawn(), "a").html
    assert "#000000" not in svg
    assert "stroke: currentColor" in svg
    assert re.match('<figure class="bk-fig"><svg [^>]*fill="currentColor"', svg)  # glyphs state no fill of their own
    assert "#ffffff" not in svg  # no white paper, no white box around the legend


def test_svg_can_stand_in_any_page():
    html = figures.show(drawn(), "a", "b < c").html
    for stray in ("<?xml", "<!DOCTYPE", "<metadata", "<style", "<!--", "<text"):
        assert stray not in html
    assert re.search(r'viewBox="[\d. ]+"', html)
    assert not re.search(r"<svg[^>]* (width|height)=", html)
    assert "<figcaption>b &lt; c</figcaption>" in html


def test_ids_are_unique_in_a_page_and_every_reference_resolves():
    fig = drawn()
    page = "".join(
        x.html for x in (figures.show(fig, "a"), figures.show(fig, "a"), figures.slider([fig, fig], "ab", "c"))
    )
    found = ids(page)
    assert len(found) > 20
    assert len(found) == len(set(found))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', page)) <= set(found)


def test_same_code_gives_the_same_html_in_a_new_process():
    # A build that changes nothing must not change the page: no date, no memory address, no random id.
    code = "from tests.test_figures import drawn, figures; print(figures.show(drawn('#3b82c4'), 'a').html)"
    runs = [subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) for _ in range(2)]
    assert runs[0] == runs[1]
    assert "<svg" in runs[0]


def test_showing_changes_no_global_setting():
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.show(drawn(), "a")
    assert dict(matplotlib.rcParams) == before


def test_colour_is_never_the_only_cue():
    _, ax = figures.figure()
    lines = [ax.plot([0, 1], [0, k])[0] for k in range(4)]
    assert [line.get_color() for line in lines] == list(figures.COLORS)
    assert len({str(line._dash_pattern) for line in lines}) == 4


@pytest.mark.parametrize("page", [1.0, 0x12 / 255])  # white, and the dark page
@pytest.mark.parametrize("colour", [*figures.COLORS, figures.GREY])
def test_colours_have_contrast_on_both_themes(colour, page):
    def luminance(channels):  # WCAG 2.2, which asks 3:1 of graphics
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    ours = luminance([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    low, high = sorted((ours, luminance([page] * 3)))
    assert (high + 0.05) / (low + 0.05) >= 3


@pytest.mark.parametrize("argument", ["nrows", "ncols", "width", "height"])
def test_sizes_are_checked(argument):
    with pytest.raises(ValueError, match=f"{argument} must be .*, got 0"):
        figures.figure(**{argument: 0})


def test_figure_is_drawn_at_the_width_asked_for():
    assert "max-width:480px" in figures.show(drawn(width=5.0), "a").html  # 96 CSS pixels an inch
    fig, axes = figures.figure(2, 3, sharey=True)
    assert axes.shape == (2, 3) and len(fig.axes) == 6


def test_slider_limits():
    fig = drawn()
    with pytest.raises(ValueError, match="figs must hold 1 to 15 figures, got 0"):
        figures.slider([], [], "a")
    with pytest.raises(ValueError, match="figs must hold 1 to 15 figures, got 16"):
        figures.slider([fig] * 16, ["x"] * 16, "a")
    with pytest.raises(ValueError, match=r"labels must hold one label per figure \(2\), got 1"):
        figures.slider([fig] * 2, ["x"], "a")


def test_slider_starts_at_its_first_frame_and_escapes_labels():
    html = figures.slider([drawn(), drawn()], ["</script>", "b"], "a").html
    assert html.count("<svg") == 2
    assert html.count('<div class="bk-frame" hidden>') == 1
    assert html.count("</script>") == 1
    assert 'aria-valuetext="&lt;/script&gt;"' in html


def test_explorable_options_survive_the_attribute():
    options = {"p": [0.5, 0.5], "note": "\"quote\" & 'more' </div>"}
    html = figures.explorable("tilt", "a", **options).html
    attributes = {}

    class Read(HTMLParser):
        def handle_starttag(self, tag, attrs):
            attributes.update(dict(attrs) if tag == "div" else {})

    Read().feed(html)
    assert attributes["class"] == "bk-explorable" and attributes["data-name"] == "tilt"
    assert json.loads(attributes["data-options"]) == options
    with pytest.raises(ValueError, match="options must be finite JSON values, got {'n': nan}"):
        figures.explorable("tilt", "a", n=float("nan"))
    with pytest.raises(ValueError, match="options must be finite JSON values"):
        figures.explorable("tilt", "a", n=object())
    with pytest.raises(ValueError, match="name must not be empty, got ''"):
        figures.explorable("", "a")


def test_samples_mark_runs_and_keep_every_character():
    shown = figures.samples({"before": ["a quick <b>"], "after": ["aei"]}, "aeiou", "More vowels.")
    assert "<u><b>a</b></u> q<u><b>ui</b></u>ck &lt;b&gt;" in shown.html
    assert "<u><b>aei</b></u>" in shown.html
    assert repr(shown) == "[samples] More vowels.\nbefore:\n  a quick <b>\nafter:\n  aei"
    assert "a quick <b>" in "".join(Balanced(figures.samples({"x": ["a quick <b>"]}, "", "a").html).text)
    assert "<u><b>]-^</b></u>x" in figures.samples({"x": ["]-^x"]}, "^-]", "a").html  # no pattern, only characters
    with pytest.raises(ValueError, match="columns must hold at least one list of strings, got {}"):
        figures.samples({}, "a", "b")


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        figures.figure()
    figures.samples({"x": ["a"]}, "a", "needs no matplotlib")


def test_table_is_readable_as_text_and_escaped_as_html():
    shown = figures.table({"beta": ["1", "0.5"], "<kl>": ["1.2", "8.3"]}, "Two temperatures.")
    assert repr(shown).splitlines() == ["[table] Two temperatures.", "beta  <kl>", "1     1.2", "0.5   8.3"]
    assert "&lt;kl&gt;" in shown.html and "<kl>" not in shown.html


@pytest.mark.parametrize("columns", [{}, {"a": ["1"], "b": []}])
def test_table_refuses_ragged_columns(columns):
    with pytest.raises(ValueError, match="columns must hold at least one column, all of one length"):
        figures.table(columns, "Bad.")


# --- progress --------------------------------------------------------------------------------------------------------


class FakeIPython:
    """A notebook's side of `display(..., display_id=True)`: keeps what is stored, and everything that was shown."""

    def __init__(self, monkeypatch, shell="a shell"):
        self.shown = []
        monkeypatch.setitem(sys.modules, "IPython", self)
        monkeypatch.setitem(sys.modules, "IPython.display", self)
        self.get_ipython = lambda: shell

    def display(self, value, *, display_id):
        assert display_id is True
        self.shown.append(value)
        return self

    def update(self, value):
        self.shown.append(value)

    @property
    def stored(self):
        return self.shown[-1]._repr_mimebundle_()


@pytest.fixture
def notebook(monkeypatch):
    return FakeIPython(monkeypatch)


@pytest.fixture
def slow(monkeypatch):
    """A clock that a quarter of a second passes on at every look."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(figures.time, "monotonic", lambda: next(ticks) / 4)


AT_REST = {"text/html": '<p class="bk-progress">a &lt; b</p>', "text/plain": "[progress] a < b"}


@pytest.mark.parametrize("place", ["nowhere", "plain Python with IPython loaded", "notebook"])
def test_progress_passes_items_through(place, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    fake = FakeIPython(monkeypatch, None if "plain" in place else "a shell") if place != "nowhere" else None
    items = [object(), None, 0]
    assert list(figures.progress(items, "a < b")) == items
    assert list(figures.progress((x for x in items), "a < b")) == items
    assert list(figures.progress([], "a < b")) == []
    if place == "notebook":
        assert len(fake.shown) == 6 and fake.stored == AT_REST
    else:
        assert fake is None or not fake.shown
    assert capsys.readouterr() == ("", "")


def test_progress_takes_one_item_at_a_time(notebook):
    source = iter(range(1000))
    steps = figures.progress(source, "a")
    assert [next(steps), next(steps)] == [0, 1] and next(source) == 2


def test_progress_counts_and_rests_at_its_label(notebook, slow):
    assert list(figures.progress(range(9), "a < b")) == list(range(9))
    texts = [repr(x) for x in notebook.shown]
    assert texts[0] == texts[-1] == "[progress] a < b"
    assert texts[1:-1] == ["a < b: 2 of 9", "a < b: 5 of 9", "a < b: 8 of 9"]  # once half a second has passed
    assert "a &lt; b: 2 of 9" in notebook.shown[1].html
    assert notebook.stored == notebook.shown[0]._repr_mimebundle_() == AT_REST


def test_progress_without_a_length_shows_the_number_so_far(notebook, slow):
    assert list(figures.progress((x for x in range(4)), "a < b")) == [0, 1, 2, 3]
    assert [repr(x) for x in notebook.shown[1:-1]] == ["a < b: 2"] and notebook.stored == AT_REST


def test_progress_rests_also_when_the_loop_is_left(notebook, slow):
    for item in figures.progress(range(1000), "a < b"):
        if item == 5:
            break
    assert notebook.stored == AT_REST

    def fails():
        yield from range(3)
        raise RuntimeError("in the source")

    with pytest.raises(RuntimeError, match="in the source"):
        list(figures.progress(fails(), "a < b"))
    assert notebook.stored == AT_REST


def test_progress_needs_a_label():
    with pytest.raises(ValueError, match="label must not be empty, got ''"):
        figures.progress([1], "")  # at once, before the first item
