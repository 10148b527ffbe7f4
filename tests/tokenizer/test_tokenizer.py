from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from npu_zoo.core.errors import PromptError, TokenizerError
from npu_zoo.core.model_config import FimFormat
from npu_zoo.engine.tokenizer import CHECK_TEXT, Tokenizer

BOS, EOS, EOT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<|EOT|>"
FIM = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
LITERAL = ("ü", "ö", "Á", "<|User|>", *FIM)
TEXTS = ["def f(x):\n    return x + 1\n", "for i in range(10):\n        print(i)\n", "数据结构 数据 é è naïve"]
FIM_FORMAT = FimFormat(begin=FIM[0], hole=FIM[1], end=FIM[2])


def ids_of(tokenizer: Tokenizer, *texts: str) -> list[int]:
    return [id_ for text in texts for id_ in tokenizer.encode(text, add_special_tokens=False)]


def metaspace(*, adds_bos: bool = True) -> Backend:
    """A tokenizer as Llama 2's: byte fallback, a space before the text, bos by the post-processor."""
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=tokens, show_progress=False)
    backend.train_from_iterator(TEXTS * 4, trainer)
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    backend = Backend.from_str(json.dumps(state))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def test_loading_needs_neither_torch_nor_transformers(checkpoint: Path) -> None:
    code = (
        "import sys; from npu_zoo.engine.tokenizer import Tokenizer; Tokenizer(sys.argv[1]).encode('x');"
        "sys.exit(' '.join({'torch', 'torch_npu', 'transformers'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, checkpoint], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_encodes_and_decodes_as_transformers_does(checkpoint: Path, tokenizer: Tokenizer) -> None:
    reference = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    for text in [*TEXTS, CHECK_TEXT, f"{BOS}a{EOT}b<|User|>c", ""]:
        ids = reference.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        plain = [id_ for id_ in ids if tokenizer.token_text(id_) not in LITERAL[:3]]
        assert tokenizer.decode(plain) == reference.decode(plain, skip_special_tokens=True)
        assert tokenizer.decode(plain, skip_special_tokens=False) == reference.decode(plain)
    assert {id_ for id_ in range(tokenizer.vocab_size) if tokenizer.is_special(id_)} == set(reference.all_special_ids)
    assert tokenizer.vocab_size == len(reference)


def test_byte_level_keeps_its_spaces_whatever_class_is_named(
    tiny: ModuleType, checkpoint: Path, tokenizer: Tokenizer
) -> None:
    assert tiny.CONFIG["tokenizer_class"] == "LlamaTokenizerFast"
    text = "if  x:\n        return  y"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text())
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(ids_of(tokenizer, text), skip_special_tokens=False) == text


def test_bos_is_added_once(tokenizer: Tokenizer) -> None:
    bos = tokenizer.bos_token_id
    assert bos is not None
    assert tokenizer.encode("x") == [bos, *ids_of(tokenizer, "x")]
    assert tokenizer.encode(BOS + "x") == [bos, *ids_of(tokenizer, "x")]
    assert tokenizer.encode("") == [bos]
    assert bos not in ids_of(tokenizer, "x")


@pytest.mark.parametrize("config", [{"add_bos_token": False, "bos_token": BOS}, {"bos_token": BOS}, None])
def test_bos_is_not_added_unasked(tiny: ModuleType, tmp_path: Path, config: dict[str, object] | None) -> None:
    tokenizer = Tokenizer(tiny.save(tmp_path, tiny.byte_level(), config))
    assert tokenizer.encode("x") == ids_of(tokenizer, "x")


def test_special_ids_are_told_apart_from_literal_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_token_ids == tuple(ids_of(tokenizer, EOT))
    assert all(tokenizer.is_special(id_) for id_ in ids_of(tokenizer, BOS, EOS, EOT))
    assert not any(tokenizer.is_special(id_) for id_ in ids_of(tokenizer, *LITERAL, "x"))
    assert tokenizer.decode(ids_of(tokenizer, "a", BOS, "b", EOT)) == "ab"
    assert tokenizer.decode(ids_of(tokenizer, "a", BOS, "b", EOT), skip_special_tokens=False) == f"a{BOS}b{EOT}"


