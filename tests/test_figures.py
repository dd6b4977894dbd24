"""Figures are display only: what can break is the page around them, so this is what is tested."""

import json
import re
import subprocess
import sys
from collections import Counter
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


@pytest.mark.slow
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
    for start in (-1, 2):
        with pytest.raises(ValueError, match=f"start must be the index of a figure, 0 to 1, got {start}"):
            figures.slider([fig] * 2, ["x", "y"], "a", start=start)


def test_slider_starts_where_it_is_told():
    html = figures.slider([drawn(), drawn(), drawn()], "abc", "alt", start=2).html
    assert re.findall(r'<div class="bk-frame"( hidden)?>', html) == [" hidden", " hidden", ""]
    assert 'value="2"' in html and 'aria-valuetext="c"' in html and "<output>c</output>" in html


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


# --- what a reader meets ---------------------------------------------------------------------------------------------


def test_a_plain_figure_can_be_read_on_a_phone():
    fig, _ = figures.figure()
    assert fig.get_size_inches().tolist() == pytest.approx([5.1 * figures.SCALE, 3.2 * figures.SCALE])
    svg = figures.show(fig, "a").html
    assert 'style="width:100%;max-width:490px;height:auto"' in svg
    for size in ({"width": 0.5}, {"height": 0.5}):
        figures.figure(**size)


@pytest.mark.parametrize(("argument", "value"), [("width", float("inf")), ("height", float("nan")), ("width", -1)])
def test_sizes_are_positive_and_finite(argument, value):
    with pytest.raises(ValueError, match=f"^{argument} must be positive and finite, got {value}$"):
        figures.figure(**{argument: value})


def test_axes_are_black_whatever_the_style_in_force():
    import matplotlib

    parts = [f"{axis}.{part}" for axis in ("xtick", "ytick") for part in ("color", "labelcolor")]
    with matplotlib.rc_context({name: "#ff0000" for name in ("axes.edgecolor", "grid.color", *parts)}):
        svg = figures.show(figures.figure()[0], "a").html
    assert "#ff0000" not in svg and "stroke: currentColor" in svg


def test_axes_have_two_sides_and_level_lines_behind_the_data():
    fig, axes = figures.figure(2, 1)
    for ax in axes:
        assert [side for side, spine in ax.spines.items() if spine.get_visible()] == ["left", "bottom"]
        assert [axis.get_gridlines()[0].get_visible() for axis in (ax.xaxis, ax.yaxis)] == [False, True]
        bar = ax.bar([1], [1])[0]
        assert ax.yaxis.get_zorder() < bar.get_zorder()
        assert ax.yaxis.get_gridlines()[0].get_alpha() < 0.5
        assert {ax.spines[side].get_edgecolor() for side in ("left", "bottom")} == {(0, 0, 0, 1)}


def test_options_of_the_axes_are_passed_on():
    _, (left, right) = figures.figure(1, 2, sharey=True)
    left.set_ylim(3, 4)
    assert right.get_ylim() == (3, 4)


def test_nothing_is_cut_off_at_the_edge():
    fig, ax = figures.figure(height=2)
    ax.set_xlabel("one\ntwo\nthree")
    ax.set_ylabel("one\ntwo\nthree")
    fig.draw_without_rendering()
    box, paper = fig.get_tightbbox(), fig.bbox_inches
    assert paper.x0 <= box.x0 and paper.y0 <= box.y0 and box.x1 <= paper.x1 and box.y1 <= paper.y1


def test_a_page_that_asks_for_fonts_gets_outlines():
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        assert "<text" not in figures.show(drawn(), "a").html


def test_a_legend_of_another_source_loses_its_box():
    fig = drawn()
    figures.show(fig, "a")
    assert fig.axes[0].get_legend().get_frame_on() is False
    figures.show(figures.figure()[0], "no legend at all")


def test_one_picture_many_times(monkeypatch):
    monkeypatch.setattr(figures, "_shown", Counter())
    fig = drawn()
    first, *more = (re.search(r' id="(bk[0-9a-f]{10}(?:-\d)?)-0"', figures.show(fig, "a").html)[1] for _ in range(4))
    assert more == [f"{first}-{k}" for k in (2, 3, 4)]


def test_an_svg_is_one_element_that_says_what_it_shows():
    html = figures.show(drawn(), "a & b").html
    head, body = re.fullmatch(r'<figure class="bk-fig">(<svg [^>]*>)(.*)</svg></figure>', html, re.DOTALL).groups()
    assert re.fullmatch(
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        r'viewBox="0 0 [\d.]+ [\d.]+" role="img" aria-label="a &amp; b" data-font="9" fill="currentColor" '
        'stroke-linejoin="round" stroke-linecap="butt" style="width:100%;max-width:490px;height:auto">',
        head,
    )
    assert body[0] == "<" and not re.search(r"\n\s|\s\n", body)  # not one byte of layout
    assert re.findall(r' id="[^"]*-(\d+)"', body) == [str(k) for k in range(len(ids(body)))]
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', body)) == set(ids(body)) and len(ids(body)) > 5
    Balanced(html)


