"""Evaluation against dense formulas, the arithmetic of its summaries, compile counts, and its section of a report."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from allmem_jax.evaluation import divergence, divergence_report
from allmem_jax.model import config as config_lib
from allmem_jax.model import lm
from allmem_jax.reporting import page as page_lib
from allmem_jax.reporting import sections

pytestmark = pytest.mark.core

LENGTH = 40


def tiny(**changes):
    fields = dict(
        vocab_size=61,
        d_model=16,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=8,
        d_ff=24,
        d_mem=8,
        window=12,
        sinks=2,
        chunk=8,
    )
    return config_lib.ModelConfig(**(fields | changes))


def tiny_model(seed=0, **changes):
    """A random model, filled in with NumPy: it saves compiling an initialisation."""
    config = tiny(**changes)
    rng = np.random.default_rng(seed)

    def fill(leaf):
        fan_in = leaf.shape[-2] if len(leaf.shape) > 2 else 1
        return jnp.asarray(rng.normal(0, fan_in**-0.5, leaf.shape), jnp.float32)

    params = jax.tree.map(fill, jax.eval_shape(lambda: lm.init_params(config)))
    return (config, *lm.split_params(params))


def tokens_like(config, count=3, length=LENGTH, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocab_size, (count, length + 1)).astype(np.int32)


def dense(params, config, tokens):
    inputs = jnp.asarray(tokens[:, :-1])
    hidden = divergence.hidden_states(params, config, inputs)
    return np.asarray(jax.nn.log_softmax(hidden @ lm.head_kernel(params, config)), np.float64)


def test_compare_equals_the_dense_formula_and_compiles_once_per_config():
    config, backbone, memory = tiny_model()
    tokens = tokens_like(config)
    variants = divergence.standard_variants(config, memory)
    divergence.hidden_states.clear_cache()
    scores = divergence.compare(config, backbone, tokens, variants, batch=2)
    doubled = [divergence.Variant("again", config, jax.tree.map(lambda x: 2 * x, memory))]
    divergence.compare(config, backbone, tokens[:1], doubled, batch=2)
    assert divergence.hidden_states._cache_size() == 4  # original, window, converted, writing off
    twice = np.concatenate([tokens, tokens[:1]])  # two pairs: the shape that is compiled already
    both = lambda *args: np.concatenate([dense(*args, twice[:2]), dense(*args, twice[2:])])[:3]  # noqa: E731
    teacher = both(backbone, config.replace(mixer="full"))
    pick = lambda log: -np.take_along_axis(log, tokens[:, 1:, None], -1)[..., 0]  # noqa: E731
    assert list(scores) == [divergence.ORIGINAL, divergence.SWA, divergence.CONVERTED, divergence.WRITE_OFF]
    close(scores[divergence.ORIGINAL]["ce"], pick(teacher))
    for variant in variants:
        student = both(lm.merge_params(backbone, variant.memory or {}), variant.config)
        close(scores[variant.name]["ce"], pick(student))
        close(scores[variant.name]["kl"], np.sum(np.exp(teacher) * (teacher - student), -1))


def close(got, want, tolerance=1e-5):
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


def test_windowed_attention_equals_the_original_inside_the_window_only():
    config, backbone, memory = tiny_model()
    scores = divergence.compare(
        config, backbone, tokens_like(config), divergence.standard_variants(config, memory), batch=2
    )
    kl = scores[divergence.SWA]["kl"]
    assert np.abs(kl[:, : config.window]).max() < 1e-5
    assert kl[:, config.window + config.sinks :].mean() > 1e-3
    written = np.abs(scores[divergence.CONVERTED]["kl"] - scores[divergence.WRITE_OFF]["kl"])
    assert written[:, : config.chunk].max() == 0, "nothing is written before the first chunk ends"
    assert written[:, config.chunk :].max() > 1e-5


def test_summaries_are_the_means_of_their_positions():
    rng = np.random.default_rng(0)
    kl, ce = rng.random((2, 3, LENGTH)).astype(np.float32)
    row = divergence.summarise({"x": {"kl": kl, "ce": ce}}, window=12, buckets=4)["x"]
    assert row["kl_inside"] == pytest.approx(kl[:, :12].mean(), rel=1e-6)
    assert row["ce_beyond"] == pytest.approx(ce[:, 12:].mean(), rel=1e-6)
    assert row["kl_curve"] == pytest.approx([kl[:, i : i + 10].mean() for i in (0, 10, 20, 30)], rel=1e-6)
    assert row["kl_blocks"] == pytest.approx([kl[n, i : i + 12].mean() for n in range(3) for i in (12, 24)], rel=1e-6)


def test_all_inside_leaves_nothing_beyond():
    row = divergence.summarise({"x": {"kl": np.ones((1, 8), np.float32)}}, window=8, buckets=2)["x"]
    assert row["kl_beyond"] is None and row["kl_blocks"] == []
    json.dumps(row, allow_nan=False)


def test_shares_of_the_gap():
    results = fake_results()
    shares = divergence.gap_closed(results, divergence.CONVERTED)
    assert shares == pytest.approx({"A": 0.25, "B": 0.5, "all texts": 1 - (0.3 + 2 * 0.1) / (0.4 + 2 * 0.2)})
    difference = divergence.gap_difference(results, divergence.CONVERTED, "control")
    assert difference["A"][0] == pytest.approx((0.35 - 0.3) / 0.4)
    blocks = np.array([0.04, 0.06])
    assert difference["A"][1] == pytest.approx(blocks.std(ddof=1) / 2**0.5 / 0.4)


def fake_results():
    def text(swa, memory, control):
        rows = {divergence.ORIGINAL: {"ce_inside": 3.0, "ce_beyond": 2.9, "ce_curve": [3.0, 2.9]}}
        for name, kl in ((divergence.SWA, swa), (divergence.CONVERTED, memory), ("control", control)):
            jitter = 0.01 if name == "control" else 0.0
            rows[name] = {
                "kl_inside": 1e-7,
                "kl_beyond": kl,
                "ce_inside": 3.0,
                "ce_beyond": 3.1,
                "kl_curve": [0.0, kl],
                "ce_curve": [3.0, 3.1],
                "kl_blocks": [kl - jitter, kl + jitter],
            }
        return rows

    return {
        "window": 12,
        "sinks": 2,
        "chunk": 8,
        "length": LENGTH,
        "sequences": {"A": 1, "B": 2},
        "positions": [10.0, 30.0],
        "variants": [divergence.ORIGINAL, divergence.SWA, divergence.CONVERTED, "control"],
        "texts": {"A": text(0.4, 0.3, 0.35), "B": text(0.2, 0.1, 0.1)},
    }


def test_window_and_sinks_do_not_recompile():
    config, backbone, _ = tiny_model(mixer="swa", vocab_size=57)
    tokens = jnp.asarray(tokens_like(config)[:1, :-1])
    before = divergence.hidden_states._cache_size()
    rng = np.random.default_rng(0)
    for window, sinks in rng.integers(1, 20, (5, 2)):
        hidden = divergence.hidden_states(backbone, config, tokens, jnp.int32(window), jnp.int32(sinks))
    want = divergence.hidden_states(backbone, config.replace(window=int(window), sinks=int(sinks)), tokens)
    close(np.asarray(hidden), np.asarray(want))
    assert divergence.hidden_states._cache_size() - before == 2  # one traced, one with the config's own


def test_cut_takes_the_middles():
    got = divergence.cut(list(range(100)), length=9, count=2)
    np.testing.assert_array_equal(got[:, 0], [20, 70])
    np.testing.assert_array_equal(got[1], range(70, 80))
    with_bos = divergence.cut(list(range(100)), length=9, count=1, prefix=[7])
    assert with_bos.shape == (1, 10) and with_bos[0, 0] == 7
    assert divergence.cut(list(range(20)), length=9, count=2).tolist() == [list(range(10)), list(range(10, 20))]


def test_errors_name_the_fix():
    config, backbone, memory = tiny_model()
    with pytest.raises(ValueError, match="19 tokens, and 2 sequences of length 9 need 20"):
        divergence.cut(list(range(19)), length=9, count=2)
    with pytest.raises(ValueError, match="length=0"):
        divergence.cut([1], length=0, count=1)
    with pytest.raises(ValueError, match=r"\[41\]"):
        divergence.compare(config, backbone, tokens_like(config)[0], divergence.standard_variants(config, None))
    with pytest.raises(ValueError, match="variants is empty"):
        divergence.compare(config, backbone, tokens_like(config), [])
    memory["layers"]["memory"]["alpha"] = memory["layers"]["memory"]["alpha"].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="'converted' gives non-finite losses from position 0"):
        divergence.compare(config, backbone, tokens_like(config), divergence.standard_variants(config, memory), batch=2)
    texts = {"a": tokens_like(config), "b": tokens_like(config, length=9)}
    with pytest.raises(ValueError, match=r"one length; got \[9, 40\]"):
        divergence.evaluate(config, backbone, texts, divergence.standard_variants(config, None))


def test_a_section_shows_the_evaluation(tmp_path):
    config, backbone, memory = tiny_model()
    texts = {"<script>alert(1)</script>": tokens_like(config), "prose": tokens_like(config, seed=1)}
    variants = divergence.standard_variants(config, memory)
    results = divergence.evaluate(config, backbone, texts, variants, batch=2)
    section = divergence_report.evaluation_section(
        results, divergence.CONVERTED, divergence.WRITE_OFF, command="allmem <x>"
    )
    page = page_lib.write(tmp_path / "out", page_lib.Report("A & B", (section,)))
    assert sorted(path.name for path in page.parent.iterdir()) == ["distance.png", "index.html", "report.json"]
    html = page.read_text()
    assert "<script" not in html and "&lt;script&gt;alert" in html and "A &amp; B" in html
    assert "percentage points" in html and "allmem &lt;x&gt;" in html
    saved = json.loads((page.parent / "report.json").read_text())
    assert saved["sections"][0]["data"] == results
    assert len(section.plots) == 3 and list(section.plots[2].lines) == [divergence.CONVERTED, divergence.WRITE_OFF]
    sections.save(tmp_path / "x.json", section)
    assert sections.load(tmp_path / "x.json") == section


def test_a_section_without_memory_and_without_a_beyond():
    config, backbone, _ = tiny_model()
    swa = divergence.standard_variants(config, None)
    results = divergence.evaluate(config, backbone, {"prose": tokens_like(config)}, swa, batch=2)
    section = divergence_report.evaluation_section(results)
    assert "nats per token from the original" in section.text[0] and len(section.tables) == 3
    short = divergence.evaluate(config, backbone, {"prose": tokens_like(config, length=config.window)}, swa, batch=2)
    section = divergence_report.evaluation_section(short, divergence.SWA, divergence.SWA)
    assert "All 12 positions lie inside the window" in section.text[0]
    assert section.tables[0].rows == (("prose", "-"),)


def test_the_difference_is_stated():
    rows = divergence_report.gap_rows(fake_results(), divergence.CONVERTED, "control")
    assert [row[0] for row in rows] == ["A", "B", "all texts"]
    assert rows[0][1:4] == ("25.0 %", "12.5 %", "+12.50 ± 2.50")
    assert "told apart" in divergence_report.verdict(fake_results(), divergence.CONVERTED, "control")
    assert "closes more" in divergence_report.verdict(fake_results(), divergence.CONVERTED, divergence.SWA)