def test_added_tokens_are_literal(tokenizer: Tokenizer) -> None:
    assert len(ids_of(tokenizer, "ü")) == 1
    assert tokenizer.decode(ids_of(tokenizer, "Führer öÁ", *FIM, "<|User|>")) == "Führer öÁ" + "".join(FIM) + "<|User|>"


@pytest.mark.parametrize("dead", [10**6, 2**40, -1])
def test_dead_ids_decode_to_nothing(tokenizer: Tokenizer, dead: int) -> None:
    assert (tokenizer.token_text(dead), tokenizer.token_bytes(dead), tokenizer.is_special(dead)) == ("", b"", False)
    assert tokenizer.decode([*ids_of(tokenizer, "ab"), dead, *ids_of(tokenizer, "c")]) == "abc"
    assert tokenizer.token_text(tokenizer.vocab_size - 1) != ""
    assert tokenizer.token_text(tokenizer.vocab_size) == ""


def test_half_a_character_is_no_prompt(tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptError, match=r"'\\ud800' at 1"):
        tokenizer.encode("a\ud800")
    with pytest.raises(PromptError, match="not int"):
        tokenizer.encode(3)  # type: ignore[arg-type]


def test_truncation_in_tokenizer_json_does_not_cut_prompts(tiny: ModuleType, tmp_path: Path) -> None:
    backend = tiny.byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    text = "def f(x): return x"
    assert Tokenizer(tiny.save(tmp_path, backend)).decode(Tokenizer(tmp_path).encode(text)) == text


def test_tokens_that_only_the_config_lists_are_added(tiny: ModuleType, tmp_path: Path) -> None:
    size = tiny.byte_level().get_vocab_size()
    config = tiny.CONFIG | {"added_tokens_decoder": {str(size): {"content": "<new>", "special": True}}}
    tokenizer = Tokenizer(tiny.save(tmp_path, tiny.byte_level(), config))
    assert ids_of(tokenizer, "<new>") == [size]
    assert tokenizer.is_special(size)
    tiny.save(
        tmp_path, tiny.byte_level(), tiny.CONFIG | {"added_tokens_decoder": {str(size + 5): {"content": "<new>"}}}
    )
    with pytest.raises(TokenizerError, match=f"<new>.*id {size + 5}"):
        Tokenizer(tmp_path)


def test_a_vocabulary_with_merges_goes_through_autotokenizer(tmp_path: Path, tiny: ModuleType) -> None:
    backend = tiny.byte_level()
    backend.model.save(str(tmp_path))
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "a", "eos_token": "b", "unk_token": "a"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode(CHECK_TEXT), skip_special_tokens=False) == CHECK_TEXT
    assert tokenizer.eos_token_ids == (backend.token_to_id("b"),)


# SentencePiece's kind


def test_sentencepiece_style_with_bos_from_the_post_processor(tiny: ModuleType, tmp_path: Path) -> None:
    config = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizer"}
    tokenizer = Tokenizer(tiny.save(tmp_path, metaspace(), config))
    reference = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in [*TEXTS, CHECK_TEXT]:
        assert tokenizer.encode(text) == reference.encode(text)
        assert tokenizer.encode(text)[0] == tokenizer.bos_token_id == 1
        assert tokenizer.decode(tokenizer.encode(text)) == text == reference.decode(tokenizer.encode(text), True)
    assert tokenizer.encode("<s>x").count(1) == 1


def test_sentencepiece_style_continues_with_its_space(tiny: ModuleType, tmp_path: Path) -> None:
    tokenizer = Tokenizer(tiny.save(tmp_path, metaspace(), {"bos_token": "<s>"}))
    ids = ids_of(tokenizer, "return x")
    assert tokenizer.decode(ids) == "return x"
    assert tokenizer.decode(ids, continues=True) == " return x"


