"""The scripts of tpu_setup/ against a cloud that replays states, and here."""

import os
import re
import shutil
import signal
import subprocess
import time
import tomllib

import jax
import pytest
import yaml
from cloud_case import FOLDER, PLACE, ROOT, SETTINGS, Cloud, wait_for

from sbr_jax import storage
from sbr_jax.programs import cli, run
from sbr_jax.programs import job as job_program


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


LOOK = f"compute tpus queued-resources describe {PLACE} --format=value(state.state)"
CREATE = (
    f"compute tpus queued-resources create {PLACE} --node-id=slice "
    "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite"
)
DELETE = f"compute tpus queued-resources delete {PLACE} --force --quiet"
RUN = "sbr_jax/tpu_setup/worker.sh run"


# --- create, status, delete -----------------------------------------------------------


def test_create_asks_once_and_waits_until_the_slice_is_there(cloud):
    states = ["none", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    cloud.plan(requests=states)
    code, printed = cloud.run("create", "--spot")
    assert code == 0
    assert cloud.calls == [LOOK, f"{CREATE} --spot", LOOK, LOOK, LOOK]
    for state in ("not there", *states[1:]):
        assert f"slice: {state}" in printed


@pytest.mark.parametrize(
    ("states", "acts", "code"),
    [
        (["ACTIVE"], [], 0),
        (["SUSPENDING", "SUSPENDED", "none", "ACTIVE"], ["delete", "create"], 0),
        (["FAILED", "none", "ACTIVE"], ["delete", "create"], 0),
        (
            ["none", "ACCEPTED", "SUSPENDED", "none", "ACTIVE"],
            ["create", "delete", "create"],
            0,
        ),
        (["none", "FAILED"], ["create", "delete"], 1),
        (["none", "PROVISIONING", "none"], ["create"], 1),
        (["broken"], [], 1),
    ],
    ids=lambda x: "-".join(map(str, x)) if isinstance(x, list) else str(x),
)
def test_create_goes_by_state(cloud, states, acts, code):
    cloud.plan(requests=states)
    found, printed = cloud.run("create")
    assert (found, cloud.acts) == (code, acts)
    if code:
        assert printed.strip().splitlines()[-1].startswith("create.sh: ")
    if states[-1] == "FAILED":
        assert "no more capacity" in printed
        assert not cloud.left
    if states[0] == "broken":
        assert "please log in" in printed


def test_a_request_can_be_left_in_the_queue(cloud):
    cloud.plan(requests=["none", "WAITING_FOR_RESOURCES"])
    assert cloud.run("create", "--no-wait")[0] == 0
    assert cloud.run("create", "--no-wait")[0] == 0
    assert cloud.acts == ["create"]
    assert cloud.left


@pytest.mark.parametrize(
    ("sent", "code", "ours"), [(signal.SIGINT, 130, True), (signal.SIGTERM, 143, False)]
)
def test_an_interrupt_takes_back_what_was_asked_for_and_no_more(
    cloud, sent, code, ours
):
    cloud.plan(requests=[*["none"] * ours, "WAITING_FOR_RESOURCES"])
    process = cloud.start("create", TPU_POLL="60")
    wait_for(lambda: cloud.calls[-1:] == [LOOK] and len(cloud.calls) >= 1 + 2 * ours)
    time.sleep(0.2)
    process.send_signal(sent)
    process.communicate(timeout=20)
    assert process.returncode == code
    assert cloud.acts == (["create", "delete"] if ours else [])
    assert cloud.left is not ours


@pytest.mark.parametrize("there", [True, False])
def test_delete_leaves_nothing(cloud, there):
    cloud.plan(requests=["ACTIVE" if there else "none"])
    assert cloud.run("delete")[0] == 0
    assert cloud.calls == [LOOK, *[DELETE] * there]
    assert not cloud.left


@pytest.mark.parametrize(
    ("state", "node", "said", "asked"),
    [
        ("SUSPENDED", "none", ["request: SUSPENDED", "slice: none"], False),
        ("ACTIVE", "PREEMPTED", ["slice: PREEMPTED", "nothing can run"], False),
        ("ACTIVE", "READY", ["request: ACTIVE", "slice: READY"], True),
    ],
)
def test_status_says_what_is_there(cloud, state, node, said, asked):
    cloud.plan(requests=[state], nodes=[node])
    code, printed = cloud.run("status")
    assert code == 0
    assert all(text in printed for text in said)
    assert any("worker.sh status" in call for call in cloud.calls) is asked


# --- launch ---------------------------------------------------------------------------

COMMAND = ["--", "python", "-m", "experiments.run", "testbed", "--workdir", "gs://b/r"]
SENT = ["send", "install"]


def answers(**lists):
    """Lists as `Cloud.plan` takes them, of words such as `ACTIVE*2, none`."""
    found = {}
    for name, text in lists.items():
        words = (word.partition("*") for word in text.split(", "))
        found[name] = [x for word, _, n in words for x in [word] * int(n or 1)]
    return found


AGAIN = ["run", "delete", "create", *SENT, "run"]


@pytest.mark.parametrize(
    ("options", "told", "acts", "code"),
    [
        # A mistake is never tried again, whatever the others say.
        ("--keep", answers(codes="143 2"), ["run"], 2),
        ("--keep --delete", answers(codes="2 2"), ["run", "delete"], 2),
        ("--keep", answers(codes="1 134"), ["run"], 1),
        # Aborted, killed, saved: again, on the same slice.
        ("", answers(codes="137 134, 134 143, 0 0"), ["run"] * 3, 0),
        ("--keep", answers(codes="143 143, 0 0"), ["run"] * 2, 0),
        ("", answers(codes="134 134"), ["run"] * 5, 134),
        # The machines were taken away.
        ("", answers(codes="143 143", requests="SUSPENDING"), ["run"], 143),
        (
            "--keep",
            answers(
                codes="143 143, 0 0",
                requests="ACTIVE*2, SUSPENDING*4, SUSPENDED, none, ACTIVE",
            ),
            AGAIN,
            0,
        ),
        (
            "--keep --delete",
            answers(
                codes="255 255, 0 0",
                nodes="READY, PREEMPTED",
                requests="ACTIVE*5, none, ACTIVE",
            ),
            [*AGAIN, "delete"],
            0,
        ),
        # Nothing is there yet, and it goes while it is installed.
        (
            "--keep",
            answers(
                requests="none*3, ACTIVE, SUSPENDED, none*3, ACTIVE", installs="255, 0"
            ),
            ["create", *SENT, "create", *SENT, "run"],
            0,
        ),
        # The connection alone broke: the same run is followed.
        ("", answers(codes="255 255, 0 0"), ["run"] * 2, 0),
    ],
    ids=str,
)
def test_launch_starts_again_what_was_stopped_and_nothing_else(
    cloud, options, told, acts, code
):
    cloud.plan(**told)
    found, printed = cloud.run("launch", *options.split(), *COMMAND)
    assert (cloud.acts, found) == (acts, code), printed
    assert cloud.left is ("--delete" not in options)
    ids = [re.search(r"run (\S+)-(\d+) ", c) for c in cloud.calls if RUN in c]
    numbers = [int(found[2]) for found in ids]
    assert len({found[1] for found in ids}) == 1
    fresh = [0]
    for said in told.get("codes", [])[: len(ids) - 1]:
        fresh.append(fresh[-1] + (not said.startswith("255")))
    assert numbers[: len(fresh)] == fresh


def test_launch_runs_the_laptops_command_on_all_workers(cloud):
    code, printed = cloud.run("launch", *COMMAND, "--seed", "0", "a b", "$HOME")
    assert code == 0
    (call,) = cloud.calls
    assert call.startswith(f"compute tpus tpu-vm ssh {PLACE} --worker=all --command=")
    assert re.fullmatch(
        r".*worker\.sh run \S+ python -m experiments\.run testbed --workdir gs://b/r "
        r"--seed 0 a\\ b \\\$HOME --distributed auto",
        call,
    )
    assert "step 1" in printed
    logs = cloud.folder / "logs"
    for number in (0, 1):
        assert (logs / f"worker-{number}.log").read_text() == "step 1\nexit 0\n"


@pytest.mark.parametrize(
    "words",
    [
        ["--", "python", "a.py", "--distributed", "off"],
        ["--", "python", "a.py", "--distributed=off"],
        ["--each", "--", "echo", "hello"],
    ],
)
def test_the_option_of_many_hosts_is_not_added_where_it_is_said_or_unknown(
    cloud, words
):
    assert cloud.run("launch", *words)[0] == 0
    assert cloud.calls[0].endswith(" ".join(words).partition("-- ")[2])


# --- the workers themselves -----------------------------------------------------------


@pytest.fixture
def workers(cloud):
    """Two workers on this machine, of which the clone is this one."""
    (cloud.folder / "real").touch()
    return cloud


STEPS = """
import os, signal, sys, time
n = os.environ["TPU_WORKER_ID"]
def end(*_):
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
print("worker", n, sys.argv[1:], flush=True)
if "wait" in sys.argv:
    time.sleep(60)
if "once" in sys.argv and not os.path.exists(os.environ["HOME"] + "/seen"):
    open(os.environ["HOME"] + "/seen", "w").close()
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(sys.argv[1]) if n == "1" else 0)
"""


@pytest.fixture
def program(workers):
    path = workers.folder / "steps.py"
    path.write_text(STEPS)
    return ["--", "python3", str(path)]


@pytest.mark.parametrize(
    ("words", "code", "runs"), [(["2"], 2, 1), (["0", "once"], 0, 2)]
)
def test_exit_codes_come_back_from_the_workers(workers, program, words, code, runs):
    found, printed = workers.run("launch", *program, *words)
    assert (found, workers.acts) == (code, ["run"] * runs), printed
    log = (workers.folder / "logs" / "worker-1.log").read_text()
    said = f"worker 1 {[*words, '--distributed', 'auto']}"
    assert log.count(said) == runs
    assert log.splitlines()[-1] == f"exit {code}"
    assert "worker 0" in printed
    assert "worker 1" not in printed


def test_ctrl_c_ends_the_run_on_all_workers_and_lets_it_save(workers, program):
    process = workers.start("launch", "--delete", *program, "0", "wait")
    pids = [workers.folder / f"worker-{n}" / "sbr_jax.run" / "pid" for n in (0, 1)]
    logs = [path.with_name("log") for path in pids]
    wait_for(lambda: all(p.is_file() and "worker" in p.read_text() for p in logs))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert workers.acts == ["run", "stop", "delete"]
    assert not workers.left
    for pid, log in zip(pids, logs, strict=True):
        assert log.read_text().splitlines()[-1] == "saved"
        assert pid.with_name("code").read_text() == "143\n"
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)


