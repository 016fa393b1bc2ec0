"""Does a program end as its users expect: by Ctrl-C, where nobody reads, and with one line about what is wrong?"""

import ast
import io
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from stellarbyte_jax.cli import program as cli
from stellarbyte_jax.command import (
    MendableError,
    command,
    directory_for,
    imports,
    make_directory,
    one_line,
    print_error,
    remedy,
    spelled,
)
from stellarbyte_jax.config import ConfigError

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
COMMANDS = [ROOT / "stellarbyte_jax" / "cli" / f"{m}.py" for m in sorted({c.module for c in cli.COMMANDS.values()})]


def _program(code: str, **more) -> subprocess.Popen:
    head = "import os, signal, sys, time\nfrom stellarbyte_jax.command import command, imports\n"
    signals = "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job may ignore it
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", head + signals + code], text=True, **{**pipes, **more})


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("a: rule; fix"), 1, "error: a: rule; fix\n"),
        (MendableError("a"), 1, "error: a\n"),
        (ConfigError("a"), 2, "error: a\n"),
        (FileNotFoundError(2, "No such file", "x"), 1, "error: [Errno 2] No such file: 'x'\n"),
        (ModuleNotFoundError("no x: pip install x"), 1, "error: no x: pip install x\n"),
        (ValueError("a\nb\x1b[2Jc"), 1, "error: a b\\x1b[2Jc\n"),
        (ValueError(), 1, "error: ValueError\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_a_status(error, code, line, capsys):
    @command
    def main() -> int:
        raise error

    assert main() == code
    assert capsys.readouterr().err == line


def test_the_word_error_is_red_on_a_terminal_alone(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    long = "[bold]a:b " + "c" * 500
    for kind, expected in ((Terminal, f"\x1b[1;31merror:\x1b[0m {long}\n"), (io.StringIO, f"error: {long}\n")):
        shown = kind()
        monkeypatch.setattr(sys, "stderr", shown)
        print_error(ValueError(long))
        assert shown.getvalue() == expected


def test_a_fault_of_ours_keeps_its_traceback():
    @command
    def main() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        main()


def test_a_program_without_reader_ends_as_others_do():
    process = _program("@command\ndef main():\n  while True: print('x' * 1000)\nsys.exit(main())")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 128 + signal.SIGPIPE
    assert process.stderr.read() == ""
    process.stderr.close()


def test_output_that_waits_in_the_buffer_has_no_reader_either():
    """Without a flush inside, Python would find out at its end and print two lines about it."""
    read, write = os.pipe()
    os.close(read)
    process = _program("@command\ndef main():\n  print('x')\n  return 0\nsys.exit(main())", stdout=write)
    os.close(write)
    assert (process.communicate()[1], process.returncode) == ("", 128 + signal.SIGPIPE)


def test_an_interrupted_import_is_silent():
    process = _program("with imports():\n  print('in', flush=True); time.sleep(60)")
    assert process.stdout is not None and process.stdout.readline() == "in\n"
    process.send_signal(signal.SIGINT)
    assert (process.communicate(timeout=60), process.returncode) == (("", ""), -signal.SIGINT)


def test_a_program_is_deaf_to_ctrl_c_before_it_imports_anything():
    """What comes first is quick, and so are the lines that lead to it."""
    code = "import sys; before = set(sys.modules); import stellarbyte_jax.interrupts; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    brought = {name.partition(".")[0] for name in done.stdout.split()}
    assert not brought & {"typing", "dataclasses", "argparse", "inspect", "rich", "jax"} and len(brought) < 40
    for path in [*SCRIPTS, ROOT / "stellarbyte_jax" / "__main__.py"]:
        if "import main" in path.read_text():
            first = ast.parse(path.read_text()).body[1]
            assert ast.unparse(first) == "from stellarbyte_jax.interrupts import imports"


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.default_int_handler, lambda *_: None])
def test_imports_leave_ctrl_c_as_it_was(handler):
    before = signal.signal(signal.SIGINT, handler)
    try:
        with imports():
            inside = signal.getsignal(signal.SIGINT)
        assert inside is (signal.SIG_DFL if handler is signal.default_int_handler else handler)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_long_message_keeps_both_ends():
    text = one_line("begin" + "x" * 200_000 + "end")
    assert len(text) < 2000 and text.startswith("begin") and text.endswith("end") and " ... " in text
    assert one_line("x" * 2000) == "x" * 2000


def test_control_characters_are_spelled_out():
    assert spelled("a\tb\nc\x00\x1b\x7f\x9b中") == "a\tb\nc\\x00\\x1b\\x7f\\x9b中"


@pytest.mark.parametrize("path", [*SCRIPTS, *COMMANDS], ids=lambda path: path.name)
def test_every_program_ends_so(path):
    """A script is a program of its own, or runs a command, as which it is named."""
    text = path.read_text()
    if "import main" in text:
        command = next(c for c in cli.COMMANDS.values() if c.script == path.name)
        assert f"from stellarbyte_jax.cli.{command.module} import main" in text
    else:
        assert "@command\ndef main(" in text
    assert path in COMMANDS or "sys.exit(main())" in text


def test_every_command_has_its_script():
    assert {c.script for c in cli.COMMANDS.values()} <= {path.name for path in SCRIPTS}


