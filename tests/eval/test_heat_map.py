from html.parser import HTMLParser

from eval.shared.heat_map import Shades, Text, heat_map, side_by_side, visible


class _Seen(HTMLParser):
    """What a reader's browser makes of a page: elements, their attributes, and the text outside styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._in_style = "", False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._in_style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        if not self._in_style:
            self.text += data


PIECES = ["<script>", 'alert("1")', "</script>", " &amp;", "\n\t'><u>", "é"]


def _map(*choices: Shades) -> _Seen:
    text = Text("a <heading>", PIECES, [f"</span> \" ' {piece}" for piece in PIECES])
    return _Seen(side_by_side([heat_map("k", "<model>", choices, [text])]))


def test_text_that_looks_like_html_is_shown_and_not_run() -> None:
    seen = _map(Shades("<s>", 0.0, 1.0, [[0.0] * len(PIECES)]))
    assert {tag for tag, _ in seen.elements}.isdisjoint({"script", "u", "model", "heading", "s"})
    spans = [attributes for tag, attributes in seen.elements if tag == "span"]
    titles = [(attributes["title"] or "").split("\n")[0] for attributes in spans]
    assert titles == [f"</span> \" ' {piece}".split("\n")[0] for piece in PIECES]
    assert '<script>alert("1")</script>·&amp;⏎\n⇥\t\'><u>é' in seen.text
    assert {"style", "title"} == {name for attributes in spans for name in attributes}


def test_shades_run_from_the_low_value_to_the_high_one_for_each_choice() -> None:
    first = Shades("one", 0.2, 0.6, [[0.0, 0.2, 0.3, 0.4, 0.6, 0.9]])
    other = Shades("two", 0.5, 0.5, [[0.5] * len(PIECES)])
    seen = _map(first, other)
    styles = [attributes["style"] for tag, attributes in seen.elements if tag == "span"]
    assert styles == [f"--s0:{shade};--s1:0" for shade in (0, 0, 25, 50, 100, 100)]
    titles = [attributes["title"] for tag, attributes in seen.elements if tag == "span"]
    assert str(titles[2]).endswith("one: 0.300\ntwo: 0.500")


def test_one_choice_is_picked_at_first_and_each_has_its_button() -> None:
    buttons = [a for tag, a in _map(*(Shades(n, 0, 1, [[0] * 6]) for n in "abc")).elements if tag == "input"]
    assert [button["id"] for button in buttons] == ["k-0", "k-1", "k-2"]
    assert ["checked" in button for button in buttons] == [True, False, False]


def test_white_space_and_control_characters_are_visible() -> None:
    shown = _Seen(visible("a b\n\t\r\x00\x1b\x7f")).text
    assert shown == "a·b⏎\n⇥\t␍␀␛␡"
