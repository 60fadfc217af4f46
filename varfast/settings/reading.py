"""Reads YAML files and values into plain data of a bounded size; merges a config over its base; applies overrides.

Scalars mean what YAML 1.2's core schema says: `yes`, `no`, `on` and `off` are text, `1e-4` is a number, `1:30` and
`2026-01-01` are text. (PyYAML reads YAML 1.1, where these are true, false, text, 90 and a date.)
"""

from __future__ import annotations

import math
import re
import stat
from pathlib import Path
from typing import Any

import yaml

from varfast.settings.paths import expanded
from varfast.types import InputError

# The longest config here has 4 kB; the names of 1000 classes have 25 kB. PyYAML reads 256 KiB in 2 s on one core.
LARGEST_FILE_BYTES = 256 * 1024
# Aliases can make 10^9 values of 700 bytes; a list of 21 000 labels is the longest that somebody may want.
LARGEST_VALUES = 100_000
DEEPEST = 32

_NULL = re.compile(r"(?:null|Null|NULL|~|)$")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_TAG = "tag:yaml.org,2002:"


def scalar(text: str) -> Any:
    """What a plain scalar means in YAML 1.2's core schema. Raises: ValueError for an integer of too many digits."""
    if _NULL.match(text):
        return None
    if _BOOL.match(text):
        return text in ("true", "True", "TRUE")
    if _INT.match(text):
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        if len(text) > 400:  # an integer of 4300 digits or more cannot be read; no number here has 20
            raise ValueError(f"a number of {len(text)} digits")
        return int(text[2:] if base != 10 else text, base)
    if _FLOAT.match(text):
        return float(text.replace(".inf", "inf").replace(".Inf", "inf").replace(".INF", "inf").replace(".nan", "nan")
                     .replace(".NaN", "nan").replace(".NAN", "nan"))  # fmt: skip
    return text


class _Loader(yaml.SafeLoader):
    """Accepts null, booleans, numbers, text, lists and mappings only; no duplicate keys, at most DEEPEST levels."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > DEEPEST:
            raise yaml.YAMLError(f"it is nested more than {DEEPEST} deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge the mappings under `<<`. PyYAML's own merge repeats keys: a small file can make 10^9."""
        for key, _ in node.value:
            if key.tag == f"{_TAG}merge":
                break
        else:
            return
        own = [pair for pair in node.value if pair[0].tag != f"{_TAG}merge"]
        sources = [value for key, value in node.value if key.tag == f"{_TAG}merge"]
        node.value = own  # before the sources are read: one of them may be this mapping
        found = {key.value if isinstance(key, yaml.ScalarNode) else id(key): (key, value) for key, value in own}
        for source in sources:
            for mapping in source.value if isinstance(source, yaml.SequenceNode) else [source]:
                if not isinstance(mapping, yaml.MappingNode):
                    raise yaml.YAMLError(f"line {mapping.start_mark.line + 1}: << wants a section, or a list of them")
                self.flatten_mapping(mapping)
                for key, value in mapping.value:
                    found.setdefault(key.value if isinstance(key, yaml.ScalarNode) else id(key), (key, value))
        node.value = list(found.values())

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        assert isinstance(node, yaml.MappingNode)
        for key_node, _ in node.value:
            if key_node.tag == f"{_TAG}merge":
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: a key is a list or a section, want a name")
            key, line = self.construct_object(key_node), key_node.start_mark.line + 1
            if key in lines:
                where = f"lines {lines[key]} and {line}" if lines[key] != line else f"line {line}, twice"
                raise yaml.YAMLError(f"key {key} stands on {where}: the second would undo the first; join them")
            lines[key] = line
        return super().construct_mapping(node, deep)


def _construct_scalar(loader: _Loader, node: yaml.ScalarNode) -> Any:
    return scalar(node.value)


def _construct_tagged(kind: str) -> Any:
    wanted: dict[str, Any] = {"null": type(None), "bool": bool, "int": int, "float": (int, float)}

    def construct(loader: _Loader, node: yaml.ScalarNode) -> Any:
        value = scalar(node.value) if isinstance(node, yaml.ScalarNode) else node
        if not isinstance(value, wanted[kind]) or (isinstance(value, bool) and kind != "bool"):
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: this is no {kind}")
        return float(value) if kind == "float" else value

    return construct


