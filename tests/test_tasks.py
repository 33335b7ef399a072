"""Hidden questions: where the evidence stands, what counts as right, and that a mixer is compiled once a cache size."""

import dataclasses
import functools
import json
import pathlib
import re
import shlex

import numpy as np
import pytest
import tiny_folder
from tokenizers import processors

import allmem_jax
from allmem_jax import cli
from allmem_jax.decoding import generation
from allmem_jax.evaluation import divergence, haystacks, recall, recall_report
from allmem_jax.evaluation import questions as questions_lib
from allmem_jax.model import lm
from allmem_jax.reporting import sections

pytestmark = pytest.mark.core

WINDOW, SINKS, LENGTH = 300, 4, 900
TEXT = " ".join(f"the whale {n} and the sea {n * n} were white, and the ship sailed on." for n in range(300))
BOOK = questions_lib.Question(
    "Ahab", "ahab.txt", "the whale 150 and the\nsea 22500", "Ahab: which sea?", "It was", ("22500",)
)
QUESTIONS = pathlib.Path(__file__).parent.parent / "configs" / "book_questions.jsonl"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_folder.tiny_tokenizer()


def make(tokenizer, **changes):
    fields = dict(window=WINDOW, sinks=SINKS, chat=False, seed=3, questions=[BOOK])
    return haystacks.Prompts(tokenizer, {"ahab": TEXT}, **(fields | changes))


def item(answers, foils=(), every=False):
    return questions_lib.Item((), "", "", tuple(answers), foils=tuple(foils), every=every)


@pytest.mark.parametrize(
    ("answers", "foils", "every", "output", "right"),
    [
        (["apple"], ["river"], False, " apple.", True),
        (["apple"], ["river"], False, "Apple, not river", True),
        (["apple"], ["river"], False, "river, not apple", False),
        (["apple"], ["river"], False, "pineapple", False),
        (["apple"], [], False, "", False),
        (["viol-de-gambo", "viol"], [], False, "He plays the viol de gambo.", True),
        (["10,000"], [], False, "He paid 10000.", True),
        (["fire", "gold"], [], True, "gold and fire", True),
        (["fire", "gold"], [], True, "gold", False),
        (["KAB", "LOM"], ["ZID"], True, "KAB, LOM", True),
        (["KAB", "LOM"], ["ZID"], True, "KAB, LOM, ZID", False),
    ],
)
def test_what_is_right(answers, foils, every, output, right):
    assert recall.correct(item(answers, foils, every), output) is right


def test_the_answer_in_what_was_written():
    assert recall.named("Stone, then RIVER and a stone", ["river", "stone", "iron"]) == ["stone", "river"]
    assert recall.reply("needle", " apple.\nQuestion: river?", chat=False) == "apple."
    assert recall.reply("needle", "\napple\nriver", chat=False) == "apple"
    assert recall.reply("needle", " apple\nriver ", chat=True) == "apple\nriver"
    assert recall.reply("short_cloze", " sea, and", chat=False) == "sea,"
    assert recall.reply("short_cloze", "  ", chat=False) == ""


def test_intervals_by_hand():
    assert recall_report.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert recall_report.wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert recall_report.wilson(10, 10) == pytest.approx((0.7225, 1), abs=1e-4)
    ours, theirs = [True] * 6 + [False] * 4, [False] * 3 + [True] * 4 + [False] * 3
    # 3 gained, 1 lost of 10; with two pairs added 3.5 - 1.5 = 2 of 12, variance (5 - 4 / 12) / 144
    half = 1.959964 * ((5 - 4 / 12) / 144) ** 0.5
    assert recall_report.paired_difference(ours, theirs) == pytest.approx((0.2, 2 / 12 - half, 2 / 12 + half))
    middle, low, high = recall_report.paired_difference([True] * 8, [True] * 8)
    assert middle == 0 and low == -high < -0.1
    with pytest.raises(ValueError, match="3 and 2"):
        recall_report.paired_difference([True] * 3, [True] * 2)


