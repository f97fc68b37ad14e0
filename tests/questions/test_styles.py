"""Styles: examples reworded, with their ids, and the label turned only where one is negated."""

import pandas as pd
import pytest

from dlk_utils.errors import DataError
from dlk_utils.questions.styles import STYLES, restyled


@pytest.fixture
def examples() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "example_id": ["a", "b", "c"],
            "kind": ["claim", "claim", "review"],
            "split": ["test"] * 3,
            "text": ["The city of Osaka is in Japan.", "Nothing here.", "A fine film, is it?"],
            "label": [1, 0, 1],
        }
    )


def test_negating_turns_the_label_and_leaves_out_what_cannot_be_negated(examples):
    negated = restyled(examples, "negated")
    assert negated.text.tolist() == ["The city of Osaka is not in Japan."]
    assert negated.label.tolist() == [0] and negated.example_id.tolist() == ["a"]
    assert restyled(negated, "negated").empty


@pytest.mark.parametrize("style", sorted(set(STYLES) - {"negated"}))
def test_any_other_style_changes_every_text_and_nothing_else(examples, style):
    reworded = restyled(examples, style)
    assert (reworded.text != examples.text).all()
    pd.testing.assert_frame_equal(reworded.drop(columns="text"), examples.drop(columns="text"))


def test_an_unknown_style_is_answered_with_those_there_are(examples):
    with pytest.raises(DataError, match=f"expected one of {', '.join(STYLES)}"):
        restyled(examples, "sung")
