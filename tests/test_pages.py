"""Names in figures: drawn as matplotlib draws a text in which it looks for no formula, and left out of no legend."""

import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
from numpy.typing import NDArray

from engram.pages import as_typed, png_of

NAMES = ["plain", "_hidden", "__", "$x^2$", "a$b", "$$", r"\$x\$", "_$a$", "50 %"]


def drawn(text: str, parse_math: bool) -> NDArray[np.float64]:
    figure = plt.figure(figsize=(3, 1))
    figure.text(0.1, 0.4, text, parse_math=parse_math)
    return plt.imread(io.BytesIO(png_of(figure, 100)))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_drawn_as_it_was_typed(name: str) -> None:
    expected = drawn(name, parse_math=False)
    assert expected.min() < 0.5  # something was
    np.testing.assert_array_equal(drawn(as_typed(name), parse_math=True), expected)


def test_a_legend_leaves_no_name_out() -> None:
    figure, ax = plt.subplots()
    for name in NAMES:
        ax.plot([0, 1], label=as_typed(name))
    assert [text.get_text() for text in ax.legend().get_texts()] == [as_typed(name) for name in NAMES]
    plt.close(figure)
