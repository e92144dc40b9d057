"""Documentation: its commands and Python blocks run, its options and keys exist, its links and files are there."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from clips import encode

from video_convmae import create_autoencoder
from video_convmae.cli import COMMANDS
from video_convmae.cli import run as run_command
from video_convmae.models.sizes import SIZES
from video_convmae.shipped import find_config, find_labels

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    *(ROOT / f"{name}.md" for name in ("README", "VIDEO", "DETECTION", "SEGMENTATION", "PRETRAIN", "FINETUNE")),
    *(ROOT / f"{name}.md" for name in ("CONTRIBUTING", "CHANGELOG")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "data_lists" / "README.md",
    ROOT / ".github" / "pull_request_template.md",
]
# Commands with --help-all.
CONFIGURED = ("pretrain", "finetune", "train-detection", "train-segmentation", "evaluate", "features")
SUBCOMMANDS = ("make-list", "benchmark")


def document_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=document_name)


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


# Commands


@functools.cache
def options_of(command: str, *subcommand: str) -> set[str]:
    """Return the options in the complete help of a command of video-convmae, or of a module (`tools.study`)."""
    if command.startswith("tools."):
        run = [sys.executable, "-m", command, "--help"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        result = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=120)
        text = result.stdout
    else:
        with redirect_stdout(StringIO()) as output, pytest.raises(SystemExit, match=r"^(0|None)$"):
            sys.exit(run_command(command, [*subcommand, "--help-all" if command in CONFIGURED else "--help"]) or 0)
        text = output.getvalue()
    return set(re.findall(r"(?<![\w-])--[\w.-]*\w", text))


def commands_in(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each command of a page: `video-convmae NAME` or a module (`tools.study.demo`), and its arguments."""
    lines = re.sub(r"\\\n\s*", "", text)
    pattern = r"(?:(?:video-convmae|-m video_convmae) ([a-z][a-z-]*)|python (?:-m )?(tools[./][\w./]+))([^\n`]*)"
    for name, module, rest in re.findall(pattern, lines):
        arguments = re.split(r"\s#|[;)]\s*$", rest)[0]
        own, *others = arguments.split(" -- ")
        yield name or module, shlex.split(own)
        for other in others:  # the command that `submit` submits
            inner, *words = shlex.split(other)
            yield inner, words


def test_commands_are_found_in_a_page() -> None:
    page = """
    torchrun --nproc-per-node 8 -m video_convmae pretrain --config video/a \\
        --output b  # --no
    `video-convmae submit --nodes 4 -- finetune --seed 1` and `python -m tools.study --seeds 5`
    """
    assert list(commands_in(page)) == [
        ("pretrain", ["--config", "video/a", "--output", "b"]),
        ("submit", ["--nodes", "4"]),
        ("finetune", ["--seed", "1"]),
        ("tools.study", ["--seeds", "5"]),
    ]


@each_document
def test_every_command_exists_and_knows_its_options(document: Path) -> None:
    for command, arguments in commands_in(document.read_text("utf-8")):
        options = {word.split("=")[0] for word in arguments if word.startswith("--")} - {"--help", "--help-all"}
        if command.startswith("tools"):
            assert command.startswith("tools."), f"name {command} as a command of video-convmae or as a module"
            known = options_of(command)
        elif command in COMMANDS:
            is_subcommand = command in SUBCOMMANDS and arguments and arguments[0].isalnum()
            known = options_of(command, *arguments[:1] if is_subcommand else ())
        else:
            assert command in ("is", "cannot"), f"there is no command {command}"  # prose after the program's name
            continue
        assert options <= known | {"--debug"}, f"{command} has no {options - known}"
        for option, find in (("--config", find_config), ("--data.labels", find_labels)):
            for value in [arguments[i + 1] for i, word in enumerate(arguments[:-1]) if word == option]:
                assert value in ("...", "null") or find(value)


