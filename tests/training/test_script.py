"""A script that trains: its data workers do not train too, and an error says what it lacks."""

import multiprocessing
import os
import re
import subprocess
import sys

import pytest
from helpers.runs import ROOT, write_config
from helpers.xla import QUICK

from stellarbyte_jax.command import MendableError
from stellarbyte_jax.config import DataConfig
from stellarbyte_jax.data.shards import prepare
from stellarbyte_jax.data.text import TextFormat
from stellarbyte_jax.training import script

HEAD = """
import sys
from stellarbyte_jax.config import load
from stellarbyte_jax.training.run import train
print("begins")
config = load(sys.argv[1], ["steps=2", "schedule.warmup_steps=0", *sys.argv[2:]])
"""
GUARDED = 'if __name__ == "__main__":\n    print(train(config).step)\n'
HIDDEN = "if config.steps == 2:\n    print(train(config).step)\n"  # an `if`, but none that helps
ADVICE = 'Put what the script does under `if __name__ == "__main__":`, or set data.workers=0'


@pytest.fixture
def start(tmp_path):
    """Runs a script that has read the settings of a tiny run."""

    def act(end, *settings):
        path = tmp_path / "mine.py"
        path.write_text(HEAD + end)
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "xla"),
            "XLA_FLAGS": QUICK,
            "JAX_PLATFORMS": "cpu",
        }
        command = [sys.executable, str(path), str(write_config(tmp_path)), *settings]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)

    return act


def test_a_script_without_a_guard_is_told_of_it_before_anything_is_made(start, tmp_path):
    done = start("print(train(config).step)\n", "data.workers=2", f"output_dir={tmp_path / 'new' / 'run'}")
    assert done.returncode == 1 and done.stdout.count("begins") == 1, "no worker was started"
    assert done.stderr.count("Traceback") == 1 and done.stderr.splitlines()[-1].endswith(
        f"{tmp_path / 'mine.py'}, line 7: with data.workers=2, each worker would run this. {ADVICE}"
    )
    assert not (tmp_path / "new").exists()


def test_a_guarded_script_and_one_without_workers_train(start):
    for end, workers, begins in ((GUARDED, 1, 2), ("print(train(config).step)\n", 0, 1)):
        done = start(end, f"data.workers={workers}")
        assert (done.returncode, done.stderr) == (0, "") and done.stdout.endswith("\n2\n")
        assert done.stdout.count("begins") == begins, "a worker runs what is not guarded"


def test_a_worker_that_runs_into_the_training_says_so(start, tmp_path):
    done = start(HIDDEN, "data.workers=1")
    assert done.returncode == 1
    assert f"MendableError: {tmp_path / 'mine.py'} begins the training in its data workers too. {ADVICE}" in done.stderr
    assert "is in use by" not in done.stderr


def test_a_worker_of_what_is_no_file_says_so_too(monkeypatch):
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    monkeypatch.delitem(sys.modules, "__mp_main__", raising=False)
    with pytest.raises(MendableError, match=r"^the script begins the training in its data workers too"):
        script.refuse_worker()


@pytest.fixture
def main(tmp_path, monkeypatch):
    """A main program at a line, as Python sees it."""

    def make(text, name="mine.py"):
        path = tmp_path / name
        path.write_text(text)
        module = type(sys)("__main__")
        module.__file__ = str(path)
        monkeypatch.setitem(sys.modules, "__main__", module)
        module.__dict__["multiprocessing"] = multiprocessing
        module.__dict__["check"] = lambda **data: script.check_guarded(DataConfig(**{"train": (str(path),), **data}))
        exec(compile(text, str(path), "exec"), module.__dict__)

    return make


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("check()", 1),
        ("\ndef main():\n    if True:\n        check()\n\nmain()", 6),
        ("with open(__file__) as file:\n    check()", 2),
        ("if __name__ != '__main__':\n    pass\ncheck()", 3),
        ("try:\n    pass\nfinally:\n    check(\n    )", 4),
        ("def main():\n    check()\n\nif __name__ == '__main__':\n    main()", None),
        ("if __name__ != '__main__':\n    pass\nelse:\n    check()", None),
        ("with open(__file__):\n    if not multiprocessing.parent_process():\n        check()", None),
        ("check(workers=0)", None),
        ("if '__main__' == __name__: check()", None),
        ("__name__ == '__main__' and check()", None),
        ("check() if __name__ == '__main__' else None", None),
        ("春 = '星'; __name__ != '__main__' or check()", None),
        ("match __name__:\n    case '__main__':\n        check()", None),
        ("import sys\nif __name__ != '__main__':\n    sys.exit()\ncheck()", 4),  # which ends a worker
        ("if __name__ == '__main__':\n    print()\ncheck()", 3),
        ("if check():\n    pass", 1),
        ("check() or print()", 1),
        ("check(**({} or {}))", 1),
        ("with open(__file__, 'wb') as file:\n    file.write(b'PK\\x03\\x04')\ncheck()", None),  # an archive
    ],
)
def test_what_is_taken_for_guarded(text, line, main, tmp_path):
    if line is None:
        main(text)
        return
    message = f"{tmp_path / 'mine.py'}, line {line}: with data.workers=1, each worker would run this. {ADVICE}"
    with pytest.raises(MendableError, match=f"^{re.escape(message)}$"):
        main(text)


def test_prepared_data_needs_no_guard(main, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a river"}\n')
    text = TextFormat(("text",), None)
    prepare([str(tmp_path / "a.jsonl")], tmp_path / "shards", str(ROOT / "tokenizer"), text=text, workers=0)
    both = (str(tmp_path / "shards"), str(tmp_path / "a.jsonl"))
    main(f"check(train=({both[0]!r},))")
    with pytest.raises(MendableError, match="each worker would run this"):
        main(f"check(train={both})")


def test_where_python_keeps_no_columns_lines_decide(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("if __name__ == '__main__':\n    f()\nf()\n")
    assert script._is_conditional(path, (2, None)) and not script._is_conditional(path, (3, None))


@pytest.mark.parametrize("file", [None, "app.pyz/__main__.py"])
def test_a_session_has_no_script_and_an_archive_no_file(file, monkeypatch):
    module = type(sys)("__main__")
    module.__file__ = file
    monkeypatch.setitem(sys.modules, "__main__", module)
    module.__dict__["check"] = lambda: script.check_guarded(DataConfig(train=("x.jsonl",)))
    exec("check()", module.__dict__)


@pytest.mark.parametrize("end", [GUARDED, "print(train(config).step)\n"])
def test_workers_of_a_script_from_standard_input_are_refused(end, tmp_path):
    """Python would start each with the file ``<stdin>`` of this folder."""
    config = write_config(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": QUICK, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-", str(config), "data.workers=1", f"output_dir={tmp_path / 'new'}"]
    given = {"input": HEAD + end, "capture_output": True, "text": True, "env": environment}
    done = subprocess.run(command, timeout=300, check=False, **given)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].endswith(
        "the script comes from <stdin>, and each of data.workers=1 would look for it as a file: save it in one, or set "
        "data.workers=0"
    )
    assert not (tmp_path / "new").exists()
