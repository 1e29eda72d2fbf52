"""A random Llama of 2 layers and a made-up study over it, for tests of training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sbr_jax import losses, models
from sbr_jax.data.batches import TokenDataset
from sbr_jax.methods import METHODS, VARIANTS
from sbr_jax.methods._hyperparameters import attribute, collect
from sbr_jax.methods.base import Problem
from sbr_jax.settings import Hardware, Training
from sbr_jax.training.config import Config
from sbr_jax.training.program import make_program
from sbr_jax.training.study import Domain, Study

LENGTH, VOCAB = 10, 32
CONFIG = models.ModelConfig(
    vocab_size=VOCAB, width=16, mlp_width=24, layers=2, heads=2, init_scale=0.3
)


def dataset(seed, size, shift=1):
    """Four random prompt tokens, then each answer token is the last one + shift."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (size, LENGTH)).astype(np.int32)
    for place in range(4, LENGTH - 1):
        tokens[:, place] = (tokens[:, place - 1] + shift) % VOCAB
    tokens[:, LENGTH - 1] = 0
    mask = np.zeros((size, LENGTH), np.float32)
    mask[:, 4 : LENGTH - 1] = 1
    return TokenDataset(tokens, mask)


def with_prompts(data, low, high, seed=0, count=3):
    """The same examples, their first prompt tokens (of four) drawn from [low, high)."""
    tokens = data.tokens.copy()
    rng = np.random.default_rng(seed)
    tokens[:, :count] = rng.integers(low, high, (len(tokens), count))
    return TokenDataset(tokens, data.mask)


def model(dtype=jnp.float32):
    params = models.init_params(jax.random.key(0), CONFIG)
    return models.make_model(CONFIG, jax.tree.map(lambda x: x.astype(dtype), params))


def loss_score(the_model, data):
    """A smooth score in 0..100 that falls with the loss on a data set."""

    @jax.jit
    def mean_loss(base, adapter, tokens, mask):
        logits = the_model.apply_fn(base, adapter, tokens)
        return jnp.mean(losses.token_cross_entropy(logits, tokens, mask))

    def score(base, adapter):
        return 100.0 * float(jnp.exp(-mean_loss(base, adapter, data.tokens, data.mask)))

    return score


def _unaligned(params):
    """Other weights: every layer's matrices moved by a random rank-two step."""
    rng = np.random.default_rng(6)

    def move(x):
        if x.ndim < 3:
            return x
        left = rng.normal(0, 0.1, (*x.shape[:-1], 2))
        right = rng.normal(0, 1.0, (x.shape[0], 2, x.shape[-1]))
        return x + jnp.asarray(left @ right, x.dtype)

    return {**params, "layers": jax.tree.map(move, params["layers"])}


def judge(data):
    """A made-up risk: how far up the vocabulary the first token lies."""
    return np.asarray(data.tokens[:, 0], np.float32) / VOCAB


def study(probe=None, **changes):
    the_model = model()
    calibration = dataset(1, 24, shift=0)
    safety = loss_score(the_model, dataset(2, 16, shift=0))
    domains = {
        name: Domain(
            dataset(10 + i, 64, shift=i + 1),
            loss_score(the_model, dataset(20 + i, 16, shift=i + 1)),
        )
        for i, name in enumerate(("medical", "legal"))
    }
    random = np.random.default_rng(5).integers(0, VOCAB, calibration.tokens.shape)
    fields = {
        "model": the_model,
        "domains": domains,
        "calibration": calibration,
        "calibration_controls": {
            "benign": dataset(3, 24, shift=5),
            "random": TokenDataset(random.astype(np.int32), calibration.mask),
        },
        "safety_mix": calibration,
        "harmful": dataset(4, 24, shift=7),
        "unaligned": _unaligned(the_model.params),
        "judge": judge,
        "evaluate": lambda base, adapter: {
            "composite": safety(base, adapter),
            "refusal": 50.0,
            "general": 10.0,
        },
        "probe": safety if probe is None else probe,
        "fingerprint": "tiny",
    }
    return Study(**{**fields, **changes})


def config(**changes):
    """A tiny job's settings; changes are fields of `Training` or of `Hardware`."""
    training = {
        "steps_per_domain": 6,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "lora_rank": 2,
        "lora_alpha": 4.0,
        "repair_steps": 3,
    }
    hardware = {"fisher_microbatch": 8, "log_every": 4}
    start = Config(Training(**training), Hardware(**hardware))
    return changed(start, **changes)


def problem(apply_fn, calibration, **changes):
    """What a defence knows in tests; changes as in `changed`."""
    return changed(Problem(apply_fn, calibration), **changes)


def changed(owner, **changes):
    """A `Problem` or `Config` with other fields, its settings' fields among them."""
    parts = {}
    for part in ("training", "hardware"):
        record = getattr(owner, part)
        own = {f.name for f in dataclasses.fields(record)} & changes.keys()
        parts[part] = dataclasses.replace(record, **{n: changes.pop(n) for n in own})
    return dataclasses.replace(owner, **parts, **changes)


def with_options(config, options):
    """A `Config` with other hyper-parameters: variant to keywords of its method."""
    for variant, changes in options.items():
        method = attribute(VARIANTS.get(variant, (variant, {}))[0])
        if not changes:
            continue
        if not hasattr(config.methods, method):  # Registered by the test itself.
            config = dataclasses.replace(config, methods=collect(METHODS, {})())
        own = dataclasses.replace(getattr(config.methods, method), **changes)
        methods = dataclasses.replace(config.methods, **{method: own})
        config = dataclasses.replace(config, methods=methods)
    return config


def program(variant, config, study, **options):
    """A variant's program, with other hyper-parameters."""
    return make_program(variant, study, with_options(config, {variant: options}))
