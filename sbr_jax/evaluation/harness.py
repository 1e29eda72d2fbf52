"""Runs our models and items in EleutherAI's evaluation harness (extra ``eval``).

``harness_model`` turns a model record into a model for ``lm_eval.simple_evaluate``;
:mod:`sbr_jax.evaluation.harness_tasks` turns items into its task dicts. Nothing is
downloaded, whereas the harness's own tasks would fetch their data from the hub. The
library is imported only when a function is called.

Tried with lm-eval 0.4.13.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sbr_jax.data import control, exchange, template, text
from sbr_jax.evaluation.harness_tasks import import_harness
from sbr_jax.evaluation.result import Result
from sbr_jax.evaluation.runner import (
    ModelRunner,
    cut,
    decode_after,
    decode_answer,
    encode_options,
)
from sbr_jax.evaluation.scorer import score
from sbr_jax.models import generate
from sbr_jax.typing import UserError

DEFAULT_NEW_TOKENS = 256


def encode_requests(
    tokenizer: Any, requests: Sequence[tuple[str, str]], *, chat: bool = False
) -> list[tuple[list[int], list[int]]]:
    """Token ids of contexts and their continuations, split as in our own tasks.

    Continuations of the same context are scored from the same token on; see
    :func:`~sbr_jax.evaluation.runner.encode_options`. Only control tokens that the chat
    template writes act as control tokens.

    Args:
      tokenizer: a transformers tokenizer.
      requests: texts, as a harness sends them option by option.
      chat: whether the chat template wrote the contexts. Then they begin as the
        template does, with or without BOS; plain ones begin with one BOS.
        begins then, with BOS or without, and plain ones with one BOS.

    Returns:
      Both parts per request, in order.
    """
    by_context: dict[str, list[int]] = {}
    for place, (context, _) in enumerate(requests):
        by_context.setdefault(context, []).append(place)
    out: list[tuple[list[int], list[int]]] = [([], [])] * len(requests)
    for context, places in by_context.items():
        options = [control.mark(tokenizer, requests[place][1]) for place in places]
        before = context if chat else control.mark(tokenizer, context)
        pairs = encode_options(tokenizer, before, options, plain=not chat)
        for place, pair in zip(places, pairs, strict=True):
            out[place] = pair
    return out


def harness_model(runner: ModelRunner) -> Any:
    """Wraps a runner's model as an ``lm_eval`` model.

    Log-likelihoods go through our scorer and answers through our generator. Texts are
    encoded as in our own tasks: a plain text begins with BOS exactly once, one from the
    chat template as the template has it. The harness's own switch
    (``apply_chat_template``) decides which is used, so a runner with a system message
    is refused. A model serves one kind of evaluation: make another model for the other
    kind.

    Args:
      runner: model, weights and budget; its ``too_long`` says what happens to prompts
        that exceed the model's context.

    Returns:
      An ``lm_eval.api.model.TemplateLM``.

    Raises:
      UserError: if lm-eval is not installed, or the runner has a system message.
    """
    import_harness()
    if runner.system is not None:
        raise UserError(
            "harness: expected a runner without a system message; pass it as "
            "system_instruction to lm_eval.simple_evaluate"
        )
    utils = importlib.import_module("lm_eval.utils")
    template_lm: Any = importlib.import_module("lm_eval.api.model").TemplateLM
    model, tokenizer = runner.model, runner.model.tokenizer
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    class HarnessModel(template_lm):
        """A model record as the harness sees it."""

        rendered = False
        """Whether the chat template wrote the texts; else they are plain data."""

        @property
        def eot_token_id(self) -> int:
            return eos if eos is not None else model.config.eos[0]

        @property
        def prefix_token_id(self) -> int:
            return bos if bos is not None else self.eot_token_id

        @property
        def max_length(self) -> int:
            return model.config.context

        @property
        def tokenizer_name(self) -> str:
            return str(tokenizer.name_or_path).replace("/", "__")

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            self.rendered = True
            history, begun = tuple(chat_history), ""
            if not add_generation_prompt:
                *history, last = history
                begun = control.mark(tokenizer, last["content"])
            where = template.place(tokenizer, text.Record(tuple(history)))
            return where.before + (where.space + begun if begun else "")

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **_: Any
        ) -> list[int]:
            if not self.rendered:
                string = control.mark(tokenizer, string)
            ids = control.encode(tokenizer, string)
            if add_special_tokens is None:
                add_special_tokens = not self.rendered
            if not add_special_tokens or bos is None or ids[:1] == [bos]:
                return ids
            return [bos, *ids]

        def loglikelihood(
            self, requests: Sequence[Any], disable_tqdm: bool = False
        ) -> list[tuple[float, bool]]:
            texts = [request.args for request in requests]
            asked = [text for text in texts if text[0]]
            encoded = iter(encode_requests(tokenizer, asked, chat=self.rendered))
            pairs = [
                next(encoded) if context else self._alone(text)
                for context, text in texts
            ]
            return self._loglikelihood_tokens([(None, *pair) for pair in pairs])

        def _alone(self, text: str) -> tuple[list[int], list[int]]:
            """Without a context: BOS, or its substitute, is there exactly once."""
            first, ids = self.prefix_token_id, self.tok_encode(text, False)
            return [first], ids[1:] if ids[:1] == [first] else ids

        def _loglikelihood_tokens(
            self, requests: Sequence[Any], disable_tqdm: bool = False, **_: Any
        ) -> list[tuple[float, bool]]:
            scores = score(
                model,
                runner.base,
                runner.adapter,
                [runner.fit(context, ending) for _, context, ending in requests],
                budget=runner.budget,
            )
            return [(float(s.log_likelihoods[0]), bool(s.greedy[0])) for s in scores]

        def loglikelihood_rolling(
            self, requests: Sequence[Any], disable_tqdm: bool = False
        ) -> list[float]:
            out = []
            for request in requests:
                windows = utils.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0], False),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
                pairs = [(None, *utils.make_disjoint_window(w)) for w in windows]
                out.append(sum(ll for ll, _ in self._loglikelihood_tokens(pairs)))
            return out

        def generate_until(
            self, requests: Sequence[Any], disable_tqdm: bool = False
        ) -> list[str]:
            by_settings: dict[str, list[int]] = {}
            for place, request in enumerate(requests):
                wish = json.dumps(request.args[1], sort_keys=True)
                by_settings.setdefault(wish, []).append(place)
            out = [""] * len(requests)
            for wish, places in by_settings.items():
                contexts = [requests[i].args[0] for i in places]
                answers = self._answers(contexts, json.loads(wish))
                for place, answer in zip(places, answers, strict=True):
                    out[place] = answer
            return out

        def _answers(self, contexts: list[str], wish: dict[str, Any]) -> list[str]:
            until = wish.get("until") or []
            until = [until] if isinstance(until, str) else until
            warm = float(wish.get("temperature", 0.0)) if wish.get("do_sample") else 0.0
            limit = int(wish.get("max_gen_toks", DEFAULT_NEW_TOKENS))
            room = self.max_length - limit
            prompts = [runner.shorten(self.tok_encode(c), room) for c in contexts]
            stops, read = (), decode_after
            if self.rendered:
                stops, read = exchange.stop_tokens(tokenizer), decode_answer
            written = generate(
                model,
                runner.base,
                runner.adapter,
                prompts,
                max_new_tokens=limit,
                temperature=warm,
                key=jax.random.key(0) if warm > 0 else None,
                batch_size=runner.batch_size,
                batch_tokens=runner.budget.tokens,
                stops=stops,
            )
            return [
                cut(read(tokenizer, before, ids), until)
                for before, ids in zip(prompts, written, strict=True)
            ]

    lm = HarnessModel()
    lm.tokenizer = tokenizer
    return lm


def evaluate_with_harness(
    runner: ModelRunner, tasks: Sequence[Mapping[str, Any]], **options: Any
) -> dict[str, Result]:
    """Runs task dicts through ``lm_eval.simple_evaluate``.

    Options are those of ``simple_evaluate`` (``limit``, ``apply_chat_template``, …).

    Returns:
      For each task its metrics (as the harness names them, in 0..1), the harness's
      version, and for each item its log-likelihoods and the most likely option.
    """
    lm_eval = import_harness()
    manager = importlib.import_module("lm_eval.tasks").TaskManager
    found = lm_eval.simple_evaluate(
        model=harness_model(runner),
        tasks=[dict(task) for task in tasks],
        task_manager=manager(include_defaults=False),
        **{"bootstrap_iters": 0, **options},
    )
    out = {}
    for task in tasks:
        name = task["task"]
        rows = []
        for sample in sorted(found["samples"][name], key=lambda s: s["doc_id"]):
            log_p = [float(response[0][0]) for response in sample["resps"]]
            rows.append(
                {
                    "id": sample["doc_id"],
                    "pick": int(np.argmax(log_p)),
                    "log_likelihoods": log_p,
                }
            )
        metrics = {
            metric: value
            for metric, value in found["results"][name].items()
            if isinstance(value, float)
        }
        settings = {"lm_eval": lm_eval.__version__, "too_long": runner.too_long}
        out[name] = Result(metrics, settings, rows)
    return out