def test_slider_as_a_reader_meets_it(monkeypatch):
    monkeypatch.setattr(figures, "_shown", Counter())
    figs = [drawn(), drawn("#3b82c4"), drawn("#d9722e")]
    html = figures.slider((fig for fig in figs), ("N = 1", "N < 2", "N = 4"), "a & b", "below").html
    head, script = html.split("<script>")
    name = re.match(r'<figure class="bk-fig bk-slider" id="(bk[0-9a-f]{10})">', head)[1]
    assert name in script and script.endswith("</script></figure>")
    frames = re.findall(r'<div class="bk-frame"( hidden)?><svg [^>]*aria-label="([^"]*)"', head)
    labels = ["a &amp; b (N = 1)", "a &amp; b (N &lt; 2)", "a &amp; b (N = 4)"]
    assert frames == list(zip(["", " hidden", " hidden"], labels, strict=True))
    assert head.count("</svg></div><div") == 2
    assert head.endswith(
        '</svg></div>\n<p class="bk-control"><input type="range" min="0" max="2" step="1" value="0" '
        'autocomplete="off"\n'
        ' aria-label="a &amp; b" aria-valuetext="N = 1"> <output>N = 1</output></p><figcaption>below</figcaption>\n'
    )
    listed = re.search(r"labels = (\[.*\]);", script)[1]
    assert json.loads(listed) == ["N = 1", "N < 2", "N = 4"] and "<" not in listed
    assert "<figcaption>" not in figures.slider(figs[:1], ["a"], "no caption").html
    Balanced(html)


@pytest.mark.slow
def test_a_slider_of_the_most_frames():
    fig, _ = figures.figure()
    html = figures.slider([fig] * 15, [str(k) for k in range(15)], "a").html
    assert html.count("<svg") == 15 and 'max="14"' in html


def test_explorable_as_a_page_without_scripts_shows_it():
    html = figures.explorable("a<b", "a & b", second=[1], first="x").html
    assert html == figures.explorable("a<b", "a & b", first="x", second=[1]).html  # in any order
    assert html == (
        '<div class="bk-explorable" role="group" aria-label="a &amp; b" data-name="a&lt;b" '
        'data-options="{&quot;first&quot;: &quot;x&quot;, &quot;second&quot;: [1]}"><p><em>a &amp; b (Interactive in '
        "the online book, with scripts on.)</em></p></div>"
    )


def test_a_caption_below_an_explorable():
    plain = figures.explorable("x", "y", n=1).html
    html = figures.explorable("x", "y", "Try n < 2.", n=1).html
    assert html == f'<figure class="bk-fig">{plain}<figcaption>Try n &lt; 2.</figcaption></figure>'


def test_an_svg_names_its_smallest_text():
    fig, ax = figures.figure(width=7)
    ax.set_title("T", fontsize=20)
    ax.text(0, 0, "unseen", fontsize=3).set_visible(False)
    ax.text(0, 0, " ", fontsize=2)
    assert 'data-font="9"' in figures.show(fig, "a").html  # of the ticks
    ax.text(0, 0, "small", fontsize=7.5)
    assert 'data-font="7.5"' in figures.show(fig, "a").html


def test_samples_and_tables_to_the_letter():
    shown = figures.samples({"<x>": ["ab", "ba"], "y": ["c"]}, "a", "a & b")
    assert shown.html == (
        '<figure class="bk-samples bk-short" aria-label="a &amp; b"><div><strong>&lt;x&gt;</strong><ul>'
        "<li><code><u><b>a</b></u>b</code></li><li><code>b<u><b>a</b></u></code></li></ul></div>"
        "<div><strong>y</strong><ul><li><code>c</code></li></ul></div></figure>"
    )
    assert "<code>ab</code>" in figures.samples({"x": ["ab"]}, "", "nothing is marked").html
    for size, short in ((12, True), (13, False)):  # of the longest string: columns narrow enough for three on a phone
        assert ("bk-short" in figures.samples({"x": ["a", "b" * size], "y": ["c"]}, "", "a").html) == short
    shown = figures.table({"x": ["a<", "ba"], "wide": ["c", "d"]}, "a & b")
    assert shown.html == (
        '<div class="bk-table"><table class="table"><caption>a &amp; b</caption><thead><tr><th scope="col">x</th>'
        '<th scope="col">wide</th></tr></thead><tbody><tr><td>a&lt;</td><td>c</td></tr>'
        "<tr><td>ba</td><td>d</td></tr></tbody></table></div>"
    )
    assert shown.text == "[table] a & b\nx   wide\na<  c\nba  d"


def test_progress_shows_paragraphs(notebook, slow):
    list(figures.progress(range(3), "a < b"))
    assert [x.html for x in notebook.shown] == [
        f'<p class="bk-progress">a &lt; b{text}</p>' for text in ("", ": 2 of 3", "")
    ]


def test_progress_waits_for_half_a_second(notebook, monkeypatch):
    ticks = iter([0, 0.5, 0.75, 0.75, 1.25, 1.5, 1.5])  # at the start, before each item, and when something was shown
    monkeypatch.setattr(figures.time, "monotonic", lambda: next(ticks))
    list(figures.progress("abcd", "a"))
    assert [x.text for x in notebook.shown[1:-1]] == ["a: 1 of 4", "a: 3 of 4"]


def test_blank_labels_and_names():
    with pytest.raises(ValueError, match="^label must not be empty, got ' '$"):
        figures.progress([1], " ")
    for alt in ("", "\n"):
        with pytest.raises(ValueError, match=f"got {alt!r}$".replace("\\", r"\\")):
            figures.show(drawn(), alt)
