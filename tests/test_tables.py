import pytest

from varfast.tables import text_table


def test_text_table_aligns_each_column_and_ends_lines_at_the_last_letter():
    rows = [("", "images", "name"), ("fid", "5", "a"), ("top5", "1000", "")]
    assert text_table(rows, "<><") == [
        "      images  name",
        "fid        5  a",
        "top5    1000",
    ]


def test_text_table_refuses_lines_of_other_lengths():
    with pytest.raises(ValueError, match="zip"):
        text_table([("a", "b"), ("c",)], "<<")