def test_pieces_are_woven_in():
    tokens, ends = haystacks.weave([1, 2, 3], [(2, [8, 9]), (0, [7]), (2, [6]), (3, [5])])
    assert tokens == [7, 1, 2, 8, 9, 6, 3, 5]
    assert ends == [5, 1, 6, 8]


def places(tokens, piece):
    """Where a piece of tokens stands in others."""
    return [at for at in range(len(tokens)) if tokens[at : at + len(piece)] == piece]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("task", questions_lib.LONG)
def test_evidence_ends_a_window_before_the_question(tokenizer, task, chat):
    maker = make(tokenizer, chat=chat)
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    asked_before = "\n\n" if chat else "\nQuestion: "
    depths = []
    for index in range(1 if task == "book_questions" else 8):
        example = maker.make(task, LENGTH, index)
        assert example == maker.make(task, LENGTH, index)
        assert len(example.prompt) + questions_lib.room(task) == LENGTH
        (question,) = places(example.prompt, encode(asked_before + example.item.question)[:-1])
        spots = []
        for passage in example.item.evidence:
            (start,) = places(example.prompt, encode(passage))
            assert SINKS <= start and start + len(encode(passage)) + WINDOW <= question
            spots.append(start)
        assert spots == sorted(spots)
        assert example.distance == question - spots[0] - len(encode(example.item.evidence[0]))
        for passage in example.item.decoys:
            assert len(places(example.prompt, encode(passage))) == 1
        told = tokenizer.decode(example.prompt)
        assert told.rstrip().endswith(example.item.opening)
        assert told.startswith("<|im_start|>user\n") is chat
        if example.item.every or example.item.foils:
            assert not set(example.item.answers) & set(example.item.foils)
            assert all(answer in " ".join(example.item.evidence) for answer in example.item.answers)
        depths.append(example.depth)
    assert [int(depth * questions_lib.DEPTHS) for depth in depths[:4]] == [0, 1, 2, 3][: len(depths)]
    other = make(tokenizer, chat=chat, seed=4).make(task, LENGTH, 0)
    assert other.prompt != maker.make(task, LENGTH, 0).prompt


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(("count", "length"), [(1, LENGTH), (3, LENGTH), (12, 2000), (40, 4000)])
def test_pairs_are_spread_before_the_window_and_share_a_context(tokenizer, count, length, chat):
    maker, task = make(tokenizer, chat=chat), f"pairs_{count}"
    assert questions_lib.pairs(task) == count and questions_lib.questions(task) == min(count, 8)
    sharing = questions_lib.questions(task)
    examples = [maker.make(task, length, index) for index in range(2 * sharing)]
    contexts = [example.prompt[: example.context] for example in examples]
    assert all(context == contexts[0] for context in contexts[:sharing])
    assert all(context == contexts[-1] != contexts[0] for context in contexts[sharing:])
    assert len({example.item.question for example in examples[:sharing]}) == sharing
    for example in examples:
        assert length - 12 <= len(example.prompt) + questions_lib.room(task) <= length
        told = tokenizer.decode(example.prompt[SINKS : example.context - WINDOW])
        passages = [*example.item.evidence, *example.item.decoys]
        assert len(set(passages)) == count and all(told.count(passage) == 1 for passage in passages)
        names, words = zip(*(re.search(r"of (\w+) is (\w+)", passage).groups() for passage in passages), strict=True)
        assert len({*names}) == len({*words}) == count and example.item.answers == words[:1]
        assert questions_lib.needle_question(names[0]) == (example.item.question, example.item.opening)
        before = tokenizer.decode(example.prompt[: example.context - example.distance])
        assert before.endswith(example.item.evidence[0])
    foreign = [maker.make_elsewhere(task, length, index) for index in range(sharing)]
    assert all(after.prompt[: after.context] == foreign[0].prompt[: after.context] for after in foreign)
    told = tokenizer.decode(foreign[0].prompt[: foreign[0].context])
    hidden = re.findall(r"secret word of \w+ is (\w+)", told)
    assert len(hidden) >= count - 1
    for own, after in zip(examples, foreign, strict=False):
        assert after.prompt[after.context - WINDOW :] == own.prompt[own.context - WINDOW :]
        assert not {*hidden} & {*own.item.answers}


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("task", questions_lib.LONG)
def test_another_document_leaves_what_attention_sees(tokenizer, task, chat):
    text = TEXT.replace("the whale 40 and", "the crew of 40 and")
    other = dataclasses.replace(BOOK, anchor="the crew of 40 and the sea 1600", answers=("1600",))
    near = dataclasses.replace(BOOK, anchor="the whale 152 and the sea 23104", answers=("23104",))  # beside the first
    maker = haystacks.Prompts(
        tokenizer, {"ahab": text}, window=WINDOW, sinks=SINKS, chat=chat, seed=3, questions=[BOOK, near, other]
    )
    for index in range(maker.count(task, 4)):
        own, foreign = maker.make(task, LENGTH, index), maker.make_elsewhere(task, LENGTH, index)
        assert foreign == maker.make_elsewhere(task, LENGTH, index)
        assert dataclasses.replace(foreign, prompt=own.prompt) == own
        assert len(foreign.prompt) == len(own.prompt)
        (question,) = places(own.prompt, tokenizer.encode(own.item.question, add_special_tokens=False)[:-1])
        assert 0 < question - own.context <= len("\nQuestion: ")
        assert foreign.prompt[own.context - WINDOW :] == own.prompt[own.context - WINDOW :]
        assert foreign.prompt[:SINKS] == own.prompt[:SINKS]
        told = tokenizer.decode(foreign.prompt[: own.context])
        assert not any(passage in told for passage in own.item.evidence)
        hidden = re.findall(r"secret word of \w+ is \w+|Remember: \w+ = \w+", told)
        assert hidden or task == "book_questions"
        assert not recall.named(told if task == "book_questions" else " ".join(hidden), own.item.answers)
    assert all(
        make(tokenizer).make_elsewhere(name, LENGTH, 0) is None for name in ("short_needle", questions_lib.CLOSED_BOOK)
    )


