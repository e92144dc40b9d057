"""Read a command line: `--config`, edits of single fields, and a short or complete help.

    video-convmae pretrain --config video/pretrain_k400_base --optim.base_lr 3e-4
    video-convmae pretrain --help            the fields that most runs set
    video-convmae pretrain --help-all        every field, explained
    video-convmae pretrain ... --print_config    the whole configuration

A configuration file may extend another and then states only what differs:

    extends: video/pretrain_k400_base        a shipped name, or a path relative to this file
    output: runs/longer
    train: {epochs: 1600}
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import docstring_parser
import jsonargparse
import yaml

from video_convmae.bounds import Bounds, bounds_of
from video_convmae.config import flatten
from video_convmae.data.remote import is_url
from video_convmae.data.text import read_text
from video_convmae.errors import UserError
from video_convmae.shipped import find_config

# Listed by --help, in this order, where a configuration has more than MANY fields.
FIRST = (
    *("output", "data.train", "data.validation", "data.root", "data.format", "data.labels", "data.workers"),
    *(
        "init.weights",
        "model.from_weights",
        "model.size",
        "model.num_frames",
        "model.image_size",
        "model.probe",
        "mask.kind",
        "mask.ratio",
    ),
    "probe.list",
    *("optim.lr", "optim.base_lr", "optim.warmup_epochs", "optim.layer_decay"),
    *("train.epochs", "train.max_steps", "train.batch_size", "train.effective_batch", "train.precision"),
    *("device", "seed"),
)
MANY = 30
WIDTH = 100

Config = TypeVar("Config")


class Field(NamedTuple):
    """A field of a configuration. default: MISSING where a value must be given."""

    type: Any
    default: Any
    explanation: str
    bounds: Bounds | None = None

    @property
    def expected(self) -> str:
        """What a user may write: `whole number or null (1 or more)`."""
        return type_name(self.type) + (f" ({self.bounds})" if self.bounds else "")


class CommandLine(argparse.ArgumentParser):
    """Parser of a command with options of its own: no abbreviations, and an error is one line.

    Args:
        command: name after `video-convmae`; empty for a subcommand, for which argparse passes `prog`.
        description: text of its help; line breaks are kept.
    """

    def __init__(self, command: str = "", description: str | None = None, **options: Any) -> None:
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **{"prog": f"video-convmae {command}", **options},
        )

    def error(self, message: str) -> NoReturn:
        """End with exit code 2 and one line."""
        fail(self.prog, message)


def run_command(kind: type[Config], program: Callable[[Config], Any], arguments: Sequence[str]) -> int:
    """Parse a configuration and run a program with it; returns the exit code 0.

    Errors are raised as they are: `video_convmae.cli.main` reports those of a user in one line.
    """
    program(parse(kind, arguments))
    return 0


def parse(kind: type[Config], arguments: Sequence[str]) -> Config:
    """Read a configuration from `--config` and edits of single fields.

    Args:
        kind: dataclass of the run, named like its command: PretrainConfig.
        arguments: as on the command line. Edits replace what files state; of several files the later replace the
            earlier. A field that is true or false is true where its name stands alone.

    Raises:
        SystemExit: a field is unknown, missing or of a wrong type (exit code 2), or help was asked for (0).
    """
    parser = _FieldParser(kind, is_complete="--help-all" in arguments)
    values: dict[str, Any] = {}
    edits: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        option, is_joined, value = argument.partition("=")
        if option == "--config":
            name = value if is_joined else next(remaining, None)
            if not name:
                parser.error("--config needs the name or the path of a configuration")
            values = merge(values, parser.read(name))
        else:
            edits.append(argument)
    edits = [parser.checked(edit, following) for edit, following in pairwise([*edits, "--"])]
    config = [f"--config={yaml.safe_dump(values)}"] if values else []
    return parser.build(kind, parser.parse_args([*config, *edits]))


def read_config(name: str | Path, folder: str | Path = "", seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a YAML file over the one that it extends.

    Args:
        name: path, or name of a shipped configuration.
        folder: folder of relative paths.
        seen: files that extend this one.

    Raises:
        UserError: there is no such file, it is no mapping, or it extends itself.
    """
    path = find_config(name, folder)
    if path.resolve() in seen:
        raise UserError(f"{path} extends itself, by way of {', '.join(str(each) for each in seen)}: remove one extends")
    try:
        values = yaml.load(read_text(path, "the configuration"), _UniqueKeys)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark else ""
        raise UserError(f"{path} is no YAML: {place}{getattr(error, 'problem', error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds {type(values).__name__}; expected fields and their values (output: runs/first)")
    base = values.pop("extends", None)
    if base is not None and not isinstance(base, str):
        raise UserError(f"{path} extends {base!r}; expected the name or the path of one configuration")
    return values if base is None else merge(read_config(base, path.parent, (*seen, path.resolve())), values)