@each_document
def test_every_configuration_and_key_exists(document: Path) -> None:
    text = document.read_text("utf-8")
    known = set().union(*(options_of(command) for command in CONFIGURED))
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    part = r"(?:model|mask|probe|data|optim|train|init|log|validate|test|mixing|sweep)"
    for key in re.findall(rf"(?<![\w./])(?:--)?({part}\.[a-z]\w*(?:\.\w+)*)", prose):
        is_file = key.rsplit(".", 1)[1] in ("txt", "md", "py", "safetensors", "csv", "json", "jsonl")
        is_code = key.startswith(("model.encode", "model.grid"))
        was_renamed = document.name == "CHANGELOG.md" and f"(was `{key}`)" in " ".join(text.split())
        exists = f"--{key}" in known or any(option.startswith(f"--{key}.") for option in known)
        assert is_file or is_code or was_renamed or exists, f"there is no key {key}"
    for name in re.findall(r"`((?:debug|image|video|detection|segmentation)/\w+)`", text):
        assert find_config(name)
    for name in re.findall(r"`((?:finetune|pretrain|probe)_(?!knn_top1|linear_top1|rank|std)\w+)`", text):
        raise AssertionError(f"write {name} with its folder, as --config takes it")


# Links, files, form


def anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", document.read_text("utf-8"), flags=re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_links_and_files_are_there(document: Path) -> None:
    text = document.read_text("utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if link.startswith("http"):
            continue
        target = document.parent / path if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"
    folders, suffixes = "configs|tools|tests|video_convmae|docs", "py|yaml|md|json|png"
    for path in re.findall(rf"(?<![\w/])(?:{folders})/[\w/]+\.(?:{suffixes})", text):
        assert (ROOT / path).exists(), path


@each_document
def test_lines_are_at_most_120_columns(document: Path) -> None:
    for number, line in enumerate(document.read_text("utf-8").splitlines(), start=1):
        assert len(line) <= 120 or line.startswith(("|", "![")), f"{document.name}:{number} has {len(line)} columns"


def test_every_page_is_reached_from_the_readme() -> None:
    linked = re.findall(r"\]\(([^)#\s]+)", (ROOT / "README.md").read_text("utf-8"))
    for page in [*(ROOT / "docs").glob("*.md"), *ROOT.glob("[A-Z]*.md")]:
        assert str(page.relative_to(ROOT)) in linked or page.name == "README.md", page.name


def test_nothing_points_outside_the_repository() -> None:
    """No file names a page that is not in the repository, or an address or host of a package registry."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if names.returncode:
        pytest.skip("not a clone: git ls-files fails")
    outside = re.compile("DESIGN" + r"\.md|INTERFACES" + r"\.md|" + "pypi" + r"\.org|pythonhosted" + r"\.org")
    for name in names.stdout.splitlines():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".cff", ".json", "") and path.is_file():
            assert not outside.search(path.read_text("utf-8", errors="replace")), name


def test_make_has_the_commands_of_the_documents() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for document in DOCUMENTS:
        for target in re.findall(r"(?:`|^)make ([a-z.][\w./-]+)(?=`|  | &&)", document.read_text("utf-8"), flags=re.M):
            name = target.replace(".venv", "$(VENV)")
            assert re.search(rf"^{re.escape(name)}:", makefile, flags=re.MULTILINE), target


# Numbers


def zoo_rows() -> list[list[str]]:
    """Return the cells of each row of the model zoo after the kind of the table, video or image."""
    zoo = (ROOT / "README.md").read_text("utf-8").split("## Model zoo")[1].split("\n## ")[0]
    video, image = zoo.split("**Image**")
    return [
        [kind, *(cell.strip() for cell in row.strip("| ").split("|"))]
        for kind, table in (("video", video), ("image", image))
        for row in re.findall(r"^\| `.*$", table, re.M)
    ]


@pytest.mark.parametrize("row", zoo_rows(), ids=lambda row: "-".join(row[:2]).replace("`", ""))
def test_the_model_zoo_has_the_models_numbers(row: list[str]) -> None:
    """Parameters and multiply-adds of the tables are those of the code; empty cells give a reason."""
    size, *msd = row[1].replace("`", "").split(", ")
    frames, visible = {"video": (16, 160), "image": (1, 49)}[row[0]]
    with torch.device("meta"):
        packed = create_autoencoder(size, num_frames=frames, msd=bool(msd))
        dense = create_autoencoder(size, num_frames=frames, msd=bool(msd), implementation="dense")
    model, encoder = (sum(p.numel() for p in module.parameters()) / 1e6 for module in (packed, packed.encoder))
    work = [sum(each.multiply_adds(visible).values()) / 1e9 for each in (packed, dense)]
    assert row[2:4] == [f"{model:.1f} ({encoder:.1f})", f"{work[0]:.1f} / {work[1]:.1f}"]
    assert len(row) == 8
    assert all(row)


def test_the_model_zoo_has_every_size_and_only_numbers_of_the_results() -> None:
    sizes = [f"`{size}`, MSD" for size in SIZES if "vit" not in size]
    assert [row[1] for row in zoo_rows() if row[0] == "image"] == sizes
    assert [row[1] for row in zoo_rows() if row[0] == "video" and row[1] != "`base`"] == sizes
    published = (ROOT / "docs" / "results.md").read_text("utf-8") + (ROOT / "FINETUNE.md").read_text("utf-8")
    for row in zoo_rows():
        assert all(number in published for number in re.findall(r"\d+\.\d", row[4])), row


# Programs


def test_the_readmes_python_runs() -> None:
    program, _ = blocks(ROOT / "README.md", "python")
    assert len([line for line in program.splitlines() if line.strip()]) <= 20
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True, timeout=300)


def test_the_example_of_a_mask_runs() -> None:
    (program,) = blocks(ROOT / "docs" / "extending.md", "python")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-c", program]
    result = subprocess.run(run, cwd=ROOT, env=environment, check=True, capture_output=True, text=True, timeout=100)
    assert result.stdout == "torch.Size([8, 14, 14]) 784\n"


SHORT = (
    "--model.size tiny --model.image_size 32 --model.num_frames 4 --train.max_steps 2 --train.batch_size 4 "
    "--optim.warmup_steps 0 --device cpu --data.workers 0"
)


def test_your_own_videos(tmp_path: Path) -> None:
    """The page's commands one after another on encoded files, one of them bad; runs are made small at their end."""
    for label, name in enumerate(("pouring", "stirring")):
        (tmp_path / "videos" / name).mkdir(parents=True)
        for i in range(6):
            encode(tmp_path / "videos" / name / f"{i}.mp4", 24 + i, seed=label)
    (tmp_path / "videos" / "pouring" / "bad.mp4").write_text("no video")
    digits = create_autoencoder("tiny", widths=(32, 64, 128), heads=4, strides=(2, 2, 2), num_frames=8, image_size=32)
    torch.save({"model": digits.state_dict()}, tmp_path / "tiny-moving-digits")  # it wins over the shipped file
    page = (ROOT / "VIDEO.md").read_text("utf-8").split("## Your own videos in ten minutes")[1].split("\n## ")[0]
    commands = "".join(re.findall(r"^```bash\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL))
    program = f"""
    video-convmae() {{
        case $1 in
            pretrain) {sys.executable} -m video_convmae "$@" {SHORT} ;;
            finetune) {sys.executable} -m video_convmae "$@" {SHORT} --test.segments 2 --test.crops 1 ;;
            evaluate) {sys.executable} -m video_convmae "$@" --workers 0 ;;
            predict) {sys.executable} -m video_convmae "$@" || test $? = 1 ;;  # it names the bad file, after the others
            *) {sys.executable} -m video_convmae "$@" ;;
        esac
    }}
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = ["bash", "-euo", "pipefail", "-c", program + commands]
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
        output = subprocess.run(
            run, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True, timeout=100
        ).stdout
        assert {line.split()[1] for line in output.splitlines()} == {"pouring", "stirring"}


@pytest.mark.slow
def test_the_demo_learns(tmp_path: Path) -> None:
    """`make demo` without its installation: about five minutes."""
    command = [sys.executable, "-m", "tools.study.demo", f"--output={tmp_path}"]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=1800)
    for name in ("metrics.json", "curves.png", "predictions.png", "reconstruction.png", "reconstruction.mp4"):
        assert (tmp_path / name).stat().st_size > 0