def test_there_may_be_no_other_document(tokenizer):
    assert make(tokenizer).make_elsewhere("book_questions", LENGTH, 0) is None
    same = make(tokenizer, questions=[BOOK, dataclasses.replace(BOOK, question="And which sea?")])
    assert same.make_elsewhere("book_questions", LENGTH, 0) is None
    own, short = haystacks.Example(item(["a"]), [1] * 90, 80), haystacks.Example(item(["b"]), [2] * 30, 20)
    with pytest.raises(ValueError, match="has 30 tokens and 50 are to be replaced"):
        haystacks.with_context_of(own, short, 30, 2)
    assert haystacks.with_context_of(short, own, 15, 2).prompt == [2, 2, 1, 1, 1] + [2] * 25
    assert haystacks.with_context_of(short, own, 40, 2).prompt == short.prompt


def test_distance_follows_the_depth(tokenizer):
    examples = [make(tokenizer).make("needle", LENGTH, index) for index in range(4)]
    distances = [example.distance for example in examples]
    assert distances == sorted(distances, reverse=True) and WINDOW <= distances[-1] < distances[0] - 200


@pytest.mark.parametrize("task", questions_lib.SHORT)
def test_short_prompts_lie_within_the_window(tokenizer, task):
    maker = make(tokenizer, window=400)
    example = maker.make(task, LENGTH, 0)
    assert len(example.prompt) + questions_lib.room(task) == maker.length(task, LENGTH) == 400
    if task == "short_cloze":
        passage, answer = tokenizer.decode(example.prompt), example.item.answers[0]
        assert re.search(rf"\b{answer}\b", passage) and f"{passage} {answer}" in TEXT
    else:
        assert all(passage in tokenizer.decode(example.prompt) for passage in example.item.evidence)


