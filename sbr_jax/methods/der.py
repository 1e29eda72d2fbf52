"""DER and DER++: replay safe examples with the logits that the aligned model gave.

Dark experience replay (Buzzega et al., arXiv:2004.07211), taken as a defence of safety
by Alssum et al., arXiv:2512.10150. On a buffer of safety examples x' with stored logits
z' and labels y':

    L = L_task + α mean ‖z_θ(x') − z'‖² + β mean NLL(y' | x')

β = 0 is DER, β > 0 is DER++. The buffer is the calibration set, the logits are those of
the aligned model at the answer places. They are not stored as such, N · A · V numbers:
the states that they are read off are, ``[N, A, D]``, and the head is run on both, a
chunk of places at a time, which gives the same numbers.

As published the norm is a sum over the vocabulary; the code of arXiv:2004.07211 takes
the mean over it, and with it its α. α = β = 0.5 is within what that paper tried; what
arXiv:2512.10150 used is not known here.

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
      logit_weight: α ≥ 0, of the squared distance of logits.
      label_weight: β ≥ 0, of the cross-entropy on the buffer's answers; above 0 it is
        DER++.
      reduction: over the vocabulary: ``"mean"`` (the code; α = 0.5 belongs to it) or
        ``"sum"`` (the formula; a factor V more at the same α).
      buffer_batch_size: examples of a step's replay, drawn with replacement; None for
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
