"""DER and DER++: replay safe examples with the aligned model's logits.

Dark experience replay (Buzzega et al., arXiv:2004.07211), used as a defence of safety
by Alssum et al., arXiv:2512.10150. On a buffer of safety examples x' with stored logits
z' and labels y':

    L = L_task + α mean ‖z_θ(x') − z'‖² + β mean NLL(y' | x')

β = 0 is DER, β > 0 is DER++. The buffer is the calibration set, and the logits are the
aligned model's at the answer places. Storing them would take N · A · V numbers. Instead
the aligned model's states ``[N, A, D]`` are stored, and the head runs on the states of
both models, a chunk of places at a time, which gives the same numbers.

The paper's norm is a sum over the vocabulary. The code of arXiv:2004.07211 takes the
mean, and its α belongs to the mean. α = β = 0.5 is within the range that this paper
tried; the values of arXiv:2512.10150 are not known here.

Symbols: θ adapter, α ``logit_weight``, β ``label_weight``, N examples of the buffer, A
answer tokens, D width, V vocabulary.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from sbr_jax.checks import checked
from sbr_jax.methods._anchor import anchored_set, safe_batch
from sbr_jax.methods.base import Cost, Method, task_loss
from sbr_jax.models import answers, vocabulary
from sbr_jax.settings import Count, NonNegative


@checked
def der(
    *,
    logit_weight: NonNegative = 0.5,
    label_weight: NonNegative = 0.0,
    reduction: Literal["mean", "sum"] = "mean",
    buffer_batch_size: Count | None = None,
    monitored: bool = False,
) -> Method:
    """Dark experience replay of the calibration set.

    Args:
      logit_weight: α ≥ 0, weight of the squared distance of logits.
      label_weight: β ≥ 0, weight of the cross-entropy on the buffer's answers; above 0
        this is DER++.
      reduction: reduction over the vocabulary: ``"mean"`` (the code, to which α = 0.5
        belongs) or ``"sum"`` (the formula; V times larger at the same α).
      buffer_batch_size: examples replayed in a step, drawn with replacement; None for
        half the task batch.
      monitored: run CSM.

    Returns:
      The method. It reports ``logits``, the distance without α, and ``replay``, the
      cross-entropy without β.

    References:
      arXiv:2004.07211, arXiv:2512.10150
    """

    def init(problem, base, adapter, key):
        return {"buffer": anchored_set(problem, base, None)}

    def gradient(problem, base, adapter, state, batch, key):
        options = (buffer_batch_size, "buffer_batch_size")
        drawn = safe_batch(problem, state["buffer"], batch, key, *options)
        found, head = answers.find(drawn), answers.head_of(problem.apply_fn)

        def joint(a):
            task = task_loss(problem, base, a, batch, key)
            hidden = answers.states(problem.apply_fn, base, a, drawn)
            reference = drawn["reference"].reshape(hidden.shape)
            gaps = vocabulary.squared_gap(
                head, base, reference, hidden, reduction=reduction, rows=found.rows
            )
            logits = jnp.mean(found.mean(gaps))
            nll = answers.cross_entropy(problem.apply_fn, base, hidden, found)
            replay = jnp.mean(nll)
            parts = {"loss": task, "logits": logits, "replay": replay}
            return task + logit_weight * logits + label_weight * replay, parts

        (_, parts), grads = jax.value_and_grad(joint, has_aux=True)(adapter)
        return grads, {}, parts

    return Method("der", monitored, Cost(backward=0.5), init=init, gradient=gradient)