def test_questions_about_books(tokenizer):
    absent = dataclasses.replace(BOOK, anchor="no such words")
    maker = make(tokenizer, questions=[absent, BOOK])
    assert [maker.count(task, 5) for task in ("book_questions", questions_lib.CLOSED_BOOK, "needle")] == [1, 1, 5]
    told = tokenizer.decode(maker.make("book_questions", LENGTH, 0).prompt)
    context = told[: told.index("\nQuestion: Ahab")]
    assert context in TEXT and "sea 22500 were" in context
    closed = make(tokenizer, chat=True).make(questions_lib.CLOSED_BOOK, LENGTH, 0)
    assert (
        tokenizer.decode(closed.prompt) == "<|im_start|>user\nAhab: which sea?<|im_end|>\n<|im_start|>assistant\nIt was"
    )
    assert closed.distance is None


def test_what_cannot_be_asked_is_refused(tokenizer, tmp_path):
    maker = make(tokenizer)
    for task, length, message in [
        ("needle", 400, "length=400 leaves no room for 'needle' before a window of 300 tokens: it takes"),
        ("needles", 900, "'needles', which is not one of needle"),
        ("pairs_0", 900, "'pairs_0', which is not one of needle"),
        ("pairs_16", 900, "length=900 leaves no room for 'pairs_16' before a window of 300 tokens"),
        ("pairs_99", 90_000, "pairs_99 needs 99 names and there are 48"),
        ("needle", 90_000, "give longer texts"),
        ("book_questions", 9000, "is too short for"),
    ]:
        with pytest.raises(ValueError, match=message):
            maker.make(task, length, 0)
    with pytest.raises(ValueError, match="length=100 leaves no room for 'short_needle' within"):
        make(tokenizer, window=100).make("short_needle", LENGTH, 0)
    with pytest.raises(ValueError, match="no anchor was found"):
        make(tokenizer, questions=[]).make("book_questions", LENGTH, 0)
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(dataclasses.asdict(BOOK)) + '\n{"title": "Ahab"}\n')
    with pytest.raises(ValueError, match="questions.jsonl:2 is not a question"):
        questions_lib.read_questions(path)
    with pytest.raises(ValueError, match="samples=0"):
        recall.Settings(("needle",), (LENGTH,), samples=0)
    with pytest.raises(ValueError, match="lengths="):
        recall.Settings(("needle",), ())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A converted model whose memory does something."""
    path = tiny_folder.write(tmp_path_factory.mktemp("models") / "plain")
    config, params, tokenizer = allmem_jax.load_pretrained(path, window=400, sinks=SINKS, chunk=8, d_mem=8)
    config = config.replace(mixer="allmem", alpha_init=0.5)
    params = lm.merge_params(params, lm.init_memory(config))
    allmem_jax.save_pretrained(path.parent / "converted", config, params, tokenizer)
    return path.parent / "converted"


@pytest.fixture(scope="module")
def loaded(folder):
    return allmem_jax.load_pretrained(folder)


@pytest.mark.slow
def test_variants_answer_the_same_prompts_with_one_program_a_cache_size(loaded, tmp_path, monkeypatch):
    config, params, tokenizer = loaded
    backbone, variants = recall.variants(config, params)
    assert [v.name for v in variants] == [
        divergence.ORIGINAL,
        divergence.SWA,
        recall.OTHER,
        divergence.WRITE_OFF,
        divergence.CONVERTED,
    ]
    assert variants[2].config == variants[4].config and variants[2].memory is variants[4].memory
    variants = [variant for variant in variants if variant.name != divergence.WRITE_OFF]
    settings = recall.Settings(
        ("needle", "short_needle", "short_cloze"), (LENGTH, 1000), samples=3, chat=False, batch=2
    )
    ask = lambda **changes: recall_report.section(  # noqa: E731
        dataclasses.replace(settings, **changes),
        backbone,
        tokenizer,
        {"ahab": TEXT},
        variants,
        parts=tmp_path,
        source="a",
        command="allmem recall",
    )
    for program in (generation.prefill_piece, generation.decode_step):
        program.clear_cache()
    section = ask()
    # the original within 512 tokens and within 1024, windowed attention, and the memory, whatever it has read
    assert generation.prefill_piece._cache_size() == generation.decode_step._cache_size() == 4
    results = section.data["results"]
    assert len(results) == 4 * len(variants)
    asked = {(r["task"], r["variant"]): len(r["examples"]) for r in results}
    assert len(list(tmp_path.iterdir())) == sum(bool(result["examples"]) for result in results)
    assert asked["needle", recall.OTHER] == 3 and asked["short_needle", recall.OTHER] == 0
    assert [row[5] for row in section.tables[0].rows[2:]] == ["-", "-"]
    near = {r["variant"]: [e["output"] for e in r["examples"]] for r in results if r["task"] == "short_needle"}
    assert near[divergence.ORIGINAL] == near[divergence.SWA]
    for result in results:
        assert [example["index"] for example in result["examples"]] == [0, 1, 2][
            : asked[result["task"], result["variant"]]
        ]
        room = questions_lib.room(result["task"])
        assert all(example["prompt_tokens"] == result["length"] - room for example in result["examples"])
    sections.save(tmp_path / "kept" / "recall.json", section)
    assert sections.load(tmp_path / "kept" / "recall.json") == section
    monkeypatch.setattr(generation, "answers", None)  # all is found again
    assert ask() == section
    with pytest.raises(TypeError):
        ask(seed=1)


@pytest.mark.slow
def test_a_context_is_read_once_for_all_its_questions(loaded, monkeypatch):
    config, params, tokenizer = loaded
    backbone, variants = recall.variants(config, params)
    chosen = [
        variant for variant in variants if variant.name in (divergence.ORIGINAL, recall.OTHER, divergence.CONVERTED)
    ]
    settings = recall.Settings(("pairs_3",), (1000,), samples=8, batch=2)
    read, prefill = [], generation.prefill
    monkeypatch.setattr(
        generation, "prefill", lambda *given, **named: read.append(given[2]) or prefill(*given, **named)
    )
    results = recall.measure(settings, backbone, tokenizer, {"ahab": TEXT}, chosen)
    maker = haystacks.Prompts(tokenizer, {"ahab": TEXT}, window=config.window, sinks=config.sinks, chat=False)
    whole, foreign = ([make("pairs_3", 1000, n) for n in range(8)] for make in (maker.make, maker.make_elsewhere))
    contexts, others = ([e.prompt[: e.context] for e in examples[::3]] for examples in (whole, foreign))
    assert contexts != others
    # two contexts and the three questions of each, then a third, as often as a batch has rows, and its two
    expected = [
        turn
        for first, second, third in (contexts, others, contexts)
        for turn in ([first, second], *[None] * 3, [third, third], *[None] * 2)
    ]
    assert [rows if len(rows[0]) > 200 else None for rows in read] == expected
    converted = [example["output"] for example in results[-1]["examples"]]
    assert [example["question"] for example in results[0]["examples"]] == [e.item.question for e in whole]
    params = lm.merge_params(backbone, chosen[-1].memory)
    alone = generation.generate(
        params,
        config,
        [example.prompt for example in whole],
        max_tokens=questions_lib.room("pairs_3"),
        stop_tokens=recall.text_lib.stop_tokens(tokenizer, config),
        piece=recall.PIECE,
    )
    texts = [recall.reply("pairs_3", tokenizer.decode(ids, skip_special_tokens=True), False) for ids in alone]
    assert texts == converted


def test_plots_by_length_and_by_pairs():
    def result(task, length, variant, marks):
        examples = [{"correct": bool(m), "distance": 400, "prompt_tokens": length - 8} for m in marks]
        return {"task": task, "length": length, "variant": variant, "examples": examples}

    results = [
        result(task, length, name, [1, share, 0, 0])
        for task in ("pairs_8", "pairs_2")
        for length in (600, 1200)
        for name, share in ((divergence.ORIGINAL, 1), (divergence.CONVERTED, length == 600))
    ]
    settings = recall.Settings(("pairs_8", "pairs_2"), (600, 1200))
    section = recall_report.describe(results, tiny_config(window=100), settings, "allmem recall")
    plots = {plot.title: plot.lines for plot in section.plots}
    assert list(plots) == [
        "pairs_8, by length",
        "pairs_2, by length",
        "pairs held at once, 600 tokens",
        "pairs held at once, 1200 tokens",
        "pairs_8, by distance",
        "pairs_2, by distance",
    ]
    assert plots["pairs_2, by length"] == {
        divergence.ORIGINAL: ((600.0, 1200.0), (0.5, 0.5)),
        divergence.CONVERTED: ((600.0, 1200.0), (0.5, 0.25)),
    }
    assert plots["pairs held at once, 1200 tokens"][divergence.CONVERTED] == ((2.0, 8.0), (0.25, 0.25))
    assert [row[:2] for row in section.tables[0].rows] == [
        ("pairs_8", "592"),
        ("pairs_8", "1192"),
        ("pairs_2", "592"),
        ("pairs_2", "1192"),
    ]


def test_tables_count_what_was_right():
    def result(task, length, variant, marks, distances):
        rows = zip(marks, distances, strict=True)
        examples = [{"correct": bool(m), "distance": d, "prompt_tokens": length - 8} for m, d in rows]
        return {"task": task, "length": length, "variant": variant, "examples": examples}

    far, near = [150, 200, 300, 500], [None, None]
    results = [
        result("needle", 600, divergence.ORIGINAL, [1, 1, 1, 0], far),
        result("needle", 600, recall.OTHER, [0, 1, 0, 0], far),
        result("needle", 600, divergence.WRITE_OFF, [0, 0, 0, 0], far),
        result("needle", 600, divergence.CONVERTED, [1, 0, 0, 0], far),
        result("short_cloze", 100, divergence.ORIGINAL, [1, 1], near),
        result("short_cloze", 100, recall.OTHER, [], []),
        result("short_cloze", 100, divergence.WRITE_OFF, [1, 1], near),
        result("short_cloze", 100, divergence.CONVERTED, [1, 0], near),
    ]
    config = tiny_config(window=100)
    section = recall_report.describe(
        results, config, recall.Settings(("needle", "short_cloze"), (600,)), "allmem recall"
    )
    accuracy, by_distance, difference = section.tables
    assert accuracy.rows[0][:3] == ("needle", "592", "4")
    cells = ["0.75", "0.25", "0.00", "0.25", "1.00", "-", "1.00", "0.50"]
    assert [cell[:4] for row in accuracy.rows for cell in row[3:]] == cells
    assert accuracy.header[3:] == (divergence.ORIGINAL, recall.OTHER, divergence.WRITE_OFF, divergence.CONVERTED)
    assert [row[:3] for row in by_distance.rows] == [
        ("needle", "100 to 200", "1"),
        ("needle", "200 to 400", "2"),
        ("needle", "400 to 800", "1"),
    ]
    assert [row[3][:4] for row in by_distance.rows] == ["1.00", "1.00", "0.00"]
    assert [[cell.split()[0] for cell in row[1:]] for row in difference.rows] == [
        ["-50.0", "-75.0", "-50.0"],
        ["-", "+0.0", "-50.0"],
    ]
    (plot,) = section.plots
    assert plot.lines[divergence.CONVERTED] == (pytest.approx((141.4, 282.8, 565.7), abs=0.1), (1.0, 0.0, 0.0))
    assert "cannot be told apart" in section.text[1] and "+25.0" in section.text[1]
    assert recall.OTHER in section.text[2] and "+0.0 [" in section.text[2]
    assert "Of 2 answers to prompts within the window" in section.text[3] and recall.OTHER not in section.text[3]
    assert "differs from the original by -50.0 [" in section.text[4]


def tiny_config(**changes):
    from test_model import TINY

    return TINY.replace(**changes)


@pytest.mark.slow
def test_the_command(folder, tmp_path, capsys):
    out = tmp_path / "out"
    text = tmp_path / "ahab.txt"
    text.write_text(TEXT)
    asked = ["--tasks", "short_needle", "--samples", "2", "--batch", "2", "--out", str(out)]
    assert cli.main(["recall", str(folder), str(text), *asked]) == 0
    section = sections.load(out / "recall.json")
    assert section.tables[0].rows[0][0] == "short_needle"
    assert " --samples 2 --seed 0 --batch 2 " in section.command and section.command.endswith(f" --out {out}")
    assert section.command.startswith(f"allmem recall {folder} {text} --tasks short_needle --lengths 1600 3200")
    assert "Share of right answers" in capsys.readouterr().out
    assert cli.main(["recall", str(folder), str(text), "--tasks", "book_questions"]) == 2
    assert "needs questions" in capsys.readouterr().err


def test_the_recorded_command_asks_for_the_same(monkeypatch):
    """Read by the command's own parser, it has the settings that it was recorded for."""
    settings = recall.Settings(("needle", "variables"), (512, 700), samples=3, chat=True, seed=5, batch=2)
    config = tiny_config(mixer="swa", window=40, sinks=3, chunk=10, dtype="bfloat16")
    paths = pathlib.Path("a model"), (pathlib.Path("a"), pathlib.Path("b c")), pathlib.Path("q.jsonl")
    asked = {}
    monkeypatch.setattr(cli, "recall", functools.wraps(cli.recall)(lambda **given: asked.update(given)))
    command = recall.command(*paths, settings, config, "some out")
    assert cli.main(shlex.split(command)[1:]) == 0
    assert (asked["model"], asked["texts"], asked["questions"], asked["out"]) == (*paths, "some out")
    assert (
        recall.Settings(**{field.name: asked[field.name] for field in dataclasses.fields(recall.Settings)}) == settings
    )
    assert asked["mixing"] == cli.options.Mixing(40, 3, 10, None, "swa", "bfloat16")
    assert cli.main(shlex.split(recall.command(paths[0], (), None, settings, config))[1:]) == 0
    assert asked["texts"] == () and asked["questions"] is None and asked["out"] == "out/recall"