def test_add_bos_token_false_wins_over_the_post_processor(tiny: ModuleType, tmp_path: Path) -> None:
    tokenizer = Tokenizer(tiny.save(tmp_path, metaspace(), {"add_bos_token": False, "bos_token": "<s>"}))
    assert 1 not in tokenizer.encode("x")


# What is refused


def test_a_tokenizer_that_loses_text_is_refused(tiny: ModuleType, tmp_path: Path) -> None:
    backend = tiny.byte_level()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(TokenizerError, match=r"'def f\(x: int\).*became 'deff\(x:int\).*download") as caught:
        Tokenizer(tiny.save(tmp_path, backend))
    assert str(tmp_path) in str(caught.value)


def test_an_unknown_decoder_is_refused(tiny: ModuleType, tmp_path: Path) -> None:
    backend = tiny.byte_level()
    backend.decoder = decoders.WordPiece()
    with pytest.raises(TokenizerError, match="decodes with WordPiece; known are ByteLevel"):
        Tokenizer(tiny.save(tmp_path, backend))


def test_a_bos_that_is_no_token_is_refused(tiny: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"bos_token '<nowhere>', which tokenizer\.json lacks"):
        Tokenizer(tiny.save(tmp_path, tiny.byte_level(), {"bos_token": "<nowhere>"}))


def test_missing_and_damaged_files_are_named(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(TokenizerError, match="is no directory"):
        Tokenizer(tmp_path / "nowhere")
    with pytest.raises(TokenizerError, match=r"holds no tokenizer; looked for tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"no protobuf")
    with pytest.raises(TokenizerError, match=r"cannot load the tokenizer|needs the package"):
        Tokenizer(tmp_path)
    damaged = (checkpoint / "tokenizer.json").read_text("utf-8")[:-20]
    (tmp_path / "tokenizer.json").write_text(damaged, "utf-8")
    with pytest.raises(TokenizerError, match="cannot load the tokenizer"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("with_file", [True, False])
def test_code_in_the_directory_does_not_run(tiny: ModuleType, tmp_path: Path, with_file: bool) -> None:
    if with_file:
        tiny.save(tmp_path, tiny.byte_level())
    canary = tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w').close()\nclass Evil:\n    pass\n"
    (tmp_path / "evil.py").write_text(code, "utf-8")
    auto_map = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    config = tiny.CONFIG | {"tokenizer_class": "Evil", "auto_map": auto_map}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}), "utf-8")
    if with_file:
        assert Tokenizer(tmp_path).encode("x")
    else:
        with pytest.raises(TokenizerError):
            Tokenizer(tmp_path)
    assert not canary.exists()


# Chat


def test_chat_uses_the_checkpoints_template_with_one_bos(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    text = tokenizer.render_chat(messages, add_generation_prompt=True)
    assert text == f"{BOS}### Instruction:\nhi\n### Response:\nho\n{EOT}\n### Response:\n"
    assert tokenizer.render_chat(messages, add_generation_prompt=False) == text.removesuffix("### Response:\n")
    assert tokenizer.chat_template_source == "checkpoint"
    assert tokenizer.encode_chat(messages).count(tokenizer.bos_token_id) == 1
    assert tokenizer.encode_chat(messages) == ids_of(tokenizer, text)


def test_chat_as_transformers_renders_it(checkpoint: Path, tokenizer: Tokenizer) -> None:
    reference = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    messages = [{"role": "user", "content": "a < b & 'c' {{ x }}", "name": None}]
    expected = reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert tokenizer.render_chat(messages) == expected
    assert (
        tokenizer.encode_chat(messages)
        == reference.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    )


@pytest.mark.parametrize("adds_bos", [True, False])
def test_chat_falls_back_to_the_familys_template(tiny: ModuleType, tmp_path: Path, adds_bos: bool) -> None:
    config = {key: value for key, value in tiny.CONFIG.items() if key != "chat_template"}
    template = tiny.TEMPLATE if adds_bos else tiny.TEMPLATE.replace("{{ bos_token }}", "")
    tiny.save(tmp_path, tiny.byte_level(), config)
    tokenizer = Tokenizer(tmp_path, chat_template=template, chat_template_adds_bos=adds_bos)
    assert tokenizer.chat_template_source == "family"
    ids = tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids) == "### Instruction:\nhi\n### Response:\n"


