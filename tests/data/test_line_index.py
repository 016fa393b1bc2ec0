"""Which lines are found, with which numbers, and what reading one of them costs."""

import numpy as np
import pytest

from stellarbyte_jax.data import line_index
from stellarbyte_jax.data.files import ByteFile
from stellarbyte_jax.data.line_index import Lines, index_lines

CONTENTS = {
    "blank lines": b'\n \t \n{"text": "a"}\r\n\n  {"text": "b"}\n\r\n{"text": "c"}',
    "a mark": b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n',
    "a mark before a blank line": b"\xef\xbb\xbf \r\n{}\n",
    "a mark inside": b"{}\n\xef\xbb\xbf\n{}",
    "long blank lines": b" " * 3000 + b"\n" + b" " * 3000 + b"{}\n" + b"\t" * 3000,
    "only blank lines": b"\n \n\t\r\n",
    "nothing": b"",
    "no newline": b"{}",
    "only newlines": b"\n" * 20,
}


@pytest.mark.parametrize("block", [1 << 26, 1, 2, 5, 64])
@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_lines_that_are_not_blank_and_their_numbers(tmp_path, monkeypatch, content, block):
    monkeypatch.setattr(line_index, "_SCAN_BYTES", block)
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    np.save(tmp_path / "index.npy", index_lines(path))
    found = Lines(str(path), str(tmp_path / "index.npy"))
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    expected = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    assert [(found.number(row), found.read(row).split(b"\n")[0]) for row in range(found.count)] == expected


def test_a_line_and_its_number_cost_no_more_at_the_end_of_a_large_file(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(b'{"text": "%d"}' % i for i in range(50_000)))
    np.save(tmp_path / "index.npy", index_lines(path))
    lines = Lines(str(path), str(tmp_path / "index.npy"))
    read = []
    plain = ByteFile.read
    monkeypatch.setattr(ByteFile, "read", lambda self, start, count: read.append(count) or plain(self, start, count))
    assert lines.read(49_999) == b'{"text": "49999"}' and lines.number(49_999) == 50_000
    assert sum(read) < 100
