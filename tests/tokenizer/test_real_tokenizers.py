from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from npu_zoo.core.model_config import FimFormat
from npu_zoo.engine.detokenizer import IncrementalDetokenizer
from npu_zoo.engine.tokenizer import Tokenizer

VECTORS = Path(__file__).parent.parent / "data" / "tokenizer_vectors"
CHECK = json.loads((VECTORS / "llama_cpp_chkhsh.json").read_text("utf-8"))
CASES = [("deepseek-coder", "deepseek-coder"), ("deepseek-llm-moe", "deepseek-llm"), ("deepseek-v3", "deepseek-v3")]
LETTERS = "õ÷ÁýÀÿøúþüùöû"


def vectors(name: str) -> list[tuple[str, list[int]]]:
    text = (VECTORS / f"ggml-vocab-{name}.gguf.inp").read_bytes().decode()
    lines = (VECTORS / f"ggml-vocab-{name}.gguf.out").read_text("utf-8").splitlines()
    texts = text.split("\n__ggml_vocab_test__\n")[: len(lines)]
    return list(zip(texts, [list(map(int, line.split())) for line in lines], strict=True))


@pytest.mark.parametrize(
    ("folder", "name"), [("deepseek-coder", "deepseek-coder"), ("deepseek-llm-moe", "deepseek-llm")]
)
def test_llama_cpp_vectors(test_data: Path, folder: str, name: str) -> None:
    tokenizer = Tokenizer(test_data / "tokenizers" / folder)
    cases = vectors(name)
    assert len(cases) == 46
    for text, ids in cases:
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(("folder", "name"), CASES)
def test_llama_cpp_check_text(test_data: Path, folder: str, name: str) -> None:
    tokenizer = Tokenizer(test_data / "tokenizers" / folder)
    ids = tokenizer.encode(CHECK["text"])
    assert ids[0] == tokenizer.bos_token_id
    assert hashlib.sha256(str(ids).encode()).hexdigest() == CHECK["sha256"][name]


def test_the_thirteen_letters_come_back(real_tokenizer: Tokenizer) -> None:
    text = f"Führer {LETTERS} größer À la carte"
    assert real_tokenizer.decode(real_tokenizer.encode(text)) == text


def test_embedding_rows_beyond_the_vocabulary_are_silent(real_tokenizer: Tokenizer) -> None:
    assert real_tokenizer.token_text(real_tokenizer.vocab_size - 1) != ""
    assert real_tokenizer.decode(range(real_tokenizer.vocab_size, real_tokenizer.vocab_size + 300)) == ""


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_ids_decode_as_the_library_does(
    real_checkpoint: Path, real_tokenizer: Tokenizer, data: st.DataObject
) -> None:
    """The law for any ids: deltas join to decode(ids); without added letters decode(ids) is the library's."""
    ids = data.draw(st.lists(st.integers(0, real_tokenizer.vocab_size + 50), max_size=30))
    for skip in (True, False):
        detokenizer = IncrementalDetokenizer(real_tokenizer, skip_special_tokens=skip)
        deltas = [*map(detokenizer.append, ids), detokenizer.finish()]
        assert "".join(deltas) == real_tokenizer.decode(ids, skip) == detokenizer.text
    plain = [id_ for id_ in ids if real_tokenizer.token_text(id_) not in LETTERS]
    assert real_tokenizer.decode(plain, skip_special_tokens=False) == library_decode(real_checkpoint, plain)


_BACKENDS: dict[Path, Backend] = {}


def library_decode(checkpoint: Path, ids: list[int]) -> str:
    if checkpoint not in _BACKENDS:
        _BACKENDS[checkpoint] = Backend.from_file(str(checkpoint / "tokenizer.json"))
    return str(_BACKENDS[checkpoint].decode(ids, skip_special_tokens=False))


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(text=st.text())
def test_every_text_comes_back(real_tokenizer: Tokenizer, text: str) -> None:
    ids = real_tokenizer.encode(text, add_special_tokens=False)
    assert real_tokenizer.decode(ids, skip_special_tokens=False) == text


def test_the_coder_is_ready_for_chat_and_fim(test_data: Path) -> None:
    tokenizer = Tokenizer(test_data / "tokenizers" / "deepseek-coder")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.vocab_size) == (32013, (32021,), 32022)
    ids = tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    assert ids.count(32013) == 1
    assert tokenizer.decode(ids).startswith("You are an AI programming assistant")
    assert tokenizer.decode(ids).endswith("### Instruction:\nhi\n### Response:\n")
    fim = FimFormat(begin="<｜fim▁begin｜>", hole="<｜fim▁hole｜>", end="<｜fim▁end｜>")
    ids = tokenizer.fim_prompt("def f(", "):", fim)
    assert (ids[:2], ids.count(32015), ids[-1]) == ([32013, 32016], 1, 32017)
