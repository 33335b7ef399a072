"""Where a text ends: every place that states it, the union of them, and what an export says."""

import json
import shutil

import pytest
import tiny_folder
import transformers

import allmem_jax
from allmem_jax.checkpoints import ends, families
from allmem_jax.checkpoints import load as load_lib
from allmem_jax.model import config as config_lib
from allmem_jax.model import state


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tiny_folder.write(tmp_path_factory.mktemp("models") / "plain")


def edit(path, **changes):
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | changes))


@pytest.fixture
def folder(plain, tmp_path):
    """A copy to be changed, whose files state no end; the tokenizer knows <|endoftext|> (0) and <|im_end|> (2)."""
    shutil.copytree(plain, tmp_path / "model")
    edit(tmp_path / "model/config.json", eos_token_id=None)
    (tmp_path / "model/generation_config.json").unlink()
    return tmp_path / "model"


@pytest.mark.parametrize(
    "generation, config, files, wanted",
    [
        (None, None, (), (0, 2)),
        (7, None, (7,), (0, 2, 7)),
        ([7, 9], 5, (5, 7, 9), (0, 2, 5, 7, 9)),
        ([2, 2], [8], (2, 8), (0, 2, 8)),
    ],
)
def test_the_files_ends_are_joined(folder, generation, config, files, wanted):
    edit(folder / "generation_config.json", eos_token_id=generation, temperature=0.6)
    edit(folder / "config.json", eos_token_id=config)
    loaded, params, tokenizer = allmem_jax.load_pretrained(folder)
    assert loaded.eos_tokens == wanted and load_lib.read_config(folder).eos_tokens == files
    assert ends.of_tokenizer(tokenizer) == set(wanted)  # whoever holds the tokenizer alone
    out = folder.parent / "out"
    allmem_jax.save_pretrained(out, loaded, params, tokenizer)
    assert allmem_jax.load_pretrained(out)[0] == loaded
    assert transformers.GenerationConfig.from_pretrained(out).eos_token_id == list(wanted)
    assert transformers.AutoConfig.from_pretrained(out).eos_token_id == list(wanted)


def test_a_folder_without_a_tokenizer_keeps_its_ends(folder):
    for file in folder.glob("*token*"):
        file.unlink()
    edit(folder / "generation_config.json", eos_token_id=[7, 9])
    config, params, tokenizer = allmem_jax.load_pretrained(folder)
    allmem_jax.save_pretrained(folder.parent / "out", config, params)
    assert tokenizer is None and load_lib.read_config(folder.parent / "out").eos_tokens == (7, 9)
    assert allmem_jax.load_pretrained(folder, eos_tokens=(1,))[0].eos_tokens == (1,)
    allmem_jax.save_pretrained(folder.parent / "one", config.replace(eos_tokens=(7,)), params)
    assert transformers.GenerationConfig.from_pretrained(folder.parent / "one").eos_token_id == 7
    allmem_jax.save_pretrained(folder.parent / "none", config.replace(eos_tokens=()), params)
    assert transformers.GenerationConfig.from_pretrained(folder.parent / "none").eos_token_id is None


def test_nested_configs_state_ends():
    raw = {"eos_token_id": [1, 106], "text_config": {"eos_token_id": 3}}
    assert ends.gather(ends.of_hf(raw, {}), 200) == (1, 3, 106)
    assert ends.gather(ends.of_hf({"text_config": [3]}, {}), 200) == ()


def test_gguf_keys_state_ends():
    metadata = {
        f"tokenizer.ggml.{name}_token_id": index
        for index, name in enumerate(("bos", "eos", "eot", "eom", "padding", "unknown"))
    }
    assert ends.gather(ends.of_gguf(metadata), 10) == (1, 2, 3)
    with pytest.warns(UserWarning, match="tokenizer.ggml.eot_token_id: 2 is no token id below vocab_size=2"):
        assert ends.gather(ends.of_gguf(metadata | {"tokenizer.ggml.eom_token_id": 0}), 2) == (0, 1)


@pytest.mark.parametrize("bad", ["</s>", True, 2.0, -1, 10**6, [[7]], {"a": 1}, [7, None]])
def test_what_is_no_token_is_left_out_with_a_warning(folder, bad):
    edit(folder / "generation_config.json", eos_token_id=bad)
    with pytest.warns(UserWarning, match="eos_token_id of generation_config.json: .* no token id"):
        assert set(load_lib.read_config(folder).eos_tokens) <= {7}


@pytest.mark.parametrize(
    "template, wanted",
    [
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}<turn>\n{% endfor %}", "<turn>"),
        ("{% for m in messages %}{{ m.content }} <turn>{{ m.role }}{% endfor %}", "<turn>"),
        ("{% for m in messages %}<turn>{{ m.role }}: {{ m.content }}\n{% endfor %}", None),
        ("{% for m in messages %}{{ m.content }}<turn><|endoftext|>{% endfor %}", "<turn>"),
        ("{% for m in messages %}{{ m.content }}END{% endfor %}", None),
        ("{{ raise_exception('no') }}", None),
        ("{% for m in messages %}", None),
        ("{{ messages[0].content }}<turn>", None),
        (None, None),
    ],
)
def test_what_a_template_ends_an_answer_with(template, wanted):
    tokenizer = tiny_folder.tiny_tokenizer()
    tokenizer.add_tokens(["<turn", "<turn>"], special_tokens=True)
    tokenizer.chat_template = template
    known = {tokenizer.convert_tokens_to_ids(text) for text in ("<|endoftext|>", "<|im_end|>")}
    assert ends.of_tokenizer(tokenizer) == known | ({tokenizer.convert_tokens_to_ids(wanted)} if wanted else set())


def test_ends_do_not_make_another_model(tmp_path):
    one = config_lib.ModelConfig(
        vocab_size=9,
        d_model=8,
        n_layers=1,
        n_heads=1,
        n_kv_heads=1,
        head_dim=8,
        d_ff=8,
        window=4,
        sinks=0,
        chunk=4,
        d_mem=4,
        eos_tokens=(1, 3),
    )
    other = one.replace(eos_tokens=())
    assert families.differing_fields(one, other) == []
    state.save_state(tmp_path / "state", one, state.init_state(one, 1))
    state.load_state(tmp_path / "state", other)
    assert config_lib.ModelConfig.from_json(one.to_json()) == one
    older = {name: value for name, value in json.loads(one.to_json()).items() if name != "eos_tokens"}
    assert config_lib.ModelConfig.from_json(json.dumps(older)) == other
    for bad in ((9,), (-1,), (True,), (1.0,)):
        with pytest.raises(ValueError, match="eos_tokens=.*vocab_size=9"):
            one.replace(eos_tokens=bad)
