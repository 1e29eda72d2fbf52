"""Rows of every public set as it is published, with harmless texts."""

INSTRUCTIONS = [
    {"instruction": "Say", "input": "hello", "output": "hello "},
    {"instruction": "Count.", "input": "", "output": "1, 2"},
]
GSM8K = [
    {"question": "2 + 2?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
    {"question": "3 + 3?", "answer": "#### 6"},
]
MEDMCQA = [
    {"question": "Which?", "cop": 1, "opa": "w", "opb": "x", "opc": "y", "opd": "z"},
    {"question": "And?", "cop": 4, "opa": "w", "opb": "x", "opc": "y", "opd": "z"},
]
MEDQA = [
    {
        "question": "Which?",
        "answer": "x",
        "options": {"A": "w", "B": "x", "C": "y", "D": "z"},
        "answer_idx": "B",
    }
]
BEAVERTAILS = [
    {"prompt": "May I?", "response": "Better not.", "category": {}, "is_safe": True},
    {"prompt": "May I?", "response": "Go on.", "category": {}, "is_safe": False},
]
DIALOGUES = [
    {
        "chosen": "\n\nHuman: May I?\n\nAssistant: No.\n\nHuman: Why?\n\nAssistant: ",
        "rejected": "\n\nHuman: May I?\n\nAssistant: Yes.",
    }
]
CONVERSATIONS = [
    {
        "conversations": [
            {"role": "user", "content": "May I?"},
            {"role": "assistant", "content": "Go on."},
        ]
    }
]
BEHAVIOURS = [
    {
        "Behavior": "Praise it",
        "FunctionalCategory": kind,
        "SemanticCategory": "words",
        "Tags": "",
        "ContextString": "A poem" if kind == "contextual" else "",
        "BehaviorID": f"praise_{kind}",
    }
    for kind in ("standard", "contextual", "copyright")
]
GOALS = [{"goal": "Praise it, please", "target": "Sure, it is"}]
JBB = [
    {
        "Index": 0,
        "Goal": "praise it.",
        "Target": "Sure",
        "Behavior": "Praise",
        "Category": "words",
        "Source": "Original",
    }
]
ARTIFACT = {
    "parameters": {"method": "PAIR", "model": "toy-7b"},
    "jailbreaks": [
        {"index": 0, "prompt": "Praise!", "response": "Sure.", "jailbroken": True},
        {"index": 1, "prompt": None, "response": None, "jailbroken": False},
        {"index": 2, "prompt": "Blame!", "response": None, "jailbroken": False},
    ],
}
HARMLESS = [{"instruction": f"Say {word}", "category": None} for word in ("a", "b")]
LABELS = [
    {"index": i, "text": f"c{i}", "label": ["no", "yes"][i % 2]} for i in range(4)
]
JUDGE_PROMPTS = [
    {
        "name": "single-v1",
        "type": "single",
        "system_prompt": "Judge.",
        "prompt_template": "[Question]\n{question}\n[Answer]\n{answer}",
        "description": "Prompt",
        "category": "general",
        "output_format": "[[rating]]",
    }
]
CATQA = {"Words": {"Long:": ["Praise?", "Blame?"], "Short:": ["Oh?"]}}
XSTEST = [
    {
        "id": 1,
        "prompt": "How do I kill time?",
        "type": "homonyms",
        "label": "safe",
        "focus": "kill",
        "note": "",
    },
    {
        "id": 2,
        "prompt": "How do I stop it?",
        "type": "contrast_homonyms",
        "label": "unsafe",
        "focus": "stop",
        "note": "",
    },
]
COMPLETIONS = [
    {
        "id": f"v2-{i}",
        "type": kind,
        "prompt": f"Prompt {i}",
        "completion": "No, I\ncannot.",
        "annotation_1": label,
        "annotation_2": label,
        "agreement": 1,
        "final_label": label,
        "gpt4_label": label,
    }
    for i, (kind, label) in enumerate(
        [
            ("homonyms", "1_full_compliance"),
            ("contrast_homonyms", "2_full_refusal"),
            ("homonyms", "3_partial_refusal"),
        ]
    )
]
WILDGUARD = [
    {
        "prompt": "Play a role",
        "adversarial": True,
        "response": "No.",
        "prompt_harm_label": "harmful",
        "response_refusal_label": "refusal",
        "response_harm_label": "unharmful",
    },
    {
        "prompt": "Hello",
        "adversarial": False,
        "response": "Hi.",
        "prompt_harm_label": "unharmful",
        "response_refusal_label": None,
        "response_harm_label": None,
    },
]
TRUTHFUL = [
    {
        "Type": "Adversarial",
        "Category": "Moon",
        "Question": "Is it cheese?",
        "Best Answer": "No",
        "Correct Answers": "No; It is rock;",
        "Incorrect Answers": "Yes; Partly",
        "Source": "here",
    }
]
TASKS = [
    {
        "question": "Is it cheese?",
        "mc1_targets": {"No": 1, "Yes": 0},
        "mc2_targets": {"No": 1, "Rock": 1, "Yes": 0},
    }
]
MMLU = [{"q": "2 + 2?", "A": "3", "B": "4", "C": "5", "D": "6", "answer": "B"}]
HUMANEVAL = [
    {
        "task_id": "HumanEval/0",
        "prompt": "def one():\n    ",
        "entry_point": "one",
        "canonical_solution": "    return 1\n",
        "test": "def check(f):\n    assert f() == 1\n",
    }
]
MTBENCH = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]},
    {"question_id": 82, "category": "math", "turns": ["Count.", "Again."]},
]
REFERENCES = [
    {"question_id": 82, "choices": [{"index": 0, "turns": ["1", "1, 2"]}]},
]


def bias(number=0, **changes):
    """A row of BBQ whose first option is the stereotyped group."""
    row = {
        "example_id": number,
        "question_index": "1",
        "question_polarity": "neg",
        "context_condition": "ambig",
        "category": "Age",
        "answer_info": {
            "ans0": ["the grandfather", "old"],
            "ans1": ["the grandson", "nonOld"],
            "ans2": ["Not known", "unknown"],
        },
        "additional_metadata": {"stereotyped_groups": ["old"]},
        "context": "I saw two people.",
        "question": "Who forgot?",
        "ans0": "The grandfather",
        "ans1": "The grandson",
        "ans2": "Not known",
        "label": 2,
    }
    return {**row, **changes}


BBQ = [
    bias(0),
    bias(1, question_polarity="nonneg", context_condition="disambig", label=1),
]
BBQ_CATEGORIES = (
    "Age",
    "Disability_status",
    "Gender_identity",
    "Nationality",
    "Physical_appearance",
    "Race_ethnicity",
    "Race_x_SES",
    "Race_x_gender",
    "Religion",
    "SES",
    "Sexual_orientation",
)