def test_chat_template_files_are_read(tiny: ModuleType, tmp_path: Path) -> None:
    named = [{"name": "tool", "template": "no"}, {"name": "default", "template": "from the list"}]
    tiny.save(tmp_path, tiny.byte_level(), tiny.CONFIG | {"chat_template": named})
    assert Tokenizer(tmp_path).render_chat([{"role": "user", "content": "x"}]) == "from the list"
    (tmp_path / "chat_template.jinja").write_text("from the file", "utf-8")
    assert Tokenizer(tmp_path).render_chat([{"role": "user", "content": "x"}]) == "from the file"


def test_no_template_at_all(tiny: ModuleType, tmp_path: Path) -> None:
    tokenizer = Tokenizer(tiny.save(tmp_path, tiny.byte_level(), {"bos_token": BOS}))
    assert tokenizer.chat_template_source is None
    with pytest.raises(PromptError, match="no chat template"):
        tokenizer.render_chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ([], "at least one"),
        ("hello", "list of messages"),
        ([{"content": "x"}], "message 0 of the conversation lacks a role"),
        (
            [{"role": "user", "content": "x"}, {"role": "user"}],
            r"message 1 .*\(user\) lacks a content",
        ),
        (["x"], "message 0"),
        ([{"role": "judge", "content": "x"}], "the chat template refuses the conversation: .*no role judge"),
    ],
)
def test_conversations_that_are_refused(tokenizer: Tokenizer, messages: list[dict[str, str]], fault: str) -> None:
    with pytest.raises(PromptError, match=fault):
        tokenizer.render_chat(messages)


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{% for %}", "{{ messages[0]['content'] + 1 }}"],
)
def test_a_template_that_breaks_out_or_down_is_a_prompt_error(tiny: ModuleType, tmp_path: Path, template: str) -> None:
    tokenizer = Tokenizer(tiny.save(tmp_path, tiny.byte_level(), tiny.CONFIG | {"chat_template": template}))
    with pytest.raises(PromptError, match="the chat template refuses"):
        tokenizer.render_chat([{"role": "user", "content": "x"}])


# Fill in the middle


def test_fim_prompt_is_the_literal_text_with_bos(tokenizer: Tokenizer) -> None:
    ids = tokenizer.fim_prompt("def f(", "):\n    pass", FIM_FORMAT)
    assert ids == tokenizer.encode(f"{FIM[0]}def f({FIM[1]}):\n    pass{FIM[2]}")
    assert ids[0] == tokenizer.bos_token_id


def test_fim_tokens_in_the_text_stay_text(tokenizer: Tokenizer) -> None:
    prefix, suffix = f"HOLE = '{FIM[1]}'{FIM[1]}", FIM[2]
    ids = tokenizer.fim_prompt(prefix, suffix, FIM_FORMAT)
    assert [ids.count(id_) for id_ in ids_of(tokenizer, *FIM)] == [1, 1, 1]
    assert tokenizer.decode(ids) == FIM[0] + prefix + FIM[1] + suffix + FIM[2]


def test_fim_without_the_tokens_is_refused(tiny: ModuleType, tmp_path: Path) -> None:
    tokenizer = Tokenizer(tiny.save(tmp_path, metaspace(), {"bos_token": "<s>"}))
    with pytest.raises(PromptError, match=f"lacks {FIM[0]}, {FIM[1]}, {FIM[2]}"):
        tokenizer.fim_prompt("a", "b", FIM_FORMAT)
