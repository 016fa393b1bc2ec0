"""Files of records in every format that is read, and lines that nothing can read."""

import gzip
import json

FORMATS = ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet")
RECORDS = [{"text": f"document {i} 静夜思\nsecond line", "title": f"t{i}"} for i in range(50)]


def lines_of(records):
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()


def write_records(path, records):
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines_of(records[:20])) + gzip.compress(lines_of(records[20:])))
    elif path.name.endswith(".zst"):
        import zstandard

        frame = zstandard.ZstdCompressor().compress
        path.write_bytes(frame(lines_of(records[:20])) + frame(lines_of(records[20:])))
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=7)
    else:
        path.write_bytes(lines_of(records))


# The third line of a.jsonl -> what is said about it.
BAD_LINES = {
    "JSON": (b'{"text": "a" "b"}', r"a\.jsonl:3:14: not valid JSON"),
    "cut": (b'{"text": "a', r"a\.jsonl:3:10: not valid JSON"),
    "not an object": (b'["text"]', r"a\.jsonl:3: a line must hold a JSON object .* not a list"),
    "missing": (b'{"content": "a", "id": "b"}', r"a\.jsonl:3: no field 'text'; the fields here are: content, id"),
    "number": (b'{"text": 5}', r"a\.jsonl:3: field 'text' must be a string, it is int"),
    "null": (b'{"text": null}', r"a\.jsonl:3: field 'text' must be a string, it is NoneType"),
    "bytes": (b'{"text": "\xff"}', r"a\.jsonl:3:11: not valid UTF-8"),
    "digits": (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", r"a\.jsonl:3: JSON with an integer of more than 4,300"),
    "depth": (b'{"text": "a", "n": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", r"a\.jsonl:3: JSON nested too deeply"),
    "surrogate": (b'{"text": "ab\\ud800"}', r"a\.jsonl:3: half of a surrogate pair at character 3"),
}