def _refuse_tag(loader: _Loader, node: yaml.Node) -> Any:
    raise yaml.YAMLError(
        f"line {node.start_mark.line + 1}: the tag {node.tag.replace(_TAG, '!!')} is not read; remove it"
    )


_Loader.yaml_implicit_resolvers = {}
_Loader.yaml_constructors = {
    f"{_TAG}{t}": yaml.SafeLoader.yaml_constructors[f"{_TAG}{t}"] for t in ("str", "seq", "map")
}
for _kind in ("null", "bool", "int", "float"):
    _Loader.add_constructor(f"{_TAG}{_kind}", _construct_tagged(_kind))
_Loader.add_constructor("!scalar", _construct_scalar)
_Loader.add_constructor(f"{_TAG}merge", _construct_scalar)  # as a value it is text
_Loader.add_constructor(None, _refuse_tag)
_Loader.add_implicit_resolver(f"{_TAG}merge", re.compile(r"<<$"), ["<"])
# All other unquoted scalars: `scalar` decides what they are.
_Loader.add_implicit_resolver("!scalar", re.compile(r".*", re.DOTALL), None)


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 (as PyYAML writes) or 1.2 (as we read) would read as a number, date or boolean."""


for _kind, _pattern in (("int", _INT), ("float", _FLOAT)):
    _Dumper.add_implicit_resolver(f"{_TAG}{_kind}", _pattern, list("-+.0123456789"))


def dump_yaml(data: Any) -> str:
    """Plain data as YAML that `read_yaml`, and any reader of YAML 1.1, read back unchanged."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False)


# PyYAML passes on what int() and its own tables raise.
_YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)


def read_yaml(text: str, what: str) -> Any:
    """Plain data of a bounded size. Raises: InputError, which begins with `what`, for what is not valid YAML."""
    try:
        data = yaml.load(text, _Loader)
    except _YAML_ERRORS as error:
        raise InputError(f"{what} is not valid YAML: {_cause(error)}") from error
    return plain(data, what)