@pytest.mark.parametrize("path", [*SCRIPTS, *COMMANDS], ids=lambda path: path.name)
def test_no_program_shows_where_its_imports_were(path):
    """What takes long to import is imported inside of ``imports()``; what makes that available is quick."""
    ours = (
        "interrupts",
        "command",
        "config",
        "config.files",
        "config.paths",
        "config.reference",
        "config.section",
        "cli.adapters",
        "cli.attention_peers",
        "cli.attention_speed",
        "cli.decode_speed",
        "cli.parser",
        "cli.program",
        "cli.tensors",
        "cli.evaluation_speed",
        "cli.grouped_peers",
        "cli.grouped_speed",
        "cli.generation_speed",
        "cli.grouped_table",
        "cli.benchmark_parser",
        "cli.layer_peers",
        "cli.layer_speed",
        "cli.lora_speed",
        "cli.loss_speed",
        "cli.machine",
        "cli.measurements",
        "cli.mesh_speed",
        "cli.moe_speed",
        "cli.peft_peers",
        "cli.torch_attention",
        "cli.torch_peers",
        "cli.traces",
        "cli.workers",
    )
    quick = {*sys.stdlib_module_names, *(f"stellarbyte_jax.{name}" for name in ours)}

    def slow(node, inside=False):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return []
        if isinstance(node, ast.With):
            inside = inside or any(ast.unparse(item.context_expr) == "imports()" for item in node.items)
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found = [] if inside else [n for n in names if not {n, n.partition(".")[0]} & quick]
        return found + [name for child in ast.iter_child_nodes(node) for name in slow(child, inside)]

    assert slow(ast.parse(path.read_text())) == []


def test_imports_in_another_thread_leave_signals_alone():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def act():
        with imports():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=act)
    thread.start()
    thread.join()
    assert seen == [before] and signal.getsignal(signal.SIGINT) is before


def test_a_directory_that_cannot_be_made_is_named_with_what_to_change(tmp_path):
    (tmp_path / "file").write_text("")
    make_directory(tmp_path / "a" / "b", "x")
    assert (tmp_path / "a" / "b").is_dir()
    with pytest.raises(OSError, match=r"file/a cannot be made: Not a directory; .*choose another output_dir"):
        make_directory(tmp_path / "file" / "a", "output_dir")
    with pytest.raises(OSError, match=r"^/proc/none cannot be made: .*; choose another output_dir$"):
        make_directory(Path("/proc/none"), "output_dir")
    assert remedy(FileNotFoundError("No such file"), "--output") == "choose another --output"
    assert "moved or removed" in (remedy(FileNotFoundError("No such file")) or "")


def test_a_letter_that_the_terminal_lacks_is_spelled_out():
    code = "import sys\n@command\ndef main():\n  print('春'); return 0\nsys.exit(main())"
    process = _program(code, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (process.communicate(timeout=60), process.returncode) == (("\\u6625\n", ""), 0)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_no_directory_that_it_made(tmp_path, error):
    (tmp_path / "there").mkdir()
    with pytest.raises(error), directory_for(tmp_path / "there" / "a" / "b", ["file", "other"]):
        (tmp_path / "there" / "a" / "b" / "file").touch()
        raise error
    assert not any((tmp_path / "there").iterdir())
    with pytest.raises(error), directory_for(tmp_path / "there"):
        raise error
    with pytest.raises(error), directory_for(tmp_path / "a" / "b"):
        (tmp_path / "a" / "others").touch()
        raise error
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "others", "there"]
    with pytest.raises(error), directory_for(tmp_path / "c", ["file"]):
        (tmp_path / "c" / "of another process").touch()
        raise error
    with pytest.raises(error), directory_for(tmp_path / "c", ["of another process"]):
        raise error
    assert (tmp_path / "c" / "of another process").exists(), "what others put there, and what was there"


def test_a_block_that_ends_well_leaves_its_directory(tmp_path):
    with directory_for(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
    assert (tmp_path / "a" / "b" / "file").exists()


def test_a_directory_that_cannot_be_made_leaves_none_above_it(tmp_path, monkeypatch):
    make = os.mkdir
    monkeypatch.setattr(os, "mkdir", lambda path, *more: make(path, *more) if "b" not in str(path)[-1] else (1 / 0))
    with pytest.raises(ZeroDivisionError), directory_for(tmp_path / "a" / "b"):
        pass
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["link", "link/run"])
def test_a_link_to_nothing_is_told_as_such(tmp_path, place):
    """A folder of runs is often a link to another disk, which may not be there."""
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    advice = f"{tmp_path / 'link'} is a link to nothing: mend the link or choose another output_dir"
    with pytest.raises(OSError, match=rf"cannot be made: File exists; {re.escape(advice)}$"):
        make_directory(tmp_path / place, "output_dir")
    with pytest.raises(FileExistsError) as failure, directory_for(tmp_path / place):
        pass
    assert remedy(failure.value) == advice
    (tmp_path / "disk").mkdir()
    make_directory(tmp_path / place, "output_dir")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="there is a file where a folder belongs"):
        make_directory(tmp_path / "file", "output_dir")


def test_warnings_are_lines_of_the_program_and_told_once():
    program = (
        "import logging, sys\n"
        "from stellarbyte_jax.command import command\n"
        "@command\n"
        "def main():\n"
        "    logging.basicConfig()  # as absl does\n"
        "    for name in ('stellarbyte_jax.hf', 'other.part', 'stellarbyte_jax.data'):\n"
        "        logging.getLogger(name).warning('%s is\\nold', 'x')\n"
        "        logging.getLogger(name).info('quiet')\n"
        "    return 0\n"
        "main()\n"
        "assert not logging.getLogger().handlers\n"
        "logging.basicConfig()\n"
        "main()\n"
        "logging.getLogger().handlers.clear()\n"
        "logging.basicConfig(format='own %(message)s')\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "" and done.returncode == 0
    assert done.stderr.splitlines()[:4] == ["warning: x is old", "warning: other.part: x is old"] * 2
    assert done.stderr.splitlines()[4:] == ["own x is", "old"] * 3
