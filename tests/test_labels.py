"""Class names and numbers: what cannot be meant is an error, what may be is a sentence that names it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from video_convmae.config import AugmentationConfig, LabelledDataConfig
from video_convmae.data.labels import check_labels, class_names, count_labels, label_notes, path_notes
from video_convmae.data.records import ListError, Record, Records, read_list
from video_convmae.lists import count_classes


def labelled(*labels: int | None) -> Records:
    return Records([Record(f"{i}.mp4", label) for i, label in enumerate(labels)])


def test_the_number_of_classes_is_the_largest_label_and_one() -> None:
    assert count_labels(labelled(0, 2, 1)) == 3
    assert count_labels(labelled(0, 1), labelled(0, 1, 2)) == 3
    assert count_labels(labelled(*range(40), 399)) == 400  # a part of Kinetics-400


@pytest.mark.parametrize("label", [2_000_000_000, 2**31 - 1, 1000, 101])
def test_a_label_far_beyond_the_others_builds_no_head(tmp_path: Path, label: int) -> None:
    path = tmp_path / "list.txt"
    path.write_text(f"a.mp4 0\nb.mp4 1\nc.mp4 {label}\n")
    data = LabelledDataConfig(train=str(path), augmentation=AugmentationConfig(flip=False))
    with pytest.raises(ListError, match=rf"c\.mp4 has the label {label}, and the list has 3 labels, 0 to 1, {label}"):
        count_classes(data, read_list(path))


@pytest.mark.parametrize("label", [2**31, 10**30])
def test_a_label_that_no_integer_holds_is_an_error_with_its_line(tmp_path: Path, label: int) -> None:
    (tmp_path / "list.txt").write_text(f"a.mp4 0\nb.mp4 {label}\n")
    with pytest.raises(ListError, match=f"line 2: the label is {label}"):
        read_list(tmp_path / "list.txt")


def test_bounds_are_those_of_the_names(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("a.mp4 1\nb.mp4 2\nc.mp4 3\n")
    (tmp_path / "list.labels.txt").write_text("run\nwalk\njump\n")
    data = LabelledDataConfig(train=str(path), augmentation=AugmentationConfig(flip=False))
    with pytest.raises(ListError, match=r"label 3; expected 0 to 2.*the list counts from 1: subtract 1"):
        count_classes(data, read_list(path))
    with pytest.raises(ListError, match=r"label 7; expected 0 to 2[^;]*$"):
        check_labels(labelled(0, 7), 3)


@pytest.mark.parametrize(
    ("labels", "names", "notes"),
    [
        ((0, 1, 2), None, []),
        ((1, 2, 3), None, ["labels begin at 1"]),
        ((1, 2, 5), None, ["labels begin at 1", "2 of the 6 classes have no record in the list: 3 to 4"]),
        ((0, 1, 4, 6), None, ["3 of the 7 classes have no record in the list: 2 to 3, 5"]),
        ((0, 2), ["run", "walk", "jump"], ["1 of the 3 classes have no record in the list: 1 ('walk')"]),
        ((None, None), ["run", "walk"], []),
    ],
)
def test_gaps_are_named(labels: tuple[int | None, ...], names: list[str] | None, notes: list[str]) -> None:
    count = len(names) if names else count_labels(labelled(*labels))
    found = label_notes(count, names, labelled(*labels))
    assert len(found) == len(notes)
    assert all(note in each for note, each in zip(notes, found))


def test_classes_that_only_the_validation_list_has_are_named() -> None:
    (gap, unseen) = label_notes(4, None, labelled(0, 1, 2), labelled(1, 2, 3))  # counted from 0, and from 1
    assert "1 of the 4 classes have no record in the list: 3" in gap
    assert "1 classes have records in the validation list and none in the training list: 3" in unseen


@pytest.mark.parametrize("name", ["list.txt", "list.csv", "k400.train", "list"])
def test_names_lie_beside_a_list_of_any_name(tmp_path: Path, name: str) -> None:
    from video_convmae.data.labels import labels_file
    from video_convmae.prepare.lists import write_list

    write_list(tmp_path / name, [("a.mp4", 0)], ["run"])
    write_list(tmp_path / "k400.val", [("a.mp4", 0)], ["walk"])
    assert class_names(tmp_path / name) == ["run"]
    assert labels_file(tmp_path / name).parent == tmp_path


def test_files_of_names(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes("run\n\u2028walk\x85 on\ncaf".encode() + b"\xe9\n\n\n")  # line feeds alone separate names
    assert class_names("", labels=path) == ["run", "walk\x85 on", "café"]
    path.write_text("run\n\nwalk\n")
    with pytest.raises(ListError, match="line 2 is empty"):
        class_names("", labels=path)
    path = tmp_path / "names.json"
    for names in ({"walk": "1", "run": "0"}, ["run", "walk"]):
        path.write_text(json.dumps(names))
        assert class_names("", labels=path) == ["run", "walk"]
    for names in ({"walk": 2, "run": 0}, "run", 5, {}, {"run": "a"}):
        path.write_text(json.dumps(names))
        with pytest.raises(ListError, match=r"names\.json"):
            class_names("", labels=path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            "# my classes\ncat\ndog",
            r"names.txt, line 1 is '# my classes'; expected the name of class 0: remove the line",
        ),
        (
            "1 dog\n0 cat",
            r"names.txt: the numbers before its names are in another order .*'1 dog'; expected class n in",
        ),
        ("2,dog\n3,eel\n1,cat", r"the numbers before its names are in another order"),
    ],
)
def test_names_that_would_shift_classes_are_errors(tmp_path: Path, lines: str, message: str) -> None:
    path = tmp_path / "names.txt"
    path.write_text(lines + "\n")
    with pytest.raises(ListError, match=message):
        class_names("", labels=path)


@pytest.mark.parametrize(
    "names",
    [
        ["3 on 3 basketball", "400 m run", "2 player chess"],  # no numbering
        ["1 dog", "2 cat"],  # UCF101's classInd.txt
        ["1 a", "10 j", "2 b", "3 c", "4 d", "5 e", "6 f", "7 g", "8 h", "9 i"],  # class folders, sorted by name
        ["7", "3", "5"],
        ["2 fingers"],
        ["cat", "# dog"],
    ],
)
def test_names_with_numbers_are_names(tmp_path: Path, names: list[str]) -> None:
    (tmp_path / "names.txt").write_text("\n".join(names))
    assert class_names("", labels=tmp_path / "names.txt") == names


@pytest.mark.parametrize(("name", "count"), [("kinetics400", 400), ("something_something_v2", 174)])
def test_shipped_names_are_taken(name: str, count: int) -> None:
    assert len(class_names("", labels=name) or []) == count


def test_names_of_class_folders_are_as_many(tmp_path: Path) -> None:
    for name in ("n01", "n02"):
        (tmp_path / "train" / name).mkdir(parents=True)
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    assert class_names("train", tmp_path, tmp_path / "names.txt") == ["cat", "dog"]
    (tmp_path / "train" / "n00").mkdir()
    with pytest.raises(ListError, match=r"names 2 classes and .*train holds 3 class folders"):
        class_names("train", tmp_path, tmp_path / "names.txt")


def test_names_in_another_order_than_the_class_folders_are_an_error(tmp_path: Path) -> None:
    for name in ("apple", "zebra"):
        (tmp_path / "train" / name).mkdir(parents=True)
    (tmp_path / "names.txt").write_text("zebra\napple\n")
    with pytest.raises(ListError, match="in another order, and folders are numbered by name"):
        class_names("train", tmp_path, tmp_path / "names.txt")


def test_files_of_both_lists_and_files_named_twice_are_said() -> None:
    records = labelled(0, 1, 0)
    assert path_notes(records, Records([Record("9.mp4", 0)])) == []
    (note,) = path_notes(records, labelled(0, 1, 0, 1))
    assert note.startswith("3 of the 4 records of the validation list are in the training list, too")
    (note,) = path_notes(Records([*records, Record("1.mp4", 1)]))
    assert note.startswith("1 records of the training list are files")


def test_a_file_of_two_classes_in_two_lines_is_said() -> None:
    records = Records([Record("a.mp4", 0), Record("b.mp4", 0), Record("a.mp4", 2), Record("a.mp4", 1)])
    torn, _ = path_notes(records)
    assert torn.startswith("1 files have different classes in different lines, the first a.mp4")
    assert torn.endswith("'a.mp4 0,1,2'")


@pytest.mark.parametrize("name", ["TurnLeft", "Turning Hand Counterclockwise", "move_right", "swipe rightwards"])
def test_names_of_directions_forbid_flips(tmp_path: Path, name: str) -> None:
    (tmp_path / "names.txt").write_text(f"brightness\n{name}\n")
    data = LabelledDataConfig(
        train="list.txt", labels=str(tmp_path / "names.txt"), augmentation=AugmentationConfig(flip=True)
    )
    with pytest.raises(ListError, match=f"the first '{name}': a flipped clip would have a wrong label"):
        count_classes(data, labelled(0, 1))