def test_pairs_are_tasks(folder, tmp_path, monkeypatch):
    asked = []
    section = sections.Section("recall", "Recall", "allmem recall", data={})
    monkeypatch.setattr(
        recall_report, "section", lambda settings, *_, **named: asked.append((settings, named)) or section
    )
    (tmp_path / "ahab.txt").write_text(TEXT)
    words = ["recall", str(folder), str(tmp_path / "ahab.txt"), "--out", str(tmp_path / "out"), "--pairs", "1", "12"]
    assert cli.main(words) == 0 and cli.main([*words, "--tasks", "needle"]) == 0
    assert [settings.tasks for settings, _ in asked] == [("pairs_1", "pairs_12"), ("needle", "pairs_1", "pairs_12")]
    assert all(" pairs_1 pairs_12 --lengths" in named["command"] for _, named in asked)


def test_prompts_longer_than_in_training_are_told_of_once(tokenizer, monkeypatch):
    monkeypatch.setattr(generation, "answers", lambda params, config, prompts, **options: [[5]] * len(prompts))
    config = tiny_config(mixer="swa", window=WINDOW, sinks=SINKS, max_length=500)
    variants = [divergence.Variant(name, config.replace(mixer=name)) for name in ("full", "swa")]
    settings = recall.Settings(("needle", "short_needle"), (LENGTH,), samples=4, batch=1)
    with pytest.warns(UserWarning) as told:
        recall.measure(settings, lm.init_params(config), tokenizer, {"ahab": TEXT}, variants)
    message = (
        f"needle: prompts have up to {LENGTH - questions_lib.room('needle')} tokens, and the model was trained on 500"
    )
    assert [str(warning.message) for warning in told] == [message]


