"""CSV files of labels: what they are taken for, and a line for each mistake."""

import numpy as np
import pytest

from lmim_jax.data import label_file
from lmim_jax.utils.errors import UserError


def read(folder, text, kind="auto"):
    """A file with this text, read."""
    path = folder / "labels.csv"
    path.write_text(text)
    return label_file.read(path, kind)


def test_classes_by_name_or_number(tmp_path):
    found = read(tmp_path, "image,label\na.png,dog\nb/c.png,cat\n\nd.png,dog\n")
    assert (found.kind, found.names) == ("classes", ("cat", "dog"))
    np.testing.assert_array_equal(found.classes, [1, 0, 1])
    assert found.lines == (2, 3, 5)
    found = read(tmp_path, "image;label\na;10\nb;9\nc;2\n")  # as numbers, not as text
    assert found.names == ("2", "9", "10")
    np.testing.assert_array_equal(found.classes, [2, 1, 0])


def test_columns_of_0_and_1_and_of_numbers(tmp_path):
    found = read(tmp_path, "image,cat,dog\na,1,0\nb,1,1\n")
    assert (found.kind, found.names) == ("multilabel", ("cat", "dog"))
    np.testing.assert_array_equal(found.values, [[1, 0], [1, 1]])
    found = read(tmp_path, "\ufeffimage\tage\tsplit\r\na\t1.5\ttrain\r\nb\t-2e1\ttest\r\n")
    assert (found.kind, found.names, found.splits) == ("regression", ("age",), ("train", "test"))
    np.testing.assert_array_equal(found.values, [[1.5], [-20]])
    assert found.select([1]).images == ("b",)


def test_the_kind_can_be_given(tmp_path):
    text = "image,label\na,1\nb,0\n"
    assert read(tmp_path, text).kind == "classes"
    assert read(tmp_path, text, "regression").values.tolist() == [[1], [0]]
    assert read(tmp_path, text, "multilabel").kind == "multilabel"
    assert read(tmp_path, "image,count\na,1\nb,0\n", "classes").names == ("0", "1")
    assert read(tmp_path, text, "list").names == ()
    assert read(tmp_path, "image\na\n").kind == "list"
    with pytest.raises(UserError, match="labels_kind='class' must be one of: auto"):
        read(tmp_path, text, "class")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: the header needs a column named image"),
        ("a.png,cat\n", "line 1: the header needs a column named image.*'a.png,cat'"),
        ("image,label\n", "no rows"),
        ("image,label\na,x\nb\n", "line 3: 1 cells, but the header has 2"),
        ("image,label\na,x\nb, \n", "line 3: the cell of column label is empty"),
        ("image,label\na,x\nb,y\na,x\n", "line 4: 'a' is already in line 2"),
        ("image,x,y\na,1.5,2\nb,1,one\n", "line 3: 'one' in column y is not a number"),
        ("image,x\na,1.5\nb,nan\n", "line 3: 'nan' in column x is not a number"),
        ("image,animal\na,cat\nb,dog\n", "column animal holds no numbers; name it label"),
        ("image,x,x\na,1,1\n", "line 1: two columns are named 'x'"),
        ('image,label\na,"x\n', "line 2: unexpected end of data"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as raised:
        read(tmp_path, text)
    assert "labels.csv" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_kind_that_does_not_fit(tmp_path):
    with pytest.raises(UserError, match="line 3: '2' in column y is neither 0 nor 1"):
        read(tmp_path, "image,x,y\na,1,1\nb,1,2\n", "multilabel")
    with pytest.raises(UserError, match="classes need one column beside image and split, not 2"):
        read(tmp_path, "image,x,y\na,1,1\nb,1,2\n", "classes")
    with pytest.raises(UserError, match="no column of labels"):
        read(tmp_path, "image,split\na,train\n", "regression")
    with pytest.raises(UserError, match="cannot be read as a CSV file"):
        label_file.read(tmp_path / "none.csv")
