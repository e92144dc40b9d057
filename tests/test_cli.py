"""The program `video-convmae`: its commands, help, errors and exit codes, and the modules that help imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest

import video_convmae
from video_convmae import cli
from video_convmae.cli.parser import CommandLine, fields_of, merge, parse, run_command, type_name
from video_convmae.config import PretrainConfig
from video_convmae.errors import UserError
from video_convmae.shipped import find_config, find_labels

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
HEAVY = {"torch", "timm", "torchvision", "av", "decord", "matplotlib", "transformers"}


@dataclass(frozen=True)
class Speed:
    """Speed."""

    rate: float | None = None
    """Learning rate."""
    steps: tuple[int, ...] = (1, 2)
    """Steps."""


@dataclass(frozen=True)
class Faster(Speed):
    """Speed of a subclass."""

    kind: Literal["a", "b", "c"] = "a"
    """Kind of speed."""


@dataclass(frozen=True)
class TripConfig:
    """A trip."""

    output: str
    """Folder to write."""
    speed: Faster = field(default_factory=Faster)
    """Its speed."""
    plot: bool = False
    """Draw it."""


def program(*arguments: str, **options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "video_convmae", *arguments]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, **options)


def error_of(capsys: pytest.CaptureFixture) -> str:
    """The only line on standard error."""
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_imports_nothing_heavy(command: str) -> None:
    """Counted in a process of its own; `--help` ends with 0 and names the command as a user types it."""
    code = f"""
import json, sys
from video_convmae.cli import main
sys.argv = ["video-convmae", {command!r}, "--help"]
try:
    code = main()
except SystemExit as end:
    code = end.code or 0
print(json.dumps([code, sorted({{name.split(".")[0] for name in sys.modules}})]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, check=True, capture_output=True, text=True, timeout=120
    )
    *help_lines, last = done.stdout.splitlines()
    code, modules = json.loads(last)
    assert code == 0
    assert not HEAVY & set(modules)
    assert help_lines[0].startswith(f"usage: video-convmae {command} ")


def test_help_of_the_program_has_a_line_for_each_command() -> None:
    done = program("--help")
    assert done.returncode == 0
    for name, text in cli.COMMANDS.items():
        assert f"  {name} " in done.stdout
        assert text in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()) <= 100


def test_every_command_has_a_module_with_main_and_a_launcher() -> None:
    launched = {path.read_text().split('main("')[1].split('"')[0] for path in (ROOT / "tools").glob("*.py")}
    assert launched == set(cli.COMMANDS) - {"inflate"}
    for name in cli.COMMANDS:
        source = (ROOT / "video_convmae" / "cli" / f"{name.replace('-', '_')}.py").read_text()
        assert "def main(" in source or "import main" in source


def test_version_is_the_packages() -> None:
    assert program("--version").stdout == f"video-convmae {video_convmae.__version__}\n"


@pytest.mark.parametrize(
    ("name", "hint"), [("pretrian", "did you mean pretrain?"), ("zzz", "video-convmae --help lists the commands")]
)
def test_an_unknown_command_is_named_with_a_suggestion(name: str, hint: str) -> None:
    done = program(name, "--x")
    assert done.returncode == 2
    assert done.stderr == f"video-convmae: error: there is no command {name!r}; {hint}\n"


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (UserError("data.train is x;\n  expected y"), "data.train is x; expected y"),
        (ValueError("cannot reshape"), "cannot reshape (--debug shows where)"),
        (
            FileNotFoundError(2, "No such file or directory", "a b.mp4"),
            "a b.mp4: No such file or directory; check the path",
        ),
        (ImportError("submitit is missing"), "submitit is missing (--debug shows where)"),
    ],
)
def test_an_expected_error_is_one_line(
    error: Exception, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: SimpleNamespace(main=raiser(error)))
    assert cli.run("make-list", ["--x"]) == 1
    assert error_of(capsys) == f"video-convmae make-list: error: {text}"
    with pytest.raises(type(error)):
        cli.run("make-list", ["--x", "--debug"])
    assert cli.run("submit", ["--x", "--", "pretrain", "--debug"]) == 1


def raiser(error: BaseException) -> object:
    def main(arguments: Sequence[str]) -> None:
        assert "--debug" not in arguments or "--" in arguments
        raise error

    return main


