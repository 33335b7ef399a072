"""Records as people have them: which files and kinds are read, as what, and what is refused."""

import gzip
import json

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from train.data import encode, formats, prompts, records
from train.loop import tiny

pytestmark = pytest.mark.core

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
ASKED, SAID = TURNS
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def lines(*found):
    return "\n".join(map(json.dumps, found)).encode()


def read(file, parse=formats.document):
    return [record.content for record in records.read(file, parse)]


@pytest.mark.parametrize(
    ("record", "content"),
    [
        ({"messages": None, "text": "hello", "images": ["beside a text, a note"]}, "hello"),
        ({"text": "\ufeffhello"}, "hello"),
        ({"messages": TURNS, "text": "rendered", "source": "x", "id": 3}, formats.Chat(TURNS)),
        ({"conversations": TURNS}, formats.Chat(TURNS)),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}, formats.Chat(TURNS)),
        ({"messages": [ASKED | {"weight": 1, "name": None}, SAID | {"weight": 1.0}]}, formats.Chat(TURNS)),
        (
            {"messages": TURNS, "system": "s", "tools": json.dumps(TOOLS)},
            formats.Chat([{"role": "system", "content": "s"}, *TURNS], TOOLS),
        ),
        ({"messages": TURNS, "functions": [{"name": "f"}]}, formats.Chat(TURNS, TOOLS)),
        (
            {"conversations": [{"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}]},
            formats.Chat([{"role": "assistant", "content": None, "tool_calls": [CALL]}]),
        ),
        (
            {"messages": [{"role": "assistant", "content": None, "function_call": CALL["function"]}]},
            formats.Chat([{"role": "assistant", "content": None, "tool_calls": [CALL]}]),
        ),
        (
            {"conversations": [{"from": "observation", "value": "3"}, {"from": "bot", "value": "x", "weight": 0}]},
            formats.Chat([{"role": "tool", "content": "3"}, {"role": "assistant", "content": "x", "train": False}]),
        ),
        (
            {"messages": [ASKED | {"content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}, SAID]},
            formats.Chat(TURNS),
        ),
        ({"prompt": "2+2=", "completion": "4"}, formats.Completion("2+2=", "4")),
        ({"prompt": "2+2=", "response": "4"}, formats.Completion("2+2=", "4")),
        (
            {"prompt": [*TURNS, ASKED], "completion": [SAID]},
            formats.Chat([ASKED, SAID | {"train": False}, ASKED, SAID]),
        ),
        (
            {"instruction": "add", "input": "2 2", "output": "4", "history": [["hi", "ho"]]},
            formats.Chat(
                [*TURNS, {"role": "user", "content": "add\n2 2"}, {"role": "assistant", "content": "4"}], plain=True
            ),
        ),
        ({"instruction": "hi", "input": "", "output": "ho", "text": None}, formats.Chat(TURNS, plain=True)),
    ],
)
def test_a_record_is_what_its_fields_say(tmp_path, record, content):
    (tmp_path / "a.jsonl").write_bytes(lines(record))
    assert read(tmp_path / "a.jsonl") == [content]


def turn(**fields):
    return {"messages": [ASKED, SAID | fields]}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"conversations": [{"from": "alien", "value": "hi"}]}, "role 'alien' is not known; name it one of system"),
        ({"conversations": [{"from": "function_call", "value": "f(x)"}]}, "call of a function must be JSON"),
        ({"messages": {"role": "user"}, "text": "a"}, 'neither a list of "messages" nor null'),
        ({"messages": ["hi"]}, 'a message needs a "role" and a "content"'),
        (turn(content=None), 'a message needs a "role" and a "content"'),
        (turn(content=[{"type": "image_url", "image_url": "x"}]), "content has type 'image_url': only texts"),
        (turn(content=["hi"]), "content has type None"),
        (turn(weight=0.5), "weight=0.5 of a message must be 0 or 1"),
        (turn(train="no"), "train='no' of a message must be 0 or 1"),
        (turn(images=["x"]), "the images of a message cannot be learned from"),
        ({"messages": [ASKED | {"train": True}, SAID]}, "only the assistant's are learned"),
        ({"messages": TURNS, "images": ["x"]}, "has images, which cannot be learned from"),
        ({"messages": TURNS, "weight": 0}, "has weight=0: mark single turns"),
        ({"messages": TURNS, "tools": "f"}, "tools that are no list of objects"),
        ({"messages": [{"role": "system", "content": "a"}, *TURNS], "system": "b"}, "keep one of them"),
        ({"prompt": "a", "completion": "b", "label": False}, "label=false, an answer not to be learned"),
        ({"prompt": "a", "completion": TURNS}, "prompt and completion must be two texts"),
        ({"prompt": "a", "completion": " "}, "prompt and completion must be two texts, the latter not empty"),
        ({"prompt": "a"}, 'has neither a non-empty "text" nor'),
        ({"instruction": "a"}, 'has neither a non-empty "text" nor'),
        ({"instruction": " ", "output": "a"}, 'an "instruction" or an "input" that is no text'),
        ({"instruction": "a", "output": ""}, 'an "output" that is no text'),
        ({"instruction": "a", "output": "b", "history": ["x"]}, 'a "history" that is no list of pairs'),
        (None, "has neither .* remove None"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(tmp_path, record, message):
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "fine"}, record))
    with pytest.raises(ValueError, match=rf"a\.jsonl:2.*{message}"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.jsonl", b"\xef\xbb\xbf" + lines({"text": "a"}, {"text": "b"}), ["a", "b"]),
        ("a.JSONL", b'{"text": "a"}\r\n\r\n  \r\n{"text": "b"}\r\n', ["a", "b"]),
        ("a.TXT", b"\xef\xbb\xbfsea\r\nand sky\r\n", ["sea\r\nand sky\r\n"]),
        ("a.json", b"\xef\xbb\xbf\n" + json.dumps([{"text": "a"}, {"text": "b"}], indent=2).encode(), ["a", "b"]),
        ("a.json", lines({"text": "a"}, {"text": "b"}), ["a", "b"]),
        ("a.jsonl.gz", gzip.compress(lines({"text": "a"}, {"text": "b"}), mtime=0), ["a", "b"]),
        ("a.json.GZ", gzip.compress(json.dumps([{"text": "a"}]).encode(), mtime=0), ["a"]),
        ("a.txt.gz", gzip.compress(b"sea", mtime=0), ["sea"]),
        ("a.jsonl", b'{"text": "a\\u0000b", "score": NaN}', ["a\0b"]),
    ],
)
def test_files_as_people_have_them(tmp_path, name, content, texts):
    (tmp_path / name).write_bytes(content)
    (file,) = records.find([tmp_path])
    found = list(records.read(file))
    assert [record.content for record in found] == texts and found[-1].read == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", json.dumps({"text": "a"}).encode("utf-16"), "a.jsonl:1 is not UTF-8 text: byte 0"),
        ("a.txt", "caf\xe9".encode("latin-1"), "a.txt is not UTF-8 text: byte 3"),
        ("a.txt", "sea".encode("utf-16-le"), "a.txt is not UTF-8 text: it has zero bytes"),
        ("a.json", b'[{"text": "a"}, 3]', r"a.json:2 has neither"),
        ("a.json", b'[{"text": "a"}', r"a.json is not JSON"),
        ("a.json", b"[]", r"a.json is empty: it has no record"),
        ("a.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}", r"a.jsonl:1 is not JSON: Exceeds the limit"),
        ("a.jsonl.gz", lines({"text": "a"}), r"a.jsonl.gz cannot be read: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(lines({"text": "a"}), mtime=0)[:-9], r"a.jsonl.gz cannot be read"),
    ],
)
def test_bad_files_are_one_clear_error(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


def test_what_a_folder_leaves_out_is_read_where_it_is_named(tmp_path):
    for name in ("a.jsonl", ".hidden.jsonl", ".git/b.jsonl", "deep/c.jsonl", "d.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(lines({"text": name}))
    for name, value in {"settings": {"seed": 1}, "e": {"text": "e"}, "f": [{"text": "f"}]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    (tmp_path / "state.json").write_text(json.dumps({"text": 1}, indent=2))
    assert [file.name for file in records.find([tmp_path])] == ["a.jsonl", "c.jsonl", "e.json", "f.json"]
    hidden = records.find([tmp_path / ".hidden.jsonl", tmp_path / ".git"])
    assert [read(file) for file in hidden] == [[".hidden.jsonl"], [".git/b.jsonl"]]


def test_parquet_rows_lose_the_fields_that_others_have(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "id": None}}]}
    rows = [
        {"messages": [ASKED | {"weight": None}, SAID], "tools": None},
        {"messages": [call, SAID | {"weight": 0}], "tools": TOOLS},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second = read(tmp_path / "a.parquet")
    assert first == formats.Chat(TURNS) and second.tools == TOOLS
    assert second.messages[0]["tool_calls"] == [{"function": {"name": "f"}}]
    assert second.messages[1] == SAID | {"train": False}
    columns = {"conversations": [[{"from": "human", "value": "x"}]], "other": [1]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet") == [formats.Chat([{"role": "user", "content": "x"}])]


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"prompt": "hi", "completion": "ho"}, [ASKED]),
        ({"prompt": [*TURNS, ASKED]}, [*TURNS, ASKED]),
        ({"conversations": [{"from": "human", "value": "hi"}]}, [ASKED]),
        ({"messages": [ASKED | {"content": [{"type": "text", "text": "hi"}]}]}, [ASKED]),
        ({"instruction": "hi", "output": "ho"}, [ASKED]),
    ],
)
def test_prompts_are_what_training_on_their_answers_sees(tmp_path, record, messages):
    (tmp_path / "a.jsonl").write_bytes(lines(record))
    (prompt,) = prompts.read(str(tmp_path / "a.jsonl"), tiny.ByteTokenizer(), 100)
    assert prompt.messages == messages
    whole = encode.chat_document("x", [*prompt.messages, SAID], tiny.ByteTokenizer())
    assert bytes(prompt.tokens + [*b"ho\n"]) == bytes(whole.tokens.tolist())
    assert not whole.response[len(prompt.tokens) - 1] and whole.response[len(prompt.tokens) :].all()


NAMES = st.sampled_from([*formats.FIELDS, "role", "content", "from", "value", "type", "tool_calls", "function_call"])
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.sampled_from(["user", "assistant", "text"])
)
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=8
)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(NAMES, JSON, max_size=5) | JSON)
def test_any_value_is_content_or_one_error(value):
    for parse in (formats.document, formats.prompt):
        try:
            content = parse("here", value)
        except ValueError as error:
            assert "here" in str(error)
            continue
        assert isinstance(content, formats.Content)
        for message in content.messages if isinstance(content, formats.Chat) else ():
            assert formats.turn("here", message) == message
