"""Deployed weights, read back: the very ones that were evaluated."""

import pytest
import tiny
from run_folder_case import go, read

from sbr_jax.training import deployed
from sbr_jax.typing import UserError

STUDY = tiny.study()
VARIANTS, SEEDS = ("plain", "antidote", "salora"), (0, 1)
OPTIONS = {"salora": {"safety_rank": 4}}
CONFIG = tiny.with_options(tiny.config(steps_per_domain=2), OPTIONS)
DOMAINS = ("medical",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    go(folder, VARIANTS, seeds=SEEDS, study=STUDY, domains=DOMAINS, options=OPTIONS)
    return folder


def test_deployed_weights_are_those_that_were_evaluated(folder):
    composites = {
        (line["method"], line["seed"]): line["metrics"]["composite"]
        for line in read(folder)
        if line["stage"] in ("base", "evaluate")
    }
    of = (folder, STUDY, CONFIG, VARIANTS, SEEDS, DOMAINS)
    found = {
        (variant, seed): STUDY.evaluate(*weights)["composite"]
        for variant, seed, weights in deployed.deployments(*of)
    }
    # Results are written to six digits.
    assert found == pytest.approx(composites, rel=1e-5)
    assert len(set(found.values())) == len(found) == 7
    done = set(found) - {("antidote", 1)}
    ((variant, seed, _),) = deployed.deployments(*of, done)
    assert (variant, seed) == ("antidote", 1)


def test_an_earlier_stage_counts_as_long_as_what_it_deploys_is_there(folder):
    job = deployed.reopen(folder, STUDY, CONFIG, DOMAINS)
    assert deployed.weights(job, "plain", 0, 1)[0] is STUDY.model.params
    with pytest.raises(UserError, match=r"stage=1: expected the state .*later one"):
        deployed.weights(job, "salora", 0, 1)
