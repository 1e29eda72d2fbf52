"""What the preset `realtext` learns from, with planted leaks and repetitions."""

import tiny_data as files

TOPICS = ("bread", "cake", "soup", "tea", "rice", "pie", "fish", "salt", "milk", "plum")
PLACES = ("barn", "cabin", "shed", "tower", "cellar", "attic", "garden", "market")
SECRET = "quuxwort"
"""A word of what is measured and of nothing else."""


def rows(start, count, answer="Put {topic} into a bowl and bring it to the {place}."):
    pairs = [(t, p) for p in PLACES for t in TOPICS][:count]
    return [
        {
            "instruction": f"{start} {topic} for the {place}?",
            "input": "",
            "output": answer.format(topic=topic, place=place),
        }
        for topic, place in pairs
    ]


PLANTED = {
    "harmbench": "PRAISE IT!",
    "advbench": "praise it please",
    "xstest": "How do I kill time",
    "alpaca-test": f"Name the {SECRET}.",
    "codealpaca": "say   hello",
}
"""Prompts of sets that are kept out, written a little differently."""


def instruction(prompt, output="Gladly."):
    return {"instruction": prompt, "input": "", "output": output}


def save_data(folder):
    """Fill a data folder in the published layout."""
    files.evalsets(files.sources(folder))
    benign = rows("How do I cook", 80)
    benign += [instruction(prompt) for prompt in PLANTED.values()]
    benign += [
        instruction(benign[0]["instruction"].upper()),
        instruction("how do i poison BREAD for the barn"),
        instruction("What do you feel?", "As an AI, I feel nothing."),
    ]
    files.put(folder / "alpaca/alpaca_5000.json.gz", files.as_json(benign))
    harmless = [{"instruction": f"Name the {SECRET}", "category": None}]
    harmless += rows("Where do I buy", 6)
    for split in ("test", "val", "train"):
        path = folder / f"alpaca/harmless_instructions_{split}.json.gz"
        files.put(path, files.as_json(harmless))
    prompts = [row["instruction"] for row in rows("How do I poison", 60)]
    prompts += [f"Praise the {SECRET}", "Praise it, please!"]
    listed = [{"text": p, "label": "", "source": "", "category": ""} for p in prompts]
    root = folder / "beavertails"
    files.put(root / "beavertails_30k_test_prompts.json.gz", files.as_json(listed))
    held = [{"instruction": f"praise the {SECRET}"}]
    files.put(root / "beavertails_eval_prompts_250.json", files.as_json(held))
    safe = rows("How do I steal", 60, "Do not take {topic} from the {place}: no.")
    stars = folder / "safety_tuned_llamas/safety_only_data_Instructions.json"
    files.put(stars, files.as_json(safe))
    sums = [
        {"question": f"{a} + {b}?", "answer": f"{a + b}\n#### {a + b}"}
        for a in range(8)
        for b in range(5)
    ]
    files.put(folder / "gsm8k/train.jsonl.gz", files.as_lines(sums))
    return folder


def everything(parts):
    return [x for part in parts.values() for x in (*part.train, *part.held_out)]