def test_an_unexpected_error_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: SimpleNamespace(main=raiser(KeyError("x"))))
    with pytest.raises(KeyError):
        cli.run("make-list", [])
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: SimpleNamespace(main=raiser(KeyboardInterrupt())))
    assert cli.run("make-list", []) == 130
    assert error_of(capsys) == "video-convmae make-list: interrupted"


def test_a_missing_list_is_one_line_and_with_debug_a_traceback(tmp_path: Path) -> None:
    arguments = ["pretrain", "--config", "debug/pretrain", "--data.train=none.txt", "--device=cpu", "--output=run"]
    done = program(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("video-convmae pretrain: error: cannot read the list none.txt: ")
    assert "Traceback" not in done.stderr
    assert "Traceback" in program(*arguments, "--debug", cwd=tmp_path).stderr


# ---- configurations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "arguments", "kept"),
    [
        ("show-features", ["run", "clip.png", "--output=clip.png"], "clip.png"),
        ("show-features", ["run", "clip.png", "--output=link/clip.png"], "clip.png"),
        ("reconstruct", ["run", "reconstruction.mp4", "--output=."], "reconstruction.mp4"),
        ("evaluate", ["--weights=run", "--output=run", "--device=cpu"], "run/metrics.json"),
        ("features", ["--weights=run", "--list=list.txt", "--output=run", "--device=cpu"], "run/bad_records.jsonl"),
    ],
)
def test_no_command_writes_over_what_it_reads(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    command: str,
    arguments: list[str],
    kept: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("run/config.yaml", "list.txt", kept):
        (tmp_path / name).write_text("mine")
    assert cli.run(command, arguments) == 1
    assert "would be" in capsys.readouterr().err
    assert (tmp_path / kept).read_text() == "mine"


def test_names_that_no_terminal_can_show_are_printed(tmp_path: Path) -> None:
    folder = os.fsdecode(b"caf\xe9")
    (tmp_path / folder / "a").mkdir(parents=True)
    (tmp_path / folder / "a" / "x.mp4").touch()
    for encoding in ("utf-8", "ascii"):
        command = [sys.executable, "-m", "video_convmae", "make-list", "folders", "--root", folder, "--out", "l.txt"]
        done = subprocess.run(
            command, env=ENVIRONMENT | {"PYTHONIOENCODING": encoding}, cwd=tmp_path, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert rb"0 files under caf\udce9 were not listed" in done.stdout


def test_fields_and_edits() -> None:
    assert parse(TripConfig, ["--output=x"]) == TripConfig("x")
    given = ["--output", "x", "--plot", "--speed.rate", "1e-3", "--speed.steps=[4,5,6]", "--speed.kind=b"]
    assert parse(TripConfig, given) == TripConfig("x", Faster(1e-3, (4, 5, 6), "b"), True)
    assert parse(TripConfig, ["--plot=false", "--output=x"]) == TripConfig("x")


def test_fields_that_follow_from_others_do_so_after_edits() -> None:
    """A default configuration holds the numbers of the default size; another size must not inherit them."""
    config = parse(PretrainConfig, ["--config=debug/pretrain", "--model.num_frames=1", "--model.size=small"])
    assert (config.model.widths, config.model.tubelet, config.model.target) == ((128, 256, 384), 1, "patch")


def test_later_files_replace_earlier_and_edits_replace_files(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("output: a\nspeed: {rate: 1e-3, kind: b}\n")
    (tmp_path / "b.yaml").write_text("output: b\nspeed: {kind: c}\n")
    given = ["--speed.rate=2", f"--config={tmp_path / 'a.yaml'}", "--config", str(tmp_path / "b")]
    assert parse(TripConfig, given) == TripConfig("b", Faster(2.0, kind="c"))
    assert parse(TripConfig, given[1:]) == TripConfig("b", Faster(1e-3, kind="c"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--speed.rates=3"], "there is no field speed.rates; did you mean speed.rate?"),
        (["--speed.rat", "3"], "there is no field speed.rat; did you mean speed.rate?"),
        (["--speed.rat=3"], "there is no field speed.rat; did you mean speed.rate?"),
        (["--out=x"], "there is no field out; did you mean output?"),
        (["--xyz=x"], "there is no field xyz; --help-all lists every field"),
        (["--speed.rate=fast"], "speed.rate is fast; expected number or null (--help-all explains every field)"),
        (["--speed.kind=d"], "speed.kind is d; expected a, b or c (--help-all explains every field)"),
        (["--plot=maybe"], "plot is maybe; expected true or false (--help-all explains every field)"),
        ([], "output must be given: on the command line, or by a --config that has it"),
        (["--config"], "--config needs the name or the path of a configuration"),
    ],
)
def test_mistakes_are_named_in_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    output = ["--output=x"] if arguments else []
    with pytest.raises(SystemExit) as end:
        parse(TripConfig, [*output, *arguments])
    assert end.value.code == 2
    assert error_of(capsys) == f"video-convmae trip: error: {message}"


def test_a_commands_own_options_have_no_abbreviations_and_one_line_for_a_mistake(capsys: pytest.CaptureFixture) -> None:
    parser = CommandLine("make-list", "Lists.")
    parser.add_argument("--output")
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--out=x"])
    assert end.value.code == 2
    assert error_of(capsys) == "video-convmae make-list: error: unrecognized arguments: --out=x"


def test_an_unknown_field_of_a_file_is_named_with_the_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.yaml").write_text("output: a\nspeed: {rat: 1}\n")
    with pytest.raises(SystemExit):
        parse(TripConfig, [f"--config={tmp_path / 'a.yaml'}"])
    assert f"{tmp_path / 'a.yaml'}: there is no field speed.rat; did you mean speed.rate?" in error_of(capsys)


def test_the_whole_configuration_is_printed(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        parse(TripConfig, ["--output=x", "--speed.kind=b", "--print_config"])
    assert not end.value.code
    assert capsys.readouterr().out == (
        "output: x\nspeed:\n  rate: null\n  steps:\n  - 1\n  - 2\n  kind: b\nplot: false\n"
    )


def test_help_is_short_and_complete_on_request(capsys: pytest.CaptureFixture) -> None:
    texts = []
    for option in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as end:
            parse(TripConfig, [option])
        assert not end.value.code
        texts.append(capsys.readouterr().out)
    short, complete = texts
    assert "--speed.rate    Learning rate. (number or null; default null)\n" in short
    assert "--output        Folder to write. (required)\n" in short
    assert "--speed.kind    Kind of speed. (a, b or c; default a)\n" in short
    for name in fields_of(TripConfig):
        assert f"--{name} " in complete


def test_types_are_written_as_a_user_types_values() -> None:
    assert type_name(int | tuple[int, int]) == "whole number or [whole number, whole number]"
    assert type_name(Literal["a"] | None) == "a or null"
    assert type_name(bool | None) == "true, false or null"


def test_run_command_parses_and_runs() -> None:
    seen = []
    assert run_command(TripConfig, seen.append, ["--output=x"]) == 0
    assert seen == [TripConfig("x")]


def test_merging_leaves_its_arguments_as_they_were() -> None:
    base, edits = {"a": {"b": 1, "c": [1, 2]}, "d": 1}, {"a": {"c": [3]}, "d": {"e": 2}}
    assert merge(base, edits) == {"a": {"b": 1, "c": [3]}, "d": {"e": 2}}
    assert base == {"a": {"b": 1, "c": [1, 2]}, "d": 1}


# ---- shipped files --------------------------------------------------------------------------------------------------


def test_shipped_files_are_found_by_name_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("video/pretrain_k400_base_msd", "video/pretrain_k400_base_msd.yaml"):
        assert find_config(name) == ROOT / "configs" / "video" / "pretrain_k400_base_msd.yaml"
    assert len(find_labels("kinetics400").read_text().splitlines()) == 400
    assert len(find_labels("something_something_v2.txt").read_text().splitlines()) == 174
    (tmp_path / "kinetics400.txt").write_text("mine\n")
    assert find_labels("kinetics400").read_text() == "mine\n"  # a file of the user comes first
    with pytest.raises(UserError, match=r"cannot read the class names 'kinetics40': .* did you mean kinetics400\?"):
        find_labels("kinetics40")
