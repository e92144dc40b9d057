"""What the documents say runs, runs; what they point to is there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from clips import encode

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / name
    for name in ("README.md", "PRETRAIN.md", "FINETUNE.md", "VIDEO.md", "data_lists/README.md", "docs/PERFORMANCE.md")
]


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_the_readmes_python_runs() -> None:
    program, _ = blocks(ROOT / "README.md", "python")
    assert len([line for line in program.splitlines() if line.strip()]) <= 20
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, check=True, timeout=300)


SHORT = (
    "--model.size tiny --model.image_size 32 --model.num_frames 4 --train.epochs 1 --train.batch_size 4 --device cpu "
    "--data.workers 0"
)


def test_your_own_videos(tmp_path: Path) -> None:
    """The page's commands one after another on encoded files, one of them bad; runs are made small at their end."""
    for name in ("tools", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    for label, name in enumerate(("pouring", "stirring")):
        (tmp_path / "videos" / name).mkdir(parents=True)
        for i in range(6):
            encode(tmp_path / "videos" / name / f"{i}.mp4", 24 + i, seed=label)
    (tmp_path / "videos" / "pouring" / "bad.mp4").write_text("no video")
    page = (ROOT / "VIDEO.md").read_text().split("## Your own videos in ten minutes")[1].split("\n## ")[0]
    commands = "".join(re.findall(r"^```bash\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL))
    python = f"""
    python() {{
        case $1 in
            *pretrain.py) {sys.executable} "$@" {SHORT} ;;
            *finetune.py) {sys.executable} "$@" {SHORT} --test.segments 2 --test.crops 1 ;;
            *evaluate.py) {sys.executable} "$@" --workers 0 ;;
            *predict.py) {sys.executable} "$@" || test $? = 1 ;;  # it names the bad file, and has done the others
            *) {sys.executable} "$@" ;;
        esac
    }}
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = ["bash", "-euo", "pipefail", "-c", python + commands]
    result = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    test = tmp_path / "runs" / "own" / "test"
    metrics = json.loads((test / "metrics.json").read_text())
    assert metrics["scored"] + metrics["failed"] == len((tmp_path / "lists" / "val.txt").read_text().splitlines())
    for path in (test / "confusion.png", test / "classes.png", tmp_path / "runs" / "own" / "features.png"):
        assert path.stat().st_size > 0
    assert "stirring" in result.stdout
    assert (tmp_path / "lists" / "checked" / "clean.labels.txt").read_text() == "pouring\nstirring\n"

    (tmp_path / "clip.mp4").write_bytes((tmp_path / "videos" / "stirring" / "1.mp4").read_bytes())
    programs = {blocks(ROOT / "README.md", "python")[1], *blocks(ROOT / "VIDEO.md", "python")}
    for program in programs:
        run = [sys.executable, "-c", program]
        said = subprocess.run(
            run, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True, timeout=100
        )
        assert {line.split()[1] for line in said.stdout.splitlines()} == {"pouring", "stirring"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_files_are_there(document: Path) -> None:
    text = document.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (document.parent / link).exists(), link
    for path in re.findall(r"(?:configs|tools|tests)/[\w/]+\.(?:py|yaml)", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_names_a_tool_that_has_those_options(document: Path) -> None:
    """Each `python tools/X.py` line of the document: the tool answers --help, and knows every option of the line."""
    commands = re.findall(r"(?:python|torchrun[^\n]*?) (tools/\w+\.py)((?:[^\n`]|\\\n)*)", document.read_text())
    assert commands or document.name == "README.md"
    for tool in sorted({tool for tool, _ in commands}):
        lines = [line for name, line in commands if name == tool]
        subcommands = {word for line in lines for word in line.split()[:1] if re.fullmatch(r"[a-z0-9]+", word)}
        options = {option for line in lines for option in re.findall(r"(--[a-z_.-]+)", line)}
        text = help_of(tool) + "".join(help_of(tool, subcommand) for subcommand in sorted(subcommands))
        for option in options - {"--help"}:
            assert option in text, f"{tool} has no {option}"


def help_of(tool: str, *subcommand: str) -> str:
    configured = tool.endswith(("pretrain.py", "finetune.py", "evaluate.py", "extract_features.py"))
    result = subprocess.run(
        [sys.executable, str(ROOT / tool), *subcommand, "--help-all" if configured else "--help"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0 or subcommand, result.stderr
    return result.stdout if result.returncode == 0 else ""


def test_make_has_the_commands_of_the_readme() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([\w-]+)", (ROOT / "README.md").read_text()):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.slow
def test_the_demo_learns(tmp_path: Path) -> None:
    """`make demo` without its installation: about five minutes."""
    command = [sys.executable, "-m", "tools.study.demo", f"--output={tmp_path}"]
    subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, check=True, timeout=1800)
    for name in ("metrics.json", "loss.png", "reconstruction.png", "reconstruction.mp4"):
        assert (tmp_path / name).stat().st_size > 0
