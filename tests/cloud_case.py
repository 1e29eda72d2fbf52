"""A cloud that replays states, for the scripts of tpu_setup/, and two local workers."""

import os
import signal
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tpu_setup"
SETTINGS = {
    "PROJECT": "p",
    "ZONE": "z",
    "TPU_NAME": "slice",
    "ACCELERATOR_TYPE": "v5litepod-16",
}
PLACE = "slice --project=p --zone=z"

CLOUD = r"""#!/usr/bin/env bash
# gcloud: notes each call, and answers from lists of which the last line stays.
next() {
  head -n 1 "$CLOUD/$1"
  [ "$(wc -l <"$CLOUD/$1")" -le 1 ] || sed -i 1d "$CLOUD/$1"
}
printf '%s\n' "$*" >>"$CLOUD/calls"
for word in "$@"; do case $word in --command=*) line=${word#--command=} ;; esac; done
case "$*" in
  *failedData*) echo "no more capacity" ;;
  *" describe "*)
    kind=requests
    case "$*" in *tpu-vm*) kind=nodes ;; esac
    said=$(next $kind)
    case $said in
      none) echo "ERROR: (gcloud) NOT_FOUND: no such thing" >&2 && exit 1 ;;
      broken) echo "ERROR: (gcloud) please log in" >&2 && exit 1 ;;
    esac
    echo "$said"
    ;;
  *" create "*) touch "$CLOUD/exists" ;;
  *" delete "*) rm -f "$CLOUD/exists" ;;
  *"worker.sh install"*) exit "$(next installs)" ;;
  *" ssh "*)
    if [ -e "$CLOUD/real" ]; then
      for n in 0 1; do
        (
          export HOME=$CLOUD/worker-$n TPU_WORKER_ID=$n
          mkdir -p "$HOME"
          [ -e "$HOME/sbr_jax" ] || ln -s "$CLONE" "$HOME/sbr_jax"
          cd "$HOME" && bash -c "$line"
        ) &
        jobs="$jobs $!"
      done
      for job in $jobs; do wait "$job" || status=$?; done
      exit "${status:-0}"
    fi
    case $line in
      *"worker.sh run"*)
        n=0
        for code in $(next codes); do
          echo "[$n] step 1"
          [ "$code" = 255 ] || echo "[$n] exit $code"
          [ "${status:-0}" != 0 ] || status=$code
          n=$((n + 1))
        done
        exit "$status"
        ;;
    esac
    ;;
esac
"""


class Cloud:
    """A folder with the false gcloud, and what it was asked."""

    def __init__(self, folder):
        self.folder = folder
        binary = folder / "bin" / "gcloud"
        binary.parent.mkdir()
        binary.write_text(CLOUD)
        binary.chmod(0o755)
        git = binary.with_name("git")
        git.write_text("#!/bin/sh\n")
        git.chmod(0o755)
        self.environment = {
            **SETTINGS,
            "PATH": f"{binary.parent}:{os.environ['PATH']}",
            "HOME": str(folder),
            "CLOUD": str(folder),
            "CLONE": str(ROOT),
            "LOGS": str(folder / "logs"),
            "TPU_POLL": "0",
            "TPU_TICK": "0.1",
            "TPU_PATIENCE": "5",
        }
        self.plan()

    def plan(self, **lists):
        """Sets what is answered; the last of each list stays."""
        usual = {"requests": ["ACTIVE"], "nodes": ["READY"], "codes": ["0 0"]}
        for name, answers in {**usual, "installs": ["0"], **lists}.items():
            (self.folder / name).write_text("".join(f"{x}\n" for x in answers))
        (self.folder / "exists").unlink(missing_ok=True)
        if lists.get("requests", ["ACTIVE"])[0] != "none":
            (self.folder / "exists").touch()

    def start(self, script, *words, **environment):
        # No shell can trap what it was started to ignore, as under `make test &`; a
        # handler of ours is the default again in a new program.
        ignored = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return subprocess.Popen(
                [FOLDER / f"{script}.sh", *words],
                env={**self.environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
                cwd=self.folder,
            )
        finally:
            signal.signal(signal.SIGINT, ignored)

    def run(self, script, *words, **environment):
        process = self.start(script, *words, **environment)
        printed, _ = process.communicate(timeout=60)
        return process.returncode, printed

    @property
    def calls(self):
        """Commands that were given, without what they all begin with."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.is_file() else []
        return [line.removeprefix("gcloud ") for line in lines]

    @property
    def acts(self):
        """Calls that are no looks, in a word or two."""
        kinds = {
            "create": "queued-resources create",
            "delete": "queued-resources delete",
            "send": "tpu-vm scp",
            "install": "worker.sh install",
            "run": "worker.sh run",
            "stop": "worker.sh stop",
        }
        found = (
            [name for name, part in kinds.items() if part in call]
            for call in self.calls
        )
        return [names[0] for names in found if names]

    @property
    def left(self):
        return (self.folder / "exists").exists()


def wait_for(there, seconds=20):
    limit = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.02)
