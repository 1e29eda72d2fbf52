"""Rows of every public set as it is published, with harmless texts."""


def rows(names, *values):
    """Rows of a table, from the names of its columns and the cells of each row."""
    return [dict(zip(names.split(), cells, strict=True)) for cells in values]


INSTRUCTIONS = rows(
    "instruction input output", ("Say", "hello", "hello "), ("Count.", "", "1, 2")
)
GSM8K = rows(
    "question answer", ("2 + 2?", "2 + 2 = <<2+2=4>>4\n#### 4"), ("3 + 3?", "#### 6")
)
MEDMCQA = rows(
    "question cop opa opb opc opd", ("Which?", 1, *"wxyz"), ("And?", 4, *"wxyz")
)
MEDQA = rows(
    "question answer options answer_idx",
    ("Which?", "x", dict(zip("ABCD", "wxyz", strict=True)), "B"),
)
BEAVERTAILS = rows(
    "prompt response category is_safe",
    ("May I?", "Better not.", {}, True),
    ("May I?", "Go on.", {}, False),
)
DIALOGUES = rows(
    "chosen rejected",
    (
        "\n\nHuman: May I?\n\nAssistant: No.\n\nHuman: Why?\n\nAssistant: ",
        "\n\nHuman: May I?\n\nAssistant: Yes.",
    ),
)
CONVERSATIONS = [
    {"conversations": rows("role content", ("user", "May I?"), ("assistant", "Go on."))}
]
BEHAVIOURS = rows(
    "Behavior FunctionalCategory SemanticCategory Tags ContextString BehaviorID",
    *(
        ("Praise it", kind, "words", "", context, f"praise_{kind}")
        for kind, context in (
            ("standard", ""),
            ("contextual", "A poem"),
            ("copyright", ""),
        )
    ),
)
GOALS = rows("goal target", ("Praise it, please", "Sure, it is"))
JBB = rows(
    "Index Goal Target Behavior Category Source",
    (0, "praise it.", "Sure", "Praise", "words", "Original"),
)
JBB_BOTH = rows("text label", ("x", "harmful"), ("praise it.", "safe"))
ARTIFACT = {
    "parameters": {"method": "PAIR", "model": "toy-7b"},
    "jailbreaks": rows(
        "index prompt response jailbroken",
        (0, "Praise!", "Sure.", True),
        (1, None, None, False),
        (2, "Blame!", None, False),
    ),
}
HARMLESS = rows("instruction category", ("Say a", None), ("Say b", None))
LABELS = rows(
    "index text label", *((i, f"c{i}", ["no", "yes"][i % 2]) for i in range(4))
)
CATQA = {"Words": {"Long:": ["Praise?", "Blame?"], "Short:": ["Oh?"]}}
XSTEST = rows(
    "id prompt type label focus note",
    (1, "How do I kill time?", "homonyms", "safe", "kill", ""),
    (2, "How do I stop it?", "contrast_homonyms", "unsafe", "stop", ""),
)
COMPLETIONS = rows(
    "id type prompt completion annotation_1 annotation_2 final_label gpt4_label "
    "agreement",
    *(
        (f"v2-{i}", kind, f"Prompt {i}", "No, I\ncannot.", *[label] * 4, 1)
        for i, (kind, label) in enumerate(
            (
                ("homonyms", "1_full_compliance"),
                ("contrast_homonyms", "2_full_refusal"),
                ("homonyms", "3_partial_refusal"),
            )
        )
    ),
)
WILDGUARD = rows(
    "prompt adversarial response prompt_harm_label response_refusal_label "
    "response_harm_label",
    ("Play a role", True, "No.", "harmful", "refusal", "unharmful"),
    ("Hello", False, "Hi.", "unharmful", None, None),
)
PROMPTS = rows("text label source category", ("May I?", "harmful", "", "{}"))
TRUTHFUL = [
    {
        **{"Type": "Adversarial", "Category": "Moon", "Question": "Is it cheese?"},
        **{"Best Answer": "No", "Correct Answers": "No; It is rock;"},
        **{"Incorrect Answers": "Yes; Partly", "Source": "here"},
    }
]
TASKS = rows(
    "question mc1_targets mc2_targets",
    ("Is it cheese?", {"No": 1, "Yes": 0}, {"No": 1, "Rock": 1, "Yes": 0}),
)
MMLU = rows("q A B C D answer", ("2 + 2?", *"3456", "B"))
HUMANEVAL = rows(
    "task_id prompt entry_point canonical_solution test",
    (
        *("HumanEval/0", "def one():\n    ", "one", "    return 1\n"),
        "def check(f):\n    assert f() == 1\n",
    ),
)
MTBENCH = rows(
    "question_id category turns",
    (81, "writing", ["Write.", "Again."]),
    (82, "math", ["Count.", "Again."]),
)


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
    *("Age", "Disability_status", "Gender_identity", "Nationality"),
    *("Physical_appearance", "Race_ethnicity", "Race_x_SES", "Race_x_gender"),
    *("Religion", "SES", "Sexual_orientation"),
)
