"""Checkpoints of a study on a chat model: found and checked before weights are read.

Configuration, tokenizer and the headers of the weights tell whether a model can be
used, in a second instead of minutes.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sbr_jax import models
from sbr_jax.data.template import fix_template
from sbr_jax.data.text import encode_prompts
from sbr_jax.evaluation import Judge, KeywordJudge
from sbr_jax.evaluation.judges.guard import (
    GuardJudge,
    first_tokens,
    harmbench_classifier,
    llama_guard,
    wild_guard,
)
from sbr_jax.methods.judges import as_text, label_likelihood_judge
from sbr_jax.methods.risk import Judge as RiskJudge
from sbr_jax.models import hf_config
from sbr_jax.models.weights import check_weights
from sbr_jax.studies.options import ChatOptions
from sbr_jax.typing import UserError

SMALL_FILES = ["*.json", "tokenizer.model", "*.jinja", "*.txt"]
"""What is fetched from the hub where weights are not wanted."""


def locate(model: str | Path, *, weights: bool, option: str = "--model") -> Path:
    """The folder of a checkpoint, fetched from the hub where it is an id.

    Args:
        model: a folder, or the id of a model on the hub.
        weights: whether to fetch those too.
        option: that named it, for messages.

    Raises:
        UserError: if there is neither.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(model)):
        raise UserError(
            f"{option}: expected a checkpoint folder or a hub id like 'owner/name', "
            f"got '{model}'"
        )
    from huggingface_hub import snapshot_download

    patterns = [*SMALL_FILES, *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(str(model), allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{option}: '{model}' is no folder here and could not be fetched from the "
            f"hub ({type(error).__name__}): name a folder, or check the network and "
            "whether its terms must be accepted"
        ) from error


def read_record(
    model: str | Path, *, date: str | None = None, thinking: bool | None = None
) -> tuple[models.Model, Path]:
    """The model without its weights: configuration and tokenizer, and its folder.

    The headers of the weights are checked where they are here; those of a hub id are
    fetched last, when all else was found in order.

    Args:
        model: a folder, or the id of a model on the hub.
        date: that its template is told.
        thinking: whether it thinks before it answers, if its template has that switch.

    Raises:
        UserError: for an unknown family, an unsupported setting, and a tokenizer that
            is missing, has no chat template, or one that writes BOS twice or never.
    """
    folder = locate(model, weights=False)
    config = hf_config.read(folder)
    tokenizer = models.load_tokenizer(folder, vocab_size=config.vocab_size)
    if Path(model).is_dir():
        check_weights(folder, config)
    if tokenizer is None:
        raise UserError(f"expected a tokenizer in {folder}, found none")
    if not tokenizer.chat_template:
        raise UserError(
            f"expected a tokenizer with a chat template in {folder}, got one without: "
            "use the -Chat or -Instruct checkpoint of this model"
        )
    tokenizer = fix_template(tokenizer, date=date, thinking=thinking)
    encode_prompts(tokenizer, ["Hello."])
    return models.make_model(config, None, tokenizer), folder


def locate_all(
    model: str | Path, options: ChatOptions, *, weights: bool
) -> dict[str, Path]:
    """The folder of every checkpoint that decides a number, by what it is for.

    Args:
        model: a folder, or the id of a model on the hub.
        options: that name the others.
        weights: whether to fetch those from the hub too.

    Raises:
        UserError: if one is missing or damaged.
    """
    found = {"model": locate(model, weights=weights)}
    for name in ("unaligned_folder", "judge_folder"):
        folder = getattr(options, name)
        if folder is not None:
            place = locate(folder, weights=weights, option=f"study.{name}")
            config = hf_config.read(place)
            if weights or Path(folder).is_dir():
                check_weights(place, config)
            found[name] = place
    return found


SHAPE = ("layers", "width", "mlp_width", "heads", "kv_heads", "head_dim")
"""What two checkpoints have in common if one can be taken from the other."""


def check_unaligned(places: Mapping[str, Path], config: models.ModelConfig) -> None:
    """Refuse another model in the place of the one before its alignment.

    Args:
        places: of `locate_all`.
        config: of the aligned model.

    Raises:
        UserError: naming the first size that differs.
    """
    place = places.get("unaligned_folder")
    if place is None:
        return
    before = hf_config.read(place)
    for name in SHAPE:
        wanted, got = getattr(config, name), getattr(before, name)
        if wanted != got:
            raise UserError(
                f"study.unaligned_folder: expected the model before its alignment, "
                f"with {name}={wanted}, got another with {name}={got} in {place}"
            )


def load_model(
    folder: Path,
    *,
    dtype: str,
    quantize: str | None = None,
    mesh: str | None = None,
    remat: bool = False,
) -> models.Model:
    """The model with its weights, on one device or spread over a mesh."""
    from sbr_jax.training.sharding import make_mesh

    # The option is named only where it is asked for.
    options = {} if quantize is None else {"quantize": quantize}
    return models.load(
        folder,
        dtype=jnp.dtype(dtype),
        mesh=None if mesh is None else make_mesh(mesh),
        hardware=models.Hardware(remat=remat),
        **options,
    )


def digest(folder: Path, blocks: int = 64, size: int = 4096) -> str:
    """A hash of a checkpoint's configuration, headers and some of its weights.

    Stop tokens that only its `generation_config.json` names are part of it.
    """
    text = (folder / "config.json").read_bytes()
    found = hashlib.sha256(text)
    own = json.loads(text).get("eos_token_id")
    own = own if isinstance(own, list) else [own]
    if more := [token for token in hf_config.read(folder).eos if token not in own]:
        found.update(json.dumps(more).encode())
    for path in sorted(folder.glob("*.safetensors")):
        length = path.stat().st_size
        found.update(f"{path.name} {length}".encode())
        with path.open("rb") as file:
            for place in np.linspace(0, max(length - size, 0), blocks).astype(int):
                file.seek(int(place))
                found.update(file.read(size))
    return found.hexdigest()[:16]


# --- judges ---------------------------------------------------------------------------

HEADER_END, BREAKS = "<|end_header_id|>", "\n\n"
"""What a turn of the Llama 3 family begins with: a header, then two line breaks."""


def _llama_guard(model: models.Model, *, breaks: bool = False) -> GuardJudge:
    """Llama Guard, whose label comes after what its template leaves it to write.

    Version 3's template stops behind the header of the guard's own turn, so the guard
    begins with the two line breaks; the earlier templates leave it nothing but a label.

    Args:
        model: the guard.
        breaks: it begins with line breaks whatever its template looks like, unless
            that writes them itself.
    """
    judge = llama_guard(model)
    end = model.tokenizer.decode(judge.encode("?", "!")[-2:])
    if not (end.endswith(HEADER_END) or (breaks and not end.endswith(BREAKS))):
        return judge
    settings = {**judge.settings, "lead": BREAKS}
    return dataclasses.replace(llama_guard(model, lead=BREAKS), settings=settings)


GUARDS: dict[str, Callable[[models.Model, Path], GuardJudge]] = {
    "llama-guard": lambda model, folder: _llama_guard(model),
    "llama-guard-3": lambda model, folder: _llama_guard(model, breaks=True),
    "wildguard": lambda model, folder: wild_guard(model, folder / "template.txt"),
    "harmbench": lambda model, folder: harmbench_classifier(
        model, folder / "template.txt"
    ),
}
"""Judges with a checkpoint; what the last two are asked is in a file beside it.

`llama-guard` is any version whose template is its publisher's; `llama-guard-3` says it
of a checkpoint with a template of somebody else's."""


def make_judge(
    name: str,
    folder: str | None,
    *,
    dtype: str,
    weights: bool = True,
    date: str | None = None,
) -> Judge:
    """Who judges answers.

    Args:
        name: `keyword`, `keyword:LIST`, or a key of `GUARDS`.
        folder: the guard's checkpoint.
        dtype: of its weights.
        weights: whether to read them; without, the judge can only describe itself.
        date: that its template is told.

    Raises:
        UserError: for an unknown name or list, and a folder without a guard.
    """
    kind, _, words = name.partition(":")
    if kind == "keyword":
        return KeywordJudge(words) if words else KeywordJudge()
    if name not in GUARDS or folder is None:
        raise UserError(
            f"study.judge: expected keyword, keyword:LIST, {', '.join(GUARDS)} (with "
            f"study.judge_folder); got '{name}'"
        )
    place = locate(folder, weights=weights, option="study.judge_folder")
    config = hf_config.read(place)
    tokenizer = models.load_tokenizer(place, vocab_size=config.vocab_size)
    if tokenizer is None:
        raise UserError(
            f"study.judge_folder: expected a tokenizer in {place}, found none"
        )
    tokenizer = fix_template(tokenizer, date=date)
    if weights:
        model = load_model(place, dtype=dtype)
        model = dataclasses.replace(model, tokenizer=tokenizer)
        return GUARDS[name](model, place)
    if Path(folder).is_dir():
        check_weights(place, config)
    return GUARDS[name](models.make_model(config, None, tokenizer), place)


def risk_judge(judge: Judge, tokenizer: Any) -> RiskJudge | None:
    """Who rates training pairs: the guard's own label, where the judge has one.

    A list of refusal words says what an answer does, not whether it does harm: under
    it every harmless answer would be a risk. So it rates nothing.

    Args:
        judge: of answers.
        tokenizer: of the data sets.

    Returns:
        `(dataset) -> risk [N]`, or None.
    """
    if not isinstance(judge, GuardJudge) or judge.labels is None:
        return None
    harmless, harmful = first_tokens(judge.model.tokenizer, judge.labels)
    render = as_text(tokenizer, judge.encode)
    return label_likelihood_judge(judge.model, None, (harmful, harmless), render)
