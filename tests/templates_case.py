"""Chat templates in the manner of the great families, over a tiny byte-level BPE."""

import dataclasses
import functools

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'] "
    "+ ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}"
    "<|end_header_id|>\n\n{{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    "{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>\n"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA31 = (
    "{% if date_string is not defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday Date: "
    "{{ date_string }}\n\n{% if messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] | trim }}{% endif %}<|eot_id|>"
    "{% for m in messages if m['role'] != 'system' %}<|start_header_id|>{{ m['role'] }}"
    "<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    "{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set rest = messages[1:] %}"
    "{% set system = messages[0]['content'] + '\n\n' %}{% else %}"
    "{% set rest = messages %}{% set system = '' %}{% endif %}{% for m in rest %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ ' [INST] ' ~ (system if loop.first else '') ~ "
    "m['content'] ~ ' [/INST]' }}{% else %}{{ ' ' + m['content'] | trim + eos_token }}"
    "{% endif %}{% endfor %}"
)
# Without a generation prompt for the header, as older templates are.
HEADLESS = CHATML.partition("{% if add_generation_prompt %}")[0]
THOUGHTS = "<think>\n\n</think>\n\n"
# Thoughts of the last answer are kept, or an empty block is set; `enable_thinking`
# has the model begin behind one.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% set content = m['content'] %}"
    "{% set thoughts = '' %}{% if '</think>' in content %}"
    "{% set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.last %}{{ '<think>\n' + thoughts + '\n</think>\n\n' }}{% endif %}"
    "{{ content.lstrip('\n') }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
THINKING_MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ '<think>\n\n</think>\n\n' + m['content'] }}<|im_end|>\n"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The prompt opens a block of thoughts that the answers of the past do not have.
OPENED = CHATML.replace(
    "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Family:
    template: str
    bos: str | None
    eos: str
    stop: str
    """What ends an answer; everything after it is not learned."""
    space: str = ""
    """What the template sets before the answer, as a part of it."""


FAMILIES = {
    "llama-2": Family(LLAMA2, "<s>", "</s>", " </s>", space=" "),
    "llama-3": Family(LLAMA3, "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>"),
    "llama-3-base-eos": Family(LLAMA3, "<|begin_of_text|>", "</s>", "<|eot_id|>"),
    "chatml": Family(CHATML, None, "<|im_end|>", "<|im_end|>"),
    "chatml-other-eos": Family(CHATML, None, "</s>", "<|im_end|>"),
    "chatml-marked": Family(CHATML_MARKED, None, "<|im_end|>", "<|im_end|>"),
    "chatml-marked-other-eos": Family(CHATML_MARKED, None, "</s>", "<|im_end|>"),
    "gemma": Family(GEMMA, "<bos>", "<eos>", "<end_of_turn>"),
    "llama-3.1": Family(LLAMA31, "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>"),
    "mistral": Family(MISTRAL, "<s>", "</s>", "</s>", space=" "),
    "headless": Family(HEADLESS, None, "</s>", "<|im_end|>"),
    "thinking": Family(THINKING, None, "<|im_end|>", "<|im_end|>"),
    "thinking-marked": Family(THINKING_MARKED, None, "</s>", "<|im_end|>"),
    "opened": Family(OPENED, None, "<|im_end|>", "<|im_end|>"),
}
SPECIAL = [
    *("<pad>", "<s>", "</s>", "<bos>", "<eos>", "<|begin_of_text|>", "<|eot_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|im_start|>", "<|im_end|>"),
    *("<start_of_turn>", "<end_of_turn>"),
]
QUESTION, ANSWER = "How long is a day?", "A day has 24 hours.\nNo more."


@functools.cache
def trained():
    """A byte-level BPE that merges common pairs, line breaks among them."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    inner = Tokenizer(BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=340,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = f"user\nmodel\nassistant\n\n[INST] [/INST] {QUESTION} {ANSWER}\n"
    inner.train_from_iterator([text] * 4, trainer)
    return inner.to_str()


def tokenizer(family):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer.from_str(trained())
    inner.add_tokens(["<think>", "</think>"])  # Not special, as published.
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token=family.bos,
        eos_token=family.eos,
        chat_template=family.template,
        clean_up_tokenization_spaces=False,
    )