class _UniqueKeys(yaml.SafeLoader):
    """A safe loader that refuses a name that is given twice; YAML's own takes the last, and loses the others."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in names:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
            names.add(key.value)
        return super().construct_mapping(node, deep)


def merge(base: dict[str, Any], edits: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with the values of `edits`; groups of fields are merged, everything else (lists too) replaced."""
    merged = dict(base)
    for key, value in edits.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def fields_of(kind: type, prefix: str = "") -> dict[str, Field]:
    """Return every field of a dataclass and of those in it, by its dotted name, with the default of its own class."""
    texts: dict[str, str] = {}
    for parent in reversed([base for base in kind.__mro__ if is_dataclass(base)]):
        parameters = docstring_parser.parse_from_object(parent).params
        texts |= {parameter.arg_name: " ".join((parameter.description or "").split()) for parameter in parameters}
    types, bounds = get_type_hints(kind), bounds_of(kind)
    found: dict[str, Field] = {}
    for each in fields(kind):
        if is_dataclass(types[each.name]):
            found |= fields_of(types[each.name], f"{prefix}{each.name}.")
        else:
            default = each.default if each.default_factory is MISSING else each.default_factory()
            text = texts.get(each.name, "")
            found[prefix + each.name] = Field(types[each.name], default, text, bounds.get(each.name))
    return found


def _items_of(kind: Any) -> list[type]:
    """Return the groups of fields that a field may hold a list of: TargetConfig of `tuple[TargetConfig, ...]`."""
    if get_origin(kind) in (Union, UnionType):
        return [item for part in get_args(kind) for item in _items_of(part)]
    items = get_args(kind)[:1] if get_origin(kind) is tuple else ()
    return [item for item in items if isinstance(item, type) and is_dataclass(item)]


def type_name(kind: Any) -> str:
    """Return a type as a user writes its values: `int or [int, int]`, `bf16, fp16 or fp32`, `true or false`."""
    *most, last = _alternatives(kind)
    return f"{', '.join(most)} or {last}" if most else last


def _alternatives(kind: Any) -> list[str]:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return [name for part in parts for name in _alternatives(part)]
    if origin is Literal:
        return [str(part) for part in parts]
    if origin is tuple:
        return [f"[{', '.join('...' if part is Ellipsis else type_name(part) for part in parts)}]"]
    words = {bool: ["true", "false"], str: ["text"], NoneType: ["null"], float: ["number"], int: ["whole number"]}
    return words.get(kind, [getattr(kind, "__name__", str(kind))])


