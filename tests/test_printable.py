import pytest

from varfast import InputError, command
from varfast.printable import printable


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("plain, ä, 猫", "plain, ä, 猫"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("abc\u202edcba", r"abc\u202edcba"),
        ("\udc80", r"\udc80"),
        ("\x9b31m", r"\x9b31m"),
        (b"\xff<html>\x00", "\ufffd<html>\\x00"),
        (ValueError("\x1b[0m"), r"\x1b[0m"),
        (7, "7"),
    ],
)
def test_printable_escapes_what_a_terminal_would_obey(value, shown):
    assert printable(value) == shown
    assert printable(value).encode()


def test_printable_bounds_the_length_and_tells_it():
    assert printable("a" * 60_000, 5) == "aaaaa... (60000 characters)"
    assert printable("aaaaa", 5) == "aaaaa"
    assert len(printable("\x1b" * 10**6)) < 1000


def test_printable_keeps_the_lines_of_a_message():
    assert printable("a\n  b\x1b", lines=True) == "a\n  b\\x1b"


def test_no_command_prints_what_a_terminal_would_obey(monkeypatch, capsys):
    """Whatever of others' text an error still quotes as it came: the last place before the terminal."""

    def main(arguments):
        error = InputError("one\n  two \x1b[2J" + "x" * 10**6)
        error.add_note("  note \x1b]0;owned\x07")
        raise error

    monkeypatch.setattr(command, "_run", lambda name, arguments: main(arguments))
    with pytest.raises(SystemExit) as ended:
        command.run_command("env", [])
    printed = capsys.readouterr().err
    assert ended.value.code == 2
    assert "\x1b" not in printed
    assert "error: one\n  two \\x1b[2Jxxx" in printed
    assert printed.endswith("  note \\x1b]0;owned\\x07\n")
    assert len(printed) < 30_000
