"""Completion of commands, keys, values, configs and run folders in bash, zsh and fish.

    varfast completion bash > ~/.local/share/bash-completion/completions/varfast
    varfast completion zsh > "${fpath[1]}/_varfast"
    varfast completion fish > ~/.config/fish/completions/varfast.fish

argcomplete has the scripts of the shells, and the quoting of each. On a TAB they start `varfast` with _ARGCOMPLETE set,
which `answer` then answers. Nothing here imports PyTorch.
"""

from __future__ import annotations

if __name__ == "__main__":
    from varfast.command import run_command

    run_command("completion")

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_origin

import argcomplete
from argcomplete.shell_integration import shellcode
from pydantic import BaseModel

from varfast.command import COMMANDS, HELP, SHELLS, Command, read_shell
from varfast.settings import arguments as command_line
from varfast.settings import completing
from varfast.settings.loading import first_needed
from varfast.settings.paths import expanded
from varfast.settings.reading import apply_override, read_config
from varfast.types import InputError

_OPTIONS = {"--help": "what it does, and its keys", "--version": "of varfast"}


def main(arguments: list[str]) -> int:
    """python -m varfast.completion bash|zsh|fish"""
    print(shellcode(["varfast"], shell=read_shell(arguments)).strip())
    return 0


def answer() -> None:
    """Answer the shell that asks what may stand at the cursor, and end the process."""
    # Every word is an argument of one kind here: which are options, and which of them take a value, is decided below.
    parser = argparse.ArgumentParser(prefix_chars="\0", add_help=False)
    words = parser.add_argument("words", nargs="*")

    def completer(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> dict[str, str]:
        return completions(getattr(parsed_args, "words", None) or [], prefix)

    words.completer = completer  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser)


def completions(before: Sequence[str], begun: str) -> dict[str, str]:
    """Words that may stand after those `before` it, and that begin with `begun`, each with its meaning."""
    if not before:
        first = {name: command.about for name, command in COMMANDS.items()} | {"help": HELP} | _OPTIONS
        return _beginning(first, begun)
    name, *others = before
    if name == "help":
        return _beginning({name: command.about for name, command in COMMANDS.items()} if not others else {}, begun)
    if name == "completion":
        return _beginning(dict.fromkeys(SHELLS, ""), begun)
    return _of_command(COMMANDS[name], others, begun) if name in COMMANDS else {}


def _of_command(command: Command, before: list[str], begun: str) -> dict[str, str]:
    options = _OPTIONS | {option.split()[0]: about for option, about in command.options if option.startswith("--")}
    schema = command.schema
    if schema is None:
        return _beginning(options, begun)
    dashes = "--" if begun.startswith("--") else ""
    plain, data, paths = begun.removeprefix(dashes), *_given(schema, before)
    key, equals, value = plain.partition("=")
    last = before[-1] if before else ""
    if last == "--sweep":
        key, equals, value = begun.partition("=")
        *done, value = value.split(",") if equals else [value]
        return _value(schema, key, value, data, ",".join([*done, ""])) if equals else completing.keys(schema, key, data)
    if last.startswith("--") and "=" not in last and last not in options and command_line.KEY.fullmatch(last[2:]):
        return {word.partition("=")[2]: about for word, about in _value(schema, last[2:], begun, data).items()}
    if equals:
        return {f"{dashes}{word}": about for word, about in _value(schema, key, value, data).items()}
    found = {f"{dashes}{word}": about for word, about in completing.keys(schema, plain, data).items()}
    found |= _beginning(options, begun) if dashes else {}
    first = schema.model_fields[first_needed(schema)]
    takes_path = "CONFIG" in command.usage or "RUN" in command.usage
    if not dashes and takes_path and (not paths or get_origin(first.annotation) is list):
        found = _paths(begun, configs="CONFIG" in command.usage, files="CHECKPOINT" in command.usage) | found
    return found


def _given(schema: type[BaseModel], before: list[str]) -> tuple[dict[str, Any], list[str]]:
    """What the config and the command line hold so far, as far as they can be read, and the paths on it."""
    data: dict[str, Any] = {}
    paths = [word for word in before if not word.startswith("-") and command_line.is_path(word, schema)]
    try:
        for path in map(expanded, paths[:1]):
            data = read_config(path / "config.yaml" if path.is_dir() else path) if "run" in schema.model_fields else {}
        for word in before:
            if word not in paths and "=" in word:
                apply_override(data, word.removeprefix("--"))
    except InputError:
        pass  # the command itself says what is wrong
    return data, paths


def _value(schema: type[BaseModel], key: str, begun: str, data: Mapping[str, Any], done: str = "") -> dict[str, str]:
    words, takes_path = completing.values(schema, key, data)
    found = _beginning(dict.fromkeys(words, ""), begun)
    if takes_path:
        found |= _paths(begun, configs=False, files=True)
    return {f"{key}={done}{word}": about for word, about in found.items()}


def _paths(begun: str, configs: bool, files: bool) -> dict[str, str]:
    """Folders, each with "/" unless it is a run; YAML files if `configs`, all files if `files`."""
    folder, name = os.path.split(begun)
    found = {}
    try:
        entries = sorted(os.scandir(expanded(folder) if folder else Path()), key=lambda entry: entry.name)
    except (OSError, InputError):
        return {}
    for entry in entries:
        path = os.path.join(folder, entry.name)
        if not entry.name.startswith(name) or (entry.name.startswith(".") and not name):
            continue
        if os.path.isfile(os.path.join(entry.path, "config.yaml")):
            found[path] = "a run"
        elif entry.is_dir():
            found[f"{path}/"] = ""
        elif files or (configs and entry.name.endswith((".yaml", ".yml"))):
            found[path] = ""
    return found


def _beginning(words: Mapping[str, str], begun: str) -> dict[str, str]:
    return {word: about for word, about in words.items() if word.startswith(begun)}