def within(
    kind: type[int] | type[float],
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> Callable[[str], Any]:
    """Return the `type` of an option of argparse: a number with these bounds."""
    bounds = Bounds(least, above, most, below)

    def read(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not bounds.contain(value):
            raise argparse.ArgumentTypeError(f"it is {text!r}; expected {type_name(kind)} ({bounds})")
        return value

    return read


def local_path(text: str) -> Path:
    """Return the path of a file or folder of this machine: the `type` of an option that takes no URL."""
    if is_url(text):
        raise argparse.ArgumentTypeError(
            f"it is {text!r}, a URL; expected a path on this machine (the lines of a list may be whole URLs)"
        )
    return Path(text)


SEED = within(int, least=0, most=2**63 - 1)


def fail(program: str, message: str, code: int = 2) -> NoReturn:
    """End the process with one line on standard error."""
    print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


class _FieldParser(jsonargparse.ArgumentParser):
    """jsonargparse's parser of a dataclass, with errors of one line and a help of its own."""

    def __init__(self, kind: type | None = None, is_complete: bool = False, **options: Any) -> None:
        """Add the fields of `kind`; `is_complete`: help lists all of them.

        Without `kind` it is the parser that jsonargparse makes, with options of its own, for the items of a list.
        """
        if kind is None:
            super().__init__(**options)
            self._fields: dict[str, Field] = {}
            return
        command = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", kind.__name__.removesuffix("Config")).lower()
        super().__init__(
            prog=f"video-convmae {command}",
            usage="%(prog)s [--config NAME] [--FIELD VALUE ...]",
            description=kind.__doc__,
            allow_abbrev=False,
        )
        self.add_argument("--help-all", action="help")
        self.add_argument("--config", action="config")
        self.add_class_arguments(kind)
        self._is_complete = is_complete
        self._fields = fields_of(kind)
        self._items = {  # of the lists of groups
            name: field
            for group, of_list in self._fields.items()
            for item in _items_of(of_list.type)
            for name, field in fields_of(item, f"{group}.").items()
        }
        groups = {name[:place] for name in self._fields for place, letter in enumerate(name) if letter == "."}
        self._known = {*self._fields, *groups}

    def read(self, name: str) -> dict[str, Any]:
        """Read a configuration file; an unknown field in it is an error that names both."""
        try:
            values = read_config(name)
        except UserError as error:
            self.error(str(error))
        for field, value in flatten(values):
            if field not in self._known:
                self.error(f"{name}: {self._no_field(field)}")
            if field not in self._fields:
                self.error(
                    f"{name}: {field} is {value!r}; expected its fields and their values below it, or no {field}"
                )
        return values

    def build(self, kind: type[Config], parsed: jsonargparse.Namespace) -> Config:
        """Return the configuration of parsed values; what they contradict is an error, as a wrong type is."""
        for name, field in self._fields.items():
            if field.default is MISSING and parsed[name] == "":
                self.error(f"{name} is empty; expected text (a variable of the shell that is not set?)")
            if field.bounds is not None and not field.bounds.contain(value := parsed[name]):
                self.error(f"{name} is {json.dumps(value)}; expected {field.expected}")
        try:
            built = self.instantiate(parsed).as_dict()
            return kind(**{name: value for name, value in built.items() if name != "config"})
        except ValueError as error:
            self.error(str(error))

    def checked(self, argument: str, following: str) -> str:
        """Check the name of an option; a field that is true or false gets its value where its name stands alone."""
        if not argument.startswith("--"):
            return argument
        name, is_joined, _ = argument[2:].partition("=")
        if name not in self._known | {"help", "help-all", "print_config"}:
            self.error(self._no_field(name))
        is_switch = name in self._fields and self._fields[name].type is bool and not is_joined
        return f"{argument}=true" if is_switch and following.startswith("--") else argument

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with exit code 2 and one line; jsonargparse's several lines on a wrong type become `NAME is VALUE`."""
        if not self._fields:
            super().error(message, ex)
        keys = re.findall(r'(?:Parser key|Key) "([^"]+)"', message)
        known = self._fields | self._items
        field = next((name for name in (".".join(keys), *keys[:1]) if name in known), None)
        value = re.search(r"(?:Given|Got) value: (.*)", message)
        missing = re.search(r"arguments are required: (.*)", message)
        unknown = re.search(r"Option '([^']+)' is not accepted", message)
        if field and unknown:  # of an item of a list
            message = self._no_field(f"{field}.{unknown[1]}")
        elif field and missing:
            message = f"an item of {field} has no {missing[1]}, which must be given"
        elif field and value:
            message = f"{field} is {value[1]}; expected {known[field].expected} (--help-all explains every field)"
        elif missing:
            message = f"{missing[1]} must be given: on the command line, or by a --config that has it"
        fail(self.prog, message)

    def format_help(self, formatter: argparse.HelpFormatter | None = None) -> str:
        """Return the help: all fields, or those that most runs set."""
        is_short = not self._is_complete and len(self._fields) > MANY
        names = [name for name in FIRST if name in self._fields] if is_short else list(self._fields)
        options = [
            ("--config NAME", "Shipped configuration (video/pretrain_k400_base_msd), or a YAML file."),
            *((f"--{name}", self._explain(name)) for name in names),
            ("--print_config", "Print the whole configuration and exit."),
            ("--help-all", f"List all {len(self._fields)} fields."),
            ("--debug", "Show the traceback of an error."),
        ]
        column = 4 + max(len(option) for option, _ in options)
        lines = [
            textwrap.fill(
                f"  {option:{column - 2}}{text}", WIDTH, subsequent_indent=" " * column, break_on_hyphens=False
            )
            for option, text in options
        ]
        return "\n".join([self.format_usage(), self.description or "", "", *lines, ""])

    def _explain(self, name: str) -> str:
        field = self._fields[name]
        if field.default is MISSING:
            return f"{field.explanation} (required)"
        written = field.default if isinstance(field.default, str) else json.dumps(field.default)
        kind = type_name(field.type) + (f", {field.bounds}" if field.bounds else "")
        return f"{field.explanation} ({kind}{'; default ' * bool(written)}{written})"

    def _no_field(self, name: str) -> str:
        near = get_close_matches(name, sorted({*self._known, *self._items}), n=1)
        ending = name.rsplit(".", 1)[-1]
        near = near or [each for each in self._fields if each.rsplit(".", 1)[-1] == ending][:3]
        hint = f"did you mean {' or '.join(near)}?" if near else "--help-all lists every field"
        return f"there is no field {name}; {hint}"
