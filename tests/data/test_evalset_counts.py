"""The real evaluation sets have the published sizes.

Only shapes, labels and counts are looked at, never text.
"""

import collections

import pytest
from tiny_data import DATA, needs_data

from sbr_jax.data import load_evalset

COUNTS = {
    ("advbench", "all"): 520,
    ("alpaca_harmless", "test"): 6266,
    ("alpaca_harmless", "val"): 6264,
    ("beavertails_prompts", "eval"): 250,
    ("beavertails_prompts", "test"): 3021,
    ("catqa", "all"): 550,
    ("harmbench", "all"): 400,
    ("harmbench", "test"): 320,
    ("harmbench", "val"): 80,
    ("harmbench_contextual", "all"): 100,
    ("harmbench_copyright", "all"): 100,
    ("harmbench_standard", "all"): 200,
    ("humaneval", "all"): 164,
    ("jailbreakbench", "benign"): 100,
    ("jailbreakbench", "harmful"): 100,
    ("jailbreakbench_artifacts", "all"): 286,
    ("legalbench", "test"): 27046,
    ("medqa", "test"): 1273,
    ("mmlu", "dev"): 285,
    ("mmlu", "test"): 14042,
    ("mmlu", "val"): 1542,
    ("mtbench", "all"): 80,
    ("safety_tuned_questions", "I-CoNa"): 178,
    ("safety_tuned_questions", "I-MaliciousInstructions"): 100,
    ("truthfulqa", "current"): 817,
    ("truthfulqa", "v0"): 817,
    ("truthfulqa_mc1", "current"): 817,
    ("truthfulqa_mc1", "v0"): 817,
    ("truthfulqa_mc2", "current"): 817,
    ("truthfulqa_mc2", "v0"): 817,
    ("xstest", "safe"): 250,
    ("xstest", "unsafe"): 200,
    ("xstest_completions", "all"): 2250,
}


@needs_data
@pytest.mark.parametrize("key", sorted(COUNTS), ids="-".join)
def test_counts_of_the_real_files(key):
    items = load_evalset(key[0], DATA, split=key[1])
    assert len(items) == COUNTS[key]
    assert len({item.id for item in items}) == len(items)
    if key[0] in ("harmbench", "advbench"):
        assert sum(not item.target for item in items) == 0
    if key[0] == "mmlu":
        assert len({item.group for item in items}) == 57


@needs_data
def test_the_labelled_answers_have_both_verdicts():
    items = load_evalset("xstest_completions", DATA)
    verdicts = collections.Counter(item.verdict for item in items)
    expected = {"compliance": 1091, "refusal": 983, "partial refusal": 176}
    assert verdicts == expected
    assert sum(item.harmful_prompt for item in items) == 1000