def worker(cloud, *words, number="0"):
    """Calls one worker's script as ssh does."""
    home = cloud.folder / f"worker-{number}"
    home.mkdir(exist_ok=True)
    return subprocess.Popen(
        [FOLDER / "worker.sh", *words],
        env={**cloud.environment, "HOME": str(home), "TPU_WORKER_ID": number},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_a_run_outlives_its_connection_and_is_followed_again(cloud, tmp_path):
    script = tmp_path / "slow.sh"
    script.write_text(
        'echo begun; while [ ! -e "$HOME/go" ]; do sleep 0.05; done; exit 7'
    )
    words = ["bash", str(script)]
    first = worker(cloud, "run", "a", *words)
    assert first.stdout.readline() == "[0] begun\n"
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate(timeout=20)
    other = worker(cloud, "run", "b", *words)
    printed, _ = other.communicate(timeout=20)
    assert other.returncode == 2
    assert "expected an idle worker" in printed
    assert "runs: bash" in worker(cloud, "status").communicate()[0]
    (cloud.folder / "worker-0" / "go").touch()
    for _ in range(2):  # while it runs, and once it is over
        again = worker(cloud, "run", "a", *words)
        assert again.communicate(timeout=20)[0] == "[0] begun\n[0] exit 7\n"
        assert again.returncode == 7
    assert "nothing runs" in worker(cloud, "stop").communicate()[0]
    assert "ended with 7: bash" in worker(cloud, "status").communicate()[0]


def test_a_command_that_does_not_end_is_killed(cloud, tmp_path):
    script = tmp_path / "deaf.sh"
    script.write_text("trap '' TERM; echo begun; while :; do sleep 0.05; done")
    cloud.environment["TPU_PATIENCE"] = "0"
    running = worker(cloud, "run", "a", "bash", str(script))
    assert running.stdout.readline() == "[0] begun\n"
    assert worker(cloud, "stop").communicate(timeout=20)[0] == "[0] stopped with 137\n"
    running.communicate(timeout=20)
    assert running.returncode == 137


# --- mistakes and dry runs ------------------------------------------------------------

SCRIPTS = {
    "create": [],
    "install": [],
    "launch": COMMAND,
    "status": [],
    "profile": [],
    "delete": [],
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_all_that_is_missing_is_named_at_once_and_help_is_the_comment_on_top(
    cloud, script
):
    empty = dict.fromkeys(SETTINGS, "")
    code, printed = cloud.run(script, *SCRIPTS[script], **empty)
    assert code == 2
    (line,) = printed.splitlines()
    names = ["PROJECT", "ZONE", "TPU_NAME"]
    names += ["ACCELERATOR_TYPE"] * (script == "create")
    assert f"expected {', '.join(names)}, got none" in line
    assert "tpu_setup/env" in line
    code, printed = cloud.run(script, "--help")
    assert code == 0
    assert f"tpu_setup/{script}.sh" in printed
    assert "shellcheck" not in printed
    assert "--dry-run" in printed
    assert cloud.calls == []


@pytest.mark.parametrize(
    ("script", "words", "environment", "said"),
    [
        ("create", ["--spots"], {}, "unknown option '--spots'"),
        ("create", ["--env"], {}, "--env: expected a file, got none"),
        ("create", ["--env", "no-such"], {}, "expected a file, found none"),
        ("create", [], {"TPU_NAME": "My_TPU"}, "small letters"),
        ("create", [], {"ACCELERATOR_TYPE": "a100-8"}, "v5litepod-N"),
        ("launch", ["--keep", *COMMAND], {"ACCELERATOR_TYPE": ""}, "ACCELERATOR_TYPE"),
        ("launch", [], {}, "expected a command, got none"),
        ("launch", ["python", "a.py"], {}, "behind --"),
        ("profile", ["--seconds", "x"], {}, "--seconds: expected a whole number"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_asked_for(
    cloud, script, words, environment, said
):
    code, printed = cloud.run(script, *words, **environment)
    assert code == 2
    (line,) = printed.splitlines()
    assert line.startswith(f"{script}.sh: error: ")
    assert said in line
    assert cloud.calls == []


def test_without_gcloud_one_line_says_what_to_install(cloud):
    tools = cloud.folder / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "basename", "mktemp", "rm"):
        (tools / name).symlink_to(shutil.which(name))
    code, printed = cloud.run("status", PATH=str(tools))
    assert code == 2
    assert "install the Google Cloud CLI" in printed


INSTALL = [
    f"git -C {ROOT} archive --format=tar.gz --output=sbr_jax.tar.gz HEAD",
    "gcloud compute tpus tpu-vm scp sbr_jax.tar.gz slice:sbr_jax.tar.gz --project=p "
    "--zone=z --worker=all",
    f"gcloud compute tpus tpu-vm ssh {PLACE} --worker=all --command=...",
]
DRY = {
    "create": [f"gcloud {LOOK}", f"gcloud {CREATE}"],
    "install": INSTALL,
    "launch": [INSTALL[2]],
    "status": [
        f"gcloud {LOOK}",
        f"gcloud compute tpus tpu-vm describe {PLACE} --format=value(state)",
        INSTALL[2],
    ],
    "profile": [
        "mkdir -p LOGS",
        f"gcloud compute tpus tpu-vm ssh {PLACE} --worker=0 --command=...",
        "gcloud compute tpus tpu-vm scp slice:sbr_jax.run/profile LOGS --recurse "
        "--project=p --zone=z --worker=0",
    ],
    "delete": [f"gcloud {DELETE}"],
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_prints_the_commands_and_gives_none(cloud, script):
    code, printed = cloud.run(script, "--dry-run", *SCRIPTS[script])
    assert code == 0
    lines = [
        re.sub(r"(--command=).*", r"\1...", line).replace("\\", "")
        for line in printed.replace(str(cloud.folder / "logs"), "LOGS").splitlines()
    ]
    assert lines == DRY[script]
    assert cloud.calls == []
    assert not (cloud.folder / "logs").exists()


def test_settings_come_from_a_file(cloud):
    text = (FOLDER / "env.example").read_text()
    path = cloud.folder / "env"
    path.write_text(text.replace("# SPOT=yes", "SPOT=yes"))
    words = ["--env", str(path), "--dry-run"]
    code, printed = cloud.run("create", *words, **dict.fromkeys(SETTINGS, ""))
    assert code == 0
    assert "create sbr-jax --project=my-project --zone=us-west4-a" in printed
    assert printed.rstrip().endswith("--runtime-version=v2-alpha-tpuv5-lite --spot")


@pytest.mark.parametrize(
    ("accelerator", "image"),
    [
        ("v6e-256", "v2-alpha-tpuv6e"),
        ("v5p-32", "v2-alpha-tpuv5"),
        ("v4-8", "tpu-ubuntu2204-base"),
    ],
)
def test_the_image_follows_the_accelerator(cloud, accelerator, image):
    kind = {"ACCELERATOR_TYPE": accelerator}
    assert f"--runtime-version={image}" in cloud.run("create", "--dry-run", **kind)[1]
    own = {**kind, "RUNTIME_VERSION": "mine"}
    assert "--runtime-version=mine" in cloud.run("create", "--dry-run", **own)[1]


# --- what lies beside them ------------------------------------------------------------


def test_the_requirements_of_gpus_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (jax,) = (name for name in project["dependencies"] if name.startswith("jax"))
    lines = (ROOT / "requirements-gpu.txt").read_text().splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    assert wanted == [jax.replace("jax", "jax[cuda13]"), "-e .[experiments,test]"]
    assert {"experiments", "test", "tpu"} <= set(project["optional-dependencies"])
    assert project["optional-dependencies"]["tpu"] == [jax.replace("jax", "jax[tpu]")]


@pytest.mark.parametrize("name", ["worker.sh", "gke.yaml", "Dockerfile"])
def test_what_is_installed_on_tpus_reaches_the_compiler_and_a_bucket(name):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (words,) = re.findall(r"\.\[([a-z,]+)\]", (FOLDER / name).read_text())
    parts = [project["optional-dependencies"][extra] for extra in words.split(",")]
    brought = {re.split(r"[^\w-]", line)[0] for lines in parts for line in lines}
    assert {"flax", "jax", storage.NEEDED["gs"]} <= brought


@pytest.mark.parametrize(
    ("status", "before", "queued"),
    [
        (0, 0, False),
        (2, 0, False),
        (134, 3, True),
        (137, 19, True),
        (143, 0, True),
        (143, 20, False),
    ],
)
def test_a_slurm_job_is_queued_again_after_the_same_codes(
    cloud, status, before, queued
):
    binary = cloud.folder / "bin"
    for name, line in {
        "srun": f'echo "srun $*" >>"$CLOUD/calls"; exit {status}',
        "scontrol": 'echo "scontrol $*" >>"$CLOUD/calls"',
    }.items():
        (binary / name).write_text(f"#!/bin/sh\n{line}\n")
        (binary / name).chmod(0o755)
    count = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(before)}
    code, _ = cloud.run("slurm", "python", "a.py", **count)
    run = "srun --kill-on-bad-exit=1 --wait=180 python a.py --distributed auto"
    assert cloud.calls == [run, *["scontrol requeue 7"] * queued]
    assert code == status
    code, printed = cloud.run("slurm")
    assert code == 2
    assert "expected a command" in printed


def test_the_job_of_kubernetes_is_the_command_of_a_laptop():
    text = (FOLDER / "gke.yaml").read_text()
    service, job = yaml.safe_load_all(text)
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    wide, high = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert spec["completions"] == spec["parallelism"] == int(wide) * int(high) // chips
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    fail, ignore = spec["podFailurePolicy"]["rules"]
    assert (fail["action"], fail["onExitCodes"]["values"]) == ("FailJob", [2])
    assert ignore["action"] == "Ignore"
    python, _, module, *args = container["args"]
    assert (python, module) == ("python", "experiments.run")
    assert args[-2:] == ["--distributed", "auto"]
    preset, found = job_program.parse(run.RunArguments, args[:-2], "run")
    assert (preset.name, found.mesh) == ("llama2-7b", "fsdp=4,tp=4")


@pytest.mark.parametrize("port", [None, "9012"])
def test_a_profile_can_be_taken_where_its_port_is_set(monkeypatch, port):
    started = []
    monkeypatch.setattr(jax.profiler, "start_server", started.append)
    monkeypatch.delenv("SBR_JAX_PROFILER_PORT", raising=False)
    if port:
        monkeypatch.setenv("SBR_JAX_PROFILER_PORT", port)
    cli.serve_profiler()
    assert started == [9012] * bool(port)