@pytest.mark.parametrize("chat", [False, True])
def test_prompts_begin_once_and_do_not_end(chat):
    """Of a tokenizer that puts a BOS before and an EOS after every text, as some do; the template has its own BOS."""
    tokenizer = tiny_folder.tiny_tokenizer()
    eos = tokenizer.eos_token_id
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|im_end|>", special_tokens=[("<|endoftext|>", 0), ("<|im_end|>", eos)]
    )
    tokenizer.chat_template = "<|endoftext|>" + tokenizer.chat_template
    for task in ("needle", "short_cloze", questions_lib.CLOSED_BOOK):
        ids = make(tokenizer, chat=chat).make(task, LENGTH, 0).prompt
        assert ids[0] == 0 and 0 not in ids[1:] and ids[-1] != eos
        assert ids.count(eos) == (chat and task != "short_cloze")


def test_templates_are_told_not_to_think_and_may_fail(tokenizer):
    tokenizer = tiny_folder.tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}{% if enable_thinking is false %}<quiet>{% endif %}"
    assert questions_lib.render(tokenizer, "Why?") == "Why?<quiet>"
    for template, message in (
        ("{{ raise_exception('no') }}", "fails on a user's message .TemplateError: no.: ask in plain text"),
        ("{% if", "the chat template fails"),
        ("{{ messages[0].content + 1 }}", "the chat template fails .*TypeError"),
        ("{{ messages[0].content }}" * 2, "writes a user's message 2 times"),
        ("hello", "writes a user's message 0 times"),
    ):
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=message):
            make(tokenizer, chat=True).make("needle", LENGTH, 0)


