from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from npu_zoo.engine.tokenizer import Tokenizer

BOS, EOS, EOT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<|EOT|>"
FIM = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
LITERAL = ("ü", "ö", "Á", "<|User|>", *FIM)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '### Instruction:\\n' + m['content'] + '\\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ '### Response:\\n' + m['content'] + '\\n<|EOT|>\\n' }}"
    "{% else %}{{ raise_exception('no role ' + m['role']) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)
CONFIG: dict[str, Any] = {
    "add_bos_token": True,
    "bos_token": {"__type": "AddedToken", "content": BOS},
    "eos_token": {"__type": "AddedToken", "content": EOT},
    "pad_token": EOS,
    "tokenizer_class": "LlamaTokenizerFast",
    "chat_template": TEMPLATE,
}
TEXTS = ["def f(x):\n    return x + 1\n", "for i in range(10):\n        print(i)\n", "数据结构 数据 é è naïve"]


def byte_level() -> Backend:
    """A small tokenizer with special tokens like the family's: some added tokens are letters, and no special ones."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=sorted(alphabet), show_progress=False)
    backend.train_from_iterator(TEXTS * 4, trainer)
    backend.add_tokens([AddedToken(text, special=False, normalized=True) for text in LITERAL])
    backend.add_special_tokens([AddedToken(text, special=True) for text in (BOS, EOS)])
    backend.add_tokens([AddedToken(EOT, special=False)])
    return backend


def save(directory: Path, backend: Backend, config: dict[str, Any] | None = CONFIG) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return directory


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """What builds and saves tiny tokenizers: this module, which tests cannot import."""
    return sys.modules[__name__]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("byte_level"), byte_level())


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer(checkpoint)


@pytest.fixture(scope="session", params=["deepseek-coder", "deepseek-llm-moe", "deepseek-v3"])
def real_checkpoint(request: pytest.FixtureRequest, test_data: Path) -> Path:
    return test_data / "tokenizers" / str(request.param)


@pytest.fixture(scope="session")
def real_tokenizer(real_checkpoint: Path) -> Tokenizer:
    return Tokenizer(real_checkpoint)
