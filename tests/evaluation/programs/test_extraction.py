from __future__ import annotations

import pytest

from npu_zoo.core.model_config import EvaluationFormat
from npu_zoo.evaluation.programs.extraction import code_blocks, program_of_answer, program_of_completion
from npu_zoo.evaluation.programs.humaneval import Problem
from npu_zoo.registry import get_registry

PROMPT = 'from math import floor\n\n\ndef helper(x):\n    return x\n\n\ndef down(x):\n    """The integer below x."""\n'
PROBLEM = Problem("T/0", PROMPT, "down", "    return floor(x)\n", "")
RULES = EvaluationFormat(instruction="{prompt}")
DEFINITION = "def down(x):\n    return floor(helper(x))\n"


def answer_of(source: str) -> object:
    names: dict[str, object] = {}
    exec(source, names)
    down = names["down"]
    assert callable(down)
    return down(2.5)


@pytest.mark.parametrize(
    "completion",
    [
        "    return floor(x)\n",
        "    return floor(x)\n\ndef main():\n    broken(",
        "    return floor(x)\n\nprint(down(3))\nbroken(",
        "    return floor(x)\n# that is all, isn't it",
        "    return floor(x)\nif __name__ == '__main__':\n    broken(",
        "    return floor(x)\n\nclass Other:\n  broken(",
        "    return floor(x)\n\n@broken(",
        "    return floor(x)\n```\nThis function",
        "    # a remark\n    if x:\n        return floor(x)\n    return 0\n\n\ndef other",
    ],
)
def test_completions_end_with_the_function(completion: str) -> None:
    assert answer_of(program_of_completion(PROBLEM, completion)) == 2


@pytest.mark.parametrize(
    "answer",
    [
        f"Here it is:\n```python\n{DEFINITION}```\nIt rounds down.",
        f"```python\n{PROMPT}    return floor(x)\n```",
        f"```\n{DEFINITION}```",
        f"~~~py\n{DEFINITION}~~~",
        f"````python\n{DEFINITION}````",
        "1. So:\n\n   ```python\n   def down(x):\n       return floor(x)\n   ```\n",
        f"```python\n{DEFINITION}",
        f"Install it:\n```bash\npip install x\n```\nand\n```python\n{DEFINITION}```",
        f"```python\n{DEFINITION}```\nUse it:\n```python\nprint(down(1)); broken(\n```",
        f"```python\n{DEFINITION}\nprint(down('x'))\nassert down(1) == 7\nfor x in 'x':\n    down(x)\n```",
        DEFINITION,
        f"{PROMPT}    return floor(x)\n",
        f"Sure! The function:\n\n{DEFINITION}\nI hope that this helps.",
        "    return floor(x)\n",
        "return floor(x)",
        "```python\n    return floor(x)\n```",
        "```python\nif x > 1:\n    return floor(x)\nreturn 0\n```",
        "\n    return floor(x)\n",
        "```python\nimport math\n\n@staticmethod\ndef other(): ...\n\ndef down(x):\n    return math.floor(x)\n```",
    ],
)
def test_answers_hold_the_function(answer: str) -> None:
    assert answer_of(program_of_answer(PROBLEM, answer, RULES)) == 2


@pytest.mark.parametrize(
    "source",
    [
        "import sys; sys.setrecursionlimit(2000)\nTABLE = {{}}\nfor i in range(5):\n    TABLE[i] = i\n{whole}",
        "TABLE = dict()\nTABLE.update({{2: 2}})\n{whole}",
        "TABLE = {{}}\nTABLE |= {{2: 2}}\n{whole}",
        "TABLE = {{}}\nwith __import__('contextlib').suppress(OSError):\n    TABLE[2] = 2\n{whole}",
        "print('é', 1); TABLE = {{2: 2}}; print(\n'é')\n{whole}",
        "TABLE = {{2: 2}}\n# a\fpage\u2028ends\n{whole}print(down(2), 1 / 0)\n",
        "TABLE = {{2: 2}}\n{whole}def main():\n    print(down(float(input())))\n\n\nmain()\n",
        "TABLE = {{2: 2}}\n{whole}if __name__ != 'x':\n    def other(): pass\n    1 / 0\n",
        "TABLE = {{2: 2}}\n{whole}try:\n    down('x') / 0\nexcept OSError:\n    pass\nwhile True:\n    input()\n",
    ],
)
def test_what_an_answer_needs_is_kept_and_its_examples_are_not(source: str) -> None:
    whole = "def down(x):\n    return TABLE[floor(helper(x))]\n"
    assert answer_of(program_of_answer(PROBLEM, f"```python\n{source.format(whole=whole)}```", RULES)) == 2


def test_which_of_two_definitions_is_a_family_s_rule() -> None:
    text = f"```python\ndef down(x):\n    return 1\n```\nBetter:\n```python\n{DEFINITION}```"
    assert answer_of(program_of_answer(PROBLEM, text, RULES)) == 1
    assert answer_of(program_of_answer(PROBLEM, text, EvaluationFormat(instruction="{prompt}", code_block="last"))) == 2


def test_tabs_become_spaces_where_a_family_writes_them() -> None:
    text = "```python\ndef down(x):\n\tif x:\n        return floor(x)\n```"
    assert answer_of(program_of_answer(PROBLEM, text, EvaluationFormat(instruction="{prompt}", tabs=True))) == 2


@pytest.mark.parametrize("answer", ["", "I cannot do that.", "```python\n```", "```python\ndef other(): pass\n```"])
def test_answers_without_the_function_give_no_program_that_passes(answer: str) -> None:
    source = program_of_answer(PROBLEM, answer, RULES)
    try:
        assert answer_of(source) is None
    except SyntaxError:
        assert answer in source


def test_code_blocks() -> None:
    text = "a\n```py\n1\n  ```py\n2\n```\n~~~\n```\n~~~\n"
    assert list(code_blocks(text)) == ["1\n  ```py\n2\n", "```\n"]


@pytest.mark.parametrize(
    ("family", "told"),
    [
        (
            "deepseek_coder",
            "Please continue to complete the function. You are not allowed to modify the given code and do the "
            "completion only. Please return all completed function in a codeblock. Here is the given code to do "
            'completion:\n```python\ndef f():\n    """F."""\n```',
        ),
        ("wizardcoder", 'Create a Python script for this problem:\ndef f():\n\t"""F."""'),
    ],
)
def test_families_are_told_what_their_makers_told_them(family: str, told: str) -> None:
    rules = get_registry().families[family].evaluation
    assert rules is not None
    assert rules.instruct('def f():\n    """F."""\n') == told


def test_an_instruction_holds_the_prompt() -> None:
    with pytest.raises(ValueError, match=r"holds \{prompt\} once"):
        EvaluationFormat(instruction="Write it.")