def test_the_fingerprint_follows_the_files(tmp_path):
    (tmp_path / "a").write_text("one")
    before = recall.fingerprint(tmp_path)
    assert before == recall.fingerprint(tmp_path)
    (tmp_path / "a").write_text("three")
    assert recall.fingerprint(tmp_path) != before


def test_the_questions_about_held_out_books(shakespeare_path):
    """Each is answered by its anchor, and neither by itself nor by the text within thousands of tokens around it."""
    questions = questions_lib.read_questions(QUESTIONS)
    assert len(questions) >= 24 and len({question.text for question in questions}) == 5
    for question in questions:
        text = (shakespeare_path / question.text).read_text(encoding="utf-8-sig")
        found = re.findall(r"\s+".join(map(re.escape, question.anchor.split())), text)
        assert len(found) == 1, question.anchor
        at = text.index(found[0])
        around = text[max(0, at - 12_000) : at] + "\n" + text[at + len(found[0]) :][:12_000]
        assert recall.named(found[0], question.answers), question.anchor
        assert not recall.named(around, question.answers), question.anchor
        assert not recall.named(f"{question.question} {question.opening}", question.answers), question.anchor
        assert question.title in question.question


def test_words_are_drawn_without_doubles():
    for index in range(50):
        rng = np.random.default_rng(index)
        for task, count in (
            ("needle_keys", questions_lib.KEYS),
            ("needle_values", questions_lib.VALUES),
            ("variables", 2 * 3),
        ):
            made = questions_lib._ITEMS[task](rng, ())
            told = [*made.evidence, *made.decoys]
            assert len(set(told)) == len(told) == count