def _cause(error: Exception) -> str:
    """The reason in one line, with line and column."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return str(error)
    mark = error.problem_mark or error.context_mark
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    if "'\\t'" in str(error.problem):
        return f"{where}a tab; indent with spaces"
    return f"{where}{' '.join(filter(None, [error.context, error.problem]))}"


def plain(data: Any, what: str) -> Any:
    """A copy in which no two places share an object, so that an override changes one place only.

    Raises: InputError if `data` holds more than 100 000 values, is nested more than 32 deep (as what contains itself
        is), or holds text that no file can hold.
    """
    left = LARGEST_VALUES

    def copied(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise InputError(f"{what} holds more than {LARGEST_VALUES} values, counted as its aliases expand")
        if depth > DEEPEST:
            raise InputError(f"{what} is nested more than {DEEPEST} deep; an alias of what it stands in has no end")
        if isinstance(value, dict):
            return {copied(k, depth + 1): copied(v, depth + 1) for k, v in value.items()}
        if isinstance(value, list):
            return [copied(v, depth + 1) for v in value]
        if isinstance(value, str):
            check_text(value, what)
        return value

    return copied(data, 0)


def check_text(text: str, what: str) -> None:
    """Raises: InputError for a NUL, and for text that is not Unicode, as Python makes of bytes that are not UTF-8."""
    bad = re.search("[\0\ud800-\udfff]", text)
    if bad:
        name = "a NUL character" if bad[0] == "\0" else "bytes that are not UTF-8"
        raise InputError(f"{what} holds {name}: {text[:100]!r}")


_KINDS = {stat.S_IFREG: "a file", stat.S_IFDIR: "a folder"}


def read_text_file(path: Path, what: str) -> str:
    """A small text file in UTF-8, with or without BOM.

    Raises: InputError, which begins with `what`, for a folder, a device, a pipe, what is too large or no such text.
    """
    try:
        mode = path.stat().st_mode
        kind = _KINDS.get(stat.S_IFMT(mode), "a device, pipe or socket")
        if kind != "a file":
            raise InputError(f"{what} is {kind}, want a YAML file; the examples are in configs/")
        with path.open("rb") as file:  # a file of /proc has no size until it is read
            content = file.read(LARGEST_FILE_BYTES + 1)
    except OSError as error:
        raise InputError(f"{what}: {error.strerror}; the examples are in configs/") from error
    if len(content) > LARGEST_FILE_BYTES:
        raise InputError(f"{what} has more than {LARGEST_FILE_BYTES // 1024} KiB, want a config; is it another file?")
    if content.startswith((b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")):
        raise InputError(f"{what} is UTF-16 or UTF-32; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{what} is not text in UTF-8: {error}; the examples are in configs/") from error


def read_config(path: Path, readers: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a YAML file, merged over the file that its key `base` names (relative to its folder), and so on."""
    named = f" (the base of {readers[-1]})" if readers else ""
    data = read_yaml(read_text_file(path, f"config {path}{named}"), f"config {path}")
    if not isinstance(data, dict):
        kinds: dict[type, str] = {type(None): "nothing", list: "a list", str: "text"}
        found = kinds.get(type(data), "a number")
        raise InputError(f"config {path}: got {found} at the top, want sections as in configs/digits.yaml")
    base = data.pop("base", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise InputError(f"config {path}: base is {base!r}, want the path of a config, as in base: digits.yaml")
    if path in readers or len(readers) > 20:
        raise InputError(f"config {path}: base leads back to it, by {' -> '.join(map(str, (*readers, path)))}")
    return merged(read_config(path.parent / expanded(base), (*readers, path)), data)


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge sections key by key. `reward` is replaced as a whole, so a run has the rewards of its own file only; and so
    is a `policy` of another family, which has other keys. Of the losses that exclude each other, `grpo` and `dpo`, a
    section of the one takes the place of the other's.
    """
    result = dict(base)
    for loss, other in (("grpo", "dpo"), ("dpo", "grpo")):
        if isinstance(over.get(loss), dict) and other not in over:
            result.pop(other, None)
    for key, value in over.items():
        below = result.get(key)
        both = isinstance(below, dict) and isinstance(value, dict) and key != "reward"
        if both and key == "policy":
            family = below.get("family", "var")  # type: ignore[union-attr]
            both = value.get("family", family) == family
        result[key] = merged(below, value) if both else value  # type: ignore[arg-type]
    return result


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set one key of nested dictionaries from "a.b=c".

    c is what YAML makes of it as a value; only quotes, [ and { begin more than a plain value, so that a path or prompt
    may hold " #" or ": ". Raises: InputError.
    """
    shown = override if len(override) <= 200 else f"{override[:200]}..."
    check_text(override, "an argument")
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")) or key != key.strip():
        raise InputError(f"argument {shown!r}: want key=value, without spaces, as in update.lr=3e-5")
    what = f"argument {shown!r}: the value"
    text = text.strip()
    if text.startswith(("[", "{", '"', "'")):
        value = read_yaml(text, what)
    else:
        try:
            value = scalar(text)
        except ValueError as error:
            raise InputError(f"{what} is {error}") from error
    set_key(data, key, value, f"argument {shown!r}")


def set_key(data: dict[str, Any], key: str, value: Any, what: str) -> None:
    """Set a dotted key of nested dictionaries; `what` sets it. Raises: InputError if a part is no section."""
    node: Any = data
    *parents, last = key.split(".")
    if len(parents) > DEEPEST:
        raise InputError(f"{what}: the key has more than {DEEPEST} parts")
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise InputError(f"{what}: {parent} is a value, not a section")
    node[last] = value


def is_finite(value: Any) -> bool:
    """No NaN, no infinity and no integer beyond 2**63 anywhere in plain data."""
    if isinstance(value, dict):
        return all(map(is_finite, value.values()))
    if isinstance(value, list):
        return all(map(is_finite, value))
    return not isinstance(value, float | int) or (
        math.isfinite(value) if isinstance(value, float) else abs(value) < 2**63
    )
